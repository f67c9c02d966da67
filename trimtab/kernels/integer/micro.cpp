// Many inputs: a block of sums in registers, weights already expanded in the nearest cache, inputs read in order.
#include <array>

#include "integer/kernels.h"

namespace trimtab {
namespace {

using simd::Bytes, simd::Floats, simd::Ints, simd::unrolled;

template <int inputs, bool wide>
void micro(const Layout& layout, const Panel& panel, const Expanded& w, int from, int to, float* out) {
  constexpr int tiles = kTiles;
  const int vectors = layout.block / 4, pad = layout.vectors - layout.join * vectors;
  const size_t start = static_cast<size_t>(from) * inputs;
  const int32_t* q = panel.q + start * layout.vectors;
  const int32_t* minus = panel.minus + start * layout.join;
  const float* scale = panel.scale + start;
  const uint8_t* codes = w.codes;
  const float* group_scale = w.scale;
  const int32_t* zero = w.zero;
  alignas(64) float part[inputs * tiles * kRows];  // of the groups of a span, before the scale of the inputs
  for (int span = from; span < to; ++span, scale += inputs) {
    for (int j = 0; j < layout.join; ++j) {
      // These and the sums in `out` stay in memory: kept in registers from one group to the next they would displace `acc`.
      asm volatile("" ::: "memory");
      Ints acc[inputs][tiles];
      unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
        const Ints start = simd::ints(minus[i]);
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) { acc[i][t] = start; });
      });
      if (layout.zeros)
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
          const Ints by = simd::load(zero + t * kRows);
          unrolled<inputs>([&](auto i) __attribute__((always_inline)) { acc[i][t] = simd::scaled(by, acc[i][t]); });
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
      Floats by[tiles];
      unrolled<tiles>([&](auto t) __attribute__((always_inline)) { by[t] = simd::load(group_scale + t * kRows); });
      // One group: its sums by both scales; of several the first begins the parts, and the last ends them.
      const auto each = [&](auto work) __attribute__((always_inline)) {
        unrolled<inputs>([&](auto i) __attribute__((always_inline)) {
          const Floats x = simd::floats(scale[i]);
          unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
            work((i * tiles + t) * kRows, simd::to_floats(acc[i][t]), by[t], x);
          });
        });
      };
      if (layout.join == 1) {
        each([&](int at, Floats sum, Floats by, Floats x) __attribute__((always_inline)) {
          simd::store(out + at, simd::fma(sum, simd::mul(by, x), simd::load(out + at)));
        });
      } else if (j == 0) {
        each([&](int at, Floats sum, Floats by, Floats) __attribute__((always_inline)) {
          simd::store(part + at, simd::mul(sum, by));
        });
      } else if (j + 1 < layout.join) {
        each([&](int at, Floats sum, Floats by, Floats) __attribute__((always_inline)) {
          simd::store(part + at, simd::fma(sum, by, simd::load(part + at)));
        });
      } else {
        each([&](int at, Floats sum, Floats by, Floats x) __attribute__((always_inline)) {
          simd::store(out + at, simd::fma(simd::fma(sum, by, simd::load(part + at)), x, simd::load(out + at)));
        });
      }
      minus += inputs, group_scale += tiles * kRows, zero += tiles * kRows;
    }
    q += static_cast<size_t>(pad) * inputs, codes += pad * tiles * kVector;
  }
}

template <bool wide, int... i>
constexpr std::array<Micro, sizeof...(i)> micros(std::integer_sequence<int, i...>) {
  return {&micro<i + 1, wide>...};
}

template <bool wide>
constexpr auto kMicros = micros<wide>(std::make_integer_sequence<int, kInputs>{});

}  // namespace

Micro micro_of(int inputs, bool wide) { return wide ? kMicros<true>[inputs - 1] : kMicros<false>[inputs - 1]; }

}  // namespace trimtab
