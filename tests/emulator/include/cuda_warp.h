// Barriers, warp operations and atomics.
#pragma once

#define __syncthreads() emulator::sync_block(__FILE__, __LINE__)
#define __syncthreads_count(predicate) emulator::sync_block(__FILE__, __LINE__, predicate)
#define __syncthreads_or(predicate) (emulator::sync_block(__FILE__, __LINE__, predicate) != 0)

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::meet(emulator::WarpOp::kSync, mask, 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {
template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle carries at most eight bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const uint64_t* values = meet(WarpOp::kShuffle, mask, bits);
  if ((mask >> source & 1) == 0) fail("shuffle from lane %u, outside the mask %08x", source, mask);
  memcpy(&value, values + source, sizeof(T));
  return value;
}
template <typename T, typename Op>
T reduce(unsigned mask, T value, Op op) {
  const uint64_t* values = meet(WarpOp::kReduce, mask, static_cast<uint32_t>(value));
  bool first = true;
  T total = T();
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) == 0) continue;
    const T here = static_cast<T>(values[l]);
    total = first ? here : op(total, here);
    first = false;
  }
  return total;
}
}  // namespace emulator

// Past the end of its segment of `width` lanes, a lane reads itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulator::lane(), w = static_cast<unsigned>(width);
  return emulator::shuffle(mask, value, lane / w * w + static_cast<unsigned>(source) % w);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const unsigned lane = emulator::lane(), w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(flip);
  return emulator::shuffle(mask, value, source / w > lane / w ? lane : source);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane();
  const bool inside = lane % static_cast<unsigned>(width) >= delta;
  return emulator::shuffle(mask, value, inside ? lane - delta : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulator::lane(), w = static_cast<unsigned>(width);
  return emulator::shuffle(mask, value, lane % w + delta < w ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulator::meet(emulator::WarpOp::kVote, mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) != 0 && values[l] != 0) ballot |= 1u << l;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const uint64_t* values = emulator::meet(emulator::WarpOp::kMatch, mask, bits);
  unsigned same = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) != 0 && values[l] == bits) same |= 1u << l;
  }
  return same;
}

#define LRL_EMULATED_REDUCE(name, type, expression)                                          \
  inline type __reduce_##name##_sync(unsigned mask, type value) {                            \
    return emulator::reduce(mask, value, [](type a, type b) -> type { return expression; }); \
  }
LRL_EMULATED_REDUCE(add, unsigned, a + b)
LRL_EMULATED_REDUCE(add, int, a + b)
LRL_EMULATED_REDUCE(min, unsigned, a < b ? a : b)
LRL_EMULATED_REDUCE(min, int, a < b ? a : b)
LRL_EMULATED_REDUCE(max, unsigned, a > b ? a : b)
LRL_EMULATED_REDUCE(max, int, a > b ? a : b)
LRL_EMULATED_REDUCE(and, unsigned, a& b)
LRL_EMULATED_REDUCE(or, unsigned, a | b)
LRL_EMULATED_REDUCE(xor, unsigned, a ^ b)
#undef LRL_EMULATED_REDUCE

// No thread is ever interrupted inside one of these. Float sums are exact only in one order: a
// kernel that adds floats atomically differs between orders of the threads, and its test goes red.
#define LRL_EMULATED_ATOMIC(name, expression)      \
  template <typename T>                            \
  T atomic##name(T* at, std::common_type_t<T> v) { \
    const T old = *at;                             \
    *at = expression;                              \
    return old;                                    \
  }
LRL_EMULATED_ATOMIC(Add, static_cast<T>(old + v))
LRL_EMULATED_ATOMIC(Max, old > v ? old : v)
LRL_EMULATED_ATOMIC(Min, old < v ? old : v)
LRL_EMULATED_ATOMIC(Or, old | v)
LRL_EMULATED_ATOMIC(And, old& v)
LRL_EMULATED_ATOMIC(Exch, v)
#undef LRL_EMULATED_ATOMIC
template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> v) {
  const T old = *at;
  if (old == expected) *at = v;
  return old;
}
