#include "runtime.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 blockDim, gridDim;
uint3 threadIdx, blockIdx;

namespace emulator {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN as a float, -1 as an integer
constexpr size_t kCanaryBytes = 256;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kPolling, kDone };

struct Fiber {
  ucontext_t entry;
  jmp_buf resume_at;
  bool started;
  State state;
  uint3 index;
  unsigned linear;
  const char* file;  // of the block barrier waited at
  int line;
  unsigned mask;                       // of the warp barrier waited at
  const std::function<bool()>* ready;  // what is waited for when polling
  const std::string* what;
};

struct alignas(1024) Kilobyte {
  unsigned char bytes[1024];
};

// Lanes that meet under one mask. Two buffers, so that nobody overwrites what others still read.
struct Meeting {
  unsigned mask = 0, arrived = 0, generation = 0;
  WarpOp op = WarpOp::kSync;
  uint64_t values[2][kLanes];
};

struct Stacks {
  char* base = nullptr;
  size_t count = 0;

  char* at(size_t i) { return base + i * kStackBytes; }
  void reserve(size_t wanted) {
    if (wanted <= count) return;
    if (base != nullptr) munmap(base, count * kStackBytes);
    void* got = mmap(nullptr, wanted * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    base = static_cast<char*>(got);
    count = wanted;
  }
};

struct Machine {
  Order order = Order::kForward;
  std::mt19937 random;
  Stacks stacks;
  std::vector<Fiber> fibers;
  std::vector<std::vector<Meeting>> warps;
  std::vector<Kilobyte> shared;
  size_t shared_bytes = 0;
  std::vector<std::function<void()>> deferred;
  uint64_t block_serial = 0;
  const std::function<void()>* thread = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  unsigned alive = 0, waiting = 0;
  int votes = 0, decided = 0;
  std::string error;
};

Machine machine;

std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> ids(count);
  std::iota(ids.begin(), ids.end(), 0u);
  if (machine.order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  if (machine.order == Order::kShuffled) std::shuffle(ids.begin(), ids.end(), machine.random);
  return ids;
}

void back_to_scheduler() {
  if (_setjmp(machine.current->resume_at) == 0) _longjmp(machine.scheduler, 1);
}

void wait_as(State state) {
  Fiber* self = machine.current;
  self->state = state;
  while (self->state == state) back_to_scheduler();
}

void release_block() {
  const Fiber* first = nullptr;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state != State::kAtBlockBarrier) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.file != first->file || fiber.line != first->line) {
      fail("divergent barrier: thread %u waits at %s:%d, thread %u at %s:%d", first->linear,
           first->file, first->line, fiber.linear, fiber.file, fiber.line);
    }
    fiber.state = State::kReady;
  }
  machine.decided = machine.votes;
  machine.votes = 0;
  machine.waiting = 0;
}

void run_fiber() {
  (*machine.thread)();
  machine.current->state = State::kDone;
  --machine.alive;
  if (machine.alive > 0 && machine.waiting == machine.alive) release_block();
  _longjmp(machine.scheduler, 1);
}

// setcontext starts a fiber on its own stack; after that _longjmp, which makes no system call,
// switches.
__attribute__((noinline)) void give_turn(Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (machine.current->started) _longjmp(machine.current->resume_at, 1);
  machine.current->started = true;
  setcontext(&machine.current->entry);
}

std::string describe_waiting() {
  std::string text = "deadlock: ";
  char part[160];
  int told = 0;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.state == State::kReady || told == 4) continue;
    if (fiber.state == State::kDone) continue;
    if (fiber.state == State::kAtBlockBarrier) {
      snprintf(part, sizeof(part), "thread %u waits at %s:%d; ", fiber.linear, fiber.file,
               fiber.line);
    } else if (fiber.state == State::kPolling) {
      snprintf(part, sizeof(part), "thread %u waits for %s; ", fiber.linear, fiber.what->c_str());
    } else {
      snprintf(part, sizeof(part), "thread %u waits for the lanes of mask %08x; ", fiber.linear,
               fiber.mask);
    }
    text += part;
    ++told;
  }
  return text + std::to_string(machine.fibers.size() - machine.alive) + " threads have exited";
}

int poison_tls(dl_phdr_info* info, size_t, void* inside) {
  const auto address = reinterpret_cast<uintptr_t>(inside);
  bool mine = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD) mine |= address >= begin && address < begin + segment.p_memsz;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (mine && info->dlpi_tls_data != nullptr) memset(info->dlpi_tls_data, kPoison, bytes);
  return mine ? 1 : 0;
}

// `__shared__` variables are the library's only thread-local ones, so that all of them can be
// filled with garbage before every block, as on a device.
void poison_shared() {
  dl_iterate_phdr(poison_tls, reinterpret_cast<void*>(&machine));
  memset(machine.shared.data(), kPoison, machine.shared.size() * sizeof(Kilobyte));
}

void prepare_fibers() {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  machine.stacks.reserve(count);
  machine.fibers.assign(count, Fiber());
  machine.warps.assign((count + kLanes - 1) / kLanes, {});
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::kReady;
    fiber.linear = i;
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = machine.stacks.at(i);
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_fiber, 0);
  }
  machine.alive = count;
  machine.waiting = 0;
  machine.votes = 0;
  machine.deferred.clear();
  ++machine.block_serial;
}

void do_deferred(size_t i) {
  const std::function<void()> work = std::move(machine.deferred[i]);
  machine.deferred.erase(machine.deferred.begin() + static_cast<std::ptrdiff_t>(i));
  work();
}

// Engines beside the threads: whether anything was done.
bool run_engines(bool stuck) {
  std::vector<std::function<void()>>& work = machine.deferred;
  if (work.empty()) return false;
  if (machine.order == Order::kShuffled ? stuck || machine.random() % 2 == 0 : stuck) {
    // What was asked for last comes first: engines keep no order.
    do_deferred(machine.order == Order::kShuffled ? machine.random() % work.size()
                                                  : work.size() - 1);
    return true;
  }
  return false;
}

void run_block(size_t shared_bytes) {
  prepare_fibers();
  poison_shared();
  while (machine.alive > 0) {
    bool progress = false;
    for (unsigned i : turns(static_cast<unsigned>(machine.fibers.size()))) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.state == State::kPolling && (*fiber.ready)()) fiber.state = State::kReady;
      if (fiber.state != State::kReady) continue;
      progress = true;
      give_turn(&fiber);
      if (!machine.error.empty()) return;
    }
    progress |= run_engines(!progress);
    if (!machine.error.empty()) return;
    if (!progress) {
      machine.error = describe_waiting();
      return;
    }
  }
  if (!machine.deferred.empty()) machine.error = "the block ended with copies under way";
  const unsigned char* bytes = machine.shared.data()->bytes;
  for (size_t i = shared_bytes; i < machine.shared.size() * sizeof(Kilobyte); ++i) {
    if (bytes[i] != kPoison) machine.error = "wrote past the dynamic shared memory";
  }
}

void refuse_access(int) { fail("touched memory that belongs to no tensor"); }

// While a grid runs, what would fault on a device is an error of the launch. Not deferred, since
// the handler never returns.
struct CatchFaults {
  struct sigaction before;
  CatchFaults() {
    struct sigaction mine = {};
    mine.sa_handler = refuse_access;
    mine.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &mine, &before);
  }
  ~CatchFaults() { sigaction(SIGSEGV, &before, nullptr); }
};

}  // namespace

void set_order(Order order, unsigned seed) {
  machine.order = order;
  machine.random.seed(seed);
}

void launch(const Shape& shape, const std::function<void()>& thread) {
  blockDim = dim3(shape.block.x, shape.block.y, shape.block.z);
  gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
  machine.shared_bytes = shape.shared_bytes;
  machine.shared.resize((shape.shared_bytes + kCanaryBytes) / sizeof(Kilobyte) + 1);
  machine.thread = &thread;
  machine.error.clear();
  const CatchFaults faults;
  for (unsigned b : turns(gridDim.x * gridDim.y * gridDim.z)) {
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    run_block(shape.shared_bytes);
    if (!machine.error.empty()) {
      throw std::runtime_error("block (" + std::to_string(blockIdx.x) + ", " +
                               std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                               "): " + machine.error);
    }
  }
}

int sync_block(const char* file, int line, int predicate) {
  Fiber* self = machine.current;
  self->file = file;
  self->line = line;
  machine.votes += predicate != 0 ? 1 : 0;
  ++machine.waiting;
  self->state = State::kAtBlockBarrier;
  if (machine.waiting == machine.alive) {
    release_block();
  } else {
    wait_as(State::kAtBlockBarrier);
  }
  return machine.decided;
}

void wait_until(const std::function<bool()>& ready, const std::string& what) {
  machine.current->ready = &ready;
  machine.current->what = &what;
  while (!ready()) wait_as(State::kPolling);
}

void defer(std::function<void()> work) {
  if (machine.order == Order::kForward) return work();
  machine.deferred.push_back(std::move(work));
}

bool late() {
  return machine.order == Order::kShuffled ? machine.random() % 2 == 0
                                           : machine.order == Order::kForward;
}

void complain(const std::string& error) {
  if (machine.error.empty()) machine.error = error;
}

unsigned lane() { return machine.current->linear % kLanes; }
unsigned thread() { return machine.current->linear; }
uint64_t block_serial() { return machine.block_serial; }

const uint64_t* meet(WarpOp op, unsigned mask, uint64_t value) {
  Fiber* self = machine.current;
  const unsigned warp = self->linear / kLanes;
  const unsigned bit = 1u << lane();
  if ((mask & bit) == 0) fail("thread %u is not in its mask %08x", self->linear, mask);
  for (unsigned l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1) == 0) continue;
    const unsigned other = warp * kLanes + l;
    if (other >= machine.fibers.size() || machine.fibers[other].state == State::kDone) {
      fail("thread %u waits for lane %u of mask %08x, which does not run", self->linear, l, mask);
    }
  }
  std::vector<Meeting>& meetings = machine.warps[warp];
  size_t at = 0;
  while (at < meetings.size() && meetings[at].mask != mask) ++at;
  if (at == meetings.size()) {
    // Other lanes hold pointers into the values: no entry may move.
    if (meetings.capacity() == 0) meetings.reserve(1024);
    if (at == 1024) fail("more than 1024 masks in a warp");
    meetings.emplace_back();
    meetings[at].mask = mask;
  }
  Meeting& meeting = meetings[at];
  if (meeting.arrived == 0) meeting.op = op;
  if (meeting.op != op) fail("lanes of mask %08x meet at different operations", mask);
  const uint64_t* values = meeting.values[meeting.generation & 1];
  meeting.values[meeting.generation & 1][lane()] = value;
  meeting.arrived |= bit;
  self->mask = mask;
  if (meeting.arrived != mask) {
    wait_as(State::kAtWarpBarrier);
    return values;
  }
  meeting.arrived = 0;
  ++meeting.generation;
  for (unsigned l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1) != 0) machine.fibers[warp * kLanes + l].state = State::kReady;
  }
  return values;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine.error = text;
  _longjmp(machine.scheduler, 1);
}

void* dynamic_shared() { return machine.shared.data(); }
size_t dynamic_shared_bytes() { return machine.shared_bytes; }

}  // namespace emulator

// What the compiler's checks call (-fsanitize=alignment,bounds,shift), in place of their library.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};
void refuse(const void* data, const char* what) {
  const Place* place = static_cast<const Place*>(data);
  emulator::fail("%s at %s:%u", what, place->file, place->line);
}
}  // namespace
extern "C" {
void __ubsan_handle_type_mismatch_v1_abort(void* data, void*) { refuse(data, "misaligned access"); }
void __ubsan_handle_out_of_bounds_abort(void* data, void*) { refuse(data, "index past an array"); }
void __ubsan_handle_shift_out_of_bounds_abort(void* data, void*, void*) {
  refuse(data, "shift past the width");
}
}
