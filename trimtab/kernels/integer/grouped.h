// A matrix of grouped integers of 1 to 8 bits, or of minifloats whose grid is one of integers, times 8-bit inputs.
#pragma once

#include <vector>

#include "base/arrays.h"
#include "integer/kernels.h"
#include "integer/layout.h"
#include "linear/weight.h"

namespace trimtab {

// A matrix as an artifact stores it: codes end to end, least significant bit first, rows one after the other.
struct Stored {
  const uint8_t* codes;
  size_t bytes;
  const uint8_t* scales;  // [rows, groups], one or two bytes each
  const uint8_t* zeros;   // [rows, groups], or null
  int rows;
  float factor;  // scale of the whole matrix
};

class GroupedWeight : public Weight {
 public:
  // `table`: from codes to stored integers, empty where they are the same. The parts lie one below the other.
  GroupedWeight(const Layout& layout, std::vector<uint8_t> table, const std::vector<Stored>& parts);

  size_t nbytes() const override { return data_.size(); }
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

 private:
  Tiles view() const;
  // A whole number of the blocks that the kernels take.
  int blocks() const { return Layout::ceil(rows, kTiles * kRows); }
  int tiles() const { return blocks() * kTiles; }
  bool by_stream(int m) const { return m <= kStreamed && streams(layout_); }
  size_t expanded_bytes() const;
  void pack(const std::vector<Stored>& parts, const uint8_t* recode);
  void through_tiles(const Inputs& inputs, float* y, int ldy, std::byte* memory, const Team& team) const;

  Layout layout_;
  Buffer table_, factors_, data_;
  bool has_table_ = false;
};

}  // namespace trimtab
