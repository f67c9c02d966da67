#include "base/arrays.h"

namespace trimtab {

void bind_integer(nb::module_& module) { (void)module; }

}  // namespace trimtab
