// The widest vectors of the variant, by the compiler's own vector types: one source for every instruction set.
#pragma once

#include <cstdint>

namespace trimtab {

#if defined(__AVX512F__)
constexpr int kVector = 64;
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif

typedef uint32_t Lanes __attribute__((vector_size(kVector), may_alias));
typedef float Floats __attribute__((vector_size(kVector), may_alias));

// Tells the compiler that a value is used and may have changed, so that it neither drops nor merges the work behind it.
template <typename T>
inline void opaque(T& value) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(value));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

}  // namespace trimtab
