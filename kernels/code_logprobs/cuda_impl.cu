// code_logprobs: a row to 8 lanes, a warp or a block, by its number of codes. The forward reads a
// row once from memory; what it reads again (for the KL, and in the backward) lies in L1.
//
// All in float32: the sums are arranged so that nothing cancels (README.md). Every sum runs in an
// order fixed by the number of codes, so a row's result does not depend on its batch.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "code_logprobs/cuda_impl.h"
#include "common/block.cuh"
#include "common/element.cuh"
#include "common/launch.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Left alone, ptxas takes 64 registers for one of the kernels and spills 8 bytes.
constexpr int kBlocksPerMultiprocessor = 3;

__device__ float infinity() { return __int_as_float(0x7f800000); }

// What is known of a softmax: its largest logit `top` counts 1, all others together `rest`, and
// `weighted` is the sum of exp(l - top) (l - top). Without the 1 in `rest`, a distribution close to
// certainty keeps the digits of its small entropy.
struct Softmax {
  float top;
  float rest;
  float weighted;
};

__device__ Softmax no_codes() { return {-infinity(), 0.0f, 0.0f}; }

// The softmax of both sides' codes together. Sums round by the order of the arguments.
__device__ Softmax merge(const Softmax& a, const Softmax& b) {
  const bool a_first = a.top >= b.top;
  const Softmax high = a_first ? a : b;
  const Softmax low = a_first ? b : a;
  if (low.top == -infinity()) return high;
  const float shift = low.top - high.top;
  const float scale = expf(shift);
  return {high.top, high.rest + scale * (low.rest + 1.0f),
          high.weighted + scale * (low.weighted + shift * (low.rest + 1.0f))};
}

__device__ void add(Softmax* s, float logit) {
  const bool raises = logit > s->top;
  const float high = raises ? logit : s->top;
  const float low = raises ? s->top : logit;
  const bool masked = low == -infinity();
  const float shift = masked ? 0.0f : low - high;
  const float scale = masked ? 0.0f : expf(shift);
  s->weighted =
      raises ? scale * (s->weighted + shift * (s->rest + 1.0f)) : s->weighted + scale * shift;
  s->rest = raises ? scale * (s->rest + 1.0f) : s->rest + scale;
  s->top = high;
}

// The sums of one row by one of its lanes, and of all of them after `reduce`.
struct RowSums {
  Softmax p;
  Softmax q;
  int broken;  // a logit that is NaN or +inf
};

struct MergeSums {
  __device__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return {merge(a.p, b.p), merge(a.q, b.q), a.broken | b.broken};
  }
};

__device__ Softmax exchange(const Softmax& s, int step) {
  return {__shfl_xor_sync(kFullWarp, s.top, step), __shfl_xor_sync(kFullWarp, s.rest, step),
          __shfl_xor_sync(kFullWarp, s.weighted, step)};
}
__device__ RowSums exchange(const RowSums& s, int step) {
  return {exchange(s.p, step), exchange(s.q, step), __shfl_xor_sync(kFullWarp, s.broken, step)};
}
__device__ float exchange(float v, int step) { return __shfl_xor_sync(kFullWarp, v, step); }

// Over the kLanes threads of a row, in every one of them, with the same bits in each.
template <int kLanes, typename V, typename Op>
__device__ V reduce(V value, Op op, V* shared) {
  constexpr int kInWarp = kLanes < kWarpSize ? kLanes : kWarpSize;
#pragma unroll
  for (int step = 1; step < kInWarp; step *= 2) {
    const V other = exchange(value, step);
    value = (threadIdx.x & step) == 0 ? op(value, other) : op(other, value);
  }
  if constexpr (kLanes > kWarpSize) {
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < kWarps; ++warp) value = op(value, shared[warp]);
    __syncthreads();
  }
  return value;
}

// Neighbours that a lane reads together, whether or not they come in one access: so that strides
// and alignment do not change the order of a sum.
template <typename T>
struct Codes {
  static constexpr int kCount = kVectorWidth<T>;
  Vector<T, kCount> at;
};

// Codes past the last one read as masked, which adds nothing to any sum.
template <bool kVectors, typename T>
__device__ Codes<T> load_codes(const T* row, int k, int num_codes) {
  Codes<T> out;
  if constexpr (kVectors) {
    out.at = load_vector<Codes<T>::kCount>(row + k);
  } else {
#pragma unroll
    for (int w = 0; w < Codes<T>::kCount; ++w) {
      from_float(-infinity(), out.at.at + w);
      if (k + w < num_codes) out.at.at[w] = row[k + w];
    }
  }
  return out;
}

template <bool kVectors, typename T>
__device__ void store_codes(T* row, int k, int num_codes, const Codes<T>& codes) {
  if constexpr (kVectors) {
    store_vector(row + k, codes.at);
  } else {
#pragma unroll
    for (int w = 0; w < Codes<T>::kCount; ++w) {
      if (k + w < num_codes) row[k + w] = codes.at.at[w];
    }
  }
}

// Calls visit(k, logits, refs) with neighbours; without a reference refs is zero.
template <int kLanes, bool kVectors, typename T, typename Visit>
__device__ void for_codes(const T* logits, const T* ref, int num_codes, Visit visit) {
  constexpr int kCount = Codes<T>::kCount;
  const int lane = threadIdx.x % kLanes;
#pragma unroll 2
  for (int k = lane * kCount; k < num_codes; k += kLanes * kCount) {
    const Codes<T> l = load_codes<kVectors>(logits, k, num_codes);
    Codes<T> r = {};
    if (ref != nullptr) r = load_codes<kVectors>(ref, k, num_codes);
    visit(k, l, r);
  }
}

// x + exp(-x) - 1, never negative. Near zero the difference would cancel; the series does not.
__device__ float gap_cost(float x) {
  float series = 1.0f / 362880.0f;
  series = fmaf(-x, series, 1.0f / 40320.0f);
  series = fmaf(-x, series, 1.0f / 5040.0f);
  series = fmaf(-x, series, 1.0f / 720.0f);
  series = fmaf(-x, series, 1.0f / 120.0f);
  series = fmaf(-x, series, 1.0f / 24.0f);
  series = fmaf(-x, series, 1.0f / 6.0f);
  series = fmaf(-x, series, 0.5f);
  return x * x * series;
}

// A row's statistics; `valid` when both distributions exist and the code names one of the K.
struct Row {
  bool valid;
  float log_mass;  // log of the sum of exp(l - top)
  float top;
  float inverse;  // 1 / mass
  float ref_top;
  float ref_inverse;
  float gap;  // log p - log q = l - r - gap
  float entropy;
  float kl;
};

// log p - log q; rounds relative to itself where policy and reference are close.
__device__ float log_ratio(const Row& row, float l, float r) { return (l - r) - row.gap; }

// p log(p / q) - p + q, whose sum over all codes is the KL: no term is negative.
__device__ float kl_term(const Row& row, float l, float r) {
  if (l == -infinity()) {
    return r == -infinity() ? 0.0f : expf(r - row.ref_top) * row.ref_inverse;
  }
  if (r == -infinity()) return infinity();
  const float p = expf(l - row.top) * row.inverse;
  const float x = log_ratio(row, l, r);
  if (fabsf(x) < 0.5f) return p * gap_cost(x);
  return p * (x - 1.0f) + expf(r - row.ref_top) * row.ref_inverse;
}

template <typename T, int kLanes, bool kVectors>
__device__ Row read_row(const T* logits, const T* ref, int64_t code, int num_codes,
                        RowSums* shared_sums, float* shared) {
  RowSums sums = {no_codes(), no_codes(), 0};
  for_codes<kLanes, kVectors>(logits, ref, num_codes,
                              [&](int, const Codes<T>& l, const Codes<T>& r) {
#pragma unroll
                                for (int w = 0; w < Codes<T>::kCount; ++w) {
                                  const float a = to_float(l.at.at[w]), b = to_float(r.at.at[w]);
                                  sums.broken |= a < infinity() && b < infinity() ? 0 : 1;
                                  add(&sums.p, a);
                                  if (ref != nullptr) add(&sums.q, b);
                                }
                              });
  sums = reduce<kLanes>(sums, MergeSums(), shared_sums);
  Row row = {};
  row.valid = sums.broken == 0 && sums.p.top > -infinity() && code >= 0 && code < num_codes &&
              (ref == nullptr || sums.q.top > -infinity());
  row.top = sums.p.top;
  row.log_mass = log1pf(sums.p.rest);
  row.inverse = 1.0f / (1.0f + sums.p.rest);
  row.entropy = row.log_mass - sums.p.weighted * row.inverse;
  if (ref == nullptr) return row;
  row.ref_top = sums.q.top;
  row.ref_inverse = 1.0f / (1.0f + sums.q.rest);
  row.gap = (row.top - row.ref_top) + (row.log_mass - log1pf(sums.q.rest));
  float kl = 0.0f;
  for_codes<kLanes, kVectors>(logits, ref, num_codes,
                              [&](int, const Codes<T>& l, const Codes<T>& r) {
#pragma unroll
                                for (int w = 0; w < Codes<T>::kCount; ++w)
                                  kl += kl_term(row, to_float(l.at.at[w]), to_float(r.at.at[w]));
                              });
  row.kl = reduce<kLanes>(kl, Sum<float>(), shared);
  return row;
}

template <typename T>
struct RowPointers {
  const T* logits;
  const T* ref;
  int64_t code;
};

template <typename T>
__device__ RowPointers<T> pointers(const LogprobsRows& in, int64_t row) {
  const T* ref = static_cast<const T*>(in.ref_logits);
  return {static_cast<const T*>(in.logits) + row * in.row_stride,
          ref == nullptr ? nullptr : ref + row * in.ref_row_stride, in.codes[row]};
}

// Calls run(row, wanted) for the rows of this thread. Lanes past the last row repeat it without
// being wanted, since a warp's lanes meet in every reduction.
template <int kLanes, typename Run>
__device__ void for_rows(int64_t rows, Run run) {
  constexpr int kRows = kThreads / kLanes;
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < rows;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + threadIdx.x / kLanes;
    run(row < rows ? row : rows - 1, row < rows);
  }
}

template <typename T, int kLanes, bool kVectors>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    _code_logprobs_fwd_kernel(LogprobsForwardCudaArgs args) {
  __shared__ RowSums shared_sums[kWarps];
  __shared__ float shared[kWarps];
  const int num_codes = static_cast<int>(args.in.num_codes);
  for_rows<kLanes>(args.in.rows, [&](int64_t at, bool wanted) {
    const RowPointers<T> in = pointers<T>(args.in, at);
    const Row row =
        read_row<T, kLanes, kVectors>(in.logits, in.ref, in.code, num_codes, shared_sums, shared);
    if (!wanted || threadIdx.x % kLanes != 0) return;
    const float nan = nan_float();
    args.logprob[at] = row.valid ? (to_float(in.logits[in.code]) - row.top) - row.log_mass : nan;
    args.entropy[at] = row.valid ? row.entropy : nan;
    args.kl[at] = row.valid ? row.kl : nan;
  });
}

// dl_k = g_logprob ([k = code] - p_k) - g_entropy p_k (log p_k + H) + g_kl p_k (log p_k - log q_k -
// KL); zero for masked codes and rows that are not valid.
template <typename T, int kLanes, bool kVectors>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    _code_logprobs_bwd_kernel(LogprobsBackwardCudaArgs args) {
  __shared__ RowSums shared_sums[kWarps];
  __shared__ float shared[kWarps];
  const int num_codes = static_cast<int>(args.in.num_codes);
  for_rows<kLanes>(args.in.rows, [&](int64_t at, bool wanted) {
    const RowPointers<T> in = pointers<T>(args.in, at);
    const Row row =
        read_row<T, kLanes, kVectors>(in.logits, in.ref, in.code, num_codes, shared_sums, shared);
    if (!wanted) return;
    const float g_logprob = args.g_logprob[at];
    const float g_entropy = args.g_entropy[at];
    const float g_kl = args.g_kl[at];
    // Where the loss gives it no weight, an infinite KL must not turn the gradient into NaN.
    const bool weighs_kl = in.ref != nullptr && g_kl != 0.0f;
    T* out = static_cast<T*>(args.dlogits) + at * args.in.num_codes;
    for_codes<kLanes, kVectors>(
        in.logits, in.ref, num_codes, [&](int k, const Codes<T>& logits, const Codes<T>& refs) {
          Codes<T> grads;
#pragma unroll
          for (int w = 0; w < Codes<T>::kCount; ++w) {
            const float l = to_float(logits.at.at[w]);
            const float shifted = l - row.top;
            float slope = -g_logprob - g_entropy * (shifted - row.log_mass + row.entropy);
            if (weighs_kl) {
              slope += g_kl * (log_ratio(row, l, to_float(refs.at.at[w])) - row.kl);
            }
            float grad = expf(shifted) * row.inverse * slope;
            if (k + w == in.code) grad += g_logprob;
            from_float(row.valid && l > -infinity() ? grad : 0.0f, grads.at.at + w);
          }
          store_codes<kVectors>(out, k, num_codes, grads);
        });
  });
}

// Enough lanes that a row is few steps, few enough that none of them idles on a short row.
template <typename Run>
void with_lanes(int64_t num_codes, Run run) {
  if (num_codes <= 256) return run(std::integral_constant<int, 8>());
  if (num_codes <= 2048) return run(std::integral_constant<int, kWarpSize>());
  run(std::integral_constant<int, kThreads>());
}

template <typename T, typename Run>
void with_vectors(const LogprobsRows& in, bool aligned, Run run) {
  const bool fits =
      aligned && vectorises<T>(in.logits, in.row_stride, in.num_codes) &&
      (in.ref_logits == nullptr || vectorises<T>(in.ref_logits, in.ref_row_stride, in.num_codes));
  if (fits) return run(std::true_type());
  run(std::false_type());
}

}  // namespace

void logprobs_forward(const LogprobsForwardCudaArgs& args, void* stream) {
  if (args.in.rows == 0) return;
  const char* op = "code_logprobs_forward";
  with_device_type(op, args.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_lanes(args.in.num_codes, [&](auto lanes) {
      with_vectors<T>(args.in, true, [&](auto vectors) {
        constexpr int kRows = kThreads / decltype(lanes)::value;
        launch(op, _code_logprobs_fwd_kernel<T, decltype(lanes)::value, decltype(vectors)::value>,
               blocks_for((args.in.rows + kRows - 1) / kRows), kThreads, 0,
               static_cast<cudaStream_t>(stream), args);
      });
    });
  });
}

void logprobs_backward(const LogprobsBackwardCudaArgs& args, void* stream) {
  if (args.in.rows == 0) return;
  const char* op = "code_logprobs_backward";
  with_device_type(op, args.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = reinterpret_cast<uintptr_t>(args.dlogits) % kVectorBytes == 0;
    with_lanes(args.in.num_codes, [&](auto lanes) {
      with_vectors<T>(args.in, aligned, [&](auto vectors) {
        constexpr int kRows = kThreads / decltype(lanes)::value;
        launch(op, _code_logprobs_bwd_kernel<T, decltype(lanes)::value, decltype(vectors)::value>,
               blocks_for((args.in.rows + kRows - 1) / kRows), kThreads, 0,
               static_cast<cudaStream_t>(stream), args);
      });
    });
  });
}

}  // namespace cuda
}  // namespace latent_rl
