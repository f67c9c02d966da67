// A small piece of work repeated by the whole team for a bounded time, each slice timed on its own: on a machine that
// other work shares the fastest slices say what the hardware can do, and the others how much of it there was.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "base/team.h"

namespace trimtab {

constexpr double kSlice = 1.5e-3;  // seconds: longer than the clock's and the barrier's error, shorter than a turn of the scheduler

// Units a second of each slice, where one `work(team)` of the whole team does `units`. Returns after about `seconds`.
// A slice lasts from the first thread's start to the last one's end: a thread that is kept off its core between the
// barrier and its clock must not make the others' work look short.
template <typename Work>
std::vector<double> rates(double seconds, double units, const Work& work) {
  using Clock = std::chrono::steady_clock;
  const auto clock = [] { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); };
  struct alignas(64) Span {
    double start, end;
  };
  std::vector<Span> spans(Pool::get().size());
  std::vector<double> found;
  double best = 1e9;  // seconds of one repeat in the fastest slice
  int repeats = 1;
  bool over = false;
  const double began = clock();
  Pool::get().run([&](const Team& team) {
    while (!over) {
      team.sync();
      spans[team.rank].start = clock();
      for (int i = 0; i < repeats; ++i) {
        asm volatile("" ::: "memory");  // what was read or worked out in one repeat is no excuse in the next
        work(team);
      }
      spans[team.rank].end = clock();
      team.sync();
      if (team.rank == 0) {
        double start = spans[0].start, end = spans[0].end;
        for (const Span& span : spans) start = std::min(start, span.start), end = std::max(end, span.end);
        const double took = std::max(end - start, 1e-9);
        best = std::min(best, took / repeats);
        over = end - began > seconds;
        if (best * repeats >= kSlice || over) {
          found.push_back(units * repeats / took);
        } else if (repeats < (1 << 24)) {
          repeats *= best * repeats < kSlice / 8 ? 8 : 2;
        }
      }
      team.sync();
    }
  });
  return found;
}

// Bytes a second: `bytes` bytes shared out among the team, each thread reading its own share over and over.
std::vector<double> read_rates(size_t bytes, double seconds);

// Bytes a second, those read and those written both counted: each thread copies its share of `bytes` bytes.
std::vector<double> copy_rates(size_t bytes, double seconds);

// Operations a second of all threads, two to a multiply-add, operands in registers.
std::vector<double> int8_rates(double seconds);
std::vector<double> fp32_rates(double seconds);
std::vector<double> bf16_rates(double seconds);  // empty where the processor has no bf16 arithmetic

// Times a second that the whole team can meet at its barrier, and that sleeping or spinning workers can be called.
std::vector<double> barrier_rates(double seconds);
std::vector<double> call_rates(double seconds);

}  // namespace trimtab
