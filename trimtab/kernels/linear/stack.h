// Weights that read the same inputs, one below the other, each in a format of its own.
#pragma once

#include <memory>
#include <vector>

#include "linear/weight.h"

namespace trimtab {

class Stack final : public Weight {
 public:
  using Parts = std::vector<std::shared_ptr<const Weight>>;
  explicit Stack(Parts parts);  // at least one, all of the same columns
  size_t nbytes() const override;
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

 private:
  const Parts parts_;
};

}  // namespace trimtab
