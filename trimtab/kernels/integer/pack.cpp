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
  std::memcpy(&word, part.codes + byte, std::min<size_t>(8, part.bytes - byte));
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

struct Source {
  const Stored* part;
  int row;
};

template <int bits>
void pack_tile(const Layout& layout, const Source (&rows)[kRows], const uint8_t* recode, std::byte* tile) {
  const int stride = 4 * layout.vectors + 8;
  std::vector<uint8_t> apart(static_cast<size_t>(kRows) * stride);
  std::vector<uint8_t> vectors(static_cast<size_t>(layout.vectors) * kVector);
  const int scale_bytes = layout.scale_bytes();
  for (int span = 0; span < layout.spans; ++span) {
    std::fill(apart.begin(), apart.end(), 0);
    for (int j = 0; j < layout.join; ++j) {
      const auto [first, count] = layout.columns(span, j);
      if (count <= 0) continue;
      const int group = layout.group_of(span, j);
      for (int r = 0; r < kRows; ++r) {
        const auto& [part, row] = rows[r];
        if (part == nullptr) continue;
        uint8_t* to = apart.data() + r * stride + j * layout.block;
        const uint64_t start = (static_cast<uint64_t>(row) * layout.cols + first) * bits;
        for (int c = 0; c < count; c += 8) {
          uint64_t codes = eight<bits>(*part, start + static_cast<uint64_t>(c) * bits);
          if (count - c < 8) codes &= (uint64_t{1} << (8 * (count - c))) - 1;
          std::memcpy(to + c, &codes, 8);
        }
        if (recode != nullptr)
          for (int c = 0; c < count; ++c) to[c] = recode[to[c]];
        const size_t at = static_cast<size_t>(row) * layout.groups + group;
        std::memcpy(tile + layout.scale_at(span, j) + r * scale_bytes, part->scales + at * scale_bytes, scale_bytes);
        if (layout.zeros) std::memcpy(tile + layout.zero_at(span, j) + r, part->zeros + at, 1);
      }
    }
    for (int v = 0; v < layout.vectors; ++v)
      for (int r = 0; r < kRows; ++r)
        std::memcpy(vectors.data() + v * kVector + 4 * r, apart.data() + r * stride + 4 * v, 4);
    std::byte* to = tile + layout.codes_at(span);
    for (int v = 0; v < layout.vectors; v += Planes<bits>::kChunk, to += Planes<bits>::kBytes)
      Planes<bits>::encode(vectors.data() + v * kVector, to);
  }
}

using PackTile = void (*)(const Layout&, const Source (&)[kRows], const uint8_t*, std::byte*);
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
    for (int t = first; t < last; ++t) {
      std::byte* tile = data_.data() + t * layout_.tile_bytes();
      std::memset(tile, 0, layout_.tile_bytes());
      Source rows[kRows];
      std::copy_n(sources.data() + static_cast<size_t>(t) * kRows, kRows, rows);
      kPackTile[layout_.bits - 1](layout_, rows, recode, tile);
    }
  });
}

}  // namespace trimtab
