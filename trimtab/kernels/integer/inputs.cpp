#include "integer/inputs.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/simd.h"
#include "linear/weight.h"

namespace trimtab {
namespace {

// Columns of a span, filled up to whole chunks and vectors.
constexpr int kMost = 512;

// Columns in steps of a vector; the last, short one is filled up with zeros.
template <typename F>
void by_vectors(const float* x, int count, F f) {
  int c = 0;
  for (; c + simd::kLanes <= count; c += simd::kLanes) f(c, simd::load(x + c));
  if (c == count) return;
  float rest[simd::kLanes] = {};
  std::copy_n(x + c, count - c, rest);
  f(c, simd::load(rest));
}

// The largest magnitude; a NaN counts as the largest of all.
float largest(const float* x, int count) {
  simd::Ints most = simd::ints(0);
  by_vectors(x, count, [&](int, simd::Floats v) { most = simd::larger_magnitude(most, v); });
  return std::bit_cast<float>(simd::largest(most));
}

// Writes q, and zeros up to a whole vector; returns the sum.
int32_t round_all(const float* x, int count, float scale, int8_t* q) {
  simd::Ints sums = simd::ints(0);
  by_vectors(x, count, [&](int c, simd::Floats v) {
    const simd::Floats steps = simd::bounded(simd::div(v, simd::floats(scale)), 127);
    sums = simd::add(sums, simd::store_rounded(q + c, steps));
  });
  return simd::total(sums);
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
  return (layout.hadamard ? whole_lines(sizeof(float) * m * layout.cols) : 0) + whole_lines(4 * n * layout.vectors) + whole_lines(4 * n) +
         whole_lines(4 * n * layout.join);
}

Inputs::Inputs(const Layout& layout, int m, int most, std::byte* memory) : m(m), panels(Layout::ceil(m, most)) {
  const size_t n = static_cast<size_t>(m) * layout.spans;
  rotated = reinterpret_cast<float*>(memory);
  if (layout.hadamard) memory += whole_lines(sizeof(float) * m * layout.cols);
  q = reinterpret_cast<int32_t*>(memory);
  scale = reinterpret_cast<float*>(memory += whole_lines(4 * n * layout.vectors));
  minus = reinterpret_cast<int32_t*>(memory + whole_lines(4 * n));
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

    alignas(64) int8_t codes[kMost];
    std::memset(codes, 0, 4 * layout.vectors);
    const auto from = layout.columns(span, 0), to = layout.columns(span, layout.join - 1);
    const float s = largest(row + from.first, to.first + to.count - from.first) / 127.0f;
    scale[before + lane] = s;
    for (int j = 0; j < layout.join; ++j) {
      const auto [start, count] = layout.columns(span, j);
      const int32_t sum = s > 0 ? round_all(row + start, count, s, codes + j * layout.block) : 0;
      minus[before * layout.join + static_cast<size_t>(j) * inputs + lane] = -sum * (layout.zeros ? 1 : layout.zero);
    }
    int32_t* out = q + before * layout.vectors + lane;
    if (inputs == 1) {
      std::memcpy(out, codes, 4 * layout.vectors);
    } else {
      for (int v = 0; v < layout.vectors; ++v) std::memcpy(out + static_cast<size_t>(v) * inputs, codes + 4 * v, 4);
    }
  }
  team.sync();
}

}  // namespace trimtab
