#include "lowrank/lowrank.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "linear/dots.h"
#include "linear/panels.h"

namespace trimtab {
namespace {

constexpr size_t kAhead = 4096;  // bytes from what is read to what is asked for

void ask_for(const void* next, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) simd::prefetch(static_cast<const std::byte*>(next) + kAhead + at);
}

}  // namespace

LowRank::LowRank(const Half* left, const Half* right, int rows, int rank, int cols)
    : Weight(rows, cols),
      rank(rank),
      memory_(std::make_shared<Buffer>(nbytes())),
      right_(reinterpret_cast<Half*>(memory_->data())),
      left_(right_ + static_cast<size_t>(rank) * cols) {
  std::copy_n(right, static_cast<size_t>(rank) * cols, right_);
  Half* to = left_;
  for (int r = 0; r < rows; r += kPanelRows)
    for (int k = 0; k < rank; ++k)
      for (int lane = 0; lane < kPanelRows; ++lane) *to++ = r + lane < rows ? left[static_cast<size_t>(r + lane) * rank + k] : Half{0};
}

LowRank::LowRank(const LowRank& other, std::shared_ptr<Buffer> memory, size_t at)
    : Weight(other.rows, other.cols),
      rank(other.rank),
      memory_(std::move(memory)),
      right_(reinterpret_cast<Half*>(memory_->data() + at)),
      left_(right_ + static_cast<size_t>(rank) * cols) {
  std::memcpy(right_, other.right_, nbytes());
}

size_t LowRank::nbytes() const { return (static_cast<size_t>(panels()) * kPanelRows + cols) * rank * sizeof(Half); }

size_t LowRank::scratch(int m) const { return static_cast<size_t>(m) * rank * sizeof(float); }

Half LowRank::left(int r, int k) const {
  return left_[(static_cast<size_t>(r / kPanelRows) * rank + k) * kPanelRows + r % kPanelRows];
}

int LowRank::panels() const { return (rows + kPanelRows - 1) / kPanelRows; }

void LowRank::narrow(const float* x, int ldx, int m, float* inner, int first, int last) const {
  const Half* right = right_ + static_cast<size_t>(first) * cols;
  dots(right, cols, last - first, x, ldx, m, cols, inner + first, rank, false);
}

void LowRank::widen(const float* inner, int m, float* y, int ldy, bool add, int first, int last) const {
  for (int p = first; p < last; ++p) {
    const Half* panel = left_ + static_cast<size_t>(p) * rank * kPanelRows;
    ask_for(panel, static_cast<size_t>(rank) * kPanelRows * sizeof(Half));
    panel_dots(panel, rank, inner, rank, m, y + p * kPanelRows, ldy, std::min(kPanelRows, rows - p * kPanelRows), add);
  }
}

void LowRank::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  float* inner = reinterpret_cast<float*>(scratch);
  const auto [rank_first, rank_last] = team.share(rank);
  narrow(x, ldx, m, inner, rank_first, rank_last);
  team.sync();
  const auto [panel_first, panel_last] = team.share(panels());
  widen(inner, m, y, ldy, false, panel_first, panel_last);
  team.sync();
}

void LowRank::row(int r, float* out) const {
  std::fill(out, out + cols, 0.0f);
  for (int k = 0; k < rank; ++k) {
    const float weight = simd::float_of_half(left(r, k));
    for (int c = 0; c < cols; ++c) out[c] += weight * simd::float_of_half(right_[static_cast<size_t>(k) * cols + c]);
  }
}

Plus::Plus(std::shared_ptr<const Weight> base, std::shared_ptr<const LowRank> extra)
    : Weight(base->rows, base->cols), base_(std::move(base)), extra_(std::move(extra)) {}

size_t Plus::scratch(int m) const { return whole_lines(extra_->scratch(m)) + base_->scratch(m); }

void Plus::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  float* inner = reinterpret_cast<float*>(scratch);
  const auto [rank_first, rank_last] = team.share(extra_->rank);
  extra_->narrow(x, ldx, m, inner, rank_first, rank_last);
  // When the base returns, all threads have been there: the inner values are complete as well.
  base_->apply(x, ldx, m, y, ldy, scratch + whole_lines(extra_->scratch(m)), team);
  const auto [panel_first, panel_last] = team.share(extra_->panels());
  extra_->widen(inner, m, y, ldy, true, panel_first, panel_last);
  team.sync();
}

void Plus::row(int r, float* out) const {
  std::vector<float> extra(cols);
  base_->row(r, out);
  extra_->row(r, extra.data());
  for (int c = 0; c < cols; ++c) out[c] += extra[c];
}

}  // namespace trimtab
