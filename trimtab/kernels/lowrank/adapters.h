// Low-rank adapters of many users in one batch (S-LoRA: Sheng et al. 2023, arXiv:2311.03285, section 5.3): every row of
// the inputs adds its own y += left right x to what the shared weight gives, whatever the ranks.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "lowrank/lowrank.h"

namespace trimtab {

// One adapter: a correction for each place of a model, or none.
using Adapter = std::vector<std::shared_ptr<const LowRank>>;

// Consecutive rows of a batch that use one adapter.
struct Rows {
  std::shared_ptr<const Adapter> adapter;
  int first, count;
};

// The adapters that are at hand, by number. They come and go while steps run: a step holds those that it uses.
class Adapters {
 public:
  // places: (outputs, inputs) of the linears that may be adapted; most: ranks that an adapter may have.
  Adapters(std::vector<std::pair<int, int>> places, int most);

  void put(int number, Adapter adapter);
  void drop(int number);
  std::shared_ptr<const Adapter> at(int number) const;
  std::vector<int> numbers() const;
  size_t nbytes() const;

  const std::vector<std::pair<int, int>> places;
  const int most;

 private:
  std::map<int, std::shared_ptr<const Adapter>> held_;
  mutable std::mutex guard_;
};

// A linear's share of the adapters: outputs [offset, offset + rows of the place) of place `place`.
struct Part {
  int place, offset;
};

// Floats of scratch for m rows.
inline size_t adapted_scratch(const Adapters& adapters, size_t parts, int m) { return parts * m * adapters.most; }

// inner = right x for all rows with an adapter. It does not wait for the other threads.
void narrow_all(const std::vector<Rows>& rows, const std::vector<Part>& parts, int m, int most, const float* x, int ldx,
                float* inner, const Team& team);

// y += left inner, once inner is complete. It does not wait either.
void widen_all(const std::vector<Rows>& rows, const std::vector<Part>& parts, int m, int most, const float* inner, float* y,
               int ldy, const Team& team);

}  // namespace trimtab
