#include "attention/kivi.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/simd.h"

namespace trimtab {
namespace {

constexpr int kVectors = kPanel / kLanes;

U32 load_words(const std::byte* p) {
  U32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store_words(std::byte* p, U32 v) { std::memcpy(p, &v, sizeof v); }

// ---- from codes to floats

// The grid of a key's channel or a value's token, ready for its codes: where the vector unit looks up lanes by their lowest
// bits, a table of its points, over and over where a code has fewer bits; whatever stands above a code is then no matter.
template <int Bits>
struct Points {
#if defined(__AVX512F__)
  static constexpr bool kTable = true;
#elif defined(__AVX2__)
  static constexpr bool kTable = Bits <= 3;
#else
  static constexpr bool kTable = false;
#endif
  F32 step, low;  // with a table, it is `step`

  Points(const float* at_step, const float* at_low) {
    if constexpr (kTable) {
      F32 codes;
      for (int i = 0; i < kLanes; ++i) codes[i] = static_cast<float>(i % (1 << Bits));
      step = fma(codes, splat(*at_step), splat(*at_low));
    } else {
      step = splat(*at_step);
      low = splat(*at_low);
    }
  }

  template <int Shift>
  F32 at(U32 words) const {
    const U32 codes = words >> Shift;
#if defined(__AVX512F__)
    return (F32)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)codes, (__m512)step);
#elif defined(__AVX2__)
    if constexpr (kTable) return (F32)_mm256_permutevar8x32_ps((__m256)step, (__m256i)codes);
#endif
    return fma(__builtin_convertvector((I32)(codes & ((1u << Bits) - 1)), F32), step, low);
  }
};

// A tile as in base/tile.h, its weight in bundles: y[i][j] (+)= sum_k x[i * RowStep + k * DepthStep] * w[k][j], where
// w[k] = low[k] + step[k] * code[k].
template <int M, int Bits, int RowStep, int DepthStep>
void coded_tile(const std::byte* words, int bundles, const float* step, const float* low, const float* x, float* y,
                ptrdiff_t ldy, bool add) {
  constexpr int kBundle = 32 / Bits;
  F32 sums[M][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = add ? load(y + i * ldy + v * kLanes) : F32{};
  for (int b = 0; b < bundles; ++b, words += kPanel * 4, step += kBundle, low += kBundle, x += kBundle * DepthStep) {
    U32 codes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) codes[v] = load_words(words + v * kLanes * 4);
    simd::unrolled<kBundle>([&](auto k) __attribute__((always_inline)) {
      const Points<Bits> points(step + k, low + k);
      F32 weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = points.template at<k * Bits>(codes[v]);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const F32 factor = splat(x[i * RowStep + k * DepthStep]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(factor, weights[v], sums[i][v]);
      }
    });
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(y + i * ldy + v * kLanes, sums[i][v]);
}

template <int Bits, int RowStep, int DepthStep>
void coded_tile(int rows, const std::byte* words, int bundles, const float* step, const float* low, const float* x,
                float* y, ptrdiff_t ldy, bool add) {
  using Kernel = void (*)(const std::byte*, int, const float*, const float*, const float*, float*, ptrdiff_t, bool);
  static constexpr auto kernels = []<size_t... M>(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{&coded_tile<static_cast<int>(M) + 1, Bits, RowStep, DepthStep>...};
  }(std::make_index_sequence<kTile>());
  kernels[rows - 1](words, bundles, step, low, x, y, ldy, add);
}

// Halves to floats.
void widen(const std::byte* from, int n, float* to) {
  const Fp16* halves = reinterpret_cast<const Fp16*>(from);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(halves + i));
  for (; i < n; ++i) to[i] = trimtab::widen(halves[i]);
}

// ---- from floats to codes

// The grid that covers [low, high] with 2^bits points, as 16 bits hold it.
struct Fitted {
  Fp16 step, low;
  Fitted(float least, float most, int bits) {
    narrow((most - least) / static_cast<float>((1 << bits) - 1), &step);
    narrow(least, &low);
  }
};

// The nearest code, ties to even; a grid without extent has the code 0.
U32 nearest(F32 x, F32 step, F32 low, int bits) {
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F32 at = (x - low) / (step == F32{} ? splat(1.0f) : step);
  const F32 bounded = smaller(larger(at, F32{}), splat(static_cast<float>((1 << bits) - 1)));
  return std::bit_cast<U32>(bounded + magic) - std::bit_cast<U32>(magic);
}

}  // namespace

void Block::pack(const Fp16* keys, const Fp16* values, std::byte* block) const {
  Fp16* key_grid = reinterpret_cast<Fp16*>(block);
  Fp16* value_grid = reinterpret_cast<Fp16*>(block + key_grids());
  std::byte* key_words = block + key_grids() + value_grids();
  std::byte* value_words = key_words + key_codes();
  std::memset(key_words, 0, key_codes() + value_codes());
  const auto put = [](std::byte* words, U32 codes, int shift) { store_words(words, load_words(words) | codes << shift); };

  const int lows = key_groups() * size;  // halves from a key's step to its lowest value
  for (int g = 0; g < key_groups(); ++g)
    for (int c = 0; c < size; ++c) {
      const auto at = [&](int t) { return load(keys + size_t(t / kPanel) * kPanel * size + c * kPanel + t % kPanel); };
      F32 least = at(g * group), most = least;
      for (int t = g * group; t < (g + 1) * group; t += kLanes) least = smaller(least, at(t)), most = larger(most, at(t));
      const Fitted grid(-largest(-least), largest(most), bits);
      key_grid[g * size + c] = grid.step;
      key_grid[lows + g * size + c] = grid.low;
      for (int t = g * group; t < (g + 1) * group; t += kLanes)
        put(key_words + ((size_t(t / kPanel) * key_bundles() + c / bundle()) * kPanel + t % kPanel) * 4,
            nearest(at(t), splat(trimtab::widen(grid.step)), splat(trimtab::widen(grid.low)), bits), c % bundle() * bits);
    }

  for (int t = 0; t < kKeys; ++t)
    for (int g = 0; g < value_groups(); ++g) {
      const Fp16* row = values + size_t(t) * padded;
      const int from = g * group, to = std::min(size, from + group);
      float least = trimtab::widen(row[from]), most = least;
      for (int c = from + 1; c < to; ++c) least = std::min(least, trimtab::widen(row[c])), most = std::max(most, trimtab::widen(row[c]));
      const Fitted grid(least, most, bits);
      value_grid[g * kKeys + t] = grid.step;
      value_grid[(value_groups() + g) * kKeys + t] = grid.low;
      for (int c = from; c < std::min(padded, from + group); c += kLanes)
        put(value_words + ((size_t(c / kPanel) * (kKeys / bundle()) + t / bundle()) * kPanel + c % kPanel) * 4,
            nearest(load(row + c), splat(trimtab::widen(grid.step)), splat(trimtab::widen(grid.low)), bits), t % bundle() * bits);
    }
}

void Block::unpack(const std::byte* block, Fp16* keys, Fp16* values) const {
  const Fp16* key_grid = reinterpret_cast<const Fp16*>(block);
  const Fp16* value_grid = reinterpret_cast<const Fp16*>(block + key_grids());
  const std::byte* key_words = block + key_grids() + value_grids();
  const std::byte* value_words = key_words + key_codes();
  const auto point = [&](const std::byte* word, int place, Fp16 step, Fp16 low) {
    uint32_t codes;
    std::memcpy(&codes, word, sizeof codes);
    return trimtab::widen(low) + trimtab::widen(step) * static_cast<float>(codes >> place * bits & ((1u << bits) - 1));
  };
  for (int t = 0; t < kKeys; ++t)
    for (int c = 0; c < size; ++c) {
      const int k = t / group * size + c, v = c / group * kKeys + t;
      narrow(point(key_words + ((size_t(t / kPanel) * key_bundles() + c / bundle()) * kPanel + t % kPanel) * 4, c % bundle(),
                   key_grid[k], key_grid[key_groups() * size + k]),
             keys + size_t(t / kPanel) * kPanel * size + c * kPanel + t % kPanel);
      narrow(point(value_words + ((size_t(c / kPanel) * (kKeys / bundle()) + t / bundle()) * kPanel + c % kPanel) * 4,
                   t % bundle(), value_grid[v], value_grid[value_groups() * kKeys + v]),
             values + size_t(t) * padded + c);
    }
}

void Block::spread_keys(const std::byte* block, float* spread) const {
  for (int g = 0; g < 2 * key_groups(); ++g) {  // the steps of all groups, then their lowest values
    widen(block + size_t(g) * size * 2, size, spread + size_t(g) * padded);
    std::fill(spread + size_t(g) * padded + size, spread + size_t(g + 1) * padded, 0.0f);
  }
}

void Block::spread_values(const std::byte* block, float* spread) const {
  widen(block + key_grids(), 2 * value_groups() * kKeys, spread);
}

void Block::score(const std::byte* block, int rows, const float* queries, float* scores, const float* spread) const {
  const std::byte* words = block + key_grids() + value_grids();
  for (int j = 0; j < kKeys; j += kPanel, words += size_t(key_bundles()) * kPanel * 4) {
    const float *step = spread + size_t(j / group) * padded, *low = step + size_t(key_groups()) * padded;
    const auto kernel = bits == 2 ? &coded_tile<2, 1, kTile> : &coded_tile<4, 1, kTile>;
    kernel(rows, words, key_bundles(), step, low, queries, scores + j, kKeys, false);
  }
}

void Block::mix(const std::byte* block, int rows, const float* shares, float* out, const float* spread) const {
  const std::byte* words = block + key_grids() + value_grids() + key_codes();
  const int bundles = kKeys / bundle();
  for (int c = 0; c < padded; c += kPanel, words += size_t(bundles) * kPanel * 4) {
    if (c >= size) break;  // a panel of padding alone
    const float *step = spread + size_t(c / group) * kKeys, *low = step + size_t(value_groups()) * kKeys;
    const auto kernel = bits == 2 ? &coded_tile<2, kKeys, 1> : &coded_tile<4, kKeys, 1>;
    kernel(rows, words, bundles, step, low, shares, out + c, padded, true);
  }
}

}  // namespace trimtab
