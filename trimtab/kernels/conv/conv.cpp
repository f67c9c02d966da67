#include "conv/conv.h"

#include <algorithm>
#include <cstring>

#include "base/team.h"
#include "sparse/spmm.h"

namespace trimtab {
namespace {

#if defined(__AVX512F__)
constexpr int kStrips = 8;  // sums that stay in registers: enough to hide the latency of the multiply-adds
#else
constexpr int kStrips = 4;
#endif
constexpr int kWidth = simd::kLanes;
constexpr size_t kSlack = kStrips * kWidth;  // floats behind the planes: a last block's strips are read whole

// to[i] = from[i * stride] for first <= i < end; the common stride is a constant, so that it is done sixteen at a time.
void every(const float* from, int stride, float* to, int first, int end) {
  if (stride == 2) {
    for (int i = first; i < end; ++i) to[i] = from[2 * i];
  } else {
    for (int i = first; i < end; ++i) to[i] = from[stride * i];
  }
}

}  // namespace

SparseConv::SparseConv(const uint8_t* bits, const Half* values, size_t kept, const float* bias, const ConvShape& shape)
    : shape(shape), offsets_(kept * sizeof(uint32_t)), values_(kept * sizeof(Half)) {
  const ConvShape& s = shape;
  const int remainders = s.stride_h * s.stride_w, out_w = s.out_width();
  plane_h_ = (s.height + 2 * s.pad_h + s.stride_h - 1) / s.stride_h;
  plane_w_ = (s.width + 2 * s.pad_w + s.stride_w - 1) / s.stride_w;
  // An odd number of cache lines, or the same pixels of all channels would fall into a few sets of the first cache.
  plane_floats_ = ((static_cast<size_t>(remainders) * plane_h_ * plane_w_ + 15) / 16 | 1) * 16;
  pixels_ = (s.out_height() - 1) * plane_w_ + out_w;
  blocks_ = (pixels_ + kStrips * kWidth - 1) / (kStrips * kWidth);
  // Unpadded and without a stride the input is its own plane, unless the last strip would read beyond the last image.
  direct_ = remainders == 1 && s.pad_h == 0 && s.pad_w == 0 && pixels_ % kWidth == 0 &&
            plane_floats_ == static_cast<size_t>(s.height) * s.width;
  const int channels = s.in / s.groups, per_group = s.out / s.groups, columns = channels * s.kernel_h * s.kernel_w;
  uint32_t* offset = reinterpret_cast<uint32_t*>(offsets_.data());
  start_.push_back(0);
  for (int o = 0; o < s.out; ++o) {
    size_t end = start_.back();
    for (int column = 0; column < columns; ++column) {
      if (!(bits[static_cast<size_t>(o) * ((columns + 7) / 8) + column / 8] >> (column % 8) & 1)) continue;
      const int channel = o / per_group * channels + column / (s.kernel_h * s.kernel_w);
      const int h = column / s.kernel_w % s.kernel_h * s.dilation_h, w = column % s.kernel_w * s.dilation_w;
      const size_t plane = static_cast<size_t>(h % s.stride_h) * s.stride_w + w % s.stride_w;
      offset[end++] = static_cast<uint32_t>(channel * plane_floats_ + plane * plane_h_ * plane_w_ +
                                            static_cast<size_t>(h / s.stride_h) * plane_w_ + w / s.stride_w);
    }
    start_.push_back(end);
  }
  std::memcpy(values_.data(), values, values_.size());
  bias_.assign(s.out, 0.0f);
  if (bias != nullptr) std::copy(bias, bias + s.out, bias_.begin());
  pieces_.resize(blocks_);
  for (int row = 0; row < s.out_height(); ++row)
    for (int column = 0; column < out_w;) {
      const int pixel = row * plane_w_ + column, block = pixel / (kStrips * kWidth), from = pixel % (kStrips * kWidth);
      const int count = std::min(out_w - column, kStrips * kWidth - from);
      pieces_[block].push_back({from, row * out_w + column, count});
      column += count;
    }
}

// Channels [first, last) of one image into their planes.
void SparseConv::prepare(const float* x, float* planes, int first, int last) const {
  const ConvShape& s = shape;
  for (int c = first; c < last; ++c) {
    float* plane = planes + c * plane_floats_;
    const float* image = x + static_cast<size_t>(c) * s.height * s.width;
    for (int a = 0; a < s.stride_h; ++a)
      for (int b = 0; b < s.stride_w; ++b)
        for (int h = 0; h < plane_h_; ++h, plane += plane_w_) {
          const int row = h * s.stride_h + a - s.pad_h;
          if (row < 0 || row >= s.height) {
            std::memset(plane, 0, plane_w_ * sizeof(float));
          } else if (s.stride_w == 1) {
            std::memset(plane, 0, s.pad_w * sizeof(float));
            std::memcpy(plane + s.pad_w, image + static_cast<size_t>(row) * s.width, s.width * sizeof(float));
            std::memset(plane + s.pad_w + s.width, 0, s.pad_w * sizeof(float));
          } else {
            const int first = std::max(0, s.pad_w - b + s.stride_w - 1) / s.stride_w;
            const int end = std::min(plane_w_, (s.width + s.pad_w - b + s.stride_w - 1) / s.stride_w);
            std::fill(plane, plane + std::min(first, plane_w_), 0.0f);
            every(image + static_cast<size_t>(row) * s.width - s.pad_w + b, s.stride_w, plane, first, end);
            std::fill(plane + std::max(end, 0), plane + plane_w_, 0.0f);
          }
        }
  }
}

// Output channels [first, last) of one block of S strips.
template <int S>
void SparseConv::rows(const float* planes, int block, int first, int last, float* y) const {
  const uint32_t* offsets = reinterpret_cast<const uint32_t*>(offsets_.data());
  const Half* values = reinterpret_cast<const Half*>(values_.data());
  const size_t out_pixels = static_cast<size_t>(shape.out_height()) * shape.out_width();
  const std::vector<Piece>& pieces = pieces_[block];
  float line[S * kWidth];
  for (int o = first; o < last; ++o) {
    simd::Floats sum[S];
    for (simd::Floats& lanes : sum) lanes = simd::floats(bias_[o]);
    sparse_row<S>(offsets + start_[o], values + start_[o], static_cast<int>(start_[o + 1] - start_[o]),
                  planes + static_cast<size_t>(block) * kStrips * kWidth, sum);
    for (int k = 0; k < S; ++k) simd::store(line + k * kWidth, sum[k]);
    for (const Piece& piece : pieces) std::memcpy(y + o * out_pixels + piece.to, line + piece.from, piece.count * sizeof(float));
  }
}

// Pairs of block and output channel [first, last), the channels of a block in a row so that its planes stay near.
void SparseConv::strips(const float* planes, float* y, int first, int last) const {
  while (first < last) {
    const int block = first / shape.out, from = first % shape.out, to = std::min(shape.out, from + last - first);
    const int count = (std::min(pixels_ - block * kStrips * kWidth, kStrips * kWidth) + kWidth - 1) / kWidth;
    switch (count) {
      case 1: rows<1>(planes, block, from, to, y); break;
      case 2: rows<2>(planes, block, from, to, y); break;
      case 3: rows<3>(planes, block, from, to, y); break;
#if defined(__AVX512F__)
      case 4: rows<4>(planes, block, from, to, y); break;
      case 5: rows<5>(planes, block, from, to, y); break;
      case 6: rows<6>(planes, block, from, to, y); break;
      case 7: rows<7>(planes, block, from, to, y); break;
#endif
      default: rows<kStrips>(planes, block, from, to, y);
    }
    first += to - from;
  }
}

// Many images are shared out whole, so that no thread waits; of few, every thread takes a part.
void SparseConv::apply(const float* x, int images, float* y) const {
  const size_t in = static_cast<size_t>(shape.in) * shape.height * shape.width;
  const size_t out = static_cast<size_t>(shape.out) * shape.out_height() * shape.out_width();
  const size_t planes = shape.in * plane_floats_ + kSlack;
  const int threads = Pool::get().size(), work = blocks_ * shape.out;
  const bool whole = images >= threads;
  Buffer scratch(direct_ ? 0 : (whole ? threads : 1) * planes * sizeof(float));
  Pool::get().run([&](const Team& team) {
    float* own = reinterpret_cast<float*>(scratch.data()) + (whole && !direct_ ? team.rank * planes : 0);
    const auto [first, last] = whole ? team.share(images) : std::pair(0, images);
    const auto [from, to] = whole ? std::pair(0, shape.in) : team.share(shape.in);
    const auto [begin, end] = whole ? std::pair(0, work) : team.share(work);
    if (!direct_ && (whole || team.rank == 0)) std::memset(own + planes - kSlack, 0, kSlack * sizeof(float));
    for (int i = first; i < last; ++i) {
      if (!direct_) prepare(x + i * in, own, from, to);
      if (!whole) team.sync();
      strips(direct_ ? x + i * in : own, y + i * out, begin, end);
      if (!whole) team.sync();
    }
  });
}

}  // namespace trimtab
