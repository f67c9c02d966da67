#include <algorithm>
#include <cstring>

#include "base/arrays.h"
#include "machine/lanes.h"
#include "machine/rates.h"

namespace trimtab {
namespace {

constexpr size_t kStep = 16 * kVector;  // bytes that one turn of the inner loop reads: enough loads in flight
constexpr size_t kAhead = 4096;         // bytes: the next page, which the hardware's prefetcher does not enter by itself

// Every byte of [p, p + bytes) once; bytes is a multiple of kStep.
Lanes sum(const std::byte* p, size_t bytes) {
  Lanes total[8] = {};
  for (const std::byte* end = p + bytes; p < end; p += kStep) {
    const auto* v = reinterpret_cast<const Lanes*>(p);
    for (size_t line = 0; line < kStep; line += 64) __builtin_prefetch(p + kAhead + line);
    for (int i = 0; i < 8; ++i) total[i] ^= v[i];
    for (int i = 0; i < 8; ++i) total[i] ^= v[8 + i];
  }
  for (int i = 1; i < 8; ++i) total[0] ^= total[i];
  return total[0];
}

// The same without the prefetch, which costs more than it brings where the set lies in the first cache.
Lanes sum_near(const std::byte* p, size_t bytes) {
  Lanes total[8] = {};
  for (const std::byte* end = p + bytes; p < end; p += kStep) {
    const auto* v = reinterpret_cast<const Lanes*>(p);
    for (int i = 0; i < 8; ++i) total[i] ^= v[i];
    for (int i = 0; i < 8; ++i) total[i] ^= v[8 + i];
  }
  for (int i = 1; i < 8; ++i) total[0] ^= total[i];
  return total[0];
}

constexpr size_t kNear = size_t{64} << 10;

// Each thread's share of a set, filled by the thread itself so that its pages lie near it.
size_t piece(size_t bytes) { return std::max(kStep, bytes / Pool::get().size() / kStep * kStep); }

void fill(const Buffer& buffer, size_t share) {
  Pool::get().run([&](const Team& team) { std::memset(buffer.data() + team.rank * share, team.rank + 1, share); });
}

// A large set is gone through block by block, each slice going on where the last one stopped: a pass over all of it would
// take longer than the scheduler leaves a thread alone.
constexpr size_t kBlock = size_t{8} << 20;

struct alignas(64) Place {
  size_t at = 0;
  size_t next(size_t block, size_t share) {
    const size_t first = at;
    at = at + 2 * block > share ? 0 : at + block;
    return first;
  }
};

}  // namespace

std::vector<double> read_rates(size_t bytes, double seconds) {
  const size_t share = piece(bytes), block = std::min(share, kBlock);
  const Buffer buffer(share * Pool::get().size());
  fill(buffer, share);
  std::vector<Place> places(Pool::get().size());
  return rates(seconds, static_cast<double>(block) * places.size(), [&](const Team& team) {
    const std::byte* mine = buffer.data() + team.rank * share + places[team.rank].next(block, share);
    Lanes total = share <= kNear ? sum_near(mine, block) : sum(mine, block);
    opaque(total);
  });
}

std::vector<double> copy_rates(size_t bytes, double seconds) {
  const size_t share = piece(bytes / 2), block = std::min(share, kBlock);
  const Buffer from(share * Pool::get().size()), to(share * Pool::get().size());
  fill(from, share);
  fill(to, share);
  std::vector<Place> places(Pool::get().size());
  return rates(seconds, 2.0 * block * places.size(), [&](const Team& team) {
    const size_t first = team.rank * share + places[team.rank].next(block, share);
    std::memcpy(to.data() + first, from.data() + first, block);
  });
}

}  // namespace trimtab
