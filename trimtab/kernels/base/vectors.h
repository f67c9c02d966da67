// The vector unit as one type, so that a kernel is written once: lanes of floats, loads from every stored type, and the few
// functions that the operations need.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "base/simd.h"

namespace trimtab {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

// 16-bit floats as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Less zero, not plus: that is x also where x is -0, and so no more than a load that repeats it.
inline F32 splat(float x) { return x - F32{}; }
inline F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline F32 smaller(F32 a, F32 b) { return a < b ? a : b; }

// The lanes combined: halves with halves, down to one.
template <typename Combine>
[[gnu::always_inline]] inline float folded(F32 v, const Combine& combine) {
#if defined(__AVX512F__)
  const __m512 whole = (__m512)v;
  __m256 eight = combine(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#elif defined(__AVX2__)
  __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 four = combine(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = combine(four, _mm_movehl_ps(four, four));
  return combine(four, _mm_movehdup_ps(four))[0];
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
#endif
}
inline float sum(F32 v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}
inline float largest(F32 v) {
  return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- 16-bit types

inline float widen(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Fp16 x) { return simd::float_of_half(x.bits); }

inline float widen(float x) { return x; }

// To the nearest, ties to even; too large a number becomes the largest, so that one outlier cannot put an infinity into a
// cache.
inline void narrow(float x, float* out) { *out = x; }

inline void narrow(float x, Bf16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float x, Fp16* out) {
  x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
#if defined(__AVX2__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float size = std::bit_cast<float>(bits & 0x7fffffffu);
  if (size < 0x1p-14f) {  // subnormal: adding 2^10 units in the last place rounds to whole units
    out->bits = static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f)));
  } else {
    const uint32_t whole = std::bit_cast<uint32_t>(size);
    out->bits = static_cast<uint16_t>(sign | ((whole - (112u << 23) + 0xfffu + (whole >> 13 & 1)) >> 13));
  }
#endif
}

inline F32 load(const Bf16* p) {
  U16 v;
  std::memcpy(&v, p, sizeof v);
  return std::bit_cast<F32>(__builtin_convertvector(v, U32) << 16);
}

inline F32 load(const Fp16* p) {
#if defined(__AVX512F__)
  // With a mask that keeps all lanes: the plain form makes GCC 12 warn of a register that it leaves open on purpose.
  return (F32)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
#endif
}

// ---- functions

// e^x, relative error below 2e-7; 0 below -87, and the largest float's neighbourhood above 88.
inline F32 exponential(F32 x) {
  const F32 bounded = smaller(larger(x, splat(-87.0f)), splat(88.0f));
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F32 shifted = fma(bounded, splat(1.44269504f), magic), n = shifted - magic;
  const F32 r = fma(n, splat(1.42860677e-6f), fma(n, splat(-0.693148613f), bounded));
  F32 p = splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
  const F32 power = std::bit_cast<F32>((std::bit_cast<I32>(shifted) << 23) + (127 << 23));
  return x < splat(-87.0f) ? F32{} : p * power;
}

}  // namespace trimtab
