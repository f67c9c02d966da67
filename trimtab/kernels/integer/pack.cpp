// From the artifact's codes to tiles: bits apart, rows interleaved, bits together again as planes.
#include <cstring>

#include "integer/grouped.h"
#include "integer/planes.h"

namespace trimtab {
namespace {

// Eight codes from bit `at` on, one a byte.
template <int bits>
uint64_t eight(const Stored& part, uint64_t at) {
  const size_t byte = at / 8;
  uint64_t word = 0;
  if (byte + 8 <= part.bytes) {
    std::memcpy(&word, part.codes + byte, 8);
  } else {
    std::memcpy(&word, part.codes + byte, part.bytes - byte);
  }
  if constexpr (bits == 8) return word;
  word >>= at % 8;
  constexpr uint64_t ones = 0x0101010101010101, mask = ones * ((1 << bits) - 1);
#if defined(__BMI2__)
  return _pdep_u64(word, mask);
#else
  uint64_t apart = 0;
  for (int i = 0; i < 8; ++i) apart |= (word >> (bits * i) & ((1 << bits) - 1)) << (8 * i);
  return apart & mask;
#endif
}

uint64_t recoded(uint64_t codes, const uint8_t* recode) {
  uint64_t result = 0;
  for (int i = 0; i < 64; i += 8) result |= uint64_t{recode[codes >> i & 255]} << i;
  return result;
}

// From 8 columns a row to vectors of 4 columns a row.
void interleave(const uint64_t* apart, size_t pairs, uint8_t* vectors) {
  for (size_t p = 0; p < pairs; ++p, apart += kRows, vectors += 2 * kVector) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_loadu_si512(apart), high = _mm512_loadu_si512(apart + 8);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    _mm512_storeu_si512(vectors, _mm512_permutex2var_epi32(low, even, high));
    _mm512_storeu_si512(vectors + kVector,
                        _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high));
#else
    uint32_t first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = static_cast<uint32_t>(apart[r]), second[r] = apart[r] >> 32;
    std::memcpy(vectors, first, kVector);
    std::memcpy(vectors + kVector, second, kVector);
#endif
  }
}

struct Source {
  const Stored* part;
  int row;
};

template <int bits>
void pack_tile(const Layout& layout, const Source (&rows)[kRows], const uint8_t* recode, int t, std::byte* block) {
  // Eight columns of the 16 rows lie together, so that both sides of the interleaving are whole cache lines.
  const size_t pairs = static_cast<size_t>(layout.vectors) / 2 + 1;
  std::vector<uint64_t> apart(pairs * kRows);
  std::vector<uint8_t> vectors(pairs * 2 * kVector);
  for (int span = 0; span < layout.spans; ++span) {
    std::fill(apart.begin(), apart.end(), 0);
    for (int j = 0; j < layout.join; ++j) {
      const auto [first, count] = layout.columns(span, j);
      const int place = j * layout.block;
      for (int r = 0; r < kRows && count > 0; ++r) {
        const auto [part, row] = rows[r];
        if (part == nullptr) continue;
        const uint64_t start = (static_cast<uint64_t>(row) * layout.cols + first) * bits;
        for (int c = 0; c < count; c += 8) {
          uint64_t codes = eight<bits>(*part, start + static_cast<uint64_t>(c) * bits);
          if (recode != nullptr) codes = recoded(codes, recode);
          if (count - c < 8) codes &= (uint64_t{1} << (8 * (count - c))) - 1;
          uint64_t* to = apart.data() + static_cast<size_t>(place + c) / 8 * kRows + r;
          if ((place + c) % 8 == 0) {
            *to = codes;
          } else {  // groups of an odd number of vectors
            *to |= codes << 32, to[kRows] = codes >> 32;
          }
        }
      }
    }
    interleave(apart.data(), pairs, vectors.data());
    std::byte* to = block + layout.codes_at(t, span);
    for (int v = 0; v < layout.vectors; v += Planes<bits>::kChunk, to += kTiles * Planes<bits>::kBytes)
      Planes<bits>::encode(vectors.data() + static_cast<size_t>(v) * kVector, to);
  }
}

// Scales and zero points of a tile, row by row as they are stored.
template <typename T>
void pack_heads(const Layout& layout, const Source (&rows)[kRows], int t, std::byte* block) {
  for (int r = 0; r < kRows; ++r) {
    const auto [part, row] = rows[r];
    if (part == nullptr) continue;
    const size_t first = static_cast<size_t>(row) * layout.groups;
    for (int span = 0; span < layout.spans; ++span)
      for (int j = 0; j < layout.join; ++j) {
        const int group = layout.group_of(span, j);
        if (group >= layout.groups) break;
        const uint8_t* scale = part->scales + (first + group) * sizeof(T);
        std::memcpy(block + layout.scale_at(t, span, j) + r * sizeof(T), scale, sizeof(T));
        if (layout.zeros) block[layout.zero_at(t, span, j) + r] = std::byte{part->zeros[first + group]};
      }
  }
}

using PackTile = void (*)(const Layout&, const Source (&)[kRows], const uint8_t*, int, std::byte*);
constexpr PackTile kPackTile[] = {&pack_tile<1>, &pack_tile<2>, &pack_tile<3>, &pack_tile<4>,
                                  &pack_tile<5>, &pack_tile<6>, &pack_tile<7>, &pack_tile<8>};

}  // namespace

void GroupedWeight::pack(const std::vector<Stored>& parts, const uint8_t* recode) {
  std::vector<Source> sources(static_cast<size_t>(tiles()) * kRows, Source{nullptr, 0});
  auto* factors = reinterpret_cast<float*>(factors_.data());
  std::fill_n(factors, sources.size(), 0.0f);
  const float unit = layout_.shift * (layout_.scale == Scale::kE4M3 ? 256.0f : 1.0f);  // E4M3 is read times 2^-8
  size_t r = 0;
  for (const Stored& part : parts)
    for (int row = 0; row < part.rows; ++row, ++r) sources[r] = {&part, row}, factors[r] = part.factor * unit;
  Pool::get().run([&](const Team& team) {
    const auto [first, last] = team.share(tiles());
    for (int tile = first; tile < last; ++tile) {
      const int t = tile % kTiles;
      std::byte* block = data_.data() + tile / kTiles * layout_.block_bytes();
      Source rows[kRows];
      std::copy_n(sources.data() + static_cast<size_t>(tile) * kRows, kRows, rows);
      for (int span = 0; span < layout_.spans; span += layout_.run_spans())
        std::memset(block + layout_.head_at(t, span), 0, layout_.head_bytes());
      if (layout_.scale_bytes() == 2) {
        pack_heads<uint16_t>(layout_, rows, t, block);
      } else {
        pack_heads<uint8_t>(layout_, rows, t, block);
      }
      kPackTile[layout_.bits - 1](layout_, rows, recode, t, block);
    }
  });
}

}  // namespace trimtab
