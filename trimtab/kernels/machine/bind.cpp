#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "base/arrays.h"
#include "machine/rates.h"

namespace trimtab {
namespace {

constexpr double kLongest = 0.8;                   // seconds that one call may take
constexpr size_t kLargest = size_t{1} << 30;       // bytes that a set may have

void bounded(double seconds) {
  require(seconds > 0 && seconds <= kLongest, "seconds must lie above 0 and be at most 0.8");
}

template <auto Measure>
void offer(nb::module_& module, const char* name, const char* says) {
  module.def(name, [](double seconds) {
    bounded(seconds);
    nb::gil_scoped_release release;
    return Measure(seconds);
  }, nb::arg("seconds") = 0.2, says);
}

template <auto Measure>
void offer_sized(nb::module_& module, const char* name, const char* says) {
  module.def(name, [](size_t bytes, double seconds) {
    bounded(seconds);
    require(bytes >= 4096 && bytes <= kLargest, "bytes must lie between 4096 and 2^30; " + std::to_string(bytes) + " were asked for");
    nb::gil_scoped_release release;
    return Measure(bytes, seconds);
  }, nb::arg("bytes"), nb::arg("seconds") = 0.2, says);
}

}  // namespace

void bind_machine(nb::module_& module) {
  offer_sized<read_rates>(module, "read_rates", "Bytes a second that all threads read of a set of `bytes`, slice by slice.");
  offer_sized<copy_rates>(module, "copy_rates", "Bytes a second, read and written together, of copying within `bytes`.");
  offer<int8_rates>(module, "int8_rates", "Operations a second of products of bytes summed in registers, two a product.");
  offer<fp32_rates>(module, "fp32_rates", "Operations a second of fp32 multiply-adds in registers, two each.");
  offer<bf16_rates>(module, "bf16_rates", "The same of bf16 products summed in fp32; empty where there is no such unit.");
  offer<barrier_rates>(module, "barrier_rates", "Times a second that the threads meet at their barrier.");
  offer<call_rates>(module, "call_rates", "Times a second that the threads are called to an empty piece of work.");
}

}  // namespace trimtab
