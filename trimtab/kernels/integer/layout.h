// How a matrix of grouped integers lies in memory for the kernels.
//
// A tile is 16 rows. Its columns are cut into spans: the columns whose inputs share a scale. A vector is 64 bytes: 16
// rows times 4 neighbouring columns, so that one instruction serves 16 rows with 4 inputs broadcast from memory. The
// codes of a span's vectors lie one after the other, in planes of bits, by chunks that fill whole planes; before each run
// of spans lie the scales and zero points that belong to it. The tiles that a kernel takes at once are a block: their
// heads lie side by side, and their chunks in turn. A block, and so a whole matrix, is read as one stream.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace trimtab {

enum class Scale { kHalf, kE8M0, kE4M3 };

constexpr int kRows = 16;          // of a tile
constexpr int kVector = 4 * kRows;  // bytes
#if defined(__AVX512F__)
constexpr int kTiles = 2;          // of a block: as many sums as there are registers
#else
constexpr int kTiles = 1;
#endif

struct Layout {
  int cols, bits, group;   // group: columns of a row that share a scale
  int chunk;               // vectors that fill whole planes of bits
  int join = 1;            // groups of a span: small ones share the activations' scale
  int pieces = 1;          // spans of a group: large ones are cut
  int block = 0;           // stored columns of a group, or of a piece: a multiple of 4
  int spans = 0;
  int groups = 0;          // of a row
  int vectors = 0;         // of a span, a whole number of the codec's chunks
  Scale scale = Scale::kHalf;
  bool zeros = false;      // a zero point a group; else `zero` for all
  int zero = 0;
  float shift = 1;         // the power of two that takes the stored integers to the grid
  bool hadamard = false;

  Layout(int cols, int bits, int group, int chunk, Scale scale, bool zeros)
      : cols(cols), bits(bits), group(std::min(group, cols)), chunk(chunk), scale(scale), zeros(zeros) {
    const int most = 256, piece = 128;
    groups = ceil(cols, this->group);
    if (this->group > most) {
      pieces = ceil(this->group, piece);
      block = 4 * ceil(this->group, 4 * pieces);
      pieces = ceil(this->group, block);
      spans = (groups - 1) * pieces + ceil(cols - (groups - 1) * this->group, block);
    } else {
      block = 4 * ceil(this->group, 4);
      join = joined(this->group, block, groups);
      spans = ceil(groups, join);
    }
    vectors = chunk * ceil(join * block / 4, chunk);
  }

  static int ceil(int a, int b) { return (a + b - 1) / b; }

  // Groups that fill 32 columns or, if they leave no rest, up to 128 stored ones; at least one.
  static int joined(int group, int block, int groups) {
    const int least = std::clamp(32 / group, 1, groups);
    for (int join = std::min(128 / block, groups); join > least; --join)
      if (groups % join == 0) return join;
    return least;
  }

  // The columns [first, first + count) of group j of a span; none behind the matrix's end.
  struct Columns { int first, count; };
  Columns columns(int span, int j) const {
    if (pieces == 1) {
      const int first = std::min((span * join + j) * group, cols);
      return {first, std::min(group, cols - first)};
    }
    const int from = span % pieces * block, first = span / pieces * group + from;
    return {first, std::min({block, group - from, cols - first})};
  }
  // Which of a row's scales that group has.
  int group_of(int span, int j) const { return pieces == 1 ? span * join + j : span / pieces; }

  // Spans whose sums are added up before they meet what came before them: columns that, expanded, fit the second cache,
  // and so many that sums seldom go out to memory and back. All kernels add in this order, so that an output depends on
  // its own inputs alone, however many others there are beside them.
  int spans_at_once() const { return std::clamp(2048 / (4 * vectors), 1, spans); }

  // Scales and zero points come before the codes of a run: one large group, or the groups of one span or four, which
  // fill cache lines.
  int run_spans() const { return pieces > 1 ? pieces : join < 4 ? 4 : 1; }
  int run_groups() const { return pieces > 1 ? 1 : run_spans() * join; }
  int scale_bytes() const { return scale == Scale::kHalf ? 2 : 1; }
  // Of one tile.
  size_t head_bytes() const {
    const size_t bytes = static_cast<size_t>(run_groups()) * kRows * (scale_bytes() + (zeros ? 1 : 0));
    return (bytes + kVector - 1) / kVector * kVector;
  }
  size_t chunk_bytes() const { return static_cast<size_t>(chunk) * 8 * bits; }
  size_t span_bytes() const { return static_cast<size_t>(vectors) * 8 * bits; }
  size_t block_bytes() const { return kTiles * (ceil(spans, run_spans()) * head_bytes() + spans * span_bytes()); }

  // Where things of tile t of a block lie. From a chunk of codes to the same tile's next one are kTiles chunks.
  size_t head_at(int t, int span) const {
    const int run = span / run_spans();
    return kTiles * run * (head_bytes() + run_spans() * span_bytes()) + t * head_bytes();
  }
  size_t codes_at(int t, int span) const {
    return kTiles * ((span / run_spans() + 1) * head_bytes() + span * span_bytes()) + t * chunk_bytes();
  }
  int head_group(int span, int j) const { return pieces == 1 ? span % run_spans() * join + j : 0; }
  // From one group's zero points to the next one's within a run.
  int head_step() const { return pieces == 1 ? kRows : 0; }
  size_t scale_at(int t, int span, int j) const {
    return head_at(t, span) + static_cast<size_t>(head_group(span, j)) * kRows * scale_bytes();
  }
  size_t zero_at(int t, int span, int j) const {
    return head_at(t, span) + static_cast<size_t>(run_groups() * scale_bytes() + head_group(span, j)) * kRows;
  }
};

}  // namespace trimtab
