// Hopper's own instructions behind thin functions: mbarriers, copies by the bulk tensor engine, and
// asynchronous matrix products of a warpgroup (PTX ISA: "mbarrier", "cp.async.bulk.tensor",
// "wgmma").
//
// They exist on sm_90a alone. Under the tests' emulator the same functions are models of these
// instructions (tests/emulator/include/hopper_emulated.h): a wrong descriptor, phase or layout
// shows there as a wrong result or a deadlock.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace latent_rl {
namespace cuda {
namespace hopper {

// A warpgroup's product is [64, 128] += [64, 16] [128, 16]^T; each thread holds 64 of its sums.
// Sum i of thread t (of 128) is at row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8 and column
// i / 4 * 8 + t % 4 * 2 + i % 2.
constexpr int kSums = 64;

}  // namespace hopper
}  // namespace cuda
}  // namespace latent_rl

#ifdef LATENT_RL_EMULATED
#include "hopper_emulated.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Kernels guard their bodies by this: what no kernel uses is not compiled for other architectures.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LATENT_RL_HAS_WGMMA
#endif

namespace latent_rl {
namespace cuda {
namespace hopper {

// The block's dynamic shared memory on a boundary of 1024 bytes, after which swizzling repeats.
__device__ inline unsigned char* swizzled_shared() {
  extern __shared__ __align__(1024) unsigned char swizzled_bytes[];
  return swizzled_bytes;
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// mbarriers: a phase ends when `count` arrivals and all expected bytes have come.

__device__ inline void init_barrier(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After the inits and before the block's barrier: makes them known to the copy engine.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// One arrival that also makes the phase wait for `bytes` of copies.
__device__ inline void arrive_expecting(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns once the phase of this parity is over; the phase before the first has parity 1.
__device__ inline void wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies the box at (column, row, group) of a tensor to shared memory, swizzled as the map says;
// what lies outside the tensor becomes zero. Its bytes complete on `barrier`.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column,
                                int row, int group) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(group), "r"(shared_address(barrier))
      : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Registers of a thread, for every warp of a warpgroup.
template <int kCount>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first product after ordinary code has touched the sums.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns once at most `kPending` committed groups are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define LATENT_RL_SUMS_8(d, i)                                                                \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LATENT_RL_MULTIPLY(element)                                                         \
  asm volatile(                                                                             \
      "{\n"                                                                                 \
      ".reg .pred add;\n"                                                                   \
      "setp.ne.b32 add, %66, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." element "." element                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "    \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "    \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "   \
      "%64, %65, add, 1, 1, 0, 0;\n"                                                        \
      "}\n"                                                                                 \
      : LATENT_RL_SUMS_8(sums, 0), LATENT_RL_SUMS_8(sums, 8), LATENT_RL_SUMS_8(sums, 16),   \
        LATENT_RL_SUMS_8(sums, 24), LATENT_RL_SUMS_8(sums, 32), LATENT_RL_SUMS_8(sums, 40), \
        LATENT_RL_SUMS_8(sums, 48), LATENT_RL_SUMS_8(sums, 56)                              \
      : "l"(left), "l"(right), "r"(static_cast<int>(add)))

// sums (+)= left right^T, both by descriptor; the old sums are dropped unless `add`.
template <typename T>
__device__ void multiply(float (&sums)[kSums], uint64_t left, uint64_t right, bool add);
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sums)[kSums], uint64_t left, uint64_t right,
                                               bool add) {
  LATENT_RL_MULTIPLY("bf16");
}
template <>
__device__ inline void multiply<__half>(float (&sums)[kSums], uint64_t left, uint64_t right,
                                        bool add) {
  LATENT_RL_MULTIPLY("f16");
}
#undef LATENT_RL_MULTIPLY
#undef LATENT_RL_SUMS_8

}  // namespace hopper
}  // namespace cuda
}  // namespace latent_rl

#endif  // LATENT_RL_EMULATED

namespace latent_rl {
namespace cuda {
namespace hopper {

// Matrix descriptor of rows of 128 bytes, 16 elements of each from `first` on, in shared memory
// swizzled by 128 bytes: the start in units of 16 bytes (bits 0-13), the distance of eight rows in
// the same units (32-45), swizzle mode 1 (62-63). The leading distance (16-29) goes unused here,
// and the base offset (49-51) is zero since eight rows begin on a boundary of 1024 bytes.
__device__ inline uint64_t matrix(const void* first) {
  constexpr uint64_t kFixed = 1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16;
  return kFixed | (shared_address(first) & 0x3ffffu) >> 4;
}

}  // namespace hopper
}  // namespace cuda
}  // namespace latent_rl
