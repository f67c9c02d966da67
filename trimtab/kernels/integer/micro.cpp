// Many inputs: a block of sums in registers, weights already expanded in the nearest cache, inputs read in order.
#include <array>

#include "integer/kernels.h"

namespace trimtab {
namespace {

using simd::Bytes, simd::Floats, simd::Ints, simd::unrolled;

template <int inputs, int tiles, bool wide>
void micro(const Layout& layout, const Panel& panel, const Expanded& w, int from, int to, float* out) {
  const int vectors = layout.block / 4, pad = layout.vectors - layout.join * vectors;
  const size_t start = static_cast<size_t>(from) * inputs;
  const int32_t* q = panel.q + start * layout.vectors;
  const int32_t* minus = panel.minus + start * layout.join;
  const float* scale = panel.scale + start;
  const uint8_t* codes = w.codes;
  const float* group_scale = w.scale;
  const int32_t* zero = w.zero;
  for (int span = from; span < to; ++span, scale += inputs) {
    for (int j = 0; j < layout.join; ++j) {
      // The sums in `out` stay in memory: kept in registers from one group to the next they would displace `acc`.
      asm volatile("" ::: "memory");
      Ints acc[inputs][tiles];
      unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
          acc[i][t] = simd::scaled(simd::load(zero + t * kRows), minus[i]);
        });
      });
      int v = vectors;
      do {
        Bytes code[tiles];
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
          code[t] = simd::load_bytes(codes + t * kVector);
        });
        unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
          const simd::Quad x = simd::quad(q + i);
          unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
            acc[i][t] = simd::dot<wide>(acc[i][t], code[t], x);
          });
        });
        q += inputs, codes += tiles * kVector;
      } while (--v > 0);
      unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
          float* sum = out + (i * tiles + t) * kRows;
          const Floats by = simd::mul(simd::load(group_scale + t * kRows), simd::floats(scale[i]));
          simd::store(sum, simd::fma(simd::to_floats(acc[i][t]), by, simd::load(sum)));
        });
      });
      minus += inputs, group_scale += tiles * kRows, zero += tiles * kRows;
    }
    q += static_cast<size_t>(pad) * inputs, codes += pad * tiles * kVector;
  }
}

template <int tiles, bool wide, int... i>
constexpr std::array<Micro, sizeof...(i)> micros(std::integer_sequence<int, i...>) {
  return {&micro<i + 1, tiles, wide>...};
}

template <int tiles, bool wide>
constexpr auto kMicros = micros<tiles, wide>(std::make_integer_sequence<int, kInputs>{});

}  // namespace

Micro micro_of(int inputs, int tiles, bool wide) {
  if constexpr (kTiles == 1) return wide ? kMicros<1, true>[inputs - 1] : kMicros<1, false>[inputs - 1];
  if (tiles == 1) return wide ? kMicros<1, true>[inputs - 1] : kMicros<1, false>[inputs - 1];
  return wide ? kMicros<kTiles, true>[inputs - 1] : kMicros<kTiles, false>[inputs - 1];
}

}  // namespace trimtab
