#include "base/arrays.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trimtab {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kPage = 4096;

size_t rounded(size_t bytes) {
  const size_t step = bytes >= kHuge ? kHuge : 64;
  return (bytes + step - 1) / step * step;
}

}  // namespace

Buffer::Buffer(size_t bytes, Kind kind) : size_(bytes) {
  if (bytes == 0) return;
#if defined(__linux__)
  if (kind == Kind::kSparse) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_NOHUGEPAGE)
    madvise(memory, bytes, MADV_NOHUGEPAGE);
#endif
    data_ = {static_cast<std::byte*>(memory), Free{bytes}};
    return;
  }
#endif
  const size_t whole = rounded(bytes);
  void* memory = std::aligned_alloc(bytes >= kHuge ? kHuge : 64, whole);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHuge) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  data_ = {static_cast<std::byte*>(memory), Free{0}};
}

void Buffer::release(size_t offset, size_t bytes) const {
#if defined(__linux__)
  if (data_.get_deleter().mapped == 0) return;
  const size_t first = (offset + kPage - 1) / kPage * kPage, last = offset + bytes == size_ ? size_ : (offset + bytes) / kPage * kPage;
  if (first < last) madvise(data_.get() + first, last - first, MADV_DONTNEED);
#else
  (void)offset, (void)bytes;
#endif
}

void Buffer::Free::operator()(std::byte* p) const {
#if defined(__linux__)
  if (mapped > 0) {
    munmap(p, mapped);
    return;
  }
#endif
  std::free(p);
}

}  // namespace trimtab
