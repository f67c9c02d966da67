#include "attention/kivi.h"

#include <algorithm>
#include <cstring>

namespace trimtab {
namespace {

constexpr int kVectors = kPanel / kLanes;

U32 load_words(const std::byte* p) {
  U32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store_words(std::byte* p, U32 v) { std::memcpy(p, &v, sizeof v); }

// ---- products with codes

// The other side of a product with codes, in 16 bits: x[k] * step[k] = unit * factor[k], and what the lowest values add up to,
// the same for every output. Rounding to 16 bits is far finer than the codes are, and two products in one instruction take half
// of what fp32 takes, whose multiply-adds alone would cost more time than reading fp16 does.
struct Factors {
  float unit, offset;
  int32_t* pairs;  // places k and k + n / 2, in the halves of a word
};

// n is a multiple of 2 kLanes; `scaled` has room for n floats.
void make_factors(const float* x, const float* step, const float* low, int n, float* scaled, Factors* factors) {
  F32 most = {}, offset = {};
  for (int k = 0; k < n; k += kLanes) {
    const F32 at = load(x + k), product = at * load(step + k);
    store(scaled + k, product);
    most = larger(most, larger(product, -product));
    offset = fma(at, load(low + k), offset);
  }
  const float peak = largest(most);
  factors->unit = peak * (1.0f / 32767.0f);
  factors->offset = sum(offset);
  const F32 scale = splat(peak > 0 ? 32767.0f / peak : 0.0f), magic = splat(12582912.0f);  // as in `nearest`
  for (int k = 0; k < n / 2; k += kLanes) {
    const U32 first = std::bit_cast<U32>(fma(load(scaled + k), scale, magic));
    const U32 second = std::bit_cast<U32>(fma(load(scaled + n / 2 + k), scale, magic));
    const U32 pair = (first & 0xffff) | second << 16;
    std::memcpy(factors->pairs + k, &pair, sizeof pair);
  }
}

// sum + both products of the 16-bit halves of each lane.
I32 dot(I32 sum, U32 codes, int32_t pair) {
#if defined(__AVX512VNNI__)
  // As text, because GCC copies the sum before each intrinsic; and it reads the pair from where it lies.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(pair));
  return sum;
#elif defined(__AVX512BW__)
  return sum + (I32)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
  return sum + (I32)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(pair));
#else
  return sum + (I32)(codes & 0xffff) * static_cast<int16_t>(pair) + (I32)(codes >> 16) * (pair >> 16);
#endif
}

// y[row][j] (+)= sum_k x[row][k] * (low[k] + step[k] * code[k][j]) over the bundles of one panel.
template <int M, int Bits>
void coded_tile(const std::byte* words, int bundles, const Factors* factors, float* y, ptrdiff_t ldy, bool add) {
  constexpr int kHalf = 16 / Bits;
  constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x10001u;
  I32 sums[M][kVectors] = {};
  for (int b = 0; b < bundles; ++b, words += kPanel * 4) {
    U32 codes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) codes[v] = load_words(words + v * kLanes * 4);
#pragma GCC unroll 8
    for (int k = 0; k < kHalf; ++k) {
      U32 two[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) two[v] = codes[v] >> (k * Bits) & kMask;
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = dot(sums[i][v], two[v], factors[i].pairs[b * kHalf + k]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = y + i * ldy + v * kLanes;
      const F32 found = fma(__builtin_convertvector(sums[i][v], F32), splat(factors[i].unit), splat(factors[i].offset));
      store(to, add ? load(to) + found : found);
    }
}

template <int Bits>
void coded_tile(int rows, const std::byte* words, int bundles, const Factors* factors, float* y, ptrdiff_t ldy, bool add) {
  using Kernel = void (*)(const std::byte*, int, const Factors*, float*, ptrdiff_t, bool);
  static constexpr auto kernels = []<size_t... M>(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{&coded_tile<static_cast<int>(M) + 1, Bits>...};
  }(std::make_index_sequence<kTile>());
  kernels[rows - 1](words, bundles, factors, y, ldy, add);
}

// Rows of x against panels that share a grid, n places deep.
template <int Bits>
void coded_rows(int rows, const float* x, int n, const std::byte* words, int panels, const float* step, const float* low, float* y,
                ptrdiff_t ldy, bool add, float* room) {
  const int bundles = n * Bits / 32;
  int32_t* pairs = reinterpret_cast<int32_t*>(room + n);
  for (int first = 0; first < rows; first += kTile) {
    const int some = std::min(kTile, rows - first);
    Factors factors[kTile];
    for (int i = 0; i < some; ++i) {
      factors[i].pairs = pairs + size_t(i) * n / 2;
      make_factors(x + size_t(first + i) * n, step, low, n, room, &factors[i]);
    }
    for (int p = 0; p < panels; ++p)
      coded_tile<Bits>(some, words + size_t(p) * bundles * kPanel * 4, bundles, factors, y + first * ldy + p * kPanel, ldy, add);
  }
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

size_t Block::word(int j, int depth, int k) const {
  const int half = k % (depth / 2), bundles = depth * bits / 32;
  return (size_t(j / kPanel) * bundles + half * bits / 16) * kPanel + j % kPanel;
}
int Block::shift(int depth, int k) const { return (k < depth / 2 ? 0 : 16) + k % (depth / 2) * bits % 16; }

void Block::pack(const Fp16* keys, const Fp16* values, std::byte* block) const {
  Fp16* key_grid = reinterpret_cast<Fp16*>(block);
  Fp16* value_grid = reinterpret_cast<Fp16*>(block + key_grids());
  std::byte* key_words = block + key_grids() + value_grids();
  std::byte* value_words = key_words + codes();
  std::memset(key_words, 0, 2 * codes());
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
        put(key_words + word(t, padded, c) * 4, nearest(at(t), splat(trimtab::widen(grid.step)), splat(trimtab::widen(grid.low)), bits),
            shift(padded, c));
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
        put(value_words + word(c, kKeys, t) * 4, nearest(load(row + c), splat(trimtab::widen(grid.step)), splat(trimtab::widen(grid.low)), bits),
            shift(kKeys, t));
    }
}

void Block::unpack(const std::byte* block, Fp16* keys, Fp16* values) const {
  const Fp16* key_grid = reinterpret_cast<const Fp16*>(block);
  const Fp16* value_grid = reinterpret_cast<const Fp16*>(block + key_grids());
  const std::byte* key_words = block + key_grids() + value_grids();
  const std::byte* value_words = key_words + codes();
  const auto point = [&](const std::byte* from, int shift, Fp16 step, Fp16 low) {
    uint32_t codes;
    std::memcpy(&codes, from, sizeof codes);
    return trimtab::widen(low) + trimtab::widen(step) * static_cast<float>(codes >> shift & ((1u << bits) - 1));
  };
  for (int t = 0; t < kKeys; ++t)
    for (int c = 0; c < size; ++c) {
      const int k = t / group * size + c, v = c / group * kKeys + t;
      narrow(point(key_words + word(t, padded, c) * 4, shift(padded, c), key_grid[k], key_grid[key_groups() * size + k]),
             keys + size_t(t / kPanel) * kPanel * size + c * kPanel + t % kPanel);
      narrow(point(value_words + word(c, kKeys, t) * 4, shift(kKeys, t), value_grid[v], value_grid[value_groups() * kKeys + v]),
             values + size_t(t) * padded + c);
    }
}

void Block::score(const std::byte* block, int rows, const float* queries, float* scores, float* room) const {
  float *step = room, *low = room + padded;
  const std::byte* words = block + key_grids() + value_grids();
  const auto work = bits == 2 ? &coded_rows<2> : &coded_rows<4>;
  for (int g = 0; g < key_groups(); ++g) {
    widen(block + size_t(g) * size * 2, size, step);
    widen(block + size_t(key_groups() + g) * size * 2, size, low);
    std::fill(step + size, step + padded, 0.0f);
    std::fill(low + size, low + padded, 0.0f);
    work(rows, queries, padded, words + word(g * group, padded, 0) * 4, group / kPanel, step, low, scores + g * group, kKeys, false,
         room + 2 * padded);
  }
}

void Block::mix(const std::byte* block, int rows, const float* shares, float* out, float* room) const {
  float *step = room, *low = room + kKeys;
  const std::byte *grids = block + key_grids(), *words = grids + value_grids() + codes();
  const auto work = bits == 2 ? &coded_rows<2> : &coded_rows<4>;
  for (int g = 0; g < value_groups(); ++g) {
    widen(grids + size_t(g) * kKeys * 2, kKeys, step);
    widen(grids + size_t(value_groups() + g) * kKeys * 2, kKeys, low);
    const int panels = std::min(group, padded - g * group) / kPanel;
    work(rows, shares, kKeys, words + word(g * group, kKeys, 0) * 4, panels, step, low, out + g * group, padded, true,
         room + 2 * kKeys);
  }
}

}  // namespace trimtab
