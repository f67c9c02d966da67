#include "base/team.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace trimtab {
namespace {

constexpr int kSpins = 50'000;  // about as long as Python takes between two tokens: a worker found spinning starts at once

std::vector<int> allowed_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &set)) cores.push_back(core);
#endif
  return cores;
}

#if defined(__linux__)
void pin(pthread_t thread, int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}
#endif

// The caller on a core of its own for as long as this lives: it would else be woken on one where a worker runs, and both
// would wait for each other until the scheduler parts them.
class Settled {
 public:
  explicit Settled(int core) {
#if defined(__linux__)
    if (core < 0 || pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) != 0) return;
    pin(pthread_self(), core);
    settled_ = true;
#else
    (void)core;
#endif
  }
  ~Settled() {
#if defined(__linux__)
    if (settled_) pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
#endif
  }
  Settled(const Settled&) = delete;
  Settled& operator=(const Settled&) = delete;

#if defined(__linux__)
 private:
  cpu_set_t before_;
  bool settled_ = false;
#endif
};

}  // namespace

Pool& Pool::get() {
  static Pool pool;
  return pool;
}

Pool::Pool() {
  const int cores = static_cast<int>(allowed_cores().size());
  start(cores > 0 ? cores : static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
}

Pool::~Pool() { stop(); }

void Pool::start(int threads) {
  over_ = false;
  barrier_ = std::make_unique<Barrier>(threads);
  const auto cores = allowed_cores();
  const bool pinned = threads > 1 && static_cast<size_t>(threads) <= cores.size();
  first_core_ = pinned ? cores[0] : -1;
  for (int rank = 1; rank < threads; ++rank) {
    // A call may come before the thread has begun: what it has seen is settled here, or it would miss that call.
    workers_.emplace_back([this, rank, seen = call_.load(std::memory_order_acquire)] { loop(rank, seen); });
#if defined(__linux__)
    if (pinned) pin(workers_.back().native_handle(), cores[rank]);
#endif
  }
}

void Pool::stop() {
  {
    std::lock_guard lock(mutex_);
    over_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Pool::resize(int threads) {
  std::lock_guard alone(running_);
  if (threads == size()) return;
  stop();
  start(threads);
}

void Pool::run(const std::function<void(const Team&)>& work) {
  std::lock_guard alone(running_);
  const int threads = size();
  const Settled settled(first_core_);
  if (threads > 1) {
    std::lock_guard lock(mutex_);
    work_ = &work;
    left_.store(threads - 1, std::memory_order_relaxed);
    call_.fetch_add(1, std::memory_order_release);
  }
  if (threads > 1) wake_.notify_all();
  work(Team{0, threads, barrier_.get()});
  while (left_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
}

void Pool::loop(int rank, uint64_t seen) {
  while (true) {
    int spins = 0;
    while (call_.load(std::memory_order_acquire) == seen && !over_.load(std::memory_order_relaxed)) {
      if (++spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        continue;
      }
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return over_ || call_.load(std::memory_order_acquire) != seen; });
    }
    if (over_) return;
    seen = call_.load(std::memory_order_acquire);
    (*work_)(Team{rank, size(), barrier_.get()});
    left_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace trimtab
