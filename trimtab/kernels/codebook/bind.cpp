#include "base/arrays.h"

namespace trimtab {

void bind_codebook(nb::module_& module) { (void)module; }

}  // namespace trimtab
