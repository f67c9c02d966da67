// Threads that run one function together, in lock-step where they ask for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace trimtab {

// Where all threads of a team wait for each other. Spins for as long as an operation takes, then gives its turn away, so
// that a machine with more threads than cores still makes progress.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    if (size_ == 1) return;
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < 20'000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

// One thread's place in a team.
struct Team {
  int rank, size;
  Barrier* barrier;
  void sync() const { barrier->wait(); }
  // The share [first, last) of n pieces that falls to this thread.
  std::pair<int, int> share(int n) const {
    return {static_cast<int>(static_cast<int64_t>(n) * rank / size), static_cast<int>(static_cast<int64_t>(n) * (rank + 1) / size)};
  }
};

// The process's threads: the caller is rank 0, the others sleep between calls. Each has a core of its own, the caller for
// as long as a call lasts.
class Pool {
 public:
  static Pool& get();
  ~Pool();
  int size() const { return static_cast<int>(workers_.size()) + 1; }
  void resize(int threads);                          // not while it runs
  void run(const std::function<void(const Team&)>& work);  // returns when all threads have returned

 private:
  Pool();
  void start(int threads);
  void stop();
  void loop(int rank, uint64_t seen);  // seen: calls made before the worker was started

  std::vector<std::thread> workers_;
  int first_core_ = -1;  // the caller's; -1 where there are more threads than cores
  std::unique_ptr<Barrier> barrier_;
  std::mutex mutex_, running_;
  std::condition_variable wake_;
  const std::function<void(const Team&)>* work_ = nullptr;
  std::atomic<uint64_t> call_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> over_{false};
};

}  // namespace trimtab
