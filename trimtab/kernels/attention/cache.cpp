#include "attention/cache.h"

#include <algorithm>

namespace trimtab {
namespace {

// The number after `mark` at the start of the text, which is taken off it; `otherwise` where there is none.
int number_after(std::string& text, const std::string& mark, int otherwise) {
  if (text.rfind(mark, 0) != 0) return otherwise;
  size_t end = mark.size();
  int number = 0;
  while (end < text.size() && text[end] >= '0' && text[end] <= '9' && number < 1 << 20) number = 10 * number + (text[end++] - '0');
  text.erase(0, end);
  return number;
}

}  // namespace

Format Format::parse(const std::string& text) {
  if (text == "fp32") return {.type = Type::kFp32};
  if (text == "fp16") return {.type = Type::kFp16};
  if (text == "bf16") return {.type = Type::kBf16};
  Format format;
  std::string rest = text;
  format.bits = number_after(rest, "kivi", 0);
  format.group = number_after(rest, "/g", 32);
  format.window = number_after(rest, "/r", 128);
  require(rest.empty() && (format.bits == 2 || format.bits == 4), "a cache holds fp32, fp16, bf16, kivi2 or kivi4, not " + text);
  require(format.group == 32 || format.group == 64, "groups of " + text + " have 32 or 64 members");
  require(format.window > 0 && format.window % kKeys == 0, "a window of " + text + " is a multiple of " + std::to_string(kKeys) + " tokens");
  return format;
}

void Cache::turn(int sequence, int head, int position) const {
  const int start = first(position), packed = packed_until_[sequence];
  if (packed < start)
    for (int t = 0; t < format.window; t += kKeys)
      block.pack(keys<Fp16>(sequence, head, t), values<Fp16>(sequence, head, t), this->packed(sequence, head, start - format.window + t));
  if (packed > start)
    for (int t = 0; t < position - start; t += kKeys)
      block.unpack(this->packed(sequence, head, start + t), keys<Fp16>(sequence, head, t), values<Fp16>(sequence, head, t));
}

void Cache::release(int sequence, int first) const {
  // Of `lanes` rows of `length` tokens, what lies behind the first `kept` of each; of all of them where none is kept.
  const auto cut = [&](const Buffer& buffer, size_t length, size_t kept, size_t bytes) {
    const size_t lane = size_t(sequence) * heads * length;
    if (kept == 0) return buffer.release(lane * bytes, size_t(heads) * length * bytes);
    for (int head = 0; kept < length && head < heads; ++head)
      buffer.release((lane + head * length + kept) * bytes, (length - kept) * bytes);
  };
  const int floats = std::min(tokens, rounded(first - this->first(first)));
  cut(keys_, tokens, floats, size * width());
  cut(values_, tokens, floats, padded * width());
  if (format.bits > 0) cut(packed_, blocks_, this->first(first) / kKeys, block.nbytes());
}

}  // namespace trimtab
