#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "base/arrays.h"
#include "lowrank/adapters.h"
#include "lowrank/lowrank.h"

namespace trimtab {

void bind_lowrank(nb::module_& module) {
  nb::class_<LowRank, Weight>(module, "LowRank", "left [rows, rank] times right [rank, cols], the bits of halves.")
      .def_ro("rank", &LowRank::rank);
  module.def(
      "low_rank",
      [](Array2<Half> left, Array2<Half> right) {
        require(left.shape(1) == right.shape(0), "left has " + std::to_string(left.shape(1)) + " columns, and right has " +
                                                     std::to_string(right.shape(0)) + " rows");
        return std::make_shared<LowRank>(left.data(), right.data(), static_cast<int>(left.shape(0)),
                                         static_cast<int>(left.shape(1)), static_cast<int>(right.shape(1)));
      },
      nb::arg("left"), nb::arg("right"));
  nb::class_<Plus, Weight>(module, "Plus", "A weight and a low-rank correction, applied in one pass.");
  module.def(
      "plus",
      [](std::shared_ptr<Weight> base, std::shared_ptr<LowRank> extra) {
        require(base != nullptr && extra != nullptr, "a weight and a low-rank correction were expected, not None");
        require(base->rows == extra->rows && base->cols == extra->cols,
                "the weight is " + std::to_string(base->rows) + " x " + std::to_string(base->cols) + ", its correction " +
                    std::to_string(extra->rows) + " x " + std::to_string(extra->cols));
        return std::make_shared<Plus>(std::move(base), std::move(extra));
      },
      nb::arg("base"), nb::arg("extra"));
  nb::class_<Adapters>(module, "Adapters", "Low-rank adapters by number, for batches whose rows use different ones.")
      .def(nb::init<std::vector<std::pair<int, int>>, int>(), nb::arg("places"), nb::arg("most"),
           "(outputs, inputs) of the linears that may be adapted, and the most ranks of an adapter.")
      .def(
          "put",
          [](Adapters& adapters, int number, const std::vector<std::shared_ptr<LowRank>>& parts) {
            adapters.put(number, Adapter(parts.begin(), parts.end()));
          },
          nb::arg("number"), nb::arg("parts"), "A correction or None for each place.")
      .def("drop", &Adapters::drop, nb::arg("number"))
      .def_prop_ro("numbers", &Adapters::numbers)
      .def_prop_ro("nbytes", &Adapters::nbytes);
}

}  // namespace trimtab
