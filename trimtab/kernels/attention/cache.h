// Keys and values of every token so far, of one layer.
#pragma once

#include <string>

#include "base/arrays.h"
#include "base/tile.h"

namespace trimtab {

// How many of the keys of a sequence a step of attention takes together; panels divide it.
inline constexpr int kKeys = 64;

// Keys lie in panels of kPanel tokens, [sequence][head][panel][channel][token], so that a panel's scores fall out in the
// lanes; values lie [sequence][head][token][channel], the channels padded to a panel.
class Cache {
 public:
  enum class Type { kFp32, kFp16, kBf16 };

  Cache(int sequences, int context, int heads, int size, Type type)
      : sequences(sequences), context(context), heads(heads), size(size), padded((size + kPanel - 1) / kPanel * kPanel),
        tokens((context + kKeys - 1) / kKeys * kKeys), type(type),
        keys_(count() * size * width()), values_(count() * padded * width()) {}

  const int sequences, context, heads, size, padded, tokens;
  const Type type;

  static Type parse(const std::string& name) {
    require(name == "fp32" || name == "fp16" || name == "bf16", "a cache holds fp32, fp16 or bf16, not " + name);
    return name == "fp32" ? Type::kFp32 : name == "fp16" ? Type::kFp16 : Type::kBf16;
  }

  size_t nbytes() const { return keys_.size() + values_.size(); }

  // Call `work` with a null pointer of the stored type.
  template <typename Work>
  void with_type(const Work& work) const {
    if (type == Type::kFp32) return work(static_cast<float*>(nullptr));
    if (type == Type::kFp16) return work(static_cast<Fp16*>(nullptr));
    work(static_cast<Bf16*>(nullptr));
  }

  template <typename T>
  T* keys(int sequence, int head, int token) const {  // the panel of the token
    return reinterpret_cast<T*>(keys_.data()) + (lane(sequence, head) + token / kPanel * kPanel) * size;
  }
  template <typename T>
  T* values(int sequence, int head, int token) const {
    return reinterpret_cast<T*>(values_.data()) + (lane(sequence, head) + token) * padded;
  }

  template <typename T>
  void put(int sequence, int head, int token, const float* key, const float* value) const {
    T* k = keys<T>(sequence, head, token) + token % kPanel;
    T* v = values<T>(sequence, head, token);
    for (int c = 0; c < size; ++c) {
      narrow(key[c], k + c * kPanel);
      narrow(value[c], v + c);
    }
  }

 private:
  size_t count() const { return size_t(sequences) * heads * tokens; }
  size_t width() const { return type == Type::kFp32 ? 4 : 2; }
  size_t lane(int sequence, int head) const { return (size_t(sequence) * heads + head) * tokens; }

  Buffer keys_, values_;
};

}  // namespace trimtab
