// Keys and values of older tokens in a few bits (KIVI): keys rounded to a grid for each channel and group of tokens, values
// to one for each token and group of channels. A grid is a step and a lowest value, both in 16 bits: x = low + step * code.
#pragma once

#include <array>
#include <cstddef>

#include "base/tile.h"
#include "base/vectors.h"

namespace trimtab {

// How many of the keys of a sequence a step of attention takes together; panels divide it.
inline constexpr int kKeys = 64;

// One head's keys and values of kKeys tokens, end to end:
//   steps and lowest values of the keys, [group of tokens][channel] each, filled up to a cache line;
//   steps and lowest values of the values, [group of channels][token] each;
//   codes of the keys, then of the values, in words of 32 bits [panel][bundle][place in the panel].
// A panel is of kPanel keys, or channels of values. Along the depth of the product, channels or tokens, n places are taken in
// bundles: a word's lower half holds the codes of 16 / bits neighbours of the first n / 2, its upper half those of their fellows
// n / 2 further on. So one shift and one mask give pairs that the vector unit multiplies and adds up as they are.
struct Block {
  int size, padded, bits, group;

  int key_groups() const { return kKeys / group; }
  int value_groups() const { return (size + group - 1) / group; }

  size_t key_grids() const { return (size_t(key_groups()) * size * 4 + 63) / 64 * 64; }  // bytes
  size_t value_grids() const { return size_t(value_groups()) * kKeys * 4; }
  size_t codes() const { return size_t(padded) * kKeys * bits / 8; }  // of keys, and of values
  size_t nbytes() const { return key_grids() + value_grids() + 2 * codes(); }

  // From floats as a cache holds them, and back.
  void pack(const Fp16* keys, const Fp16* values, std::byte* block) const;
  void unpack(const std::byte* block, Fp16* keys, Fp16* values) const;

  // scores[row * kKeys + key] = sum over channels of queries[row * padded + channel], zero beyond the size, times the keys.
  void score(const std::byte* block, int rows, const float* queries, float* scores, float* room) const;
  // out[row * padded + channel] += sum over keys of shares[row * kKeys + key] times the values.
  void mix(const std::byte* block, int rows, const float* shares, float* out, float* room) const;
  // Floats of room that either needs: a grid, a row times its steps, and a tile's factors.
  size_t room() const {
    const size_t depth = padded > kKeys ? padded : kKeys;
    return 3 * depth + kTile * depth / 2;
  }

 private:
  // Where the code of output j and place k of the depth lies: its word, and how far up in it.
  size_t word(int j, int depth, int k) const;
  int shift(int depth, int k) const;
};

}  // namespace trimtab
