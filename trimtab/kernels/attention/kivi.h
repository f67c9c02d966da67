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
//   codes of the keys, words of 32 bits [panel of tokens][bundle of channels][token];
//   codes of the values, words [panel of channels][bundle of tokens][channel].
// A word holds one bundle: codes of 32 / bits neighbours, the first in the lowest bits. So a vector of words is spread to
// vectors of floats by shifts alone.
struct Block {
  int size, padded, bits, group;

  int key_groups() const { return kKeys / group; }
  int value_groups() const { return (size + group - 1) / group; }
  int bundle() const { return 32 / bits; }
  int key_bundles() const { return (size + bundle() - 1) / bundle(); }

  size_t key_grids() const { return (size_t(key_groups()) * size * 4 + 63) / 64 * 64; }  // bytes
  size_t value_grids() const { return size_t(value_groups()) * kKeys * 4; }
  size_t key_codes() const { return size_t(key_bundles()) * kKeys * 4; }
  size_t value_codes() const { return size_t(padded) * kKeys * bits / 8; }
  size_t nbytes() const { return key_grids() + value_grids() + key_codes() + value_codes(); }

  // From floats as a cache holds them, and back.
  void pack(const Fp16* keys, const Fp16* values, std::byte* block) const;
  void unpack(const std::byte* block, Fp16* keys, Fp16* values) const;

  // scores[row][key] = sum over channels of queries[channel][row] times the keys; rows as `tile` takes them. `spread` holds
  // spread_floats() floats.
  void score(const std::byte* block, int rows, const float* queries, float* scores, const float* spread) const;
  // out[row][channel] += sum over keys of shares[row][key] times the values.
  void mix(const std::byte* block, int rows, const float* shares, float* out, const float* spread) const;

  // The grids of a block as floats: steps, then lowest values.
  size_t spread_floats() const { return size_t(4) * padded; }
  void spread_keys(const std::byte* block, float* spread) const;    // [group][padded] each
  void spread_values(const std::byte* block, float* spread) const;  // [group][kKeys] each
};

}  // namespace trimtab
