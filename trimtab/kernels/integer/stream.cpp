// Few inputs: the weights are read once, as one stream, and expanded in registers on the way.
#include <array>

#include "integer/kernels.h"
#include "integer/planes.h"

namespace trimtab {
namespace {

using simd::Bytes, simd::Floats, simd::Ints, simd::unrolled;

// Sums of one input side by side, so that an instruction need not wait for the one before.
constexpr int sums_of(int inputs) { return inputs == 1 ? 4 : inputs <= 4 ? 2 : 1; }
// Vectors that one turn of the inner loop takes.
constexpr int step_of(int bits) { return std::max(chunk_of(bits), 4); }

constexpr size_t kAhead = 4096;  // bytes by which the stream is asked for before it is used

template <int bits, bool table, int i>
[[gnu::always_inline]] inline Bytes vector_at(const std::byte* p, const uint8_t* entries) {
  constexpr int chunk = Planes<bits>::kChunk;
  Bytes code = Planes<bits>::template decode<i % chunk>(p + i / chunk * Planes<bits>::kBytes);
  if constexpr (table) code = simd::look_up<bits>(entries, code);
  return code;
}

template <int bits, bool table>
void expand(const Tiles& tiles, int tile, int from, int to, uint8_t* codes, int stride) {
  const Layout& layout = tiles.layout;
  constexpr int chunk = Planes<bits>::kChunk;
  for (int span = from; span < to; ++span) {
    const std::byte* p = tiles.tile(tile) + layout.codes_at(span);
    for (int v = 0; v < layout.vectors; v += chunk, p += Planes<bits>::kBytes) {
      for (int line = 0; line < Planes<bits>::kBytes; line += 64) simd::prefetch(p + kAhead + line);
      unrolled<chunk>([&](auto i) __attribute__((always_inline)) {
        simd::store_bytes(codes, vector_at<bits, table, i>(p, tiles.table));
        codes += stride;
      });
    }
  }
}

template <int bits, bool table, int inputs>
void stream(const Tiles& tiles, const Panel& panel, int tile, float* y, int ldy) {
  constexpr int sums = sums_of(inputs), step = step_of(bits);
  const Layout& layout = tiles.layout;
  const int vectors = layout.block / 4, spans = layout.spans, join = layout.join, run = layout.run_spans();
  const int scale_step = layout.head_step() * layout.scale_bytes(), zero_step = layout.zeros ? layout.head_step() : 0;
  const size_t head = layout.head_bytes(), scales = layout.zero_at(0, 0);
  const Ints zero_of_all = simd::ints(layout.zero);
  Floats out[inputs];
  unrolled<inputs>([&](auto i) { out[i] = simd::floats(0); });
  const std::byte* p = tiles.tile(tile);
  const int32_t* q = panel.q;
  const int32_t* minus = panel.minus;
  const float* scale = panel.scale;
  for (int first = 0; first < spans; first += run) {
    const std::byte *scale_at = p, *zero_at = p + scales;
    p += head;
    for (int span = first; span < std::min(first + run, spans); ++span, scale += inputs) {
      for (int j = 0; j < join; ++j) {
        const Ints zero = layout.zeros ? simd::load_bytes_wide(zero_at) : zero_of_all;
        Ints acc[inputs][sums];
        unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
          unrolled<sums>([&](auto s) __attribute__((always_inline)) {
            acc[i][s] = s == 0 ? simd::scaled(zero, minus[i]) : simd::ints(0);
          });
        });
        int v = vectors;
        do {
          unrolled<step>([&](auto k) __attribute__((always_inline)) {
            const Bytes w = vector_at<bits, table, k>(p, tiles.table);
            unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
              acc[i][k % sums] =
                  simd::dot<bits == 8 || (table && bits == 7)>(acc[i][k % sums], w, simd::quad(q + k * inputs + i));
            });
          });
          for (int line = 0; line < step * 8 * bits; line += 64) simd::prefetch(p + kAhead + line);
          p += step * 8 * bits, q += step * inputs;
        } while ((v -= step) > 0);
        const Floats s = scale_of(layout, scale_at);
        unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
          Ints sum = acc[i][0];
          unrolled<sums - 1>([&](auto k) __attribute__((always_inline)) { sum = simd::add(sum, acc[i][k + 1]); });
          out[i] = simd::fma(simd::to_floats(sum), simd::mul(s, simd::floats(scale[i])), out[i]);
        });
        minus += inputs, scale_at += scale_step, zero_at += zero_step;
      }
    }
  }
  const Floats factor = simd::load(tiles.factors + tile * kRows);
  const int rows = std::min(kRows, tiles.rows - tile * kRows);
  unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
    float* to = y + static_cast<size_t>(i) * ldy + tile * kRows;
    const Floats result = simd::mul(out[i], factor);
    if (rows == kRows) {
      simd::store(to, result);
    } else {
      float part[kRows];
      simd::store(part, result);
      std::copy_n(part, rows, to);
    }
  });
}

template <int bits, bool table>
constexpr Kernels kernels() {
  Kernels k{chunk_of(bits), &expand<bits, table>, {}};
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((k.stream[i] = &stream<bits, table, i + 1>), ...);
  }(std::make_integer_sequence<int, kStream>{});
  return k;
}

template <int... bits>
constexpr std::array<Kernels, sizeof...(bits)> even(std::integer_sequence<int, bits...>) {
  return {kernels<bits + 1, false>()...};
}
// Grids of 3 bits and more can be uneven; one of 8 bits that fits a byte is even.
template <int... bits>
constexpr std::array<Kernels, sizeof...(bits)> uneven(std::integer_sequence<int, bits...>) {
  return {kernels<bits + 3, true>()...};
}

constexpr auto kEven = even(std::make_integer_sequence<int, 8>{});
constexpr auto kUneven = uneven(std::make_integer_sequence<int, 5>{});

}  // namespace

bool streams(const Layout& layout) {
  return layout.block / 4 % step_of(layout.bits) == 0 && layout.vectors * 4 == layout.join * layout.block;
}

const Kernels& kernels_of(int bits, bool table) { return table ? kUneven[bits - 3] : kEven[bits - 1]; }

}  // namespace trimtab
