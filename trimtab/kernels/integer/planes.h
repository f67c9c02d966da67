// Codes of 1 to 8 bits as planes of 8, 4, 2 and 1 bits: those that the number itself has in binary (6 = 4 + 2), the
// lowest bits of the code in the widest plane. A plane of w bits holds 8 / w vectors in 64 bytes and is expanded with a
// shift and a mask, whatever the number of bits (bit-planes as in FlexQ and bipolar-INT, without their 1-bit products).
#pragma once

#include "base/simd.h"
#include "integer/layout.h"

namespace trimtab {

template <int bits>
struct Planes {
  static constexpr int kChunk = bits & 1 ? 8 : bits & 2 ? 4 : bits & 4 ? 2 : 1;  // vectors that fill whole planes
  static constexpr int kBytes = kChunk * 8 * bits;
  static constexpr bool has(int width) { return (bits & width) != 0; }
  // Where the plane begins in a chunk, and where its bits lie in a code: behind those of the wider planes.
  static constexpr int start(int width) { return kChunk * 8 * (bits & ~(2 * width - 1)); }
  static constexpr int place(int width) { return bits & ~(2 * width - 1); }

  // Vector i of the chunk at p.
  template <int i>
  [[gnu::always_inline]] static simd::Bytes decode(const std::byte* p) {
    if constexpr (has(8)) {
      return simd::load_bytes(p + i * kVector);
    } else {
      simd::Bytes code = simd::zero_bytes();
      simd::unrolled<3>([&](auto which) __attribute__((always_inline)) {
        constexpr int width = 4 >> which, of = 8 / width;
        if constexpr (has(width)) {
          const simd::Bytes plane = simd::load_bytes(p + start(width) + i / of * kVector);
          code = simd::either(code, simd::field<i % of * width, width, place(width)>(plane));
        }
      });
      return code;
    }
  }

  // The chunk at p from kChunk vectors.
  static void encode(const uint8_t* vectors, std::byte* p) {
    simd::unrolled<4>([&](auto which) {
      constexpr int width = 8 >> which, of = 8 / width;
      if constexpr (has(width)) {
        simd::unrolled<kChunk / of>([&](auto v) {
          simd::Bytes plane = simd::zero_bytes();
          simd::unrolled<of>([&](auto i) {
            const simd::Bytes code = simd::load_bytes(vectors + (v * of + i) * kVector);
            plane = simd::either(plane, simd::field<place(width), width, i * width>(code));
          });
          simd::store_bytes(p + start(width) + v * kVector, plane);
        });
      }
    });
  }
};

constexpr int chunk_of(int bits) { return bits & 1 ? 8 : bits & 2 ? 4 : bits & 4 ? 2 : 1; }

}  // namespace trimtab
