// A weight of which `kept` of every `group` neighbours in a row stay, groups of 2, 4, 8 or 16.
#pragma once

#include <cstdint>

#include "base/arrays.h"
#include "base/simd.h"
#include "linear/weight.h"

namespace trimtab {

// Sixteen rows lie side by side: lane r of slot s holds the s-th kept value of row r and its place in the group, and one
// permutation of the group's inputs brings each lane the input that it needs. Only kept weights are multiplied.
class NM final : public Weight {
 public:
  // Whether a group's places fit a word of 32 bits, each of log2(group) bits.
  static bool fits(int kept, int group);

  // values and places [rows][ceil(cols / group) * kept], places below `group`.
  NM(const Half* values, const uint8_t* places, int rows, int cols, int kept, int group);
  size_t nbytes() const override { return values_.size() + places_.size(); }
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

 private:
  void unpack(int p, int c, int count, float* tile) const;
  void unpacked(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const;
  template <int P, int M, int KEPT, int GROUP>
  void panel(int p, const float* x, size_t ldx, float* y, int ldy) const;
  template <int M, int KEPT, int GROUP>
  void panels(const float* x, size_t ldx, float* y, int ldy, const Team& team) const;
  template <int M>
  void inputs(int m, const float* x, size_t ldx, float* y, int ldy, const Team& team) const;

  const int kept_, group_;
  const int width_, each_;  // bits of a place, and places in a word: those of whole groups
  const int slots_;         // of a row
  const int words_;
  Buffer values_;  // [rows / 16][slots_][16]
  Buffer places_;  // [rows / 16][words_][16]: a word of 32 bits holds a lane's places
};

}  // namespace trimtab
