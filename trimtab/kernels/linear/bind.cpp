#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include "base/arrays.h"
#include "linear/weight.h"

namespace trimtab {

void bind_linear(nb::module_& module) {
  nb::class_<Weight>(module, "Weight", "A packed weight matrix, interleaved for the kernels.")
      .def_ro("rows", &Weight::rows)
      .def_ro("cols", &Weight::cols)
      .def_prop_ro("nbytes", &Weight::nbytes, "Bytes that one pass over the matrix reads.")
      .def(
          "apply",
          [](const Weight& weight, Array2<float> x) {
            const int m = static_cast<int>(x.shape(0));
            require(x.shape(1) == static_cast<size_t>(weight.cols),
                    "the weight has " + std::to_string(weight.cols) + " columns, and x has " + std::to_string(x.shape(1)));
            float* y;
            auto result = new_floats({x.shape(0), static_cast<size_t>(weight.rows)}, &y);
            if (m == 0) return result;
            Buffer scratch(weight.scratch(m));
            {
              nb::gil_scoped_release release;
              Pool::get().run([&](const Team& team) {
                weight.apply(x.data(), weight.cols, m, y, weight.rows, scratch.data(), team);
              });
            }
            return result;
          },
          nb::arg("x"), "x [m, cols] to y [m, rows], fp32.")
      .def(
          "row",
          [](const Weight& weight, int r) {
            require(r >= 0 && r < weight.rows, "the weight has " + std::to_string(weight.rows) + " rows; row " + std::to_string(r) + " was asked for");
            float* y;
            auto result = new_floats({static_cast<size_t>(weight.cols)}, &y);
            weight.row(r, y);
            return result;
          },
          nb::arg("row"), "A row unpacked, fp32.");
}

}  // namespace trimtab
