// A weight of low rank: two factors in halves, and the sum of any weight and such a correction.
#pragma once

#include <memory>

#include "base/arrays.h"
#include "base/simd.h"
#include "linear/weight.h"

namespace trimtab {

// W = left right, with left [rows, rank] and right [rank, cols].
class LowRank final : public Weight {
 public:
  LowRank(const Half* left, const Half* right, int rows, int rank, int cols);
  // A copy whose factors lie in a part of some memory, at bytes [at, at + other.nbytes()).
  LowRank(const LowRank& other, std::shared_ptr<Buffer> memory, size_t at);
  size_t nbytes() const override;
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

  // The two halves of `apply`, of ranks or panels of rows [first, last): inner [m, rank] = right x, and y (+)= left inner.
  void narrow(const float* x, int ldx, int m, float* inner, int first, int last) const;
  void widen(const float* inner, int m, float* y, int ldy, bool add, int first, int last) const;
  int panels() const;

  const int rank;

 private:
  Half left(int r, int k) const;

  std::shared_ptr<Buffer> memory_;
  Half* right_;  // [rank][cols]
  Half* left_;   // [rows / 16][rank][16]: sixteen outputs lie side by side, so that no sum runs across a register
};

// W = base + extra: the low-rank correction of what the base lost, in the same pass (Yao et al. 2023, arXiv:2303.08302).
class Plus final : public Weight {
 public:
  Plus(std::shared_ptr<const Weight> base, std::shared_ptr<const LowRank> extra);
  size_t nbytes() const override { return base_->nbytes() + extra_->nbytes(); }
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

 private:
  const std::shared_ptr<const Weight> base_;
  const std::shared_ptr<const LowRank> extra_;
};

}  // namespace trimtab
