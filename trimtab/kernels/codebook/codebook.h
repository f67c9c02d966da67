// A weight whose vectors of neighbouring columns are indices into a codebook, and maybe into a second one for what the
// first leaves (Liu et al. 2024, arXiv:2409.17066).
#pragma once

#include <cstdint>
#include <vector>

#include "base/arrays.h"
#include "base/simd.h"
#include "linear/weight.h"

namespace trimtab {

class Codebook final : public Weight {
 public:
  struct Book {
    const uint16_t* indices;  // [rows][ceil(cols / dim)], each below size
    const Half* words;        // [size][dim]
    int size;
  };
  Codebook(const std::vector<Book>& books, int rows, int cols, int dim);
  size_t nbytes() const override;
  size_t scratch(int m) const override;
  void apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const override;
  void row(int r, float* out) const override;

 private:
  size_t place(int r, int book, int vector) const;
  template <typename Index>
  void unpack(int r, int rows, int block, float* tile, size_t ld) const;
  void unpack_any(int r, int rows, int block, float* tile, size_t ld) const;
  void expand(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const;
  void build(const float* x, int block, std::byte* tables, float* scale) const;
  void look_up(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const;
  bool looks_up(int m) const;

  const int dim_, books_, vectors_, blocks_, panels_;
  int index_bytes_;  // 1 where no book has more than 256 words, else 2
  Buffer indices_;   // [blocks_][panels_][books_][16 vectors, the last block's rounded up to even][64 rows]
  Buffer words_;     // books of [size][dim rounded up to four], fp32: what rows are unpacked from
  Buffer columns_;   // books of [dim][256], fp32: what tables are built from
  std::vector<size_t> book_;  // where each book begins in words_
};

}  // namespace trimtab
