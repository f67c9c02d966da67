// The product of a sparse row and a dense matrix whose columns lie in strips of sixteen: one multiply-add a kept weight
// and strip (Elsen et al. 2019, arXiv:1911.09723).
#pragma once

#include <cstddef>

#include "base/simd.h"

namespace trimtab {

inline simd::Floats everywhere(const float* p) { return simd::floats(*p); }
inline simd::Floats everywhere(const Half* p) { return simd::floats_of_half(p); }

// sum[s] += sum_k values[k] x[offsets[k] + 16 s ...] for s < S. The sums stay in registers for the whole row; few strips
// are summed in several chains, which hide each other's latency.
template <int S, typename T>
void sparse_row(const uint32_t* offsets, const T* values, int kept, const float* x, simd::Floats (&sum)[S]) {
  constexpr int kChains = S >= 4 ? 1 : S >= 2 ? 2 : 4;
  simd::Floats chain[kChains][S];
  for (int s = 0; s < S; ++s) chain[0][s] = sum[s];
  for (int j = 1; j < kChains; ++j)
    for (int s = 0; s < S; ++s) chain[j][s] = simd::floats(0.0f);
  int k = 0;
  for (; k + kChains <= kept; k += kChains)
    for (int j = 0; j < kChains; ++j) {
      const simd::Floats weight = everywhere(values + k + j);
      const float* strip = x + offsets[k + j];
      for (int s = 0; s < S; ++s) chain[j][s] = simd::fma(weight, simd::load(strip + s * simd::kLanes), chain[j][s]);
    }
  for (; k < kept; ++k)
    for (int s = 0; s < S; ++s)
      chain[0][s] = simd::fma(everywhere(values + k), simd::load(x + offsets[k] + s * simd::kLanes), chain[0][s]);
  for (int s = 0; s < S; ++s) {
    sum[s] = chain[0][s];
    for (int j = 1; j < kChains; ++j) sum[s] = simd::fma(simd::floats(1.0f), chain[j][s], sum[s]);
  }
}

}  // namespace trimtab
