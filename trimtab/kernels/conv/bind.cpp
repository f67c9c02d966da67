#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "base/arrays.h"
#include "conv/conv.h"
#include "sparse/masked.h"

namespace trimtab {

using Pair = std::tuple<int, int>;

void bind_conv(nb::module_& module) {
  nb::class_<SparseConv>(module, "SparseConv", "A convolution with a sparse kernel, for inputs of one height and width.")
      .def_prop_ro("nbytes", &SparseConv::nbytes, "Bytes of the kept weights and their places.")
      .def(
          "apply",
          [](const SparseConv& conv, nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu> x) {
            const ConvShape& s = conv.shape;
            require(x.shape(1) == static_cast<size_t>(s.in) && x.shape(2) == static_cast<size_t>(s.height) &&
                        x.shape(3) == static_cast<size_t>(s.width),
                    "x must be [images, " + std::to_string(s.in) + ", " + std::to_string(s.height) + ", " +
                        std::to_string(s.width) + "]");
            float* y;
            auto result = new_floats({x.shape(0), static_cast<size_t>(s.out), static_cast<size_t>(s.out_height()),
                                      static_cast<size_t>(s.out_width())}, &y);
            {
              nb::gil_scoped_release release;
              conv.apply(x.data(), static_cast<int>(x.shape(0)), y);
            }
            return result;
          },
          nb::arg("x"), "x [images, in, height, width] to y [images, out, height', width'], fp32.");
  module.def(
      "sparse_conv",
      [](Array2<uint8_t> bits, Array1<Half> values, std::optional<Array1<float>> bias, int in, int groups, Pair kernel,
         Pair stride, Pair padding, Pair dilation, Pair size) {
        const auto [kh, kw] = kernel;
        const auto [sh, sw] = stride;
        const auto [ph, pw] = padding;
        const auto [dh, dw] = dilation;
        const auto [height, width] = size;
        const int out = static_cast<int>(bits.shape(0));
        require(in >= 1 && out >= 1 && groups >= 1 && in % groups == 0 && out % groups == 0, "groups must divide the channels");
        require(kh >= 1 && kw >= 1 && sh >= 1 && sw >= 1 && dh >= 1 && dw >= 1 && ph >= 0 && pw >= 0 && height >= 1 && width >= 1,
                "kernel, stride, dilation and size must be at least 1, padding at least 0");
        const ConvShape shape{in, out, groups, kh, kw, sh, sw, ph, pw, dh, dw, height, width};
        require(height + 2 * ph >= dh * (kh - 1) + 1 && width + 2 * pw >= dw * (kw - 1) + 1, "the kernel is larger than the padded input");
        const uint64_t padded = uint64_t(height + 2 * ph + sh) * uint64_t(width + 2 * pw + sw) * uint64_t(in);
        require(padded < (uint64_t{1} << 31), "the padded input of an image is too large");
        const int columns = in / groups * kh * kw;
        require(bits.shape(1) == static_cast<size_t>(columns + 7) / 8, "a row of " + std::to_string(columns) + " weights needs " +
                                                                           std::to_string((columns + 7) / 8) + " bytes of mask");
        const size_t kept = Masked::count(bits.data(), out, columns);
        require(kept == values.shape(0), "the mask keeps another number of weights than the " + std::to_string(values.shape(0)) + " values");
        require(!bias || bias->shape(0) == static_cast<size_t>(out), "a bias has a value for each output channel");
        return std::make_shared<SparseConv>(bits.data(), values.data(), kept, bias ? bias->data() : nullptr, shape);
      },
      nb::arg("bits"), nb::arg("values"), nb::arg("bias").none(), nb::arg("channels"), nb::arg("groups"), nb::arg("kernel"),
      nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("size"));
}

}  // namespace trimtab
