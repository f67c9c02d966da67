// Keys and values of every token so far, of one layer.
#pragma once

#include <string>
#include <vector>

#include "attention/kivi.h"
#include "base/arrays.h"
#include "base/tile.h"

namespace trimtab {

// How a cache stores what it holds: all of it in one type of float, or codes of `bits` bits for all but the newest tokens.
struct Format {
  enum class Type { kFp32, kFp16, kBf16 };
  Type type = Type::kFp16;  // of what is not packed
  int bits = 0;             // of a code; 0: nothing is packed
  int group = 0;            // keys of a channel, or channels of a value, that share a grid
  int window = 0;           // tokens that are packed together, once all of them are there and another one comes

  // fp32, fp16, bf16, or kivi2 and kivi4 with /g32 or /g64 and /r<window>.
  static Format parse(const std::string& text);
};

// Keys lie in panels of kPanel tokens, [sequence][head][panel][channel][token], so that a panel's scores fall out in the
// lanes; values lie [sequence][head][token][channel], the channels padded to kPadding, which every panel divides, so that a
// cache takes the same bytes on every processor. Where tokens are packed, all of that holds for the newest window alone, and
// the older ones lie in blocks of kKeys tokens, see kivi.h. Where it is `paged`, each sequence has addresses for its whole
// context, and memory for the tokens that it holds: the system's own pages are the pages, and no kernel looks one up.
class Cache {
 public:
  static constexpr int kPadding = 32;

  Cache(int sequences, int context, int heads, int size, const Format& format, bool paged)
      : sequences(sequences), context(context), heads(heads), size(size), padded((size + kPadding - 1) / kPadding * kPadding),
        tokens(rounded(format.bits > 0 ? std::min(context, format.window) : context)), format(format),
        block{size, padded, format.bits, format.group},
        blocks_(format.bits > 0 ? (context - 1) / format.window * format.window / kKeys : 0),
        keys_(count() * size * width(), kind(paged)), values_(count() * padded * width(), kind(paged)),
        packed_(format.bits > 0 ? size_t(sequences) * heads * blocks_ * block.nbytes() : 0, kind(paged)),
        packed_until_(sequences, 0) {}

  const int sequences, context, heads, size, padded;
  const int tokens;  // of a sequence that are held as floats
  const Format format;
  const Block block;

  size_t nbytes() const { return keys_.size() + values_.size() + packed_.size(); }

  // Call `work` with a null pointer of the type of what is not packed.
  template <typename Work>
  void with_type(const Work& work) const {
    if (format.type == Format::Type::kFp32) return work(static_cast<float*>(nullptr));
    if (format.type == Format::Type::kFp16) return work(static_cast<Fp16*>(nullptr));
    work(static_cast<Bf16*>(nullptr));
  }

  // The first token that a step at this position sees as floats.
  int first(int position) const { return format.bits > 0 ? position / format.window * format.window : 0; }

  // Token `place` of those that are held as floats.
  template <typename T>
  T* keys(int sequence, int head, int place) const {  // the panel of the token
    return reinterpret_cast<T*>(keys_.data()) + (lane(sequence, head) + place / kPanel * kPanel) * size;
  }
  template <typename T>
  T* values(int sequence, int head, int place) const {
    return reinterpret_cast<T*>(values_.data()) + (lane(sequence, head) + place) * padded;
  }

  std::byte* packed(int sequence, int head, int token) const {  // the block of the token
    return packed_.data() + ((size_t(sequence) * heads + head) * blocks_ + token / kKeys) * block.nbytes();
  }

  template <typename T>
  void put(int sequence, int head, int place, const float* key, const float* value) const {
    T* k = keys<T>(sequence, head, place) + place % kPanel;
    T* v = values<T>(sequence, head, place);
    for (int c = 0; c < size; ++c) {
      narrow(key[c], k + c * kPanel);
      narrow(value[c], v + c);
    }
  }

  // Make one head of a sequence ready for a token at `position`: a window that is full is packed; where tokens were dropped
  // down into a packed window, those of it that remain become floats again, and it is packed anew when it is full.
  void turn(int sequence, int head, int position) const;
  // A sequence holds no tokens from `first` on: their memory goes back to the system where the cache is paged.
  void release(int sequence, int first) const;
  // To be told by one thread once all heads have turned.
  void turned(int sequence, int position) { packed_until_[sequence] = first(position); }

 private:
  static Buffer::Kind kind(bool paged) { return paged ? Buffer::Kind::kSparse : Buffer::Kind::kWhole; }
  static int rounded(int n) { return (n + kKeys - 1) / kKeys * kKeys; }
  size_t count() const { return size_t(sequences) * heads * tokens; }
  size_t width() const { return format.type == Format::Type::kFp32 ? 4 : 2; }
  size_t lane(int sequence, int head) const { return (size_t(sequence) * heads + head) * tokens; }

  const int blocks_;  // of a sequence and head
  Buffer keys_, values_, packed_;
  std::vector<int> packed_until_;  // tokens of each sequence that are packed
};

}  // namespace trimtab
