// Products with panels of sixteen rows, whose weights of one column lie side by side: no sum runs across a register, and
// a column's inputs are broadcast as they are read.
#pragma once

#include <cstddef>

#include "base/simd.h"

namespace trimtab {

constexpr int kPanelRows = simd::kLanes;
#if defined(__AVX512F__)
constexpr int kPanelInputs = 16;  // inputs that share one load of a panel's column
#else
constexpr int kPanelInputs = 4;
#endif

// y[i * ldy + lane] (+)= sum_c panel[c][lane] x[i * ldx + c] for i < M and the first n lanes. T is float or Half.
template <int M, typename T>
void panel_block(const T* panel, int cols, const float* x, size_t ldx, float* y, size_t ldy, int n, bool add) {
  simd::Floats sum[M];
  for (int i = 0; i < M; ++i) sum[i] = add ? simd::load(y + i * ldy, n) : simd::floats(0.0f);
  for (int c = 0; c < cols; ++c, panel += kPanelRows) {
    const simd::Floats weight = simd::load(panel);
    for (int i = 0; i < M; ++i) sum[i] = simd::fma(weight, simd::floats(x[i * ldx + c]), sum[i]);
  }
  for (int i = 0; i < M; ++i) simd::store(y + i * ldy, sum[i], n);
}

// The same for m inputs.
template <typename T>
void panel_dots(const T* panel, int cols, const float* x, size_t ldx, int m, float* y, size_t ldy, int n, bool add) {
  int i = 0;
  for (; i + kPanelInputs <= m; i += kPanelInputs)
    panel_block<kPanelInputs>(panel, cols, x + i * ldx, ldx, y + i * ldy, ldy, n, add);
  for (; i + 4 <= m; i += 4) panel_block<4>(panel, cols, x + i * ldx, ldx, y + i * ldy, ldy, n, add);
  for (; i < m; ++i) panel_block<1>(panel, cols, x + i * ldx, ldx, y + i * ldy, ldy, n, add);
}

}  // namespace trimtab
