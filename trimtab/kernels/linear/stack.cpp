#include "linear/stack.h"

#include <algorithm>
#include <numeric>

namespace trimtab {
namespace {

int rows_of(const Stack::Parts& parts) {
  return std::accumulate(parts.begin(), parts.end(), 0, [](int rows, const auto& part) { return rows + part->rows; });
}

}  // namespace

Stack::Stack(Parts parts) : Weight(rows_of(parts), parts.front()->cols), parts_(std::move(parts)) {}

size_t Stack::nbytes() const {
  size_t bytes = 0;
  for (const auto& part : parts_) bytes += part->nbytes();
  return bytes;
}

size_t Stack::scratch(int m) const {
  size_t most = 0;
  for (const auto& part : parts_) most = std::max(most, part->scratch(m));
  return most;
}

void Stack::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  for (const auto& part : parts_) {
    part->apply(x, ldx, m, y, ldy, scratch, team);
    y += part->rows;
  }
}

void Stack::row(int r, float* out) const {
  for (const auto& part : parts_) {
    if (r < part->rows) return part->row(r, out);
    r -= part->rows;
  }
}

}  // namespace trimtab
