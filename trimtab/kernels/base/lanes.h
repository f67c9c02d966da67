// Sixteen floats at a time, the same on every processor: one 512-bit register, two of 256 bits, or a plain array.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 warns of undefined operands inside its own intrinsics (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace trimtab {

using Half = uint16_t;  // the bits of an IEEE half

inline float to_float(Half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Shifted into a float's fields a half is 2^-112 times itself, subnormals included; one multiplication mends that.
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  float value;
  if (rest >= 0x0f800000) {  // infinity or not a number
    const uint32_t bits = sign | 0x70000000 | rest;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  std::memcpy(&value, &rest, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
#endif
}

#if defined(__AVX2__)
inline float sum_of(__m256 eight) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif

struct Lanes {
  static constexpr int kWidth = 16;
#if defined(__AVX512F__)
  __m512 v;
  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes all(float a) { return {_mm512_set1_ps(a)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Lanes all_half(const Half* p) { return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(*p)))}; }
  static Lanes load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Lanes load(const Half* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  float sum() const { return sum_of(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))); }
  static Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
#else
  static Lanes all_half(const Half* p) { return all(to_float(*p)); }
  static Lanes load(const float* p, int n) { return padded(p, n); }
  static Lanes load(const Half* p, int n) { return padded(p, n); }
  void store(float* p, int n) const {
    float whole[kWidth];
    store(whole);
    std::memcpy(p, whole, n * sizeof(float));
  }
  template <typename T>
  static Lanes padded(const T* p, int n) {
    T whole[kWidth] = {};
    std::memcpy(whole, p, n * sizeof(T));
    return load(whole);
  }
#if defined(__AVX2__)
  __m256 a, b;
  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Lanes load(const Half* p) { return {half(p), half(p + 8)}; }
  void store(float* p) const { _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b); }
  float sum() const { return sum_of(_mm256_add_ps(a, b)); }
  static Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static __m256 half(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#else
  float v[kWidth];
  static Lanes zero() { return all(0); }
  static Lanes all(float a) {
    Lanes to;
    for (float& lane : to.v) lane = a;
    return to;
  }
  static Lanes load(const float* p) {
    Lanes to;
    std::memcpy(to.v, p, sizeof to.v);
    return to;
  }
  static Lanes load(const Half* p) {
    Lanes to;
    for (int i = 0; i < kWidth; ++i) to.v[i] = to_float(p[i]);
    return to;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  float sum() const {
    float total = 0;
    for (float lane : v) total += lane;
    return total;
  }
  static Lanes fma(Lanes a, Lanes b, Lanes c) {
    for (int i = 0; i < kWidth; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
#endif
#endif
};

}  // namespace trimtab
