// Attention of new tokens to everything that their sequences hold, with a softmax that never sees a whole row.
#pragma once

#include <vector>

#include "attention/cache.h"
#include "base/team.h"

namespace trimtab {

// Consecutive tokens of one sequence: rows [row, row + count) of the step, at positions [start, start + count).
struct Segment {
  int sequence, start, count, row;
};

// Work that one thread does alone: queries of some tokens and heads that share a head of keys and values, over a run of
// keys. Where the keys of a piece are divided between threads (`parts` > 1), its results are merged afterwards.
struct Piece {
  Segment segment;
  int head, first_query, queries, first_token, tokens;  // head of the keys; queries of that head's group; tokens of the segment
  int from, to;                                          // keys
  int part, parts;
  int rows() const { return queries * tokens; }
};

// How attention is divided over a team; made once for a step, for layers of the same heads.
struct Pieces {
  Pieces(const std::vector<Segment>& segments, int query_heads, int heads, int threads);
  std::vector<Piece> pieces;
  static constexpr int kRows = 4 * kTile;  // queries of a piece: as many as reuse a key well and leave the cache to keys
  size_t scratch(int padded) const;        // bytes for the parts that are merged
};

struct Attention {
  const Cache& cache;
  int query_heads;
  float scale;
  int window;  // keys that a query sees, itself included; 0: all

  // Bytes of scratch that each thread needs.
  size_t scratch() const;

  // q[row * ldq + head * size ..] to out[row * ldo + head * size ..]; every thread of the team calls it after the cache and q
  // are complete. `merged` holds pieces.scratch() bytes for the team, `own` the thread's own scratch.
  void run(const Pieces& pieces, const float* q, int ldq, float* out, int ldo, std::byte* merged, std::byte* own,
           const Team& team) const;

 private:
  struct Sums {
    float *out, *peak, *total;  // [rows][padded], [rows], [rows]
  };
  Sums sums(std::byte* memory) const;
  template <typename T>
  void piece(const Piece& piece, const float* q, int ldq, const Sums& sums, std::byte* own) const;
  void merge(const Piece* parts, std::byte* merged, size_t stride, int row, float* out, int ldo) const;
};

}  // namespace trimtab
