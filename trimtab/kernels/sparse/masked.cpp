#include "sparse/masked.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "linear/by_rows.h"
#include "linear/dots.h"
#include "sparse/spmm.h"
#include "sparse/spread.h"

namespace trimtab {
namespace {

#if defined(__AVX512F__)
constexpr int kStrips = 8;  // of sixteen inputs: as many sums as hide the latency of the multiply-adds
#else
constexpr int kStrips = 4;
#endif
constexpr int kColumns = 1024;  // of the inputs transposed at a time: with all strips they fill half a second cache

int padded_inputs(int m) { return (m + simd::kLanes - 1) / simd::kLanes * simd::kLanes; }

int chunk_of(int m) { return std::min(padded_inputs(m), kStrips * simd::kLanes); }

// x[i][c] for i < m to transposed[c][i], the rest of the last strip zero; each thread its share of the columns.
void transpose(const float* x, int ldx, int m, int cols, float* transposed, const Team& team) {
  const int ld = padded_inputs(m);
  const auto [first, last] = team.share(cols);
  for (int strip = 0; strip < ld; strip += simd::kLanes)
    for (int c = first; c < last; ++c)
      for (int i = strip; i < strip + simd::kLanes; ++i)
        transposed[static_cast<size_t>(c) * ld + i] = i < m ? x[static_cast<size_t>(i) * ldx + c] : 0.0f;
}

// sums [16 strips] (+)= the kept weights of a part of a row times the strips.
template <int S = kStrips>
void strips_of_row(int strips, const uint32_t* offsets, const float* values, int kept, const float* x, float* sums, bool add) {
  if constexpr (S > 0) {
    if (strips != S) return strips_of_row<S - 1>(strips, offsets, values, kept, x, sums, add);
    simd::Floats sum[S];
    for (int s = 0; s < S; ++s) sum[s] = add ? simd::load(sums + s * simd::kLanes) : simd::floats(0.0f);
    sparse_row<S>(offsets, values, kept, x, sum);
    for (int s = 0; s < S; ++s) simd::store(sums + s * simd::kLanes, sum[s]);
  }
}

// The scratch of `kept_only`, cut up for one thread.
struct Scratch {
  static constexpr size_t kList = kColumns + simd::kLanes;
  static size_t strips_bytes(int m) { return whole_lines(static_cast<size_t>(kColumns) * chunk_of(m) * sizeof(float)); }
  static size_t sums_bytes(int rows, int m) { return whole_lines(static_cast<size_t>(rows) * chunk_of(m) * sizeof(float)); }
  static size_t at_bytes(int rows) { return whole_lines(rows * sizeof(size_t)); }
  static size_t bytes(int rows, int m, int threads) {
    return strips_bytes(m) + sums_bytes(rows, m) + at_bytes(rows) + threads * kList * 8;
  }
  Scratch(int rows, int m, int rank, std::byte* at_hand)
      : strips(reinterpret_cast<float*>(at_hand)),
        sums(reinterpret_cast<float*>(at_hand + strips_bytes(m))),
        at(reinterpret_cast<size_t*>(at_hand + strips_bytes(m) + sums_bytes(rows, m))),
        offsets(reinterpret_cast<uint32_t*>(reinterpret_cast<std::byte*>(at) + at_bytes(rows) + rank * kList * 8)),
        values(reinterpret_cast<float*>(offsets + kList)) {}
  float* const strips;      // [kColumns][chunk], shared
  float* const sums;        // [rows][chunk]
  size_t* const at;         // [rows]: how far each row's values have been read
  uint32_t* const offsets;  // of the kept weights in the strips, and their values: this thread's
  float* const values;
};

}  // namespace

size_t Masked::count(const uint8_t* bits, int rows, int cols) {
  const size_t bytes = (cols + 7) / 8;
  size_t set = 0;
  for (size_t i = 0; i < rows * bytes; ++i) set += std::popcount(bits[i]);
  for (int r = 0; cols % 8 && r < rows; ++r)
    if (bits[r * bytes + bytes - 1] >> (cols % 8)) return SIZE_MAX;
  return set;
}

Masked::Masked(const uint8_t* bits, const Half* values, size_t kept, int rows, int cols)
    : Weight(rows, cols),
      words_((cols + 15) / 16),
      masks_(static_cast<size_t>(rows) * words_ * sizeof(uint16_t)),
      values_((kept + simd::kLanes) * sizeof(Half)) {
  const size_t bytes = (cols + 7) / 8;
  uint16_t* mask = reinterpret_cast<uint16_t*>(masks_.data());
  start_.push_back(0);
  for (int r = 0; r < rows; ++r) {
    size_t end = start_.back();
    for (int w = 0; w < words_; ++w) {
      const size_t byte = r * bytes + 2 * w;
      const int high = 2 * w + 1 < static_cast<int>(bytes) ? bits[byte + 1] : 0;
      *mask = static_cast<uint16_t>(bits[byte] | high << 8);
      end += std::popcount(*mask++);
    }
    start_.push_back(end);
  }
  std::memcpy(values_.data(), values, kept * sizeof(Half));
  std::memset(values_.data() + kept * sizeof(Half), 0, simd::kLanes * sizeof(Half));
}

size_t Masked::nbytes() const { return masks_.size() + start_.back() * sizeof(Half); }

void Masked::row(int r, float* out) const {
  const uint16_t* mask = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r) * words_;
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + start_[r];
  int c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= cols; c += 16, ++mask) {
    _mm512_storeu_ps(out + c, spread(*mask, simd::load(value)));
    value += std::popcount(*mask);
  }
#endif
  for (; c < cols; c += 16, ++mask)
    for (int lane = 0; lane < std::min(16, cols - c); ++lane) out[c + lane] = *mask >> lane & 1 ? simd::float_of_half(*value++) : 0.0f;
}

// A piece of R rows of one input: each word's kept values are spread over the lanes by the mask as they arrive, so that
// memory is read once and compressed, and R chains of pointers and sums run side by side. Masks are `words_` apart; `value`
// goes on to what follows the piece.
template <int R>
void Masked::single(const uint16_t* masks, const Half** values, const float* x, int count, float* y, bool add) const {
#if defined(__AVX512F__)
  const Half* value[R];
  __m512 sum[R];
  simd::unrolled<R>([&](auto k) {
    value[k] = values[k];
    sum[k] = _mm512_setzero_ps();
  });
  const auto word = [&](int w, __m512 input) __attribute__((always_inline)) {
    simd::unrolled<R>([&](auto k) {
      const uint16_t kept = masks[static_cast<size_t>(k) * words_ + w];
      sum[k] = _mm512_fmadd_ps(spread(kept, simd::load(value[k])), input, sum[k]);
      value[k] += std::popcount(uint32_t{kept});
      asm("" : "+r"(value[k]));  // GCC would put the pointers into one vector register and take them out again
    });
  };
  int w = 0;
  for (; 16 * (w + 1) <= count; ++w) word(w, simd::load(x + 16 * w));
  if (16 * w < count) word(w, simd::load(x + 16 * w, count - 16 * w));
  simd::unrolled<R>([&](auto k) {
    values[k] = value[k];
    y[k] = simd::total(sum[k]) + (add ? y[k] : 0.0f);
  });
#else
  (void)masks, (void)values, (void)x, (void)count, (void)y, (void)add;
#endif
}

template <int R>
void Masked::single_rows(const float* x, int r, float* y) const {
  const uint16_t* masks = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r) * words_;
  const Half* values[R];
  for (int k = 0; k < R; ++k) values[k] = reinterpret_cast<const Half*>(values_.data()) + start_[r + k];
  for (int c = 0; c < cols; c += kPieceCols) single<R>(masks + c / 16, values, x + c, std::min(kPieceCols, cols - c), y + r, c > 0);
}

// The kept ones of `words` words: their columns, counted from the first, times `scale`, and their values.
int Masked::unpack(const uint16_t* mask, int words, const Half* value, uint32_t scale, uint32_t* offsets, float* values) {
  uint32_t* offset = offsets;
#if defined(__AVX512F__)
  const __m512i step = _mm512_set1_epi32(static_cast<int>(16 * scale));
  __m512i column = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm512_set1_epi32(static_cast<int>(scale)));
  for (int w = 0; w < words; ++w) {
    _mm512_storeu_si512(offset, _mm512_maskz_compress_epi32(mask[w], column));
    offset += std::popcount(mask[w]);
    column = _mm512_add_epi32(column, step);
  }
#else
  for (int w = 0; w < words; ++w)
    for (uint32_t left = mask[w]; left != 0; left &= left - 1) *offset++ = scale * (16 * w + std::countr_zero(left));
#endif
  const int kept = static_cast<int>(offset - offsets);
  for (int k = 0; k < kept; k += simd::kLanes) simd::store(values + k, simd::load(value + k));
  return kept;
}

// Many inputs: transposed into strips, a block of columns at a time; each row's part of the block is unpacked into a list
// once and meets all strips, so that zeros cost nothing. The sums of all rows wait between blocks.
void Masked::kept_only(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  const Scratch room(rows, m, team.rank, scratch);
  const auto [first, last] = team.share(rows);
  for (int i = 0; i < m; i += chunk_of(m)) {
    const int inputs = std::min(chunk_of(m), m - i), ld = padded_inputs(inputs);
    for (int c = 0; c < cols; c += kColumns) {
      const int count = std::min(kColumns, cols - c);
      transpose(x + static_cast<size_t>(i) * ldx + c, ldx, inputs, count, room.strips, team);
      team.sync();
      for (int r = first; r < last; ++r) {
        const uint16_t* mask = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r) * words_ + c / 16;
        size_t& at = room.at[r];
        if (c == 0) at = start_[r];
        const Half* value = reinterpret_cast<const Half*>(values_.data()) + at;
        const int kept = unpack(mask, (count + 15) / 16, value, ld, room.offsets, room.values);
        strips_of_row(ld / simd::kLanes, room.offsets, room.values, kept, room.strips, room.sums + static_cast<size_t>(r) * ld, c > 0);
        at += kept;
      }
      team.sync();
    }
    for (int k = 0; k < inputs; ++k)
      for (int r = first; r < last; ++r) y[static_cast<size_t>(i + k) * ldy + r] = room.sums[static_cast<size_t>(r) * ld + k];
  }
  team.sync();
}

size_t Masked::scratch(int m) const {
  const int threads = Pool::get().size();
  return std::max(Scratch::bytes(rows, m, threads), by_rows_scratch(cols, threads));
}

// Where skipping zeros beats multiplying them, as measured: the more inputs share an unpacked list, the sooner.
bool Masked::skips(int m) const {
  const double share = static_cast<double>(start_.back()) / (static_cast<double>(rows) * cols);
  return m >= 16 ? share < 0.4 : m >= 6 && share < 0.2;
}

void Masked::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  if (skips(m)) return kept_only(x, ldx, m, y, ldy, scratch, team);
#if defined(__AVX512F__)
  if (m == 1) {
    const auto [first, last] = team.share(rows);
    int r = first;
    for (; r + 4 <= last; r += 4) single_rows<4>(x, r, y);
    for (; r < last; ++r) single_rows<1>(x, r, y);
    return team.sync();
  }
#endif
  apply_by_rows(*this, x, ldx, m, y, ldy, scratch, team);
}

}  // namespace trimtab
