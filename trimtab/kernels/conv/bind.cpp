#include "base/arrays.h"

namespace trimtab {

void bind_conv(nb::module_& module) { (void)module; }

}  // namespace trimtab
