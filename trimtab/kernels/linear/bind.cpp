#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "base/arrays.h"
#include "linear/stack.h"

namespace trimtab {
namespace {

// Seconds of each of `turns` products of the weights, one weight after the other, with memory that is already there.
std::vector<double> seconds(const std::vector<std::shared_ptr<Weight>>& weights, Array2<float> x, int turns) {
  require(!weights.empty() && turns >= 1 && x.shape(0) >= 1, "timing needs weights, inputs and turns");
  const int m = static_cast<int>(x.shape(0)), rows = weights[0]->rows, cols = weights[0]->cols;
  size_t scratch = 0;
  for (const auto& w : weights) {
    require(w->rows == rows && w->cols == cols, "weights that are timed together have one shape");
    scratch = std::max(scratch, w->scratch(m));
  }
  require(x.shape(1) == static_cast<size_t>(cols), "x and the weights differ in their columns");
  const int ldy = static_cast<int>(spaced(rows));
  Buffer memory(scratch), out(sizeof(float) * m * ldy);
  auto* y = reinterpret_cast<float*>(out.data());
  std::vector<double> found(turns);
  nb::gil_scoped_release release;
  Pool::get().run([&](const Team& team) {
    for (int turn = 0; turn < turns; ++turn) {
      const auto start = std::chrono::steady_clock::now();
      weights[turn % weights.size()]->apply(x.data(), cols, m, y, ldy, memory.data(), team);
      if (team.rank == 0) found[turn] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  });
  return found;
}

std::shared_ptr<Weight> stack(const std::vector<std::shared_ptr<Weight>>& parts) {
  require(!parts.empty(), "a stack has at least one part");
  int64_t rows = 0;
  for (const auto& part : parts) {
    require(part != nullptr, "a weight was expected, not None");
    require(part->cols == parts[0]->cols, "weights of " + std::to_string(parts[0]->cols) + " and " + std::to_string(part->cols) +
                                              " columns do not read the same inputs");
    rows += part->rows;
  }
  require(rows < INT32_MAX, "the stack has too many rows");
  return std::make_shared<Stack>(Stack::Parts(parts.begin(), parts.end()));
}

}  // namespace

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
  module.def("stack", &stack, nb::arg("parts"), "Weights that read the same inputs, one below the other, as one.");
  module.def("seconds", &seconds, nb::arg("weights"), nb::arg("x"), nb::arg("turns"),
             "Seconds of each of `turns` products x [m, cols] to [m, rows], with one weight after the other.");
}

}  // namespace trimtab
