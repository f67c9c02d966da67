#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "dense/dense.h"

namespace trimtab {
namespace {

template <typename T, typename Stored>
std::shared_ptr<Weight> make(const Array2<Stored>& weight) {
  require(weight.shape(0) > 0 && weight.shape(1) > 0 && weight.shape(0) < INT32_MAX && weight.shape(1) < INT32_MAX,
          "a dense weight has at least one row and one column");
  return std::make_shared<DenseWeight<T>>(reinterpret_cast<const T*>(weight.data()), static_cast<int>(weight.shape(0)),
                                          static_cast<int>(weight.shape(1)));
}

}  // namespace

void bind_dense(nb::module_& module) {
  module.def("dense_fp32", &make<float, float>, nb::arg("weight"), "A weight [out, in] in fp32.");
  module.def("dense_bf16", &make<Bf16, uint16_t>, nb::arg("weight"), "A weight [out, in] in bf16, given as its bits.");
  module.def("dense_fp16", &make<Fp16, uint16_t>, nb::arg("weight"), "A weight [out, in] in fp16, given as its bits.");
}

}  // namespace trimtab
