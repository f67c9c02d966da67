#include "codebook/codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear/dots.h"

namespace trimtab {
namespace {

constexpr int kVectors = 16;  // of a block: its tables of 512 bytes a vector fit the first cache
constexpr int kRows = 64;     // of a panel: one register of indices
constexpr int kWords = 256;   // of a table
constexpr int kTile = 16;     // rows unpacked at a time
constexpr int kTableBytes = 2 * kWords;
constexpr int kInputs = 4;    // whose tables are built and looked up together, divided by the books

int rounded(int n, int to) { return (n + to - 1) / to * to; }

// Where in a register of indices a row of a panel lies, so that widening to 32 bits puts the rows in order: byte
// 16 l + 4 q + e holds row 16 q + 4 l + e.
int byte_of(int row) { return 16 * (row / 4 % 4) + 4 * (row / 16) + row % 4; }

}  // namespace

Codebook::Codebook(const std::vector<Book>& books, int rows, int cols, int dim)
    : Weight(rows, cols),
      dim_(dim),
      books_(static_cast<int>(books.size())),
      vectors_((cols + dim - 1) / dim),
      blocks_((vectors_ + kVectors - 1) / kVectors),
      panels_((rows + kRows - 1) / kRows) {
  index_bytes_ = 1;
  size_t words = 0;
  for (const Book& book : books) {
    if (book.size > kWords) index_bytes_ = 2;
    book_.push_back(words);
    words += static_cast<size_t>(book.size) * rounded(dim, 4);
  }
  words_ = Buffer(words * sizeof(float));
  columns_ = Buffer(index_bytes_ == 1 ? static_cast<size_t>(books_) * dim * kWords * sizeof(float) : 0);
  indices_ = Buffer(static_cast<size_t>(panels_) * kRows * books_ * rounded(vectors_, 2) * index_bytes_);
  std::memset(words_.data(), 0, words_.size());
  if (columns_.size()) std::memset(columns_.data(), 0, columns_.size());
  std::memset(indices_.data(), 0, indices_.size());
  for (int b = 0; b < books_; ++b) {
    float* word = reinterpret_cast<float*>(words_.data()) + book_[b];
    float* column = reinterpret_cast<float*>(columns_.data()) + static_cast<size_t>(b) * dim * kWords;
    for (int k = 0; k < books[b].size; ++k)
      for (int d = 0; d < dim; ++d) {
        const float value = simd::float_of_half(books[b].words[static_cast<size_t>(k) * dim + d]);
        word[static_cast<size_t>(k) * rounded(dim, 4) + d] = value;
        if (columns_.size()) column[d * kWords + k] = value;
      }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors_; ++v) {
        const uint16_t index = books[b].indices[static_cast<size_t>(r) * vectors_ + v];
        if (index_bytes_ == 1) reinterpret_cast<uint8_t*>(indices_.data())[place(r, b, v)] = static_cast<uint8_t>(index);
        else reinterpret_cast<uint16_t*>(indices_.data())[place(r, b, v)] = index;
      }
  }
}

size_t Codebook::nbytes() const { return indices_.size() + words_.size(); }

size_t Codebook::place(int r, int book, int vector) const {
  const int block = vector / kVectors, held = std::min(kVectors, rounded(vectors_, 2) - block * kVectors);
  const size_t before = static_cast<size_t>(block) * kVectors * panels_ * books_;
  const size_t line = before + (static_cast<size_t>(r / kRows) * books_ + book) * held + vector % kVectors;
  return line * kRows + byte_of(r % kRows);
}

// A block of vectors of some rows of one panel to tile [rows][ld]. Words are copied four floats at a time; what a copy
// writes beyond its vector is written again by the next, and behind the last the tile has room.
template <typename Index>
void Codebook::unpack(int r, int rows, int block, float* tile, size_t ld) const {
  const int count = std::min(kVectors, vectors_ - block * kVectors), width = rounded(dim_, 4);
  const Index* first = reinterpret_cast<const Index*>(indices_.data()) + place(r, 0, block * kVectors);
  const Index* second = books_ > 1 ? reinterpret_cast<const Index*>(indices_.data()) + place(r, 1, block * kVectors) : first;
  const float* words = reinterpret_cast<const float*>(words_.data());
  const float* rest = words + book_.back();
  int byte[kTile];
  for (int k = 0; k < rows; ++k) byte[k] = byte_of((r + k) % kRows) - byte_of(r % kRows);
  for (int v = 0; v < count; ++v, first += kRows, second += kRows, tile += dim_)
    for (int k = 0; k < rows; ++k) {
      const float* word = words + static_cast<size_t>(first[byte[k]]) * width;
      float* to = tile + k * ld;
      if (books_ == 1) {
        for (int d = 0; d < width; d += 4) std::memcpy(to + d, word + d, 4 * sizeof(float));
      } else {
        const float* more = rest + static_cast<size_t>(second[byte[k]]) * width;
        for (int d = 0; d < width; d += 4) {
          float four[4];
          for (int i = 0; i < 4; ++i) four[i] = word[d + i] + more[d + i];
          std::memcpy(to + d, four, sizeof four);
        }
      }
    }
}

void Codebook::unpack_any(int r, int rows, int block, float* tile, size_t ld) const {
  if (index_bytes_ == 1) unpack<uint8_t>(r, rows, block, tile, ld);
  else unpack<uint16_t>(r, rows, block, tile, ld);
}

void Codebook::row(int r, float* out) const {
  std::vector<float> tile(static_cast<size_t>(kVectors) * dim_ + 4);
  for (int block = 0, c = 0; block < blocks_; ++block, c += kVectors * dim_) {
    unpack_any(r, 1, block, tile.data(), tile.size());
    std::memcpy(out + c, tile.data(), std::min(kVectors * dim_, cols - c) * sizeof(float));
  }
}

// Many inputs: a tile of rows is unpacked into the second cache and multiplied with all of them.
void Codebook::expand(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  const int wide = kVectors * dim_;
  const int blocks = std::max(1, 2048 / wide);  // multiplied at a time
  const size_t ld = rounded(blocks * wide + 4, 16);
  float* tile = reinterpret_cast<float*>(scratch) + team.rank * kTile * ld;
  const auto [first, last] = team.share((rows + kTile - 1) / kTile);
  for (int t = first; t < last; ++t) {
    const int r = t * kTile, count = std::min(kTile, rows - r);
    for (int block = 0; block < blocks_; block += blocks) {
      for (int b = block; b < std::min(blocks_, block + blocks); ++b) unpack_any(r, count, b, tile + (b - block) * wide, ld);
      const int c = block * wide;
      dots(tile, ld, count, x + c, ldx, m, std::min(blocks * wide, cols - c), y + r, ldy, c > 0);
    }
  }
  team.sync();
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

// Tables of a block for one input: every codeword times the block's columns, rounded to 16 bits with one scale a block;
// tables [books][vectors][low bytes 256, high bytes 256].
void Codebook::build(const float* x, int block, std::byte* tables, float* scale) const {
  const int held = std::min(kVectors, rounded(vectors_, 2) - block * kVectors);
  alignas(64) float sums[2 * kVectors][kWords];
  __m512 most = _mm512_setzero_ps();
  for (int b = 0; b < books_; ++b) {
    const float* columns = reinterpret_cast<const float*>(columns_.data()) + static_cast<size_t>(b) * dim_ * kWords;
    for (int v = 0; v < held; ++v) {
      const int c = (block * kVectors + v) * dim_, count = std::clamp(cols - c, 0, dim_);
      for (int k = 0; k < kWords; k += 64) {
        __m512 sum[4];
        for (__m512& s : sum) s = _mm512_setzero_ps();
        for (int d = 0; d < count; ++d)
          for (int q = 0; q < 4; ++q)
            sum[q] = _mm512_fmadd_ps(_mm512_load_ps(columns + d * kWords + k + 16 * q), _mm512_set1_ps(x[c + d]), sum[q]);
        for (int q = 0; q < 4; ++q) {
          most = _mm512_max_ps(most, _mm512_abs_ps(sum[q]));
          _mm512_store_ps(&sums[b * kVectors + v][k + 16 * q], sum[q]);
        }
      }
    }
  }
  const float largest = _mm512_reduce_max_ps(most);
  *scale = largest / 32767;
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? 32767 / largest : 0.0f);
  for (int b = 0; b < books_; ++b)
    for (int v = 0; v < held; ++v, tables += kTableBytes)
      for (int k = 0; k < kWords; k += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(&sums[b * kVectors + v][k]), inverse));
        _mm_store_si128(reinterpret_cast<__m128i*>(tables + k), _mm512_cvtepi32_epi8(rounded));
        _mm_store_si128(reinterpret_cast<__m128i*>(tables + kWords + k), _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
      }
}

namespace {

// 64 indices looked up in a table of 256 bytes: two permutations of 128 each, and the index's highest bit chooses.
inline __m512i look(const __m512i (&table)[4], __m512i index, __mmask64 upper) {
  const __m512i low = _mm512_permutex2var_epi8(table[0], index, table[1]);
  return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(table[2], index, table[3]));
}

// P panels times `count` vectors (even) of one input: 32-bit sums of 16-bit entries, then y (+)= scale * sum. Two vectors
// share each table's registers, and one dot instruction adds both.
template <int P>
void look_up_panels(const uint8_t* indices, size_t panel_bytes, const std::byte* tables, int count, __m512i (&sum)[P][4]) {
  const __m512i ones = _mm512_set1_epi16(1);
  for (int v = 0; v < count; v += 2, indices += 2 * kRows) {
    __m512i wide[2][P][2];
    for (int j = 0; j < 2; ++j, tables += kTableBytes) {
      __m512i low[4], high[4];
      for (int q = 0; q < 4; ++q) {
        low[q] = _mm512_load_si512(tables + 64 * q);
        high[q] = _mm512_load_si512(tables + kWords + 64 * q);
      }
      for (int p = 0; p < P; ++p) {
        const __m512i index = _mm512_load_si512(indices + p * panel_bytes + j * kRows);
        const __mmask64 upper = _mm512_movepi8_mask(index);
        const __m512i l = look(low, index, upper), h = look(high, index, upper);
        wide[j][p][0] = _mm512_unpacklo_epi8(l, h);
        wide[j][p][1] = _mm512_unpackhi_epi8(l, h);
      }
    }
    for (int p = 0; p < P; ++p)
      for (int q = 0; q < 2; ++q) {
        const __m512i a = wide[0][p][q], b = wide[1][p][q];
        sum[p][2 * q] = _mm512_dpwssd_epi32(sum[p][2 * q], _mm512_unpacklo_epi16(a, b), ones);
        sum[p][2 * q + 1] = _mm512_dpwssd_epi32(sum[p][2 * q + 1], _mm512_unpackhi_epi16(a, b), ones);
      }
  }
}

template <int P>
void look_up_block(const uint8_t* indices, size_t panel_bytes, const std::byte* tables, int count, float scale, float* y,
                   int rows, bool add) {
  __m512i sum[P][4];
  for (auto& panel : sum)
    for (__m512i& s : panel) s = _mm512_setzero_si512();
  look_up_panels<P>(indices, panel_bytes, tables, count, sum);
  for (int k = 0; k < 4 * P && 16 * k < rows; ++k) {
    const int n = std::min(16, rows - 16 * k);
    const simd::Floats before = add ? simd::load(y + 16 * k, n) : simd::floats(0.0f);
    simd::store(y + 16 * k, simd::fma(simd::floats(scale), simd::to_floats(sum[k / 4][k % 4]), before), n);
  }
}

}  // namespace

// Few inputs: each codeword meets each vector of the input once, and a row adds up what its indices find in these
// tables (T-MAC, arXiv:2407.00088), 64 rows at a time. Nothing is multiplied a weight.
void Codebook::look_up(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  const size_t table_bytes = static_cast<size_t>(books_) * kVectors * kTableBytes;
  float* scales = reinterpret_cast<float*>(scratch + table_bytes * m * blocks_);
  const auto [from, to] = team.share(m * blocks_);
  for (int u = from; u < to; ++u)
    build(x + static_cast<size_t>(u / blocks_) * ldx, u % blocks_, scratch + u * table_bytes, scales + u);
  team.sync();
  const auto [first, last] = team.share(panels_);
  for (int block = 0; block < blocks_; ++block) {
    const int count = books_ * std::min(kVectors, rounded(vectors_, 2) - block * kVectors);
    const size_t panel_bytes = static_cast<size_t>(count) * kRows;
    const uint8_t* indices = reinterpret_cast<const uint8_t*>(indices_.data()) +
                             static_cast<size_t>(block) * kVectors * panels_ * books_ * kRows;
    for (int p = first; p < last; p += 2)
      for (int i = 0; i < m; ++i) {
        const int u = i * blocks_ + block, r = p * kRows;
        float* out = y + static_cast<size_t>(i) * ldy + r;
        const std::byte* tables = scratch + u * table_bytes;
        if (p + 1 < last) look_up_block<2>(indices + p * panel_bytes, panel_bytes, tables, count, scales[u], out, std::min(2 * kRows, rows - r), block > 0);
        else look_up_block<1>(indices + p * panel_bytes, panel_bytes, tables, count, scales[u], out, std::min(kRows, rows - r), block > 0);
      }
  }
  team.sync();
}

// Tables are rounded, so that an input should not find them alone and miss them in company. Up to an index for every four
// weights looking up is never far behind, and weights with rows enough to share the tables always do it. With more indices
// many inputs share what is unpacked; measured nanoseconds: 0.045 a look-up and table entry, 0.65 to unpack an index, 0.0136
// a multiply-add.
bool Codebook::looks_up(int m) const {
  if (index_bytes_ > 1) return false;
  if (4 * books_ <= dim_) return rows >= kWords / 2;
  const double indices = static_cast<double>(books_) / dim_;  // a weight
  return m * (0.045 * indices * (1 + static_cast<double>(kWords) / rows) - 0.0136) < 0.65 * indices;
}

#else

void Codebook::look_up(const float*, int, int, float*, int, std::byte*, const Team&) const {}

bool Codebook::looks_up(int) const { return false; }

#endif

size_t Codebook::scratch(int m) const {
  const size_t block = static_cast<size_t>(books_) * kVectors * kTableBytes + sizeof(float);
  const int wide = kVectors * dim_;
  const size_t tile = static_cast<size_t>(kTile) * rounded(std::max(1, 2048 / wide) * wide + 4, 16) * sizeof(float);
  return looks_up(m) ? block * std::min(m, kInputs / books_) * blocks_ : tile * Pool::get().size();
}

void Codebook::apply(const float* x, int ldx, int m, float* y, int ldy, std::byte* scratch, const Team& team) const {
  if (!looks_up(m)) return expand(x, ldx, m, y, ldy, scratch, team);
  const int chunk = kInputs / books_;
  for (int i = 0; i < m; i += chunk)
    look_up(x + static_cast<size_t>(i) * ldx, ldx, std::min(chunk, m - i), y + static_cast<size_t>(i) * ldy, ldy, scratch, team);
}

}  // namespace trimtab
