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

  size_t scratch(int m) const override { return m == 1 ? 0 : size_t(tiles(m)) * kTile * cols * sizeof(float); }

  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override {
    const auto [first, last] = team.share(panels_);
    if (m == 1) {
      for (int p = first; p < last; ++p)
        finish(p, 1, y, ldy, false, [&](float* to, int ld) {
          tile<1, 1, 1>(panel(p), kPanel, cols, x, to, ld, false);
        });
      team.sync();
      return;
    }
    float* packed = reinterpret_cast<float*>(scratch);
    pack(x, ldx, m, packed, team);
    team.sync();
    // A block of the panel and of a tile of inputs fit into the nearest cache; the panel's stays there for all tiles.
    for (int depth = 0; depth < cols; depth += kDepth) {
      const int length = std::min(kDepth, cols - depth);
      for (int p = first; p < last; ++p)
        for (int t = 0; t < tiles(m); ++t) {
          const int rows = std::min(kTile, m - t * kTile);
          const float* inputs = packed + (size_t(t) * cols + depth) * kTile;
          finish(p, rows, y + size_t(t) * kTile * ldy, ldy, depth > 0, [&](float* to, int ld) {
            tile<1, kTile>(rows, panel(p) + size_t(depth) * kPanel, kPanel, length, inputs, to, ld, depth > 0);
          });
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

  static int tiles(int m) { return (m + kTile - 1) / kTile; }

  T* panel(int p) const { return reinterpret_cast<T*>(data_.data()) + size_t(p) * kPanel * cols; }

  // Inputs as the tiles read them, [tile][col][input of the tile].
  void pack(const float* x, int ldx, int m, float* packed, const Team& team) const {
    const auto [first, last] = team.share(cols);
    for (int t = 0; t < tiles(m); ++t)
      for (int i = 0; i < std::min(kTile, m - t * kTile); ++i) {
        const float* from = x + (size_t(t) * kTile + i) * ldx;
        float* to = packed + size_t(t) * kTile * cols + i;
        for (int c = first; c < last; ++c) to[size_t(c) * kTile] = from[c];
      }
  }

  // Run a kernel on outputs of panel p; where the panel is the last and cut short, by way of a whole one.
  template <typename Kernel>
  void finish(int p, int inputs, float* y, int ldy, bool add, const Kernel& kernel) const {
    const int used = std::min(kPanel, rows - p * kPanel);
    if (used == kPanel) return kernel(y + p * kPanel, ldy);
    alignas(64) float whole[kTile * kPanel];
    if (add)
      for (int i = 0; i < inputs; ++i) std::copy_n(y + size_t(i) * ldy + p * kPanel, used, whole + i * kPanel);
    kernel(whole, kPanel);
    for (int i = 0; i < inputs; ++i) std::copy_n(whole + i * kPanel, used, y + size_t(i) * ldy + p * kPanel);
  }

  const int panels_;
  Buffer data_;
};

}  // namespace trimtab
