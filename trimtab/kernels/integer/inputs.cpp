#include "integer/inputs.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace trimtab {
namespace {

size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The largest magnitude, found among the bits so that a NaN counts as the largest of all.
float largest(const float* x, int count) {
  int32_t most = 0;
  for (int c = 0; c < count; ++c) most = std::max(most, std::bit_cast<int32_t>(x[c]) & 0x7fffffff);
  return std::bit_cast<float>(most);
}

// Rounds to nearest even by pushing the fraction out of the mantissa. Returns the sum of what was written.
int32_t round_all(const float* x, int count, float scale, int8_t* q) {
  constexpr float magic = 0x1.8p23f;
  int32_t sum = 0;
  for (int c = 0; c < count; ++c) {
    float t = x[c] / scale;
    t = t < 127.0f ? t : 127.0f;
    t = t > -127.0f ? t : -127.0f;
    const int32_t code = std::bit_cast<int32_t>(t + magic) - std::bit_cast<int32_t>(magic);
    q[c] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

}  // namespace

void hadamard(float* x, int group) {
  for (int h = 1; h < group; h *= 2)
    for (int i = 0; i < group; i += 2 * h)
      for (int k = i; k < i + h; ++k) {
        const float a = x[k], b = x[k + h];
        x[k] = a + b, x[k + h] = a - b;
      }
  const float norm = static_cast<float>(std::sqrt(static_cast<double>(group)));
  for (int i = 0; i < group; ++i) x[i] /= norm;
}

size_t Inputs::bytes(const Layout& layout, int m) {
  const size_t n = static_cast<size_t>(m) * layout.spans;
  return (layout.hadamard ? lines(sizeof(float) * m * layout.cols) : 0) + lines(4 * n * layout.vectors) + lines(4 * n) +
         lines(4 * n * layout.join);
}

Inputs::Inputs(const Layout& layout, int m, int most, std::byte* memory) : m(m), panels(Layout::ceil(m, most)) {
  const size_t n = static_cast<size_t>(m) * layout.spans;
  rotated = reinterpret_cast<float*>(memory);
  if (layout.hadamard) memory += lines(sizeof(float) * m * layout.cols);
  q = reinterpret_cast<int32_t*>(memory);
  scale = reinterpret_cast<float*>(memory += lines(4 * n * layout.vectors));
  minus = reinterpret_cast<int32_t*>(memory + lines(4 * n));
}

void Inputs::quantise(const Layout& layout, const float* x, int ldx, const Team& team) const {
  if (layout.hadamard) {
    const int whole = layout.cols / layout.group, tail = layout.cols - whole * layout.group;
    const auto [begin, end] = team.share(m * layout.groups);
    for (int item = begin; item < end; ++item) {
      const int i = item / layout.groups, g = item % layout.groups;
      float* out = rotated + static_cast<size_t>(i) * layout.cols + g * layout.group;
      std::memcpy(out, x + static_cast<size_t>(i) * ldx + g * layout.group,
                  sizeof(float) * (g < whole ? layout.group : tail));
      if (g < whole) hadamard(out, layout.group);
    }
    team.sync();
    x = rotated, ldx = layout.cols;
  }
  const auto [begin, end] = team.share(m * layout.spans);
  for (int item = begin, p = 0; item < end; ++item) {
    const int i = item / layout.spans, span = item % layout.spans;
    while (first(p + 1) <= i) ++p;
    const int inputs = first(p + 1) - first(p), lane = i - first(p);
    const size_t before = static_cast<size_t>(first(p)) * layout.spans + static_cast<size_t>(span) * inputs;
    const float* row = x + static_cast<size_t>(i) * ldx;

    alignas(64) int8_t codes[1024] = {};
    const auto from = layout.columns(span, 0), to = layout.columns(span, layout.join - 1);
    const float s = largest(row + from.first, to.first + to.count - from.first) / 127.0f;
    scale[before + lane] = s;
    for (int j = 0; j < layout.join; ++j) {
      const auto [start, count] = layout.columns(span, j);
      const int32_t sum = s > 0 ? round_all(row + start, count, s, codes + j * layout.block) : 0;
      minus[before * layout.join + static_cast<size_t>(j) * inputs + lane] = -sum;
    }
    int32_t* out = q + before * layout.vectors + lane;
    for (int v = 0; v < layout.vectors; ++v) std::memcpy(out + static_cast<size_t>(v) * inputs, codes + 4 * v, 4);
  }
  team.sync();
}

}  // namespace trimtab
