// gated_merge between its matrix products: gather, add, silu and product in one pass over memory,
// and the same backward. Bound by bandwidth: forward 2 N I read and 3 N I written, backward 3
// and 3.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/element.cuh"
#include "common/launch.h"
#include "gated_merge/cuda_impl.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// exp overflows to infinity below -88, which gives the 0 that is right.
__device__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ bool has_code(const int64_t* codes, int64_t row, int64_t num_codes) {
  return codes[row] >= 0 && codes[row] < num_codes;
}

// Calls run(row, column) for every kWidth columns of every row; a block stays within one row, so
// that its threads share one code, and blocks of one row stand side by side.
template <int kWidth, typename Run>
__device__ void for_columns(int64_t rows, int64_t width, Run run) {
  const int64_t in_row = (width + kThreads * kWidth - 1) / (kThreads * kWidth);
  for (int64_t task = blockIdx.x; task < rows * in_row; task += gridDim.x) {
    const int64_t row = task / in_row;
    const int64_t column = ((task - row * in_row) * kThreads + threadIdx.x) * kWidth;
    if (column < width) run(row, column);
  }
}

template <typename T, int kWidth>
__device__ void load_wide(const T* from, float* to) {
  const Vector<T, kWidth> v = load_vector<kWidth>(from);
#pragma unroll
  for (int w = 0; w < kWidth; ++w) to[w] = to_float(v.at[w]);
}

template <typename T, int kWidth>
__device__ void store_rounded(const float* from, T* to) {
  Vector<T, kWidth> v;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) from_float(from[w], v.at + w);
  store_vector(to, v);
}

// pre += table[code], at four floats an access at most.
template <int kWidth>
__device__ void add_table(const float* table, float* pre) {
  constexpr int kStep = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int first = 0; first < kWidth; first += kStep) {
    const Vector<float, kStep> t = load_vector<kStep>(table + first);
#pragma unroll
    for (int w = 0; w < kStep; ++w) pre[first + w] += t.at[w];
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) _gated_merge_fwd_kernel(MergeForwardCudaArgs args) {
  for_columns<kWidth>(args.rows, args.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * args.width + column;
    const bool valid = has_code(args.codes, row, args.num_codes);
    const int64_t entry = (valid ? args.codes[row] : 0) * args.width + column;
    T* gate_at = static_cast<T*>(args.pre_gate) + at;
    T* up_at = static_cast<T*>(args.pre_up) + at;
    float gate[kWidth], up[kWidth], activation[kWidth];
    load_wide<T, kWidth>(gate_at, gate);
    load_wide<T, kWidth>(up_at, up);
    add_table<kWidth>(args.table_gate + entry, gate);
    add_table<kWidth>(args.table_up + entry, up);
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      activation[w] = valid ? gate[w] * sigmoid(gate[w]) * up[w] : nan_float();
    }
    store_rounded<T, kWidth>(gate, gate_at);
    store_rounded<T, kWidth>(up, up_at);
    store_rounded<T, kWidth>(activation, static_cast<T*>(args.activation) + at);
  });
}

// With s = sigmoid(gate): d_up = d silu(gate), d_gate = d up s (1 + gate (1 - s)). A row without a
// code passes no gradient on, whatever its pre-activations are.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) _gated_merge_bwd_kernel(MergeBackwardCudaArgs args) {
  for_columns<kWidth>(args.rows, args.width, [&](int64_t row, int64_t column) {
    const int64_t at = row * args.width + column;
    float d_gate[kWidth] = {}, d_up[kWidth] = {}, activation[kWidth] = {};
    if (has_code(args.codes, row, args.num_codes)) {
      float d[kWidth], gate[kWidth], up[kWidth];
      load_wide<T, kWidth>(static_cast<const T*>(args.d_activation) + at, d);
      load_wide<T, kWidth>(static_cast<const T*>(args.pre_gate) + at, gate);
      load_wide<T, kWidth>(static_cast<const T*>(args.pre_up) + at, up);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const float s = sigmoid(gate[w]);
        const float silu = gate[w] * s;
        activation[w] = silu * up[w];
        d_up[w] = d[w] * silu;
        d_gate[w] = d[w] * up[w] * s * (1.0f + gate[w] * (1.0f - s));
      }
    }
    T* d_pre = static_cast<T*>(args.d_pre) + 2 * row * args.width + column;
    store_rounded<T, kWidth>(d_gate, d_pre);
    store_rounded<T, kWidth>(d_up, d_pre + args.width);
    store_rounded<T, kWidth>(activation, static_cast<T*>(args.activation) + at);
  });
}

inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % kVectorBytes == 0; }

// Calls run with the widest vectors that the columns and every pointer allow.
template <typename T, typename Run, typename... Pointers>
void with_width(int64_t width, Run run, const Pointers*... pointers) {
  if (width % kVectorWidth<T> == 0 && (aligned(pointers) && ...)) {
    return run(std::integral_constant<int, kVectorWidth<T>>());
  }
  run(std::integral_constant<int, 1>());
}

template <typename Args>
unsigned grid_for(const Args& args, int vector_width) {
  const int64_t columns = int64_t{kThreads} * vector_width;
  return blocks_for(args.rows * ((args.width + columns - 1) / columns));
}

}  // namespace

void merge_forward(const MergeForwardCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  const char* op = "gated_merge_forward";
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>(
        args.width,
        [&](auto width) {
          launch(op, _gated_merge_fwd_kernel<T, decltype(width)::value>, grid_for(args, width),
                 kThreads, 0, static_cast<cudaStream_t>(stream), args);
        },
        args.pre_gate, args.pre_up, args.table_gate, args.table_up, args.activation);
  });
}

void merge_backward(const MergeBackwardCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  const char* op = "gated_merge_backward";
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width<T>(
        args.width,
        [&](auto width) {
          launch(op, _gated_merge_bwd_kernel<T, decltype(width)::value>, grid_for(args, width),
                 kThreads, 0, static_cast<cudaStream_t>(stream), args);
        },
        args.d_activation, args.pre_gate, args.pre_up, args.d_pre, args.activation);
  });
}

}  // namespace cuda
}  // namespace latent_rl
