// The extension module: what each room of the kernels offers to Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "base/team.h"

namespace nb = nanobind;

namespace trimtab {

void bind_linear(nb::module_& module);
void bind_integer(nb::module_& module);
void bind_dense(nb::module_& module);
void bind_codebook(nb::module_& module);
void bind_sparse(nb::module_& module);
void bind_lowrank(nb::module_& module);
void bind_conv(nb::module_& module);
void bind_attention(nb::module_& module);
void bind_step(nb::module_& module);
void bind_machine(nb::module_& module);

namespace {

// What the processor can do, of what the variants ask for.
std::vector<std::string> features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    found.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    found.push_back("avx512");
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) found.push_back("vnni");
#endif
  return found;
}

}  // namespace
}  // namespace trimtab

NB_MODULE(TRIMTAB_MODULE, module) {
  using namespace trimtab;
  module.def("features", &features, "Variants beyond `generic` that this processor can run.");
  module.def("threads", [] { return Pool::get().size(); }, "Threads that the kernels use.");
  module.def("set_threads", [](int n) {
    if (n < 1 || n > 1024) throw nb::value_error("threads must lie between 1 and 1024");
    Pool::get().resize(n);
  }, nb::arg("threads"));
  bind_linear(module);
  bind_integer(module);
  bind_dense(module);
  bind_codebook(module);
  bind_sparse(module);
  bind_lowrank(module);
  bind_conv(module);
  bind_attention(module);
  bind_step(module);
  bind_machine(module);
}
