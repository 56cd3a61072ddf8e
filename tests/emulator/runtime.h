// The machine behind the emulated CUDA headers: one block at a time, its threads as fibers that run
// until they meet a barrier.
#pragma once

#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Shape {
  Index grid, block;
  size_t shared_bytes;
};

// In which order threads and blocks take their turns. A race between two barriers shows as a result
// that depends on it.
enum class Order { kForward, kReverse, kShuffled };

void set_order(Order order, unsigned seed);

// Runs `thread` once per thread of the grid. Throws std::runtime_error for what would hang, fault
// or be undefined on a device: a barrier some threads never reach, threads at different barriers,
// lanes that exited or stand outside their mask, a misaligned vector access, an index past an
// array.
void launch(const Shape& shape, const std::function<void()>& thread);

// What a block's barrier counts: threads, true predicates, and their conjunction and disjunction.
struct Vote {
  int count = 0;
};
int sync_block(const char* file, int line, int predicate = 0);

enum class WarpOp { kSync, kShuffle, kVote, kReduce, kMatch };

// Meets the other lanes of `mask` and returns every lane's value; it stays valid until the same
// lanes meet again.
const uint64_t* meet(WarpOp op, unsigned mask, uint64_t value);

unsigned lane();
[[noreturn]] void fail(const char* format, ...);
void* dynamic_shared();

}  // namespace emulator
