// The way to apply a weight that serves every format and many inputs: unpack a few rows, multiply, go on.
#pragma once

#include "linear/weight.h"

namespace trimtab {

size_t by_rows_scratch(int cols, int threads);

// `Weight::apply` by way of `Weight::row`: each thread unpacks a tile of rows into its part of the scratch, where the
// cache keeps it, and multiplies it with all inputs.
void apply_by_rows(const Weight& weight, const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch,
                   const Team& team);

}  // namespace trimtab
