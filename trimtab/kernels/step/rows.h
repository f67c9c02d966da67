// What happens to a row of activations between two products with a weight.
#pragma once

#include <string>

#include "base/vectors.h"

namespace trimtab {

// y = x / sqrt(mean(x^2) + eps) * weight, or with `rms` false ((x - mean) / sqrt(var + eps)) * weight + bias; a null weight is
// one, a null bias zero. x and y may be the same.
void norm_row(const float* x, float* y, int width, bool rms, const float* weight, const float* bias, float eps);

// Rotate pairs (c, c + width / 2) of one head's first `width` channels by the angles whose cosines and sines are given.
void rotate_head(float* x, int width, const float* cosine, const float* sine);

enum class Activation { kNone, kRelu, kSilu, kGelu, kGeluTanh };
Activation parse_activation(const std::string& name);

// y = f(x), times `times` where it is not null; y may be either.
void activate_row(Activation kind, const float* x, const float* times, float* y, int width);

}  // namespace trimtab
