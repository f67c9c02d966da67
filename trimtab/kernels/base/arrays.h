// Arrays as they come from Python: contiguous, on the CPU, of a known type; checked before a kernel sees them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace trimtab {

namespace nb = nanobind;

template <typename T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Refuse what no kernel may see; the message reaches Python as a ValueError.
inline void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

// Memory at a cache line's boundary, in huge pages where the system gives them.
class Buffer {
 public:
  // Whole: to be used all at once. Sparse: addresses alone, which take memory page by page as they are first written to,
  // and give it back when they are told to.
  enum class Kind { kWhole, kSparse };

  Buffer() = default;
  explicit Buffer(size_t bytes, Kind kind = Kind::kWhole);
  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

  // Of a sparse buffer: what these bytes held is gone, and the pages that lie wholly within them go back to the system.
  void release(size_t offset, size_t bytes) const;

 private:
  struct Free {
    size_t mapped;  // bytes to unmap; 0: to be freed
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Free> data_{nullptr, Free{0}};
  size_t size_ = 0;
};

// Floats from one row of a width to the next: whole cache lines, but not whole pages, as the same column of many rows
// would then fall into the same few places of every cache.
constexpr size_t spaced(size_t width) {
  const size_t whole = (width + 15) / 16 * 16;
  return whole % 1024 == 0 ? whole + 16 : whole;
}

// A float array of Python's that owns its memory: a large one takes huge pages, for each new page costs a fault.
inline nb::ndarray<nb::numpy, float> new_floats(std::initializer_list<size_t> shape, float** data) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  auto* memory = new Buffer(count > 0 ? count * sizeof(float) : 1);
  *data = reinterpret_cast<float*>(memory->data());
  nb::capsule owner(memory, [](void* p) noexcept { delete static_cast<Buffer*>(p); });
  return nb::ndarray<nb::numpy, float>(*data, shape.size(), shape.begin(), owner);
}

}  // namespace trimtab
