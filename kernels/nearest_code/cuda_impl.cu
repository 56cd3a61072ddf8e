// The screen of nearest_code on Hopper: best score, its code and the runner-up of every row.
//
// A block owns 256 rows, 128 per consumer warpgroup, which stay in shared memory while tiles of 128
// codes stream past both. The consumers take turns on the matrix unit: while one multiplies, the
// other looks for maxima among the scores it has in registers. README.md has the reasons and the
// error bound.
#include <cuda_runtime.h>

#include "common/block.cuh"
#include "common/element.cuh"
#include "common/hopper.cuh"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "nearest_code/cuda_impl.h"
#include "nearest_code/maxima.cuh"
#include "nearest_code/pipeline.cuh"

namespace latent_rl {
namespace cuda {
namespace nearest {
namespace {

constexpr float kWorst = -2.5e38f;  // WORST of screen.py
constexpr int kLimits = 8;

// One arrival for the warp, after all of its lanes are done.
__device__ void release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) hopper::arrive(barrier);
}

// Multiplies the consumer's rows by the next tile of codes: sums[p] = rows of product p.
template <typename T, int kChunks>
__device__ void multiply_tile(const Shared<kChunks>& shared, int consumer, int buffer,
                              Place<Shared<kChunks>::kStages>& place,
                              float (&sums)[kProducts][hopper::kSums]) {
  auto& barriers = shared.barriers();
  int before = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    hopper::wait(&barriers.codes_full[place.at], place.parity);
    hopper::begin_products();
    const uint64_t left = hopper::matrix(shared.rows(consumer, buffer, c));
    const uint64_t right = hopper::matrix(shared.codes(place.at));
#pragma unroll
    for (int k = 0; k < kChunk / kStep; ++k) {
      // Descriptors count in units of 16 bytes; the swizzle is of addresses, so that a step along
      // a row is plain addition.
      constexpr int kStepUnits = kStep * 2 / 16;
      constexpr int kProductUnits = 64 * kSwizzleBytes / 16;
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        hopper::multiply<T>(sums[p], left + p * kProductUnits + k * kStepUnits,
                            right + k * kStepUnits, c > 0 || k > 0);
      }
    }
    hopper::commit_products();
    if (c > 0) {
      // Free a chunk while the next one is multiplied.
      hopper::wait_products<1>();
      release(&barriers.codes_empty[before]);
    }
    before = place.at;
    place.next();
  }
  // All is issued: the other's products may queue up behind.
  release(&barriers.turn[1 - consumer]);
  hopper::wait_products<0>();
  release(&barriers.codes_empty[before]);
}

// The row, of the consumer's, that a thread decides: each of the four lanes that share rows takes
// one.
__device__ int own_row() {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int lane = thread % kWarpSize;
  return lane % 4 / 2 * 64 + thread / kWarpSize * 16 + lane % 2 * 8 + lane / 4;
}

// Squared length of the thread's own row, float32.
template <typename T, int kChunks>
__device__ float own_square(const Shared<kChunks>& shared, int consumer, int buffer) {
  constexpr int kWidth = kVectorWidth<T>;
  const int row = own_row();
  float square = 0.0f;
  for (int c = 0; c < kChunks; ++c) {
    const T* from =
        reinterpret_cast<const T*>(shared.rows(consumer, buffer, c) + row * kSwizzleBytes);
#pragma unroll
    for (int i = 0; i < kSwizzleBytes / kVectorBytes; ++i) {
      // The swizzle puts vector v of row r at v ^ (r % 8). Beginning at different vectors, the
      // lanes of an access meet eight different groups of banks.
      const int at = i ^ static_cast<int>(threadIdx.x % 4) * 2 ^ row % 8;
      const auto values = load_vector<kWidth>(from + at * kWidth);
      for (int e = 0; e < kWidth; ++e) {
        square = fmaf(to_float(values.at[e]), to_float(values.at[e]), square);
      }
    }
  }
  return square;
}

// Bound on the error of a row's scores, as score_error of screen.py for operands not rounded.
__device__ float score_error(const Screen& screen, int group, float square) {
  const float* limits = screen.limits + group * kLimits;
  const float exact_length = limits[0], reach = limits[1], lost = limits[2];
  const float length = sqrtf(square);
  float error = 2.4e-7f * length * exact_length + length * lost;
  error += screen.accumulation * (length * reach + limits[3]);
  error += screen.underflow * (1.0f + length + reach) * (1.0f + limits[4]);
  return error * screen.slack;
}

// Joins what the four lanes of a row know, and stores its code or lists it.
__device__ void decide(const Screen& screen, int group, int64_t first, float square,
                       const Best (&rows)[kProducts][kHalves]) {
  float best = kUnusable, second = kUnusable;
  int code = 0;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float top, runner_up;
      int top_code;
      rows[p][h].finish(top, runner_up, top_code);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, top, step);
        const float other_second = __shfl_xor_sync(kFullWarp, runner_up, step);
        const int other_code = __shfl_xor_sync(kFullWarp, top_code, step);
        runner_up = fmaxf(fmaxf(runner_up, other_second), fminf(top, other));
        top_code = other > top ? other_code : top_code;
        top = fmaxf(top, other);
      }
      if (static_cast<int>(threadIdx.x % 4) == p * kHalves + h) {
        best = top;
        second = runner_up;
        code = top_code;
      }
    }
  }
  const int64_t row = first + own_row();
  if (row >= screen.rows) return;
  const float error = score_error(screen, group, square);
  const int64_t begin = group * screen.rows;
  // NaN (from overflow) compares false: what is tested is certainty, not doubt.
  if (best > kWorst && best - second > 2.0f * error) {
    screen.codes[begin + row] = code;
  } else {
    const int place = atomicAdd(screen.count + group, 1);
    screen.listed[begin + place] = row;
    screen.threshold[begin + place] = best - 2.0f * error;
  }
}

template <typename T, int kChunks, bool kScaled>
__device__ void consume(const Shared<kChunks>& shared, const Screen& screen, int consumer) {
  auto& barriers = shared.barriers();
  Place<Shared<kChunks>::kStages> codes;
  Place<Shared<kChunks>::kRowBuffers> rows;
  Place<Shared<kChunks>::kBiasBuffers> biases;
  // The first consumer begins; the second waits for it to have begun.
  unsigned turn = consumer == 0 ? 1 : 0;
  float sums[kProducts][hopper::kSums];
  Best best[kProducts][kHalves];
  for (unsigned tile = blockIdx.x; tile < screen.tiles; tile += gridDim.x, rows.next()) {
    const RowTile at = row_tile(screen, tile);
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) best[p][h].start();
    }
    hopper::wait(&barriers.rows_full[consumer][rows.at], rows.parity);
    const float square = own_square<T>(shared, consumer, rows.at);
    for (int t = 0; t < screen.code_tiles; ++t, biases.next()) {
      hopper::wait(&barriers.turn[consumer], turn);
      turn ^= 1;
      multiply_tile<T>(shared, consumer, rows.at, codes, sums);
      if (t == screen.code_tiles - 1) release(&barriers.rows_empty[consumer][rows.at]);
      hopper::wait(&barriers.bias_full[biases.at], biases.parity);
      enter_scores<kScaled>(sums, shared.bias(biases.at), shared.scale(biases.at), t, best);
      release(&barriers.bias_empty[biases.at]);
    }
    decide(screen, at.group, at.first + consumer * kTileRows, square, best);
  }
}

template <typename T, int kChunks, bool kScaled>
__global__ void __launch_bounds__(kThreads, 1)
    _nearest_code_hopper_kernel(const __grid_constant__ CUtensorMap rows,
                                const __grid_constant__ CUtensorMap codes, Screen screen) {
#if defined(LATENT_RL_HAS_WGMMA)
  const Shared<kChunks> shared = {hopper::swizzled_shared()};
  if (threadIdx.x == 0) {
    shared.init_barriers();
    hopper::publish_barriers();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  if (warp < kGroupWarps) {
    hopper::shrink_registers<kProducerRegisters>();
    const bool leads = threadIdx.x % kWarpSize == 0;
    if (warp == 0) {
      if (leads) copy_codes(shared, &codes, screen);
    } else if (warp <= kConsumers) {
      if (leads) copy_rows(shared, &rows, screen, warp - 1);
    } else {
      copy_biases<kChunks, kScaled>(shared, screen);
    }
  } else {
    hopper::grow_registers<kConsumerRegisters>();
    consume<T, kChunks, kScaled>(shared, screen, warp / kGroupWarps - 1);
  }
#endif
}

template <typename T, int kChunks, bool kScaled>
void launch_screen(const NearestScreenCudaArgs& args, cudaStream_t stream) {
  const char* op = "nearest_code";
  const Boxes rows = {args.x,   args.dtype,          args.groups,      args.rows,
                      args.dim, args.x_group_stride, args.x_row_stride};
  const Boxes codes = {args.table,     args.dtype, args.groups,
                       args.num_codes, args.dim,   args.num_codes * args.dim,
                       args.dim};
  const int64_t group_tiles = (args.rows + kBlockRows - 1) / kBlockRows;
  const int64_t tiles = args.groups * group_tiles;
  if (tiles > INT32_MAX) throw std::invalid_argument(std::string(op) + ": too many rows");
  const Screen screen = {args.bias,
                         args.scale,
                         args.limits,
                         args.codes,
                         args.listed,
                         args.threshold,
                         args.count,
                         args.rows,
                         args.num_codes,
                         static_cast<unsigned>(tiles),
                         static_cast<unsigned>(group_tiles),
                         static_cast<int>((args.num_codes + kTileCodes - 1) / kTileCodes),
                         args.accumulation,
                         args.underflow,
                         args.slack};
  int device = 0, processors = 0;
  check(op, cudaGetDevice(&device), "cudaGetDevice");
  check(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const int64_t blocks = tiles < processors ? tiles : processors;
  launch(op, _nearest_code_hopper_kernel<T, kChunks, kScaled>, static_cast<unsigned>(blocks),
         kThreads, Shared<kChunks>::kBytes, stream, tensor_map(op, rows, kTileRows),
         tensor_map(op, codes, kTileCodes), screen);
}

template <typename T, bool kScaled>
void launch_width(const NearestScreenCudaArgs& args, cudaStream_t stream) {
  switch ((args.dim + kChunk - 1) / kChunk) {
    case 1:
      return launch_screen<T, 1, kScaled>(args, stream);
    case 2:
      return launch_screen<T, 2, kScaled>(args, stream);
    case 3:
      return launch_screen<T, 3, kScaled>(args, stream);
    default:
      return launch_screen<T, 4, kScaled>(args, stream);
  }
}

template <typename T>
void launch_metric(const NearestScreenCudaArgs& args, cudaStream_t stream) {
  if (args.scale != nullptr) return launch_width<T, true>(args, stream);
  launch_width<T, false>(args, stream);
}

}  // namespace
}  // namespace nearest

void nearest_screen(const NearestScreenCudaArgs& args, void* stream) {
  if (args.groups == 0 || args.rows == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kBFloat16) return nearest::launch_metric<__nv_bfloat16>(args, queue);
  nearest::launch_metric<__half>(args, queue);
}

}  // namespace cuda
}  // namespace latent_rl
