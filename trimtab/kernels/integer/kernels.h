// The loops of the grouped integer product, one table of them for every way to store a code.
#pragma once

#include "base/simd.h"
#include "integer/inputs.h"
#include "integer/layout.h"

namespace trimtab {

// What a kernel must know of the matrix.
struct Tiles {
  const Layout& layout;
  const std::byte* data;
  const uint8_t* table;    // from codes to stored integers, for grids that are not even
  const float* factors;    // [tiles, 16]: of a row, on top of its groups' scales
  int rows;

  const std::byte* block(int b) const { return data + b * layout.block_bytes(); }
};

// Inputs that the kernels take at once. Up to `kStreamed` inputs it costs less to take a block's bits apart for every
// `kStream` of them than to expand it.
#if defined(__AVX512F__)
constexpr int kStream = 8, kStreamed = 32, kInputs = 12;
#elif defined(__AVX2__)
constexpr int kStream = 4, kStreamed = 8, kInputs = 4;
#else
constexpr int kStream = 1, kStreamed = 1, kInputs = 4;
#endif

// Spans of a block as bytes, with scales and zero points in 32 bits: what the second path computes on.
struct Expanded {
  uint8_t* codes;  // [spans, vectors, kTiles, 64]
  float* scale;    // [spans, join, kTiles, 16]
  int32_t* zero;   // [spans, join, kTiles, 16]
};

struct Kernels {
  int chunk;
  // Spans [from, to) of a block, [spans, vectors, kTiles, 64].
  void (*expand)(const Tiles& tiles, int block, int from, int to, uint8_t* codes);
  // A block by 1 .. kStream inputs, straight from the stream; the second ones where spans have several groups.
  void (*stream[2][kStream])(const Tiles& tiles, const Panel& panel, int block, float* y, int ldy);
};

// Whether each group fills chunks, so that the stream needs no expanding first.
bool streams(const Layout& layout);

const Kernels& kernels_of(int bits, bool table);

// One panel by the expanded spans [from, to): out [inputs, kTiles * 16] grows.
using Micro = void (*)(const Layout& layout, const Panel& panel, const Expanded& w, int from, int to, float* out);
Micro micro_of(int inputs, bool wide);

// Scales of group j of a span, for the 16 rows of the tile at p.
inline simd::Floats scale_of(const Layout& layout, const std::byte* p) {
  switch (layout.scale) {
    case Scale::kHalf: return simd::load_halves(p);
    case Scale::kE8M0: return simd::load_powers(p);
    default: return simd::load_e4m3(p);
  }
}

}  // namespace trimtab
