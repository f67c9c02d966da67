#include "step/rows.h"

#include <cmath>

#include "base/arrays.h"

namespace trimtab {
namespace {

// Lanes at a time, the rest of the row through a vector that is filled up with zeros.
template <typename Work>
void by_lanes(int width, const Work& work) {
  int c = 0;
  for (; c + kLanes <= width; c += kLanes) work(c, kLanes);
  if (c < width) work(c, width - c);
}

F32 load_some(const float* p, int n) {
  if (n == kLanes) return load(p);
  F32 v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

void store_some(float* p, F32 v, int n) { std::memcpy(p, &v, n * sizeof(float)); }

// erf(x), absolute error below 2e-7 (Abramowitz and Stegun 1964, 7.1.26).
F32 error_function(F32 x) {
  const F32 size = larger(x, -x), t = splat(1.0f) / fma(size, splat(0.3275911f), splat(1.0f));
  F32 p = splat(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, splat(c));
  const F32 value = splat(1.0f) - p * t * exponential(-size * size);
  return x < F32{} ? -value : value;
}

template <typename Function>
void apply(const float* x, const float* times, float* y, int width, const Function& f) {
  by_lanes(width, [&](int c, int n) {
    F32 v = f(load_some(x + c, n));
    if (times != nullptr) v *= load_some(times + c, n);
    store_some(y + c, v, n);
  });
}

}  // namespace

void norm_row(const float* x, float* y, int width, bool rms, const float* weight, const float* bias, float eps) {
  float mean = 0;
  if (!rms) {
    F32 total = {};
    by_lanes(width, [&](int c, int n) { total += load_some(x + c, n); });
    mean = sum(total) / static_cast<float>(width);
  }
  F32 squares = {};
  by_lanes(width, [&](int c, int n) {
    F32 v = load_some(x + c, n) - splat(mean);
    if (n < kLanes && !rms)  // the filling is no part of the row
      for (int i = n; i < kLanes; ++i) v[i] = 0;
    squares = fma(v, v, squares);
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  by_lanes(width, [&](int c, int n) {
    F32 v = (load_some(x + c, n) - splat(mean)) * splat(scale);
    if (weight != nullptr) v *= load_some(weight + c, n);
    if (bias != nullptr) v += load_some(bias + c, n);
    store_some(y + c, v, n);
  });
}

void rotate_head(float* x, int width, const float* cosine, const float* sine) {
  const int half = width / 2;
  by_lanes(half, [&](int c, int n) {
    const F32 a = load_some(x + c, n), b = load_some(x + half + c, n);
    const F32 cos = load_some(cosine + c, n), sin = load_some(sine + c, n);
    store_some(x + c, a * cos - b * sin, n);
    store_some(x + half + c, b * cos + a * sin, n);
  });
}

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  require(name == "gelu_tanh", "an activation is none, relu, silu, gelu or gelu_tanh, not " + name);
  return Activation::kGeluTanh;
}

void activate_row(Activation kind, const float* x, const float* times, float* y, int width) {
  const F32 one = splat(1.0f), half = splat(0.5f);
  switch (kind) {
    case Activation::kNone:
      return apply(x, times, y, width, [](F32 v) { return v; });
    case Activation::kRelu:
      return apply(x, times, y, width, [](F32 v) { return larger(v, F32{}); });
    case Activation::kSilu:
      return apply(x, times, y, width, [=](F32 v) { return v / (one + exponential(-v)); });
    case Activation::kGelu:
      return apply(x, times, y, width, [=](F32 v) { return half * v * (one + error_function(v * splat(0.70710678f))); });
    case Activation::kGeluTanh:  // v (1 + tanh u) / 2 = v / (1 + e^-2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
      return apply(x, times, y, width, [=](F32 v) {
        const F32 u = v * fma(v * v, splat(0.0356774081f), splat(0.797884561f));
        return v / (one + exponential(u * splat(-2.0f)));
      });
  }
}

}  // namespace trimtab
