// The functions of kernels/common/hopper.cuh as models: mbarriers with phases and bytes, copies
// that arrive when they like, and products that are done some time between issue and wait.
#pragma once

#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#define LATENT_RL_HAS_WGMMA

namespace emulator {

void init_barrier(uint64_t* barrier, unsigned count);
void arrive(uint64_t* barrier, unsigned expected_bytes);
void wait_barrier(uint64_t* barrier, unsigned parity);
void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const int (&at)[3]);

// Address in the block's shared memory, as descriptors count.
uint32_t shared_address(const void* at);

enum class Step { kBegin, kCommit, kRegisters };
void product_step(Step step);
void wait_products(unsigned pending);
using Decode = float (*)(uint16_t);
void multiply(float* sums, uint64_t left, uint64_t right, bool add, Decode decode);

}  // namespace emulator

namespace latent_rl {
namespace cuda {
namespace hopper {

inline unsigned char* swizzled_shared() {
  return static_cast<unsigned char*>(emulator::dynamic_shared());
}
inline uint32_t shared_address(const void* at) { return emulator::shared_address(at); }
inline void init_barrier(uint64_t* barrier, unsigned count) {
  emulator::init_barrier(barrier, count);
}
inline void publish_barriers() {}
inline void arrive(uint64_t* barrier) { emulator::arrive(barrier, 0); }
inline void arrive_expecting(uint64_t* barrier, unsigned bytes) {
  emulator::arrive(barrier, bytes);
}
inline void wait(uint64_t* barrier, unsigned parity) { emulator::wait_barrier(barrier, parity); }
inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                     int group) {
  emulator::copy_box(to, map, barrier, {column, row, group});
}
template <int kCount>
void set_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  emulator::product_step(emulator::Step::kRegisters);
}
template <int kCount>
void grow_registers() {
  set_registers<kCount>();
}
template <int kCount>
void shrink_registers() {
  set_registers<kCount>();
}
inline void begin_products() { emulator::product_step(emulator::Step::kBegin); }
inline void commit_products() { emulator::product_step(emulator::Step::kCommit); }
template <int kPending>
void wait_products() {
  emulator::wait_products(kPending);
}
template <typename T>
void multiply(float (&sums)[kSums], uint64_t left, uint64_t right, bool add) {
  emulator::multiply(sums, left, right, add, [](uint16_t bits) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__half{bits});
    return __bfloat162float(__nv_bfloat16{bits});
  });
}

}  // namespace hopper
}  // namespace cuda
}  // namespace latent_rl
