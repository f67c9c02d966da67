#include "base/arrays.h"

namespace trimtab {

void bind_sparse(nb::module_& module) { (void)module; }

}  // namespace trimtab
