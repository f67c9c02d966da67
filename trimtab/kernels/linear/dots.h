// Dot products of rows with inputs, a block of both at a time: the fp32 arithmetic of every format that unpacks rows.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/simd.h"

namespace trimtab {

#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotInputs = 6;  // 24 of the 32 registers add up, 10 loads feed 24 multiply-adds
#else
constexpr int kDotRows = 2, kDotInputs = 2;  // 4 pairs of the 16 registers add up
#endif

// y[i * ldy + r] (+)= sum_c w[r * ldw + c] x[i * ldx + c] for r < R, i < M. T is float or Half.
template <int R, int M, typename T>
void dot_block(const T* w, size_t ldw, const float* x, size_t ldx, int cols, float* y, size_t ldy, bool add) {
  simd::Floats sum[R][M];
  for (auto& row : sum)
    for (simd::Floats& lanes : row) lanes = simd::floats(0.0f);
  const auto step = [&](auto load, int c) {
    simd::Floats weight[R];
    for (int r = 0; r < R; ++r) weight[r] = load(w + r * ldw + c);
    for (int i = 0; i < M; ++i) {
      const simd::Floats input = load(x + i * ldx + c);
      for (int r = 0; r < R; ++r) sum[r][i] = simd::fma(weight[r], input, sum[r][i]);
    }
  };
  int c = 0;
  for (; c + simd::kLanes <= cols; c += simd::kLanes) step([](auto p) { return simd::load(p); }, c);
  if (c < cols) step([n = cols - c](auto p) { return simd::load(p, n); }, c);
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; ++r) y[i * ldy + r] = simd::total(sum[r][i]) + (add ? y[i * ldy + r] : 0.0f);
}

template <int R, int M = kDotInputs, typename T>
void dot_inputs(const T* w, size_t ldw, const float* x, size_t ldx, int m, int cols, float* y, size_t ldy, bool add) {
  if constexpr (M > 0) {
    if (m == M) return dot_block<R, M>(w, ldw, x, ldx, cols, y, ldy, add);
    dot_inputs<R, M - 1>(w, ldw, x, ldx, m, cols, y, ldy, add);
  }
}

// The same for any numbers of rows and inputs.
template <typename T>
void dots(const T* w, size_t ldw, int rows, const float* x, size_t ldx, int m, int cols, float* y, size_t ldy, bool add) {
  for (int i = 0; i < m; i += kDotInputs) {
    const int inputs = std::min(kDotInputs, m - i);
    int r = 0;
    for (; r + kDotRows <= rows; r += kDotRows)
      dot_inputs<kDotRows>(w + r * ldw, ldw, x + i * ldx, ldx, inputs, cols, y + i * ldy + r, ldy, add);
    for (; r < rows; ++r) dot_inputs<1>(w + r * ldw, ldw, x + i * ldx, ldx, inputs, cols, y + i * ldy + r, ldy, add);
  }
}

}  // namespace trimtab
