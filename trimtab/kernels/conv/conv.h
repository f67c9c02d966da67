// A convolution whose kernel is sparse: the kept weights alone are multiplied, each with strips of sixteen pixels.
#pragma once

#include <cstdint>
#include <vector>

#include "base/arrays.h"
#include "base/simd.h"

namespace trimtab {

struct ConvShape {
  int in, out, groups;              // channels
  int kernel_h, kernel_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int height, width;                // of the input
  int out_height() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int out_width() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
};

// The input is copied into a padded plane a channel, or, with a stride, into one plane for each remainder of row and
// column: then a weight's partner for the output pixel p is always p + a constant, whatever the kernel. A row of outputs
// is as long as a plane's row; the pixels beyond its end are computed and left behind. So a general kernel is the
// product of a sparse matrix and strips, as a 1x1 kernel is (Elsen et al. 2019, arXiv:1911.09723).
class SparseConv {
 public:
  // bits [out][ceil(columns / 8)] and the kept values, row by row; a row's columns are [in / groups][kernel_h][kernel_w].
  SparseConv(const uint8_t* bits, const Half* values, size_t kept, const float* bias, const ConvShape& shape);
  size_t nbytes() const { return offsets_.size() + values_.size() + bias_.size() * sizeof(float); }
  void apply(const float* x, int images, float* y) const;
  const ConvShape shape;

 private:
  struct Piece {  // pixels of a block that one row of the output takes
    int from, to, count;
  };
  template <int S>
  void rows(const float* planes, int block, int first, int last, float* y) const;
  void prepare(const float* x, float* planes, int first, int last) const;
  void strips(const float* planes, float* y, int first, int last) const;

  int plane_h_, plane_w_;     // of one remainder
  int pixels_;                // of an output channel, those beyond the rows' ends included
  int blocks_;                // of kStrips strips
  bool direct_;               // the input itself serves as the planes
  size_t plane_floats_;       // of a channel, all its remainders
  Buffer offsets_;            // of each kept weight, in floats from the first pixel's partner
  Buffer values_;             // [kept], halves
  std::vector<size_t> start_; // of each output channel's weights, and the end
  std::vector<float> bias_;   // [out]
  std::vector<std::vector<Piece>> pieces_;
};

}  // namespace trimtab
