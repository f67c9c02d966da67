#include "integer/grouped.h"

#include <algorithm>
#include <cstring>

namespace trimtab {
namespace {

int rows_of(const std::vector<Stored>& parts) {
  int rows = 0;
  for (const Stored& part : parts) rows += part.rows;
  return rows;
}

}  // namespace

GroupedWeight::GroupedWeight(const Layout& layout, std::vector<uint8_t> table, const std::vector<Stored>& parts)
    : Weight(rows_of(parts), layout.cols),
      layout_(layout),
      table_(128),
      factors_(sizeof(float) * kRows * tiles()),
      data_(layout.block_bytes() * blocks()) {
  const int stored = 1 << layout.bits;
  const bool fits = std::all_of(table.begin(), table.end(), [&](uint8_t entry) { return entry < stored; });
  has_table_ = !fits;
  if (has_table_) {
    std::memset(table_.data(), 0, table_.size());
    std::memcpy(table_.data(), table.data(), table.size());
  }
  pack(parts, has_table_ || table.empty() ? nullptr : table.data());
}

Tiles GroupedWeight::view() const {
  return {layout_, data_.data(), reinterpret_cast<const uint8_t*>(table_.data()),
          reinterpret_cast<const float*>(factors_.data()), rows};
}

size_t GroupedWeight::expanded_bytes() const {
  return static_cast<size_t>(layout_.spans_at_once()) * kTiles * (layout_.vectors + 2 * layout_.join) * kVector;
}

size_t GroupedWeight::scratch(int m) const {
  return Inputs::bytes(layout_, m) + (by_stream(m) ? 0 : expanded_bytes() * Pool::get().size());
}

void GroupedWeight::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch,
                          const Team& team) const {
  const Inputs inputs(layout_, m, by_stream(m) ? kStream : kInputs, scratch);
  inputs.quantise(layout_, x, ldx, team);
  if (by_stream(m)) {
    const auto [first, last] = team.share(blocks());
    const Tiles view = this->view();
    const auto& stream = kernels_of(layout_.bits, has_table_).stream[layout_.join > 1];
    for (int block = first; block < last; ++block)
      for (int p = 0; p < inputs.panels; ++p) {
        const int i0 = inputs.first(p), count = inputs.first(p + 1) - i0;
        stream[count - 1](view, inputs.panel(layout_, p), block, y + static_cast<size_t>(i0) * ldy, ldy);
      }
  } else {
    through_tiles(inputs, y, ldy, scratch + Inputs::bytes(layout_, m) + expanded_bytes() * team.rank, team);
  }
  team.sync();
}

void GroupedWeight::through_tiles(const Inputs& inputs, float* y, int ldy, std::byte* memory, const Team& team) const {
  const Tiles view = this->view();
  const Kernels& kernels = kernels_of(layout_.bits, has_table_);
  const bool wide = layout_.bits == 8 || (has_table_ && layout_.bits == 7);
  const int at_once = layout_.spans_at_once(), join = layout_.join;
  const size_t heads = static_cast<size_t>(at_once) * join * kTiles * kRows;
  const Expanded expanded{reinterpret_cast<uint8_t*>(memory + 8 * heads), reinterpret_cast<float*>(memory),
                          reinterpret_cast<int32_t*>(memory) + heads};
  const auto [begin, end] = team.share(blocks());
  for (int block = begin; block < end; ++block) {
    const int tile0 = block * kTiles;
    const std::byte* stored = view.block(block);
    for (int from = 0; from < layout_.spans; from += at_once) {
      const int to = std::min(from + at_once, layout_.spans);
      kernels.expand(view, block, from, to, expanded.codes);
      for (int t = 0; t < kTiles; ++t) {
        for (int span = from; span < to; ++span)
          for (int j = 0; j < join; ++j) {
            const size_t at = ((static_cast<size_t>(span - from) * join + j) * kTiles + t) * kRows;
            simd::store(expanded.scale + at, scale_of(layout_, stored + layout_.scale_at(t, span, j)));
            simd::store(expanded.zero + at, layout_.zeros ? simd::load_bytes_wide(stored + layout_.zero_at(t, span, j))
                                                          : simd::ints(layout_.zero));
          }
      }
      for (int p = 0; p < inputs.panels; ++p) {
        const int i0 = inputs.first(p), count = inputs.first(p + 1) - i0;
        for (int i = 0; i < count; ++i)
          for (int t = 0; t < kTiles; ++t)
            simd::prefetch_to_write(y + static_cast<size_t>(i0 + i) * ldy + (tile0 + t) * kRows);
        alignas(64) float out[kInputs * kTiles * kRows] = {};
        micro_of(count, wide)(layout_, inputs.panel(layout_, p), expanded, from, to, out);
        for (int i = 0; i < count; ++i)
          for (int t = 0; t < kTiles; ++t) {
            const int row0 = (tile0 + t) * kRows, here = std::min(kRows, rows - row0);
            float* target = y + static_cast<size_t>(i0 + i) * ldy + row0;
            float* sum = out + (i * kTiles + t) * kRows;
            const simd::Floats factor = simd::load(view.factors + row0);
            if (here == kRows) {
              const simd::Floats before = from > 0 ? simd::load(target) : simd::floats(0);
              simd::store(target, simd::fma(simd::load(sum), factor, before));
            } else if (here > 0) {
              const simd::Floats before = from > 0 ? simd::load(target, here) : simd::floats(0);
              simd::store(target, simd::fma(simd::load(sum), factor, before), here);
            }
          }
      }
    }
  }
}

void GroupedWeight::row(int r, float* out) const {
  const Tiles view = this->view();
  const int block = r / kRows / kTiles, t = r / kRows % kTiles, lane = r % kRows;
  const std::byte* stored = view.block(block);
  std::vector<uint8_t> codes(static_cast<size_t>(layout_.vectors) * kTiles * kVector);
  float scales[kRows];
  for (int span = 0; span < layout_.spans; ++span) {
    kernels_of(layout_.bits, has_table_).expand(view, block, span, span + 1, codes.data());
    for (int j = 0; j < layout_.join; ++j) {
      const auto [first, count] = layout_.columns(span, j);
      if (count <= 0) continue;
      simd::store(scales, scale_of(layout_, stored + layout_.scale_at(t, span, j)));
      const float scale = scales[lane] * (view.factors[r] / layout_.shift);
      const int zero = layout_.zeros ? static_cast<int>(stored[layout_.zero_at(t, span, j) + lane]) : layout_.zero;
      for (int c = 0; c < count; ++c) {
        const int at = j * layout_.block + c, code = codes[(at / 4 * kTiles + t) * kVector + 4 * lane + at % 4];
        out[first + c] = static_cast<float>(code - zero) * layout_.shift * scale;
      }
    }
  }
  if (layout_.hadamard)
    for (int g = 0; g < layout_.cols / layout_.group; ++g) hadamard(out + g * layout_.group, layout_.group);
}

}  // namespace trimtab
