#include "linear/by_rows.h"

#include <algorithm>

#include "linear/dots.h"

namespace trimtab {
namespace {

constexpr int kTileRows = 16;  // a tile of 2,048 columns takes 128 KiB: an eighth of a core's second cache

size_t padded(int cols) { return (static_cast<size_t>(cols) + 15) / 16 * 16; }

}  // namespace

size_t by_rows_scratch(int cols, int threads) { return kTileRows * padded(cols) * sizeof(float) * threads; }

void apply_by_rows(const Weight& weight, const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch,
                   const Team& team) {
  const int cols = weight.cols;
  const size_t ld = padded(cols);
  float* tile = reinterpret_cast<float*>(scratch) + team.rank * kTileRows * ld;
  // A single input reads each row once, at once: it should still be in the first cache.
  const int most = m == 1 ? kDotRows : kTileRows;
  const auto [first, last] = team.share(weight.rows);
  for (int r = first; r < last; r += most) {
    const int rows = std::min(most, last - r);
    for (int k = 0; k < rows; ++k) weight.row(r + k, tile + k * ld);
    for (int c = 0; c == 0 || c < cols; c += kPieceCols)
      dots(tile + c, ld, rows, x + c, ldx, m, std::min(kPieceCols, cols - c), y + r, ldy, c > 0);
  }
  team.sync();
}

}  // namespace trimtab
