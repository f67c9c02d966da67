#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "base/arrays.h"
#include "integer/grouped.h"
#include "integer/planes.h"

namespace trimtab {
namespace {

Scale scale_named(const std::string& name) {
  require(name == "f16" || name == "e8m0" || name == "e4m3", "scales are f16, e8m0 or e4m3; found " + name);
  return name == "f16" ? Scale::kHalf : name == "e8m0" ? Scale::kE8M0 : Scale::kE4M3;
}

std::shared_ptr<Weight> grouped(int cols, int bits, int group, const std::string& scale, bool hadamard, int zero,
                                float shift, const std::vector<uint8_t>& table,
                                const std::vector<Array1<uint8_t>>& codes, const std::vector<Array1<uint8_t>>& scales,
                                const std::vector<Array1<uint8_t>>& zeros, const std::vector<float>& factors) {
  require(bits >= 1 && bits <= 8, "codes have 1 to 8 bits; " + std::to_string(bits) + " were asked for");
  require(cols >= 1 && cols < 1 << 27 && group >= 1, "a matrix needs columns and groups of columns");
  require(zero >= 0 && zero <= 255, "a zero point is a byte");
  require(table.empty() || table.size() == size_t{1} << bits, "the table needs an entry for every code");
  const bool fits = std::all_of(table.begin(), table.end(), [&](uint8_t entry) { return entry < 1 << bits; });
  require(fits || (bits >= 3 && bits <= 7), "an uneven grid has 3 to 7 bits");
  require(fits || bits == 7 || std::all_of(table.begin(), table.end(), [](uint8_t entry) { return entry < 130; }),
          "an uneven grid of fewer than 7 bits reaches to 129");
  require(!hadamard || (group <= cols && (group & (group - 1)) == 0), "a Hadamard matrix has 2^n columns");
  require(!codes.empty() && scales.size() == codes.size() && factors.size() == codes.size() &&
              (zeros.empty() || zeros.size() == codes.size()),
          "every part needs codes, scales and a factor, and all or none zero points");

  Layout layout(cols, bits, group, chunk_of(bits), scale_named(scale), !zeros.empty());
  layout.zero = zero, layout.shift = shift, layout.hadamard = hadamard;
  std::vector<Stored> parts;
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t rows = scales[i].size() / (static_cast<size_t>(layout.groups) * layout.scale_bytes());
    const std::string which = "part " + std::to_string(i);
    require(rows >= 1 && rows < size_t{1} << 30, which + " has no rows, or too many");
    require(scales[i].size() == rows * layout.groups * layout.scale_bytes(), which + ": scales are not whole rows");
    require(zeros.empty() || zeros[i].size() == rows * layout.groups, which + ": every scale needs a zero point");
    require(codes[i].size() == (rows * cols * bits + 7) / 8,
            which + ": " + std::to_string(rows) + " rows of " + std::to_string(cols) + " codes of " +
                std::to_string(bits) + " bits do not fill " + std::to_string(codes[i].size()) + " bytes");
    parts.push_back({codes[i].data(), codes[i].size(), scales[i].data(), zeros.empty() ? nullptr : zeros[i].data(),
                     static_cast<int>(rows), factors[i]});
  }
  nb::gil_scoped_release release;
  return std::make_shared<GroupedWeight>(layout, table, parts);
}

}  // namespace

void bind_integer(nb::module_& module) {
  module.def("grouped", &grouped, nb::arg("cols"), nb::arg("bits"), nb::arg("group"), nb::arg("scale"),
             nb::arg("hadamard"), nb::arg("zero"), nb::arg("shift"), nb::arg("table"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("zeros"), nb::arg("factors"),
             "Matrices of grouped integers, one below the other, as one weight.");
}

}  // namespace trimtab
