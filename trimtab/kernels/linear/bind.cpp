#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace trimtab {

void bind_linear(nb::module_& module) { (void)module; }

}  // namespace trimtab
