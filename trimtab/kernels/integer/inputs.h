// The inputs of a grouped integer matrix, rounded to 8 bits on the fly: q = round(x / s), s = max|x| / 127 of a span.
#pragma once

#include <cstdint>

#include "base/team.h"
#include "integer/layout.h"

namespace trimtab {

// A few inputs next to each other, as the kernels read them from front to back.
struct Panel {
  const int32_t* q;      // [spans, vectors, inputs], each 4 neighbouring columns
  const float* scale;    // [spans, inputs]
  const int32_t* minus;  // [spans, join, inputs]: minus the sum of a group's q, times the zero point where it is one for all
};

// All inputs, in panels of about equal size.
struct Inputs {
  int m, panels;
  float* rotated;  // [m, cols], where the level rotates
  int32_t* q;
  float* scale;
  int32_t* minus;

  Inputs(const Layout& layout, int m, int most, std::byte* memory);
  static size_t bytes(const Layout& layout, int m);

  int first(int panel) const { return static_cast<int>(static_cast<int64_t>(m) * panel / panels); }
  Panel panel(const Layout& layout, int p) const {
    const size_t before = static_cast<size_t>(first(p)) * layout.spans;
    return {q + before * layout.vectors, scale + before, minus + before * layout.join};
  }

  // Every thread of the team calls it; the inputs are complete when it returns.
  void quantise(const Layout& layout, const float* x, int ldx, const Team& team) const;
};

// x [group] becomes x H, H the orthonormal Hadamard matrix.
void hadamard(float* x, int group);

}  // namespace trimtab
