#include "base/arrays.h"

namespace trimtab {

void bind_attention(nb::module_& module) { (void)module; }

}  // namespace trimtab
