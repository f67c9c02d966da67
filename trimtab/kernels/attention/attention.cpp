#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace trimtab {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int kRows = Pieces::kRows;

// Where row r of a piece comes from.
struct Place {
  int row, head, position;
};

Place place(const Piece& piece, int query_heads, int heads, int r) {
  const int token = piece.first_token + r / piece.queries;
  return {piece.segment.row + token, piece.head * (query_heads / heads) + piece.first_query + r % piece.queries,
          piece.segment.start + token};
}

// Scores of keys that the query may not see become minus infinity: those outside [low, high) of a block.
void mask(float* scores, int low, int high) {
  for (int j = 0; j < std::min(low, kKeys); ++j) scores[j] = kNone;
  for (int j = std::max(high, 0); j < kKeys; ++j) scores[j] = kNone;
}

}  // namespace

Pieces::Pieces(const std::vector<Segment>& segments, int query_heads, int heads, int threads) {
  const int group = query_heads / heads;
  for (const Segment& s : segments)
    for (int head = 0; head < heads; ++head)
      for (int q = 0; q < group; q += kRows) {
        const int queries = std::min(kRows, group - q), step = kRows / queries;
        for (int t = 0; t < s.count; t += step) {
          const int tokens = std::min(step, s.count - t);
          pieces.push_back({s, head, q, queries, t, tokens, 0, s.start + t + tokens, 0, 1});
        }
      }
  if (pieces.empty() || static_cast<int>(pieces.size()) >= threads) return;
  // Fewer pieces than threads: divide the keys as well, in whole blocks.
  const int share = (threads + static_cast<int>(pieces.size()) - 1) / static_cast<int>(pieces.size());
  std::vector<Piece> divided;
  for (const Piece& whole : pieces) {
    const int blocks = (whole.to + kKeys - 1) / kKeys, parts = std::min(share, blocks);
    for (int part = 0; part < parts; ++part) {
      Piece piece = whole;
      piece.from = blocks * part / parts * kKeys;
      piece.to = std::min(whole.to, blocks * (part + 1) / parts * kKeys);
      piece.part = part;
      piece.parts = parts;
      divided.push_back(piece);
    }
  }
  pieces = std::move(divided);
}

size_t Pieces::scratch(int padded) const {
  const bool divided = std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.parts > 1; });
  return divided ? pieces.size() * kRows * (size_t(padded) + 2) * sizeof(float) : 0;
}

size_t Attention::scratch() const {
  const size_t queries = size_t(kRows) * cache.padded, scores = size_t(kRows) * kKeys, sums = size_t(kRows) * (cache.padded + 2);
  const size_t rows = cache.format.bits > 0 ? size_t(kRows) * cache.padded + cache.block.room() : 0;
  return ((queries + scores + sums + rows) * sizeof(float) + 63) / 64 * 64;
}

Attention::Sums Attention::sums(std::byte* memory) const {
  float* out = reinterpret_cast<float*>(memory);
  return {out, out + size_t(kRows) * cache.padded, out + size_t(kRows) * (cache.padded + 1)};
}

void Attention::run(const Pieces& work, const float* q, int ldq, float* out, int ldo, std::byte* merged, std::byte* own,
                    const Team& team) const {
  const int count = static_cast<int>(work.pieces.size());
  const size_t stride = size_t(kRows) * (cache.padded + 2) * sizeof(float);
  bool divided = false;
  // One after the other round the team: later tokens see more keys, and neighbours cost alike.
  for (int i = 0; i < count; ++i) {
    const Piece& p = work.pieces[i];
    divided |= p.parts > 1;
    if (i % team.size != team.rank) continue;
    const Sums here = sums(p.parts > 1 ? merged + i * stride : own + (size_t(kRows) * (cache.padded + kKeys)) * sizeof(float));
    cache.with_type([&]<typename T>(T*) { piece<T>(p, q, ldq, here, own); });
    if (p.parts > 1) continue;
    for (int r = 0; r < p.rows(); ++r) {
      const Place at = place(p, query_heads, cache.heads, r);
      float* to = out + size_t(at.row) * ldo + at.head * cache.size;
      const float share = 1.0f / here.total[r];
      for (int c = 0; c < cache.size; ++c) to[c] = here.out[size_t(r) * cache.padded + c] * share;
    }
  }
  team.sync();
  if (!divided) return;
  for (int i = 0; i < count; i += work.pieces[i].parts) {
    if (work.pieces[i].parts == 1) continue;
    const auto [first, last] = team.share(work.pieces[i].rows());
    for (int r = first; r < last; ++r) merge(&work.pieces[i], merged + i * stride, stride, r, out, ldo);
  }
  team.sync();
}

template <typename T>
void Attention::piece(const Piece& p, const float* q, int ldq, const Sums& sums, std::byte* own) const {
  const int size = cache.size, padded = cache.padded, rows = p.rows(), tiles = (rows + kTile - 1) / kTile;
  float* queries = reinterpret_cast<float*>(own);    // [tile][channel][row of the tile], scaled
  float* scores = queries + size_t(kRows) * padded;  // [row][key of the block]
  float* by_row = scores + size_t(kRows) * (kKeys + padded + 2);  // the queries once more, [row][channel], for packed blocks
  int low[kRows], high[kRows];                       // the keys that each row sees
  const int first = cache.first(p.segment.start);    // keys before it are packed
  for (int r = 0; r < rows; ++r) {
    const Place at = place(p, query_heads, cache.heads, r);
    const float* from = q + size_t(at.row) * ldq + at.head * size;
    float* to = queries + size_t(r / kTile) * kTile * size + r % kTile;
    for (int c = 0; c < size; ++c) to[size_t(c) * kTile] = from[c] * scale;
    if (first > 0) {
      for (int c = 0; c < size; ++c) by_row[size_t(r) * padded + c] = from[c] * scale;
      std::fill_n(by_row + size_t(r) * padded + size, padded - size, 0.0f);
    }
    high[r] = at.position + 1;
    low[r] = window > 0 ? std::max(0, high[r] - window) : 0;
    sums.peak[r] = kNone;
    sums.total[r] = 0;
  }
  std::fill_n(sums.out, size_t(rows) * padded, 0.0f);
  const auto each_tile = [&](const auto& work) {
    for (int t = 0; t < tiles; ++t) {
      float *some = queries + size_t(t) * kTile * size, *s = scores + t * kTile * kKeys;
      work(std::min(kTile, rows - t * kTile), some, s, sums.out + size_t(t) * kTile * padded);
    }
  };
  for (int block = std::max(p.from, low[0] / kKeys * kKeys); block < p.to; block += kKeys) {
    const int keys = std::min(kKeys, p.to - block);
    const std::byte* packed = block < first ? cache.packed(p.segment.sequence, p.head, block) : nullptr;
    if (packed != nullptr) {
      // The grids and codes of a block are short runs, over before the processor has seen where they lead.
      if (block + kKeys < std::min(first, p.to))
        for (size_t i = 0; i < cache.block.nbytes(); i += 64) simd::prefetch(packed + cache.block.nbytes() + i);
      cache.block.score(packed, rows, by_row, scores, by_row + size_t(kRows) * padded);
    } else {
      for (int j = 0; j < keys; j += kPanel)
        each_tile([&](int m, const float* some, float* s, float*) {
          const T* panel = cache.keys<T>(p.segment.sequence, p.head, block - first + j);
          tile<1, kTile>(m, panel, kPanel, size, some, s + j, kKeys, false);
        });
    }
    for (int r = 0; r < rows; ++r) {
      float* s = scores + r * kKeys;
      mask(s, low[r] - block, std::min(high[r] - block, keys));
      F32 most = load(s);
      for (int j = kLanes; j < kKeys; j += kLanes) most = larger(most, load(s + j));
      const float peak = std::max(sums.peak[r], largest(most));
      const F32 shift = splat(peak == kNone ? 0.0f : peak);  // nothing seen so far: all shares are exp(-inf) = 0
      F32 total = {};
      for (int j = 0; j < kKeys; j += kLanes) {
        const F32 share = exponential(load(s + j) - shift);
        store(s + j, share);
        total += share;
      }
      if (peak != sums.peak[r]) {  // what was summed up so far is rescaled to the new peak
        const float fade = sums.peak[r] == kNone ? 0.0f : std::exp(sums.peak[r] - peak);
        sums.total[r] *= fade;
        for (int c = 0; c < padded; c += kLanes) store(sums.out + size_t(r) * padded + c, load(sums.out + size_t(r) * padded + c) * splat(fade));
        sums.peak[r] = peak;
      }
      sums.total[r] += sum(total);
    }
    if (packed != nullptr) {
      cache.block.mix(packed, rows, scores, sums.out, by_row + size_t(kRows) * padded);
    } else {
      const T* values = cache.values<T>(p.segment.sequence, p.head, block - first);
      for (int c = 0; c < padded; c += kPanel)
        each_tile([&](int m, const float*, const float* s, float* o) { tile<kKeys, 1>(m, values + c, padded, keys, s, o + c, padded, true); });
    }
  }
}

void Attention::merge(const Piece* parts, std::byte* merged, size_t stride, int row, float* out, int ldo) const {
  const Place at = place(*parts, query_heads, cache.heads, row);
  float* to = out + size_t(at.row) * ldo + at.head * cache.size;
  float peak = kNone, total = 0;
  for (int i = 0; i < parts->parts; ++i) peak = std::max(peak, sums(merged + i * stride).peak[row]);
  std::fill_n(to, cache.size, 0.0f);
  for (int i = 0; i < parts->parts; ++i) {
    const Sums part = sums(merged + i * stride);
    if (part.peak[row] == kNone) continue;
    const float share = std::exp(part.peak[row] - peak);
    total += share * part.total[row];
    for (int c = 0; c < cache.size; ++c) to[c] += share * part.out[size_t(row) * cache.padded + c];
  }
  for (int c = 0; c < cache.size; ++c) to[c] /= total;
}

}  // namespace trimtab
