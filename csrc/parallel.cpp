#include "parallel.h"

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace latent_rl {
namespace {

constexpr int kMaxThreads = 256;
constexpr uintptr_t kLargePage = 2u << 20;
// glibc serves requests above 32 MiB at most from fresh mappings, and below reuses what it has.
constexpr int64_t kLeastLargeBytes = 8 << 20;

class Pool {
 public:
  // Waits for the workers: they sleep, so this only wakes them to leave.
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // False when another caller's job is running; the caller then works alone.
  bool try_run(int64_t tasks, int threads, TaskFn fn, void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int thread = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, thread] { work(thread); });
      }
      fn_ = fn;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = threads - 1;
      running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void drain(int thread) {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      fn_(context_, task, thread);
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && thread <= wanted_); });
      if (stop_) return;
      seen = generation_;
      lock.unlock();
      drain(thread);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  int wanted_ = 0;
  int running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

// Never destroyed: a destructor at exit would join threads that a fork or an interpreter shutdown
// may already have taken away.
std::atomic<Pool*> g_pool{nullptr};
std::once_flag g_once;

// Only the forking thread survives in a child, so the child starts with a new pool. The old one is
// left as it is: its mutexes may be held by threads that no longer exist.
void forget_pool_in_child() { g_pool.store(new (std::nothrow) Pool(), std::memory_order_release); }

Pool* pool() {
  std::call_once(g_once, [] {
    g_pool.store(new Pool(), std::memory_order_release);
    pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  });
  return g_pool.load(std::memory_order_acquire);
}

}  // namespace

void parallel_for(int64_t tasks, int threads, TaskFn fn, void* context) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1) {
    Pool* shared = pool();
    if (shared != nullptr && shared->try_run(tasks, threads, fn, context)) return;
  }
  for (int64_t task = 0; task < tasks; ++task) fn(context, task, 0);
}

Scratch::Scratch(size_t bytes) : data_(nullptr) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, rounded == 0 ? 64 : rounded);
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

void use_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLeastLargeBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  // Advice: a refusal changes nothing.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace latent_rl
