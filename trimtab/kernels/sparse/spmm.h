// The product of a sparse row and a dense matrix whose columns lie in strips of sixteen: one multiply-add a kept weight
// and strip (Elsen et al. 2019, arXiv:1911.09723).
#pragma once

#include <cstddef>

#include "base/lanes.h"

namespace trimtab {

// sum[s] += sum_k values[k] x[offsets[k] + 16 s ...] for s < S. The sums stay in registers for the whole row.
template <int S, typename T>
void sparse_row(const uint32_t* offsets, const T* values, int kept, const float* x, Lanes (&sum)[S]) {
  for (int k = 0; k < kept; ++k) {
    Lanes weight;
    if constexpr (sizeof(T) == sizeof(float)) weight = Lanes::all(values[k]);
    else weight = Lanes::all_half(values + k);
    const float* strip = x + offsets[k];
    for (int s = 0; s < S; ++s) sum[s] = Lanes::fma(weight, Lanes::load(strip + s * Lanes::kWidth), sum[s]);
  }
}

}  // namespace trimtab
