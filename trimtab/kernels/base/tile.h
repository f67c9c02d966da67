// The one inner loop of dense products: a tile of outputs kept in registers while the depth passes by.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "base/vectors.h"

namespace trimtab {

inline constexpr int kPanel = 2 * kLanes;  // outputs that lie side by side in memory
#if defined(__AVX512F__)
inline constexpr int kTile = 12;  // rows of a tile: 24 of 32 registers accumulate
#else
inline constexpr int kTile = 6;  // 12 of 16
#endif

// y[i][j] (+)= sum_k x[i * RowStep + k * DepthStep] * w[k][j] for i < M, j < kPanel. A weight is loaded and widened once for
// all M rows; the steps are constants so that an address costs nothing. With Panels = 2 the next panel, `between` further on,
// is taken along: for few rows that reads x half as often and keeps enough sums going to hide their latency.
template <int M, int Panels, int RowStep, int DepthStep, typename T>
inline void tile(const T* w, ptrdiff_t ldw, ptrdiff_t between, int depth, const float* x, float* y, ptrdiff_t ldy, bool add) {
  constexpr int kVectors = 2 * Panels;
  F32 sums[M][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = add ? load(y + i * ldy + v * kLanes) : F32{};
  for (int k = 0; k < depth; ++k, w += ldw, x += DepthStep) {
    F32 weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load(w + v / 2 * between + v % 2 * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const F32 factor = splat(x[i * RowStep]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(factor, weights[v], sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(y + i * ldy + v * kLanes, sums[i][v]);
}

// One panel, for a number of rows that is known only when it runs, 1 <= rows <= kTile.
template <int RowStep, int DepthStep, typename T>
inline void tile(int rows, const T* w, ptrdiff_t ldw, int depth, const float* x, float* y, ptrdiff_t ldy, bool add) {
  using Kernel = void (*)(const T*, ptrdiff_t, ptrdiff_t, int, const float*, float*, ptrdiff_t, bool);
  static constexpr auto kernels = []<size_t... M>(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{&tile<static_cast<int>(M) + 1, 1, RowStep, DepthStep, T>...};
  }(std::make_index_sequence<kTile>());
  kernels[rows - 1](w, ldw, 0, depth, x, y, ldy, add);
}

}  // namespace trimtab
