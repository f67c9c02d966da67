#include "base/arrays.h"

namespace trimtab {

void bind_dense(nb::module_& module) { (void)module; }

}  // namespace trimtab
