#include "sparse/masked.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "linear/by_rows.h"
#include "linear/dots.h"
#include "sparse/spmm.h"

namespace trimtab {
namespace {

#if defined(__AVX512F__)
constexpr int kStrips = 8;  // of sixteen inputs: as many sums as hide the latency of the multiply-adds
#else
constexpr int kStrips = 4;
#endif
constexpr int kManyInputs = 16;  // from here on the kept weights alone are multiplied, where few enough are kept

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int padded_inputs(int m) { return (m + Lanes::kWidth - 1) / Lanes::kWidth * Lanes::kWidth; }

// Inputs that are transposed at a time: theirs should lie in a core's second cache.
int chunk_of(int m, int cols) { return std::min(padded_inputs(m), std::clamp(131'072 / cols / 16, 1, kStrips) * 16); }

// x[i][c] for i < m to transposed[c][i], the rest of the last strip zero; each thread its share of the columns.
void transpose(const float* x, int ldx, int m, int cols, float* transposed, const Team& team) {
  const int ld = padded_inputs(m);
  const auto [first, last] = team.share(cols);
  for (int strip = 0; strip < ld; strip += Lanes::kWidth)
    for (int c = first; c < last; ++c)
      for (int i = strip; i < strip + Lanes::kWidth; ++i)
        transposed[static_cast<size_t>(c) * ld + i] = i < m ? x[static_cast<size_t>(i) * ldx + c] : 0.0f;
}

template <int S = kStrips>
void strips_of_row(int strips, const uint32_t* offsets, const float* values, int kept, const float* x, float* y, int ldy, int m) {
  if constexpr (S > 0) {
    if (strips != S) return strips_of_row<S - 1>(strips, offsets, values, kept, x, y, ldy, m);
    Lanes sum[S];
    for (Lanes& lanes : sum) lanes = Lanes::zero();
    sparse_row<S>(offsets, values, kept, x, sum);
    float lane[S * Lanes::kWidth];
    for (int s = 0; s < S; ++s) sum[s].store(lane + s * Lanes::kWidth);
    for (int i = 0; i < m; ++i) y[static_cast<size_t>(i) * ldy] = lane[i];
  }
}

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
      values_((kept + Lanes::kWidth) * sizeof(Half)) {
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
  std::memset(values_.data() + kept * sizeof(Half), 0, Lanes::kWidth * sizeof(Half));
}

size_t Masked::nbytes() const { return masks_.size() + start_.back() * sizeof(Half); }

void Masked::row(int r, float* out) const {
  const uint16_t* mask = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r) * words_;
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + start_[r];
  int c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= cols; c += 16, ++mask) {
    _mm512_storeu_ps(out + c, _mm512_maskz_expand_ps(*mask, Lanes::load(value).v));
    value += std::popcount(*mask);
  }
#endif
  for (; c < cols; c += 16, ++mask)
    for (int lane = 0; lane < std::min(16, cols - c); ++lane) out[c + lane] = *mask >> lane & 1 ? to_float(*value++) : 0.0f;
}

// R rows of one input: each word's kept values are spread over the lanes by the mask as they arrive, so that memory is
// read once and compressed, and R chains of pointers and sums run side by side.
template <int R>
void Masked::single(const float* x, int r, float* y) const {
#if defined(__AVX512F__)
  const uint16_t* mask[R];
  const Half* value[R];
  __m512 sum[R];
  for (int k = 0; k < R; ++k) {
    mask[k] = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r + k) * words_;
    value[k] = reinterpret_cast<const Half*>(values_.data()) + start_[r + k];
    sum[k] = _mm512_setzero_ps();
  }
  const auto word = [&](__m512 input, int w) {
    for (int k = 0; k < R; ++k) {
      const uint32_t kept = mask[k][w];
      sum[k] = _mm512_fmadd_ps(_mm512_maskz_expand_ps(kept, Lanes::load(value[k]).v), input, sum[k]);
      value[k] += __builtin_popcount(kept);
    }
  };
  const int whole = cols / 16;
  for (int w = 0; w < whole; ++w) word(_mm512_loadu_ps(x + 16 * w), w);
  if (whole < words_) word(Lanes::load(x + 16 * whole, cols - 16 * whole).v, whole);
  for (int k = 0; k < R; ++k) y[r + k] = Lanes{sum[k]}.sum();
#else
  (void)x, (void)r, (void)y;
#endif
}

// The kept columns of a row and their values, for the product that skips the zeros.
int Masked::unpack(int r, uint32_t* columns, float* values) const {
  const uint16_t* mask = reinterpret_cast<const uint16_t*>(masks_.data()) + static_cast<size_t>(r) * words_;
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + start_[r];
  const int kept = static_cast<int>(start_[r + 1] - start_[r]);
#if defined(__AVX512F__)
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int w = 0; w < words_; ++w) {
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(mask[w], column));
    columns += std::popcount(mask[w]);
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
  }
#else
  for (int w = 0; w < words_; ++w)
    for (uint32_t left = mask[w]; left != 0; left &= left - 1) *columns++ = 16 * w + std::countr_zero(left);
#endif
  for (int k = 0; k < kept; k += Lanes::kWidth) Lanes::load(value + k).store(values + k);
  return kept;
}

// Inputs transposed into strips; each row is unpacked into a list once and meets the strips in turn.
void Masked::kept_only(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  const size_t list = static_cast<size_t>(cols) + Lanes::kWidth;
  const int chunk = chunk_of(m, cols);
  float* transposed = reinterpret_cast<float*>(scratch);
  std::byte* own = scratch + aligned(static_cast<size_t>(cols) * chunk * sizeof(float)) + team.rank * aligned(list * 8);
  uint32_t* columns = reinterpret_cast<uint32_t*>(own);
  float* values = reinterpret_cast<float*>(own) + list;
  const auto [first, last] = team.share(rows);
  for (int i = 0; i < m; i += chunk) {
    const int inputs = std::min(chunk, m - i), ld = padded_inputs(inputs);
    transpose(x + static_cast<size_t>(i) * ldx, ldx, inputs, cols, transposed, team);
    team.sync();
    for (int r = first; r < last; ++r) {
      const int kept = unpack(r, columns, values);
      for (int k = 0; k < kept; ++k) columns[k] *= ld;
      strips_of_row(ld / Lanes::kWidth, columns, values, kept, transposed, y + static_cast<size_t>(i) * ldy + r, ldy, inputs);
    }
    team.sync();
  }
}

size_t Masked::scratch(int m) const {
  const int threads = Pool::get().size();
  const size_t strips = aligned(static_cast<size_t>(cols) * chunk_of(m, cols) * sizeof(float));
  const size_t lists = threads * aligned((static_cast<size_t>(cols) + Lanes::kWidth) * 8);
  return std::max(strips + lists, by_rows_scratch(cols, threads));
}

void Masked::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  const bool few_kept = start_.back() * 2 < static_cast<size_t>(rows) * cols;
  if (m >= kManyInputs && few_kept) return kept_only(x, ldx, m, y, ldy, scratch, team);
#if defined(__AVX512F__)
  if (m == 1) {
    const auto [first, last] = team.share(rows);
    int r = first;
    for (; r + 4 <= last; r += 4) single<4>(x, r, y);
    for (; r < last; ++r) single<1>(x, r, y);
    return team.sync();
  }
#endif
  apply_by_rows(*this, x, ldx, m, y, ldy, scratch, team);
}

}  // namespace trimtab
