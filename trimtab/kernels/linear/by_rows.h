// The way to apply a weight that serves every format and many inputs: unpack a few rows, multiply, go on.
#pragma once

#include "linear/weight.h"

namespace trimtab {

// Longer rows are multiplied piece by piece, so that the inputs' pieces stay near, too. All ways to apply a weight add up a
// piece before it meets what came before it, so that an output depends on its own inputs alone.
constexpr int kPieceCols = 2048;

size_t by_rows_scratch(int cols, int threads);

// `Weight::apply` by way of `Weight::row`: each thread unpacks a tile of rows into its part of the scratch, where the
// cache keeps it, and multiplies it with all inputs.
void apply_by_rows(const Weight& weight, const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch,
                   const Team& team);

}  // namespace trimtab
