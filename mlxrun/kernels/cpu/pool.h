// A small pool of threads. The caller works too, and chunks are taken one by one, so that a core
// that somebody else uses at the moment only gets fewer of them.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#endif

namespace kernels {

// A number that threads may wait on until it changes.
class Epoch {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1);
    if (!sleepers_.load()) return;
#if defined(__linux__)
    syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
    // Under the lock, so that nobody is between looking and sleeping.
    { std::lock_guard<std::mutex> lock(lock_); }
    changed_.notify_all();
#endif
  }

  void sleep_while(uint32_t seen) {
    sleepers_.fetch_add(1);
#if defined(__linux__)
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(lock_);
    changed_.wait(lock, [&] { return now() != seen; });
#endif
    sleepers_.fetch_sub(1);
  }

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<int> sleepers_{0};
#if !defined(__linux__)
  std::mutex lock_;
  std::condition_variable changed_;
#endif
};

class Pool {
 public:
  // Workers wait busily for `spin` seconds, at most 0.2 ms, before they sleep.
  Pool(int threads, double spin, bool pinned)
      : threads_(std::max(threads, 1)), spin_(std::min(std::max(spin, 0.), 2e-4)), pinned_(pinned) {
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    stop_.store(true);
    epoch_.advance();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  // body(i) for i = 0 ... chunks - 1, on whichever threads. Where another caller has the workers at
  // the moment, the caller works alone.
  template <class Body> void run(int chunks, const Body& body) {
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (threads_ == 1 || chunks <= 1 || !turn.try_lock()) {
      for (int i = 0; i < chunks; i++) body(i);
      return;
    }
    call_ = [](const void* body, int i) { (*static_cast<const Body*>(body))(i); };
    body_ = &body;
    chunks_ = chunks;
    next_.store(0);
    inside_.store(1);
    epoch_.advance();
    take();
    // Only when no worker is inside may the job end: then the caller's own share goes from 1 to 0.
    int one = 1;
    for (int tries = 0; !inside_.compare_exchange_weak(one, 0); one = 1)
      if (++tries < 2000) pause();
      else std::this_thread::yield();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void take() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) call_(body_, i);
  }

  void work(int number) {
    if (pinned_) pin(number);
    for (uint32_t seen = 0;;) {
      wait(seen);
      seen = epoch_.now();
      if (stop_.load()) return;
      // Who comes late finds nobody inside, and must not touch what a later job prepares.
      int inside = inside_.load();
      while (inside > 0 && !inside_.compare_exchange_weak(inside, inside + 1)) {
      }
      if (inside <= 0) continue;
      take();
      inside_.fetch_sub(1);
    }
  }

  void wait(uint32_t seen) {
    using clock = std::chrono::steady_clock;
    const auto until = clock::now() + std::chrono::duration<double>(spin_);
    for (int i = 1; epoch_.now() == seen; i++) {
      pause();
      if (i % 64 == 0 && clock::now() > until) epoch_.sleep_while(seen);
    }
  }

  static void pin(int number) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    const int count = CPU_COUNT(&allowed);
    for (int cpu = 0, at = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &allowed) || at++ != number % count) continue;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      sched_setaffinity(0, sizeof one, &one);
      return;
    }
#else
    (void)number;
#endif
  }

  const int threads_;
  const double spin_;
  const bool pinned_;
  Epoch epoch_;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> inside_{0};  // threads that work on the job; 0: there is none
  void (*call_)(const void*, int) = nullptr;
  const void* body_ = nullptr;
  int chunks_ = 0;
  std::atomic<bool> stop_{false};
  std::mutex turn_;
  std::vector<std::thread> workers_;
};

// The pool of this process. A fork's child has none of its parent's threads: it starts a pool of
// its own when it first needs one.
class Pools {
 public:
  static Pool& get() {
    Pool* pool = current().load(std::memory_order_acquire);
    return pool ? *pool : start();
  }
  static void configure(int threads, double spin, bool pinned) {
    std::lock_guard<std::mutex> lock(guard());
    Settings& s = settings();
    const int count = threads > 0 ? threads : default_threads();
    if (current().load() && s.threads == count && s.spin == spin && s.pinned == pinned) return;
    s = {count, spin, pinned};
    delete current().exchange(nullptr);
  }

 private:
  struct Settings {
    int threads;
    double spin;
    bool pinned;
  };
  static int default_threads() { return std::max(1u, std::thread::hardware_concurrency()); }
  static std::atomic<Pool*>& current() {
    static std::atomic<Pool*> pool{nullptr};
    return pool;
  }
  static Settings& settings() {
    static Settings s{default_threads(), 2e-5, false};
    return s;
  }
  static std::mutex& guard() {
    static std::mutex m;
    return m;
  }
  static Pool& start() {
    std::lock_guard<std::mutex> lock(guard());
    static const int registered = pthread_atfork([] { guard().lock(); }, [] { guard().unlock(); },
                                                 [] {
                                                   current().store(nullptr);  // left as it is
                                                   guard().unlock();
                                                 });
    (void)registered;
    Pool* pool = current().load();
    if (!pool) {
      pool = new Pool(settings().threads, settings().spin, settings().pinned);
      current().store(pool, std::memory_order_release);
    }
    return *pool;
  }
};

}  // namespace kernels
