// Sixteen lanes of 32 bits, the unit of the kernels' layouts, for whatever the compiler may use: one register of
// AVX-512, two of AVX2, or plain loops.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the header, where a lane is undefined on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace trimtab {

using Half = uint16_t;  // the bits of an IEEE half

}  // namespace trimtab

namespace trimtab::simd {

constexpr int kLanes = 16;

// Call f with the constants 0 .. n-1, each known to the compiler.
template <int n, typename F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }

inline float float_of_half(Half half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
#endif
}

#if defined(__AVX2__)
inline float total_of(__m256 eight) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)

using Floats = __m512;  // 16 floats
using Ints = __m512i;   // 16 of 32 bits
using Bytes = __m512i;  // 16 times 4 bytes
using Quad = __m512i;   // the same 4 bytes 16 times

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// Within [-most, most]; most where x is not a number.
inline Floats bounded(Floats x, float most) {
  return _mm512_max_ps(_mm512_min_ps(x, floats(most)), floats(-most));
}

inline Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
// To the nearest integer, ties to even; stored as bytes.
inline Ints store_rounded(int8_t* p, Floats x) {
  const __m512i whole = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
  return whole;
}
// The larger of a and |x|, compared as bits: a NaN is the largest of all.
inline Ints larger_magnitude(Ints a, Floats x) {
  return _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
// Lanes of 0..255 times lanes that fit 16 bits.
inline Ints scaled(Ints bytes, Ints n) { return _mm512_madd_epi16(bytes, n); }

inline int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x); }
inline int32_t total(Ints x) { return _mm512_reduce_add_epi32(x); }
inline float total(Floats x) {
  return total_of(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}

inline Floats load_halves(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline Floats floats_of_half(const Half* one) { return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(*one))); }

// The first n lanes; what is not loaded is zero.
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Floats load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Floats load(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void store(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline Ints load_bytes_wide(const void* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
// E8M0: the power of two 2^(code - 127); code 0 is a subnormal.
inline Floats load_powers(const void* p) {
  const __m512i exponent = _mm512_slli_epi32(load_bytes_wide(p), 23);
  return _mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_set1_epi32(0x00400000)));
}
// Non-negative E4M3 times 2^-8: the bits are those of a half.
inline Floats load_e4m3(const void* p) {
  const __m256i halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))), 7);
  return _mm512_cvtph_ps(halves);
}

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
// Bits [from, from + width) of every byte moved to [to, to + width), the others zero.
template <int from, int width, int to>
inline Bytes field(Bytes x) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << width) - 1) << to));
  if constexpr (from > to) x = _mm512_srli_epi16(x, from - to);
  if constexpr (from < to) x = _mm512_slli_epi16(x, to - from);
  return _mm512_and_si512(x, mask);
}
inline Quad quad(const int32_t* p) { return _mm512_set1_epi32(*p); }

// acc + the sum over each lane's four products of unsigned bytes and signed bytes in -127..127. `wide`: a byte of
// `codes` may exceed 127.
template <bool wide>
inline Ints dot(Ints acc, Bytes codes, Quad x) {
#if defined(__AVX512VNNI__)
  // As text, because GCC copies the sum before each intrinsic, and runs out of registers where there are many sums.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
#else
  // Pairs of products stay within 16 bits while codes are below 128; the highest bit goes through by itself.
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (wide) {
    const __m512i top = _mm512_set1_epi8(-128);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_and_si512(codes, top), x), ones));
    codes = _mm512_andnot_si512(top, codes);
  }
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), ones));
#endif
}

// Entries of a table of 2^bits bytes, 64-byte aligned and padded to 16 entries.
template <int bits>
inline Bytes look_up(const uint8_t* table, Bytes codes) {
  if constexpr (bits <= 4) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), codes);
  } else {
#if defined(__AVX512VBMI__)
    const __m512i low = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
    if constexpr (bits == 5) return _mm512_permutexvar_epi8(codes, low);
    if constexpr (bits == 6) return _mm512_permutexvar_epi8(codes, _mm512_load_si512(table));
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
#else
    __m512i found = _mm512_setzero_si512();
    for (int i = 0; i < 1 << (bits - 4); ++i) {
      const __m512i part =
          _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
      const __mmask64 here = _mm512_cmpeq_epi8_mask(field<4, 4, 0>(codes), _mm512_set1_epi8(static_cast<char>(i)));
      found = _mm512_mask_shuffle_epi8(found, here, part, codes);
    }
    return found;
#endif
  }
}

#elif defined(__AVX2__)

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
using Bytes = Ints;
using Quad = __m256i;

inline Floats floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
inline Floats bounded(Floats x, float most) {
  const __m256 high = _mm256_set1_ps(most), low = _mm256_set1_ps(-most);
  return {_mm256_max_ps(_mm256_min_ps(x.a, high), low), _mm256_max_ps(_mm256_min_ps(x.b, high), low)};
}

inline Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Bytes load_bytes(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_bytes(void* p, Bytes x) {
  auto* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a), _mm256_storeu_si256(q + 1, x.b);
}
inline Ints load(const int32_t* p) { return load_bytes(p); }
inline void store(int32_t* p, Ints x) { store_bytes(p, x); }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints store_rounded(int8_t* p, Floats x) {
  const Ints whole = {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
  const __m256i narrow = _mm256_packs_epi32(whole.a, whole.b);  // within each half: a b a b
  const __m256i order = _mm256_permute4x64_epi64(narrow, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1)));
  return whole;
}
inline Ints larger_magnitude(Ints a, Floats x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epi32(a.a, _mm256_and_si256(_mm256_castps_si256(x.a), magnitude)),
          _mm256_max_epi32(a.b, _mm256_and_si256(_mm256_castps_si256(x.b), magnitude))};
}
inline Ints scaled(Ints bytes, Ints n) { return {_mm256_madd_epi16(bytes.a, n.a), _mm256_madd_epi16(bytes.b, n.b)}; }

inline int32_t largest(Ints x) {
  const __m256i most = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline float total(Floats x) { return total_of(_mm256_add_ps(x.a, x.b)); }
inline int32_t total(Ints x) {
  const __m256i sum = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline Floats halves(__m128i a, __m128i b) { return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)}; }
inline Floats load_halves(const void* p) {
  const auto* q = static_cast<const __m128i*>(p);
  return halves(_mm_loadu_si128(q), _mm_loadu_si128(q + 1));
}
inline Ints load_bytes_wide(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
inline Floats load_powers(const void* p) {
  const Ints code = load_bytes_wide(p);
  const __m256i least = _mm256_set1_epi32(0x00400000);
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(code.a, 23), least)),
          _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(code.b, 23), least))};
}
inline Floats load_e4m3(const void* p) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return halves(_mm_slli_epi16(_mm_cvtepu8_epi16(x), 7), _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_srli_si128(x, 8)), 7));
}

inline Bytes zero_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
template <int from, int width, int to>
inline Bytes field(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << width) - 1) << to));
  if constexpr (from > to) x = {_mm256_srli_epi16(x.a, from - to), _mm256_srli_epi16(x.b, from - to)};
  if constexpr (from < to) x = {_mm256_slli_epi16(x.a, to - from), _mm256_slli_epi16(x.b, to - from)};
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Quad quad(const int32_t* p) { return _mm256_set1_epi32(*p); }

// See above: pairs of products stay within 16 bits while codes are below 128; the highest bit goes through by itself.
template <bool wide>
inline __m256i dot_half(__m256i acc, __m256i codes, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (wide) {
    const __m256i top = _mm256_set1_epi8(-128);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(codes, top), x), ones));
    codes = _mm256_andnot_si256(top, codes);
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
}
template <bool wide>
inline Ints dot(Ints acc, Bytes codes, Quad x) {
  return {dot_half<wide>(acc.a, codes.a, x), dot_half<wide>(acc.b, codes.b, x)};
}

template <int bits>
inline Bytes look_up(const uint8_t* table, Bytes codes) {
  Bytes found = zero_bytes();
  for (int i = 0; i < (bits <= 4 ? 1 : 1 << (bits - 4)); ++i) {
    const __m256i part =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
    const __m256i here = _mm256_set1_epi8(static_cast<char>(i));
    const Bytes high = field<4, 4, 0>(codes), low = field<0, 4, 0>(codes);
    found.a = _mm256_blendv_epi8(found.a, _mm256_shuffle_epi8(part, low.a), _mm256_cmpeq_epi8(high.a, here));
    found.b = _mm256_blendv_epi8(found.b, _mm256_shuffle_epi8(part, low.b), _mm256_cmpeq_epi8(high.b, here));
  }
  return found;
}

#else

struct Floats { float v[kLanes]; };
struct Ints { int32_t v[kLanes]; };
struct Bytes { uint8_t v[4 * kLanes]; };
struct Quad { int8_t v[4]; };

template <typename Result, typename F>
inline Result each(F f) {
  Result r;
  for (size_t i = 0; i < std::size(r.v); ++i) r.v[i] = f(i);
  return r;
}

inline Floats floats(float x) { return each<Floats>([&](size_t) { return x; }); }
inline Floats load(const float* p) { return each<Floats>([&](size_t i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats mul(Floats a, Floats b) { return each<Floats>([&](size_t i) { return a.v[i] * b.v[i]; }); }
inline Floats add(Floats a, Floats b) { return each<Floats>([&](size_t i) { return a.v[i] + b.v[i]; }); }
inline Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
inline Floats div(Floats a, Floats b) { return each<Floats>([&](size_t i) { return a.v[i] / b.v[i]; }); }
inline Floats bounded(Floats x, float most) {
  return each<Floats>([&](size_t i) { return std::max(x.v[i] < most ? x.v[i] : most, -most); });
}

inline Ints ints(int32_t x) { return each<Ints>([&](size_t) { return x; }); }
inline Ints load(const int32_t* p) { return each<Ints>([&](size_t i) { return p[i]; }); }
inline void store(int32_t* p, Ints x) { std::memcpy(p, x.v, sizeof x.v); }
inline Ints add(Ints a, Ints b) { return each<Ints>([&](size_t i) { return a.v[i] + b.v[i]; }); }
inline Floats to_floats(Ints x) { return each<Floats>([&](size_t i) { return static_cast<float>(x.v[i]); }); }
// Adding 1.5 * 2^23 pushes the fraction out of the mantissa.
inline Ints store_rounded(int8_t* p, Floats x) {
  constexpr float magic = 0x1.8p23f;
  const Ints whole = each<Ints>(
      [&](size_t i) { return std::bit_cast<int32_t>(x.v[i] + magic) - std::bit_cast<int32_t>(magic); });
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(whole.v[i]);
  return whole;
}
inline Ints larger_magnitude(Ints a, Floats x) {
  return each<Ints>([&](size_t i) { return std::max(a.v[i], std::bit_cast<int32_t>(x.v[i]) & 0x7fffffff); });
}
inline Ints scaled(Ints bytes, Ints n) { return each<Ints>([&](size_t i) { return bytes.v[i] * n.v[i]; }); }

inline int32_t largest(Ints x) { return *std::max_element(x.v, x.v + kLanes); }
inline int32_t total(Ints x) { return std::accumulate(x.v, x.v + kLanes, 0); }
inline float total(Floats x) { return std::accumulate(x.v, x.v + kLanes, 0.0f); }

inline Bytes load_bytes(const void* p) {
  Bytes r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_bytes(void* p, Bytes x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats load_halves(const void* p) {
  uint16_t half[kLanes];
  std::memcpy(half, p, sizeof half);
  return each<Floats>([&](size_t i) { return float_of_half(half[i]); });
}
inline Ints load_bytes_wide(const void* p) {
  return each<Ints>([&](size_t i) { return static_cast<const uint8_t*>(p)[i]; });
}
inline Floats load_powers(const void* p) {
  const Ints code = load_bytes_wide(p);
  return each<Floats>([&](size_t i) { return std::bit_cast<float>(std::max(code.v[i] << 23, 0x00400000)); });
}
inline Floats load_e4m3(const void* p) {
  const Ints code = load_bytes_wide(p);
  return each<Floats>([&](size_t i) { return float_of_half(static_cast<uint16_t>(code.v[i] << 7)); });
}

inline Bytes zero_bytes() { return Bytes{}; }
inline Bytes either(Bytes a, Bytes b) { return each<Bytes>([&](size_t i) { return a.v[i] | b.v[i]; }); }
template <int from, int width, int to>
inline Bytes field(Bytes x) {
  return each<Bytes>([&](size_t i) { return static_cast<uint8_t>((x.v[i] >> from & ((1 << width) - 1)) << to); });
}
inline Quad quad(const int32_t* p) {
  Quad r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
template <bool wide>
inline Ints dot(Ints acc, Bytes codes, Quad x) {
  for (int i = 0; i < kLanes; ++i)
    for (int k = 0; k < 4; ++k) acc.v[i] += codes.v[4 * i + k] * x.v[k];
  return acc;
}
template <int bits>
inline Bytes look_up(const uint8_t* table, Bytes codes) {
  return each<Bytes>([&](size_t i) { return table[codes.v[i]]; });
}

#endif

inline Floats load(const Half* p) { return load_halves(p); }

#if !defined(__AVX512F__) || !defined(__AVX512BW__)
inline Floats floats_of_half(const Half* one) { return floats(float_of_half(*one)); }

template <typename T>
inline Floats load(const T* p, int n) {
  T whole[kLanes] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
inline void store(float* p, Floats x, int n) {
  float whole[kLanes];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(float));
}
#endif

}  // namespace trimtab::simd
