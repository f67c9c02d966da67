#include "sparse/nm.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "linear/panels.h"

namespace trimtab {
namespace {

constexpr int kMostInputs = 4;   // more are served by unpacking: a permutation an input and slot costs as much as a zero
constexpr int kTileCols = 512;  // a tile of sixteen rows fills two thirds of the first cache
constexpr size_t kTileFloats = (kTileCols + 16) * kPanelRows;

size_t panels_of(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Columns of the copy of an input whose last group may be read as a whole register.
size_t padded(int cols) { return (static_cast<size_t>(cols) + 2 * kPanelRows) / kPanelRows * kPanelRows; }

}  // namespace

bool NM::fits(int kept, int group) {
  const int width = std::bit_width(static_cast<unsigned>(group - 1));
  return (group == 2 || group == 4 || group == 8 || group == 16) && kept >= 1 && kept * width <= 32;
}

NM::NM(const Half* values, const uint8_t* places, int rows, int cols, int kept, int group)
    : Weight(rows, cols),
      kept_(kept),
      group_(group),
      width_(std::bit_width(static_cast<unsigned>(group - 1))),
      each_(32 / width_ / kept * kept),
      slots_((cols + group - 1) / group * kept),
      words_((slots_ + each_ - 1) / each_),
      values_(panels_of(rows) * slots_ * kPanelRows * sizeof(Half)),
      places_(panels_of(rows) * words_ * kPanelRows * sizeof(uint32_t)) {
  std::memset(values_.data(), 0, values_.size());
  std::memset(places_.data(), 0, places_.size());
  Half* value = reinterpret_cast<Half*>(values_.data());
  uint32_t* word = reinterpret_cast<uint32_t*>(places_.data());
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < slots_; ++s) {
      const size_t panel = r / kPanelRows, lane = r % kPanelRows, from = static_cast<size_t>(r) * slots_ + s;
      // In the order of their places, in which all ways to apply the weight add up.
      const uint8_t* group = places + from - s % kept;
      const int before = static_cast<int>(std::count_if(group, group + kept, [&](uint8_t place) { return place < places[from]; }));
      const int to = s / kept * kept + before + static_cast<int>(std::count(group, places + from, places[from]));
      value[(panel * slots_ + to) * kPanelRows + lane] = values[from];
      word[(panel * words_ + to / each_) * kPanelRows + lane] |= static_cast<uint32_t>(places[from]) << (to % each_ * width_);
    }
}

void NM::row(int r, float* out) const {
  const size_t panel = r / kPanelRows, lane = r % kPanelRows;
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + panel * slots_ * kPanelRows + lane;
  const uint32_t* word = reinterpret_cast<const uint32_t*>(places_.data()) + panel * words_ * kPanelRows + lane;
  std::memset(out, 0, cols * sizeof(float));
  for (int s = 0; s < slots_; ++s) {
    const int place = word[static_cast<size_t>(s / each_) * kPanelRows] >> (s % each_ * width_) & (group_ - 1);
    const int c = s / kept_ * group_ + place;
    if (c < cols) out[c] += simd::float_of_half(value[static_cast<size_t>(s) * kPanelRows]);
  }
}

// Columns [c, c + count) of panel p, dense: tile [count][16]. Both ends are whole words of places.
void NM::unpack(int p, int c, int count, float* tile) const {
  const size_t first = static_cast<size_t>(c) / group_ * kept_;
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + (static_cast<size_t>(p) * slots_ + first) * kPanelRows;
  const uint32_t* word = reinterpret_cast<const uint32_t*>(places_.data()) + (static_cast<size_t>(p) * words_ + first / each_) * kPanelRows;
  std::memset(tile, 0, static_cast<size_t>((count + group_ - 1) / group_) * group_ * kPanelRows * sizeof(float));
  const int slots = static_cast<int>(std::min<size_t>((count + group_ - 1) / group_ * kept_, slots_ - first));
  for (int s = 0; s < slots; s += each_, word += kPanelRows)
    for (int k = 0, end = std::min(each_, slots - s); k < end; ++k, value += kPanelRows) {
      float* group = tile + static_cast<size_t>((s + k) / kept_) * group_ * kPanelRows;
#if defined(__AVX512F__)
      // Each place of the group takes the value where it is the lane's own: no store waits for a computed address.
      const __m512i place = _mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(word), _mm512_set1_epi32(k * width_)),
                                             _mm512_set1_epi32(group_ - 1));
      const __m512 weight = simd::load(value);
      for (int j = 0; j < group_; ++j)
        _mm512_mask_storeu_ps(group + j * kPanelRows, _mm512_cmpeq_epi32_mask(place, _mm512_set1_epi32(j)), weight);
#else
      for (int lane = 0; lane < kPanelRows; ++lane)
        if (value[lane] != 0) group[(word[lane] >> (k * width_) & (group_ - 1)) * kPanelRows + lane] = simd::float_of_half(value[lane]);
#endif
    }
}

// Many inputs: a panel becomes dense piece by piece in the first cache, and meets all inputs there.
void NM::unpacked(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  float* tile = reinterpret_cast<float*>(scratch) + team.rank * kTileFloats;
  const int piece = kTileCols / (each_ / kept_ * group_) * (each_ / kept_ * group_);
  const auto [first, last] = team.share(static_cast<int>(panels_of(rows)));
  for (int p = first; p < last; ++p)
    for (int c = 0; c < cols; c += piece) {
      const int count = std::min(piece, cols - c);
      unpack(p, c, count, tile);
      panel_dots(tile, count, x + c, ldx, m, y + p * kPanelRows, ldy, std::min(kPanelRows, rows - p * kPanelRows), c > 0);
    }
  team.sync();
}

#if defined(__AVX512F__)

// P panels of sixteen rows from p on for M inputs [M][ldx]. KEPT and GROUP are those of the weight, or 0 where they may be
// any. Each output is one chain of additions, and two panels at once hide its latency.
template <int P, int M, int KEPT, int GROUP>
void NM::panel(int p, const float* x, size_t ldx, float* y, int ldy) const {
  const Half* value = reinterpret_cast<const Half*>(values_.data()) + static_cast<size_t>(p) * slots_ * kPanelRows;
  const __m512i* word = reinterpret_cast<const __m512i*>(places_.data()) + static_cast<size_t>(p) * words_;
  const size_t next = static_cast<size_t>(slots_) * kPanelRows;  // from a panel's value to the next one's
  const int kept = KEPT > 0 ? KEPT : kept_, group = GROUP > 0 ? GROUP : group_;
  const int each = KEPT > 0 && GROUP == 4 ? 16 / KEPT * KEPT : each_;
  const __m512i step = _mm512_set1_epi32(width_), within = _mm512_set1_epi32(group - 1);
  __m512 sum[P][M];
  for (auto& panel : sum)
    for (__m512& lanes : panel) lanes = _mm512_setzero_ps();
  for (int s = 0; s < slots_; s += each, ++word) {
    __m512i places[P];
    for (int q = 0; q < P; ++q) places[q] = word[q * words_];
    for (int end = std::min(each, slots_ - s), k = 0; k < end; k += kept, x += group) {
      __m512 input[M];
      for (int i = 0; i < M; ++i)  // a group of four fills each quarter of a register: its permutation is the cheaper one
        input[i] = GROUP == 4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(x + i * ldx)) : _mm512_loadu_ps(x + i * ldx);
      for (int j = 0; j < kept; ++j, value += kPanelRows)
        for (int q = 0; q < P; ++q) {
          const __m512 weight = simd::load(value + q * next);
          for (int i = 0; i < M; ++i) {
            const __m512 chosen = GROUP == 4 ? _mm512_permutevar_ps(input[i], places[q])
                                             : _mm512_permutexvar_ps(_mm512_and_si512(places[q], within), input[i]);
            sum[q][i] = _mm512_fmadd_ps(weight, chosen, sum[q][i]);
          }
          places[q] = GROUP == 4 ? _mm512_srli_epi32(places[q], 2) : _mm512_srlv_epi32(places[q], step);
        }
    }
  }
  for (int q = 0; q < P; ++q, ++p)
    for (int i = 0; i < M; ++i)
      simd::store(y + static_cast<size_t>(i) * ldy + p * kPanelRows, sum[q][i], std::min(kPanelRows, rows - p * kPanelRows));
}

template <int M, int KEPT, int GROUP>
void NM::panels(const float* x, size_t ldx, float* y, int ldy, const Team& team) const {
  const auto [first, last] = team.share(static_cast<int>(panels_of(rows)));
  int p = first;
  for (; p + 2 <= last; p += 2) panel<2, M, KEPT, GROUP>(p, x, ldx, y, ldy);
  if (p < last) panel<1, M, KEPT, GROUP>(p, x, ldx, y, ldy);
}

template <int M>
void NM::inputs(int m, const float* x, size_t ldx, float* y, int ldy, const Team& team) const {
  if constexpr (M > 0) {
    if (m != M) return inputs<M - 1>(m, x, ldx, y, ldy, team);
    if (kept_ == 2 && group_ == 4) return panels<M, 2, 4>(x, ldx, y, ldy, team);
    if (kept_ == 1 && group_ == 4) return panels<M, 1, 4>(x, ldx, y, ldy, team);
    panels<M, 0, 0>(x, ldx, y, ldy, team);
  }
}

#endif

size_t NM::scratch(int m) const {
  return std::max(std::min(m, kMostInputs) * padded(cols) * sizeof(float), Pool::get().size() * kTileFloats * sizeof(float));
}

void NM::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
#if defined(__AVX512F__)
  if (m <= kMostInputs) {
    float* copy = reinterpret_cast<float*>(scratch);
    const size_t ld = padded(cols);
    const auto [first, last] = team.share(static_cast<int>(ld));
    for (int i = 0; i < m; ++i)
      for (int c = first; c < last; ++c) copy[i * ld + c] = c < cols ? x[static_cast<size_t>(i) * ldx + c] : 0.0f;
    team.sync();
    inputs<kMostInputs>(m, copy, ld, y, ldy, team);
    return team.sync();
  }
#endif
  unpacked(x, ldx, m, y, ldy, scratch, team);
}

}  // namespace trimtab
