// The product of a sparse row and a dense matrix whose columns lie in strips of sixteen: one multiply-add a kept weight
// and strip (Elsen et al. 2019, arXiv:1911.09723).
#pragma once

#include <cstddef>

#include "base/lanes.h"

namespace trimtab {

inline Lanes everywhere(const float* p) { return Lanes::all(*p); }
inline Lanes everywhere(const Half* p) { return Lanes::all_half(p); }

// sum[s] += sum_k values[k] x[offsets[k] + 16 s ...] for s < S. The sums stay in registers for the whole row; few strips
// are summed in several chains, which hide each other's latency.
template <int S, typename T>
void sparse_row(const uint32_t* offsets, const T* values, int kept, const float* x, Lanes (&sum)[S]) {
  constexpr int kChains = S >= 4 ? 1 : S >= 2 ? 2 : 4;
  Lanes chain[kChains][S];
  for (int s = 0; s < S; ++s) chain[0][s] = sum[s];
  for (int j = 1; j < kChains; ++j)
    for (int s = 0; s < S; ++s) chain[j][s] = Lanes::zero();
  int k = 0;
  for (; k + kChains <= kept; k += kChains)
    for (int j = 0; j < kChains; ++j) {
      const Lanes weight = everywhere(values + k + j);
      const float* strip = x + offsets[k + j];
      for (int s = 0; s < S; ++s) chain[j][s] = Lanes::fma(weight, Lanes::load(strip + s * Lanes::kWidth), chain[j][s]);
    }
  for (; k < kept; ++k)
    for (int s = 0; s < S; ++s)
      chain[0][s] = Lanes::fma(everywhere(values + k), Lanes::load(x + offsets[k] + s * Lanes::kWidth), chain[0][s]);
  for (int s = 0; s < S; ++s) {
    sum[s] = chain[0][s];
    for (int j = 1; j < kChains; ++j) sum[s] = Lanes::fma(Lanes::all(1), chain[j][s], sum[s]);
  }
}

}  // namespace trimtab
