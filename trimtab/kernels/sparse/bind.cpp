#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>

#include "base/arrays.h"
#include "sparse/masked.h"
#include "sparse/nm.h"

namespace trimtab {

void bind_sparse(nb::module_& module) {
  nb::class_<Masked, Weight>(module, "Masked", "A weight with zeros anywhere: a bit a weight, the kept values in halves.");
  nb::class_<NM, Weight>(module, "NM", "A weight of which `kept` of every `group` neighbours in a row stay.");
  module.def(
      "masked",
      [](Array2<uint8_t> bits, Array1<Half> values, int cols) {
        const size_t rows = bits.shape(0);
        require(cols >= 1 && bits.shape(1) == static_cast<size_t>(cols + 7) / 8,
                std::to_string(cols) + " columns need " + std::to_string((cols + 7) / 8) + " bytes of mask a row, not " +
                    std::to_string(bits.shape(1)));
        const size_t kept = Masked::count(bits.data(), static_cast<int>(rows), cols);
        require(kept == values.shape(0), "the mask keeps another number of weights than the " +
                                             std::to_string(values.shape(0)) + " values");
        return std::make_shared<Masked>(bits.data(), values.data(), kept, static_cast<int>(rows), cols);
      },
      nb::arg("bits"), nb::arg("values"), nb::arg("cols"));
  module.def("nm_fits", &NM::fits, nb::arg("kept"), nb::arg("group"), "Whether `nm` takes this pattern.");
  module.def(
      "nm",
      [](Array2<Half> values, Array2<uint8_t> places, int cols, int kept, int group) {
        require(NM::fits(kept, group), std::to_string(kept) + " of " + std::to_string(group) + " is not a pattern of this kernel");
        const size_t slots = static_cast<size_t>(cols + group - 1) / group * kept;
        require(cols >= 1 && values.shape(1) == slots && places.shape(1) == slots && values.shape(0) == places.shape(0),
                std::to_string(cols) + " columns need " + std::to_string(slots) + " values and places a row");
        const uint8_t* end = places.data() + places.size();
        require(std::all_of(places.data(), end, [&](uint8_t place) { return place < group; }),
                "a place lies outside its group of " + std::to_string(group));
        return std::make_shared<NM>(values.data(), places.data(), static_cast<int>(values.shape(0)), cols, kept, group);
      },
      nb::arg("values"), nb::arg("places"), nb::arg("cols"), nb::arg("kept"), nb::arg("group"));
}

}  // namespace trimtab
