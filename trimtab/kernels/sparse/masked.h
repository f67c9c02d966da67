// A weight with zeros anywhere: a bit a weight, and the kept values in halves, row after row.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arrays.h"
#include "base/simd.h"
#include "linear/weight.h"

namespace trimtab {

// Loaded as sparse, computed as dense (Xia et al. 2023, arXiv:2309.10285) with few inputs; with many, only the kept
// weights are multiplied.
class Masked final : public Weight {
 public:
  // bits [rows][ceil(cols / 8)]: bit c % 8 of byte c / 8 says whether column c of the row is kept.
  Masked(const uint8_t* bits, const Half* values, size_t kept, int rows, int cols);
  size_t nbytes() const override;
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

  // How many bits are set in `bits [rows][ceil(cols / 8)]`; those behind the last column must be clear.
  static size_t count(const uint8_t* bits, int rows, int cols);

 private:
  template <int R>
  [[gnu::noinline]] void single(const uint16_t* masks, const Half** values, const float* x, int count, float* y, bool add) const;
  template <int R>
  void single_rows(const float* x, int r, float* y) const;
  static int unpack(const uint16_t* mask, int words, const Half* value, uint32_t scale, uint32_t* offsets, float* values);
  bool skips(int m) const;
  void kept_only(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const;

  const int words_;            // of sixteen columns
  Buffer masks_;               // [rows][words_]
  Buffer values_;              // and sixteen more halves, so that a full register can be read behind the last
  std::vector<size_t> start_;  // of each row's values, and the end
};

}  // namespace trimtab
