#include "base/arrays.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trimtab {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

size_t rounded(size_t bytes) {
  const size_t step = bytes >= kHuge ? kHuge : 64;
  return (bytes + step - 1) / step * step;
}

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  const size_t whole = rounded(bytes);
  void* memory = std::aligned_alloc(bytes >= kHuge ? kHuge : 64, whole);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHuge) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  data_ = {static_cast<std::byte*>(memory), Free{whole}};
}

void Buffer::Free::operator()(std::byte* p) const { std::free(p); }

}  // namespace trimtab
