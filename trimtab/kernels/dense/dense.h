// Weights that are not packed: fp32, bf16 or fp16 in memory, fp32 in arithmetic.
#pragma once

#include <algorithm>

#include "base/arrays.h"
#include "base/tile.h"
#include "linear/weight.h"

namespace trimtab {

// Rows lie in panels of kPanel side by side, [panel][col][row of the panel], so that a thread streams one run of memory and
// every weight that it loads serves all inputs of a tile.
template <typename T>
class DenseWeight final : public Weight {
 public:
  DenseWeight(const T* w, int rows, int cols)
      : Weight(rows, cols), panels_((rows + kPanel - 1) / kPanel), data_(size_t(panels_) * kPanel * cols * sizeof(T)) {
    T* out = panel(0);
    for (int p = 0; p < panels_; ++p)
      for (int c = 0; c < cols; ++c)
        for (int r = p * kPanel; r < (p + 1) * kPanel; ++r) *out++ = r < rows ? w[size_t(r) * cols + c] : T{};
  }

  size_t nbytes() const override { return size_t(rows) * cols * sizeof(T); }

  size_t scratch(int m) const override { return m == 1 ? 0 : size_t(m) * cols * sizeof(float); }

  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override {
    if (m > 1) {
      pack(x, ldx, m, reinterpret_cast<float*>(scratch), team);
      team.sync();
      x = reinterpret_cast<float*>(scratch);
    }
    // The inputs of a block of the depth fit into the nearest cache, and for many inputs the panel's weights too.
    const int step = m > kTile ? kDepth : std::max(kDepth, 8192 / m);
    const auto [first, last] = team.share(panels_);
    for (int depth = 0; depth < cols; depth += step) {
      const int length = std::min(step, cols - depth);
      for (int p = first; p < last;) {
        const int panels = m <= kWide && p + 1 < last ? 2 : 1;
        for (int i = 0; i < m; i += kTile) {
          const int inputs = std::min(kTile, m - i);
          const float* from = x + size_t(i) * cols + size_t(depth) * inputs;
          product(p, panels, depth, length, inputs, from, y + size_t(i) * ldy, ldy);
        }
        p += panels;
      }
    }
    team.sync();
  }

  void row(int r, float* out) const override {
    const T* from = panel(r / kPanel) + r % kPanel;
    for (int c = 0; c < cols; ++c) out[c] = widen(from[size_t(c) * kPanel]);
  }

 private:
  static constexpr int kDepth = 512;
  static constexpr int kWide = kTile / 2;  // up to so many inputs, two panels are taken at once

  T* panel(int p) const { return reinterpret_cast<T*>(data_.data()) + size_t(p) * kPanel * cols; }

  // Inputs as the tiles read them, [tile][col][input of the tile].
  void pack(const float* x, int ldx, int m, float* packed, const Team& team) const {
    const auto [first, last] = team.share(cols);
    for (int i = 0; i < m; ++i) {
      const int tile = i / kTile * kTile, inputs = std::min(kTile, m - tile);
      float* to = packed + size_t(tile) * cols + i % kTile;
      for (int c = first; c < last; ++c) to[size_t(c) * inputs] = x[size_t(i) * ldx + c];
    }
  }

  // A block of the depth, for the outputs of one panel or two; of the last one, cut short, by way of a whole one.
  void product(int p, int panels, int depth, int length, int inputs, const float* x, float* y, int ldy) const {
    const T* w = panel(p) + size_t(depth) * kPanel;
    const int used = std::min(panels * kPanel, rows - p * kPanel);
    float* out = y + p * kPanel;
    if (used == panels * kPanel) return kernels(panels)[inputs - 1](w, kPanel, size_t(kPanel) * cols, length, x, out, ldy, depth > 0);
    alignas(64) float whole[kTile * kPanel];
    const int ld = panels * kPanel;
    if (depth > 0)
      for (int i = 0; i < inputs; ++i) std::copy_n(out + size_t(i) * ldy, used, whole + i * ld);
    kernels(panels)[inputs - 1](w, kPanel, size_t(kPanel) * cols, length, x, whole, ld, depth > 0);
    for (int i = 0; i < inputs; ++i) std::copy_n(whole + i * ld, used, out + size_t(i) * ldy);
  }

  using Kernel = void (*)(const T*, ptrdiff_t, ptrdiff_t, int, const float*, float*, ptrdiff_t, bool);

  static const Kernel* kernels(int panels) {
    static constexpr auto single = []<size_t... M>(std::index_sequence<M...>) {
      return std::array<Kernel, sizeof...(M)>{&tile<int(M) + 1, 1, 1, int(M) + 1, T>...};
    }(std::make_index_sequence<kTile>());
    static constexpr auto pairs = []<size_t... M>(std::index_sequence<M...>) {
      return std::array<Kernel, sizeof...(M)>{&tile<int(M) + 1, 2, 1, int(M) + 1, T>...};
    }(std::make_index_sequence<kWide>());
    return panels == 2 ? pairs.data() : single.data();
  }

  const int panels_;
  Buffer data_;
};

}  // namespace trimtab
