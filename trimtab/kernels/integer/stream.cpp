// Few inputs: the weights are read once, as one stream, and expanded in registers on the way.
#include <array>

#include "integer/kernels.h"
#include "integer/planes.h"

namespace trimtab {
namespace {

using simd::Bytes, simd::Floats, simd::Ints, simd::unrolled;

// Sums of one input side by side, so that an instruction need not wait for the one before.
constexpr int sums_of(int inputs) { return inputs * kTiles >= 8 ? 1 : 2; }
// Vectors of a tile that one turn of the inner loop takes.
constexpr int step_of(int bits) { return std::max(chunk_of(bits), 4); }

constexpr size_t kAhead = 6144;  // bytes by which the stream is asked for before it is used

// Vector i of tile t of the block whose chunks begin at p.
template <int bits, bool table, int i, int t>
[[gnu::always_inline]] inline Bytes vector_at(const std::byte* p, const uint8_t* entries) {
  constexpr int chunk = Planes<bits>::kChunk;
  Bytes code = Planes<bits>::template decode<i % chunk>(p + (i / chunk * kTiles + t) * Planes<bits>::kBytes);
  if constexpr (table) code = simd::look_up<bits>(entries, code);
  return code;
}

template <int bits, bool table>
void expand(const Tiles& tiles, int block, int from, int to, uint8_t* codes) {
  const Layout& layout = tiles.layout;
  constexpr int chunk = Planes<bits>::kChunk, bytes = kTiles * Planes<bits>::kBytes;
  for (int span = from; span < to; ++span) {
    const std::byte* p = tiles.block(block) + layout.codes_at(0, span);
    for (int v = 0; v < layout.vectors; v += chunk, p += bytes) {
      for (int line = 0; line < bytes; line += 64) simd::prefetch(p + kAhead + line);
      unrolled<chunk>([&](auto i) __attribute__((always_inline)) {
        unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
          simd::store_bytes(codes, vector_at<bits, table, i, t>(p, tiles.table));
          codes += kVector;
        });
      });
    }
  }
}

template <int bits, bool table, bool joined, int inputs>
void stream(const Tiles& tiles, const Panel& panel, int block, float* y, int ldy) {
  constexpr int sums = sums_of(inputs), step = step_of(bits), bytes = kTiles * step * 8 * bits;
  const Layout& layout = tiles.layout;
  const int vectors = layout.block / 4, spans = layout.spans, join = joined ? layout.join : 1, run = layout.run_spans();
  const int scale_step = layout.head_step() * layout.scale_bytes(), zero_step = layout.zeros ? layout.head_step() : 0;
  const size_t head = layout.head_bytes(), scales = layout.zero_at(0, 0, 0);
  alignas(64) float out[inputs][kTiles][kRows] = {};
  [[maybe_unused]] alignas(64) float part[inputs][kTiles][kRows];  // of the groups of a span, before the scale of the inputs
  alignas(64) float total[inputs][kTiles][kRows] = {};  // of the spans before those that are added up together
  Floats factors[kTiles];
  for (int t = 0; t < kTiles; ++t) factors[t] = simd::load(tiles.factors + (block * kTiles + t) * kRows);
  const auto settle = [&]() __attribute__((noinline)) {
    for (int i = 0; i < inputs; ++i)
      for (int t = 0; t < kTiles; ++t) {
        simd::store(total[i][t], simd::fma(simd::load(out[i][t]), factors[t], simd::load(total[i][t])));
        simd::store(out[i][t], simd::floats(0));
      }
  };
  int left = layout.spans_at_once();
  const std::byte* p = tiles.block(block);
  const int32_t* q = panel.q;
  const int32_t* minus = panel.minus;
  const float* scale = panel.scale;
  for (int first = 0; first < spans; first += run) {
    const std::byte *scale_at = p, *zero_at = p + scales;
    p += kTiles * head;
    for (int span = first; span < std::min(first + run, spans); ++span, scale += inputs) {
      for (int j = 0; j < join; ++j) {
        // Kept in registers from one group to the next, `out` would displace `acc`.
        if constexpr (inputs > (joined ? 2 : 4)) asm volatile("" ::: "memory");
        Ints acc[inputs][kTiles][sums];
        unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
          const Ints start = simd::ints(minus[i]);
          unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
            unrolled<sums>([&](auto s) __attribute__((always_inline)) { acc[i][t][s] = s == 0 ? start : simd::ints(0); });
          });
        });
        if (layout.zeros)
          unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
            const Ints zero = simd::load_bytes_wide(zero_at + t * head);
            unrolled<inputs>([&](auto i) __attribute__((always_inline)) { acc[i][t][0] = simd::scaled(zero, acc[i][t][0]); });
          });
        int v = vectors;
        do {
          unrolled<step>([&](auto k) __attribute__((always_inline)) {
            Bytes w[kTiles];
            unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
              w[t] = vector_at<bits, table, k, t>(p, tiles.table);
            });
            unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
              const simd::Quad x = simd::quad(q + k * inputs + i);
              unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
                Ints& sum = acc[i][t][k % sums];
                sum = simd::dot<bits == 8 || (table && bits == 7)>(sum, w[t], x);
              });
            });
          });
          for (int line = 0; line < bytes; line += 64) simd::prefetch(p + kAhead + line);
          p += bytes, q += step * inputs;
        } while ((v -= step) > 0);
        unrolled<kTiles>([&](auto t) __attribute__((always_inline)) {
          const Floats s = scale_of(layout, scale_at + t * head);
          unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
            Ints sum = acc[i][t][0];
            unrolled<sums - 1>([&](auto k) __attribute__((always_inline)) { sum = simd::add(sum, acc[i][t][k + 1]); });
            const Floats x = simd::floats(scale[i]), found = simd::to_floats(sum);
            if constexpr (!joined) {
              simd::store(out[i][t], simd::fma(found, simd::mul(s, x), simd::load(out[i][t])));
            } else if (j == 0) {
              simd::store(part[i][t], simd::mul(found, s));
            } else if (j + 1 < join) {
              simd::store(part[i][t], simd::fma(found, s, simd::load(part[i][t])));
            } else {
              simd::store(out[i][t], simd::fma(simd::fma(found, s, simd::load(part[i][t])), x, simd::load(out[i][t])));
            }
          });
        });
        minus += inputs, scale_at += scale_step, zero_at += zero_step;
      }
      if (--left == 0) settle(), left = layout.spans_at_once();
    }
  }
  settle();
  for (int t = 0; t < kTiles; ++t) {
    const int row = (block * kTiles + t) * kRows, rows = std::min(kRows, tiles.rows - row);
    if (rows <= 0) break;
    for (int i = 0; i < inputs; ++i) std::copy_n(total[i][t], rows, y + static_cast<size_t>(i) * ldy + row);
  }
}

template <int bits, bool table>
constexpr Kernels kernels() {
  Kernels k{chunk_of(bits), &expand<bits, table>, {}};
  [&]<int... i>(std::integer_sequence<int, i...>) {
    ((k.stream[0][i] = &stream<bits, table, false, i + 1>), ...);
    ((k.stream[1][i] = &stream<bits, table, true, i + 1>), ...);
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
