// One product of Hopper's matrix unit, right, and wrong in each way that the emulator must find.
#include <map>

#include "common/element.cuh"
#include "common/hopper.cuh"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "hopper_probes.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kRows = 64, kColumns = 128;
constexpr int kLeftBytes = kRows * kSwizzleBytes, kRightBytes = kColumns * kSwizzleBytes;
constexpr size_t kBytes = kLeftBytes + kRightBytes + 1024;

enum class Fault {
  kNone,
  kNoInit,
  kNoWait,
  kWrongParity,
  kFewBytes,
  kManyBytes,
  kTwoArrivals,
  kNoFence,
  kNoCommit,
  kReadEarly,
  kOffStart,
  kNoSwizzle,
  kLanesDiffer,
  kOffTarget,
  kNobodyWaits
};

__device__ void copy(unsigned char* shared, uint64_t* full, const CUtensorMap* left,
                     const CUtensorMap* right, Fault fault) {
  unsigned bytes = kLeftBytes + kRightBytes;
  if (fault == Fault::kFewBytes) bytes -= 16;
  if (fault == Fault::kManyBytes) bytes += 16;
  hopper::arrive_expecting(full, bytes);
  if (fault == Fault::kTwoArrivals) hopper::arrive(full);
  hopper::copy_box(shared + (fault == Fault::kOffTarget ? 128 : 0), left, full, 0, 0, 0);
  hopper::copy_box(shared + kLeftBytes, right, full, 0, 0, 0);
}

__device__ void multiply(const unsigned char* shared, uint64_t* full, float* out, Fault fault) {
  float sums[hopper::kSums];
  if (fault != Fault::kNoWait) hopper::wait(full, fault == Fault::kWrongParity ? 1 : 0);
  if (fault != Fault::kNoFence) hopper::begin_products();
  for (int k = 0; k < 4; ++k) {
    uint64_t left = hopper::matrix(shared) + 2 * k;
    if (fault == Fault::kOffStart) left += 1;
    if (fault == Fault::kNoSwizzle) left &= ~(3ull << 62);
    if (fault == Fault::kLanesDiffer) left += threadIdx.x % 2;
    const uint64_t right = hopper::matrix(shared + kLeftBytes) + 2 * k;
    hopper::multiply<__nv_bfloat16>(sums, left, right, k > 0);
  }
  if (fault != Fault::kNoCommit) hopper::commit_products();
  float early = 0.0f;
  if (fault == Fault::kReadEarly) early = sums[5];
  hopper::wait_products<0>();
  if (fault == Fault::kReadEarly) sums[5] = early;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = 0; i < hopper::kSums; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    out[row * kColumns + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

__global__ void _product_kernel(const __grid_constant__ CUtensorMap left,
                                const __grid_constant__ CUtensorMap right, float* out,
                                Fault fault) {
  unsigned char* shared = hopper::swizzled_shared();
  auto* full = reinterpret_cast<uint64_t*>(shared + kLeftBytes + kRightBytes);
  if (threadIdx.x == 0 && fault != Fault::kNoInit) hopper::init_barrier(full, 1);
  hopper::publish_barriers();
  __syncthreads();
  if (threadIdx.x == 128) copy(shared, full, &left, &right, fault);
  if (threadIdx.x < 128 && fault != Fault::kNobodyWaits) multiply(shared, full, out, fault);
}

}  // namespace

void hopper_probe(const std::string& fault, const void* left, const void* right, float* out,
                  int64_t rows, int64_t width) {
  static const std::map<std::string, Fault> faults = {{"none", Fault::kNone},
                                                      {"no init", Fault::kNoInit},
                                                      {"no wait", Fault::kNoWait},
                                                      {"wrong parity", Fault::kWrongParity},
                                                      {"few bytes", Fault::kFewBytes},
                                                      {"many bytes", Fault::kManyBytes},
                                                      {"two arrivals", Fault::kTwoArrivals},
                                                      {"no fence", Fault::kNoFence},
                                                      {"no commit", Fault::kNoCommit},
                                                      {"read early", Fault::kReadEarly},
                                                      {"off start", Fault::kOffStart},
                                                      {"no swizzle", Fault::kNoSwizzle},
                                                      {"lanes differ", Fault::kLanesDiffer},
                                                      {"off target", Fault::kOffTarget},
                                                      {"nobody waits", Fault::kNobodyWaits}};
  const auto boxes = [width](const void* base, int64_t count) {
    return Boxes{base, DType::kBFloat16, 1, count, width, count * width, width};
  };
  launch("hopper_probe", _product_kernel, 1, 160, kBytes, nullptr,
         tensor_map("hopper_probe", boxes(left, rows), kRows),
         tensor_map("hopper_probe", boxes(right, kColumns), kColumns), out, faults.at(fault));
}

}  // namespace cuda
}  // namespace latent_rl
