#include "lowrank/adapters.h"

#include <algorithm>

namespace trimtab {
namespace {

// Call work(correction, run of rows, part's index) for every correction that the batch uses.
template <typename Work>
void each(const std::vector<Rows>& rows, const std::vector<Part>& parts, const Work& work) {
  for (size_t p = 0; p < parts.size(); ++p)
    for (const Rows& run : rows)
      if (const LowRank* correction = (*run.adapter)[parts[p].place].get()) work(*correction, run, p);
}

// Cut the sum of all `amount`s into equal shares, one a thread: work(correction, run, part, first, last) for what of each
// falls to this one. Ranks differ, so that sharing out each correction by itself would leave threads idle.
template <typename Amount, typename Work>
void share_out(const std::vector<Rows>& rows, const std::vector<Part>& parts, const Team& team, const Amount& amount,
               const Work& work) {
  int total = 0, seen = 0;
  each(rows, parts, [&](const LowRank& correction, const Rows&, size_t) { total += amount(correction); });
  const auto [first, last] = team.share(total);
  each(rows, parts, [&](const LowRank& correction, const Rows& run, size_t part) {
    const int from = std::max(first - seen, 0), to = std::min(last - seen, amount(correction));
    if (from < to) work(correction, run, part, from, to);
    seen += amount(correction);
  });
}

}  // namespace

Adapters::Adapters(std::vector<std::pair<int, int>> places, int most) : places(std::move(places)), most(most) {
  require(!this->places.empty() && this->places.size() < 1 << 20, "adapters need linears to adapt");
  require(most >= 1 && most <= 1 << 12, "an adapter has between 1 and 4096 ranks");
}

void Adapters::put(int number, Adapter adapter) {
  require(number >= 0, "adapters are numbered from 0 on");
  require(adapter.size() == places.size(), "an adapter has a correction, or none, for each of " + std::to_string(places.size()) + " linears");
  for (size_t i = 0; i < places.size(); ++i) {
    const auto& correction = adapter[i];
    if (correction == nullptr) continue;
    const auto [rows, cols] = places[i];
    require(correction->rows == rows && correction->cols == cols,
            "the correction " + std::to_string(i) + " is " + std::to_string(correction->rows) + " x " + std::to_string(correction->cols) +
                ", and its linear " + std::to_string(rows) + " x " + std::to_string(cols));
    require(correction->rank <= most, "an adapter of rank " + std::to_string(correction->rank) + " is above the " + std::to_string(most) + " that there is room for");
  }
  // Factors are small; side by side in huge pages they are read as one stream.
  size_t bytes = 0;
  for (const auto& correction : adapter) bytes += correction == nullptr ? 0 : whole_lines(correction->nbytes());
  const auto memory = std::make_shared<Buffer>(bytes);
  size_t at = 0;
  for (auto& correction : adapter) {
    if (correction == nullptr) continue;
    correction = std::make_shared<const LowRank>(*correction, memory, at);
    at += whole_lines(correction->nbytes());
  }
  std::lock_guard alone(guard_);
  held_[number] = std::make_shared<const Adapter>(std::move(adapter));
}

void Adapters::drop(int number) {
  std::lock_guard alone(guard_);
  require(held_.erase(number) == 1, "there is no adapter " + std::to_string(number));
}

std::shared_ptr<const Adapter> Adapters::at(int number) const {
  std::lock_guard alone(guard_);
  const auto found = held_.find(number);
  require(found != held_.end(), "there is no adapter " + std::to_string(number));
  return found->second;
}

std::vector<int> Adapters::numbers() const {
  std::lock_guard alone(guard_);
  std::vector<int> found;
  for (const auto& [number, adapter] : held_) found.push_back(number);
  return found;
}

size_t Adapters::nbytes() const {
  std::lock_guard alone(guard_);
  size_t bytes = 0;
  for (const auto& [number, adapter] : held_)
    for (const auto& correction : *adapter) bytes += correction == nullptr ? 0 : correction->nbytes();
  return bytes;
}

void narrow_all(const std::vector<Rows>& rows, const std::vector<Part>& parts, int m, int most, const float* x, int ldx,
                float* inner, const Team& team) {
  share_out(rows, parts, team, [](const LowRank& c) { return c.rank; },
            [&](const LowRank& c, const Rows& run, size_t part, int first, int last) {
              c.narrow(x + size_t(run.first) * ldx, ldx, run.count, inner + (part * m + run.first) * most, first, last);
            });
}

void widen_all(const std::vector<Rows>& rows, const std::vector<Part>& parts, int m, int most, const float* inner, float* y,
               int ldy, const Team& team) {
  share_out(rows, parts, team, [](const LowRank& c) { return c.panels(); },
            [&](const LowRank& c, const Rows& run, size_t part, int first, int last) {
              c.widen(inner + (part * m + run.first) * most, run.count, y + size_t(run.first) * ldy + parts[part].offset, ldy,
                      true, first, last);
            });
}

}  // namespace trimtab
