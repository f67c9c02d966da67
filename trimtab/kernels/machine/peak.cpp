#include <utility>

#include "machine/lanes.h"
#include "machine/rates.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trimtab {
namespace {

constexpr int kCalls = 64;   // timed together, for one is about as short as the clock's own error
constexpr int kTurns = 256;  // of the inner loop in one call: the call itself is then below a hundredth

// Enough independent sums to fill every unit for as long as one multiply-add takes, within the variant's registers.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kSums = 12;
#else
constexpr int kSums = 10;
#endif

#if defined(__AVX512F__)
Floats multiply_add(Floats a, Floats b, Floats sum) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
#elif defined(__AVX2__)
Floats multiply_add(Floats a, Floats b, Floats sum) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
#else
Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
#endif

// Sums of products of four bytes, as the integer kernels of this variant form them.
#if defined(__AVX512VNNI__)
Lanes dot(Lanes a, Lanes b, Lanes sum) { return (Lanes)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#elif defined(__AVX512BW__)
Lanes dot(Lanes a, Lanes b, Lanes sum) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)(a), (__m512i)(b));
  return sum + (Lanes)(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
Lanes dot(Lanes a, Lanes b, Lanes sum) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b));
  return sum + (Lanes)(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
// Plain C++ widens to 32 bits first: one product a lane, not four.
Lanes dot(Lanes a, Lanes b, Lanes sum) { return a * b + sum; }
#endif

#if defined(__AVX2__)
constexpr double kProducts = 4.0;  // of bytes in a 32-bit lane
#else
constexpr double kProducts = 1.0;
#endif

// kSums sums in registers, kTurns times; `step(a, b, sum)` is one instruction or a few.
template <typename V, typename Step, size_t... I>
void turns(V a, V b, const Step& step, std::index_sequence<I...>) {
  V sums[] = {((void)I, b)...};
  (opaque(sums[I]), ...);
  for (int turn = 0; turn < kTurns; ++turn) {
    // Each `opaque` costs nothing, and keeps the compiler from seeing one product computed again and again.
    ((opaque(a), sums[I] = step(a, b, sums[I])), ...);
  }
  (opaque(sums[I]), ...);
}

template <typename V, typename Step>
std::vector<double> arithmetic(double seconds, double operations, V a, V b, const Step& step) {
  const double all = operations * kSums * kTurns * Pool::get().size();
  return rates(seconds, all, [&](const Team&) { turns(a, b, step, std::make_index_sequence<kSums>{}); });
}

}  // namespace

std::vector<double> fp32_rates(double seconds) {
  const Floats a = Floats{} + 0.5f, b = Floats{} + 0.25f;
  return arithmetic(seconds, 2.0 * kVector / 4, a, b, [](Floats x, Floats y, Floats s) { return multiply_add(x, y, s); });
}

std::vector<double> int8_rates(double seconds) {
  const Lanes a = Lanes{} + 0x01020304u, b = Lanes{} + 0x01010101u;
  return arithmetic(seconds, 2.0 * kProducts * kVector / 4, a, b, [](Lanes x, Lanes y, Lanes s) { return dot(x, y, s); });
}

// bf16 products are asked of the processor at run time, unlike all else: no variant is compiled for them, because the
// kernels compute bf16 in fp32; the peak says what that leaves on the table.
#if defined(__AVX512F__) && defined(__x86_64__)
namespace {

__attribute__((target("avx512bf16"))) void bf16_turns(float start) {
  __m512 sums[kSums];
  for (auto& sum : sums) {
    sum = _mm512_set1_ps(start);
    opaque(sum);
  }
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3e80);
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      opaque(a);
      sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) opaque(sums[i]);
}

}  // namespace

std::vector<double> bf16_rates(double seconds) {
  if (!__builtin_cpu_supports("avx512bf16")) return {};
  const double all = 2.0 * kVector / 2 * kSums * kTurns * Pool::get().size();
  return rates(seconds, all, [](const Team&) { bf16_turns(0.5f); });
}
#else
std::vector<double> bf16_rates(double) { return {}; }
#endif

std::vector<double> barrier_rates(double seconds) {
  return rates(seconds, 1.0, [](const Team& team) { team.sync(); });
}

std::vector<double> call_rates(double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> found;
  for (const auto began = Clock::now(); Clock::now() - began < std::chrono::duration<double>(seconds);) {
    const auto start = Clock::now();
    for (int i = 0; i < kCalls; ++i) Pool::get().run([](const Team&) {});
    found.push_back(kCalls / std::chrono::duration<double>(Clock::now() - start).count());
  }
  return found;
}

}  // namespace trimtab
