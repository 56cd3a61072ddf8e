// The machine behind the emulated CUDA headers: one block at a time, its threads as fibers that run
// until they meet a barrier.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

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

enum class WarpOp { kSync, kShuffle, kVote, kReduce, kMatch, kProduct };

// Meets the other lanes of `mask` and returns every lane's value; it stays valid until the same
// lanes meet again.
const uint64_t* meet(WarpOp op, unsigned mask, uint64_t value);

// Lets other threads run until `ready` holds; `what` is told if it never does.
void wait_until(const std::function<bool()>& ready, const std::string& what);

// Work of an engine beside the threads: done at once, at random, or only when no thread can go on,
// by the order of the turns. It must not fail(), since no thread runs then, but may complain().
void defer(std::function<void()> work);
// Whether work whose moment is open shall be done as late as may be.
bool late();
void complain(const std::string& error);

unsigned lane();
unsigned thread();        // of its block
uint64_t block_serial();  // another for every block that runs
[[noreturn]] void fail(const char* format, ...);
void* dynamic_shared();  // on a boundary of 1024 bytes
size_t dynamic_shared_bytes();

}  // namespace emulator
