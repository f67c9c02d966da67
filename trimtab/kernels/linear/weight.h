// A weight matrix as a kernel streams it: packed, interleaved for the vector unit, never expanded as a whole.
#pragma once

#include <cstddef>

#include "base/team.h"

namespace trimtab {

// Rounded up to whole cache lines, so that what follows in a scratch is aligned.
inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

class Weight {
 public:
  Weight(int rows, int cols) : rows(rows), cols(cols) {}
  virtual ~Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;

  const int rows, cols;

  // Bytes that one pass over the matrix reads.
  virtual size_t nbytes() const = 0;

  // Bytes of scratch that `apply` needs for m inputs; shared by the team, 64-byte aligned.
  virtual size_t scratch(int m) const = 0;

  // y[i * ldy + r] = sum_c W[r, c] x[i * ldx + c] for i < m. Every thread of the team calls it with the same arguments
  // after x is complete; when it returns, y is complete for all of them.
  virtual void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const = 0;

  // Row r unpacked, cols floats: an embedding's row.
  virtual void row(int r, float* out) const = 0;
};

}  // namespace trimtab
