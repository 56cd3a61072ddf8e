// A small pool of sleeping workers. Tasks are independent and each is computed the same way by
// whichever thread takes it, so results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latent_rl {

using TaskFn = void (*)(void* context, int64_t task, int thread);

// Runs fn(context, task, thread) for every task in [0, tasks), thread in [0, threads). Runs in the
// caller alone when threads is 1 or the pool is busy with another caller's job. fn must not throw.
void parallel_for(int64_t tasks, int threads, TaskFn fn, void* context);

// 64-byte aligned memory that lives until the end of the scope; throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// Asks for large pages under memory about to be written for the first time. A fresh allocation of
// many megabytes is otherwise faulted in 4 KiB at a time, which costs more than filling it. Small
// areas are left alone; where the system has no such advice nothing happens.
void use_large_pages(void* data, int64_t bytes);

}  // namespace latent_rl
