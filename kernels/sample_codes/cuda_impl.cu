// sample_codes: one block per row, the row in shared memory as float64 scores.
//
// Up to kRankedCodes codes a thread counts how many codes come before its own: top-k and top-p keep
// the first ranks. Above, they keep everything above a threshold, found by building the threshold's
// 64 bits from the top; ties at the threshold keep the lowest ids. All sums run in a fixed order,
// so a row's result depends on the row, its seed and its offset alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/block.cuh"
#include "common/launch.h"
#include "common/philox.h"
#include "sample_codes/cuda_impl.h"

namespace latent_rl {
namespace cuda {
namespace {

// Threads of a row of few codes, and of one of many.
constexpr int kFewThreads = 128;
constexpr int kManyThreads = 256;
constexpr int kCodesOfThread = 4;
constexpr int64_t kRankedCodes = kFewThreads * kCodesOfThread;

struct Choice {
  double score;
  int code;
};

template <int kThreadsOfRow>
struct Shared {
  static constexpr int kThreads = kThreadsOfRow;
  static constexpr int kWarps = kThreads / kWarpSize;
  double sums[kWarps + 1];
  int counts[kWarps + 1];
  double scores[kWarps];
  int codes[kWarps];
  int running;
};

__device__ double to_double(float v) { return static_cast<double>(v); }
__device__ double to_double(double v) { return v; }
__device__ double to_double(__nv_bfloat16 v) { return static_cast<double>(__bfloat162float(v)); }
__device__ double to_double(__half v) { return static_cast<double>(__half2float(v)); }

__device__ double minus_infinity() { return __longlong_as_double(0xfff0000000000000LL); }

template <typename Shared>
__device__ double sum_of_block(double value, Shared* shared) {
  return block_reduce<Shared::kThreads>(value, Sum<double>(), shared->sums);
}
template <typename Shared>
__device__ double max_of_block(double value, Shared* shared) {
  return block_reduce<Shared::kThreads>(value, Max<double>(), shared->sums);
}
template <typename Shared>
__device__ int count_of_block(int value, Shared* shared) {
  return block_reduce<Shared::kThreads>(value, Sum<int>(), shared->counts);
}

__device__ bool better(Choice a, Choice b) {
  return a.score > b.score || (a.score == b.score && a.code < b.code);
}

// The block's best choice, in every thread. A code of INT32_MAX stands for none.
template <typename Shared>
__device__ Choice best_of_block(Choice mine, Shared* shared) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const Choice other = {__shfl_xor_sync(kFullWarp, mine.score, step),
                          __shfl_xor_sync(kFullWarp, mine.code, step)};
    if (better(other, mine)) mine = other;
  }
  if (threadIdx.x % kWarpSize == 0) {
    shared->scores[threadIdx.x / kWarpSize] = mine.score;
    shared->codes[threadIdx.x / kWarpSize] = mine.code;
  }
  __syncthreads();
  Choice best = {shared->scores[0], shared->codes[0]};
  for (int warp = 1; warp < Shared::kWarps; ++warp) {
    const Choice other = {shared->scores[warp], shared->codes[warp]};
    if (better(other, best)) best = other;
  }
  __syncthreads();
  return best;
}

// Unsigned integers in the order of the doubles; adding zero makes -0 and 0 the tie they are.
__device__ unsigned long long ordered(double v) {
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(v + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000ULL;
}

// Of the codes whose key equals `threshold`, all but the first `keep` in id order become -inf, and
// so does every code below.
template <typename Shared>
__device__ void drop_below(double* row, int num_codes, unsigned long long threshold, int keep,
                           Shared* shared) {
  if (threadIdx.x == 0) shared->running = 0;
  __syncthreads();
  const unsigned lane_mask = (1u << (threadIdx.x % kWarpSize)) - 1;
  const int warp = threadIdx.x / kWarpSize;
  for (int first = 0; first < num_codes; first += Shared::kThreads) {
    const int k = first + static_cast<int>(threadIdx.x);
    const unsigned long long key = k < num_codes ? ordered(row[k]) : 0;
    const bool tie = k < num_codes && key == threshold;
    const unsigned ties = __ballot_sync(kFullWarp, tie);
    if (threadIdx.x % kWarpSize == 0) shared->counts[warp] = __popc(ties);
    __syncthreads();
    int before = shared->running + __popc(ties & lane_mask);
    int total = 0;
    for (int w = 0; w < Shared::kWarps; ++w) {
      before += w < warp ? shared->counts[w] : 0;
      total += shared->counts[w];
    }
    if (k < num_codes && (key < threshold || (tie && before >= keep))) row[k] = minus_infinity();
    __syncthreads();
    if (threadIdx.x == 0) shared->running += total;
    __syncthreads();
  }
}

template <typename Shared>
__device__ int count_at_least(const double* row, int num_codes, unsigned long long key,
                              Shared* shared) {
  int count = 0;
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads)
    count += ordered(row[k]) >= key ? 1 : 0;
  return count_of_block(count, shared);
}

template <typename Shared>
__device__ double mass_at_least(const double* row, const double* masses, int num_codes,
                                unsigned long long key, Shared* shared) {
  double mass = 0.0;
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) {
    mass += ordered(row[k]) >= key ? masses[k] : 0.0;
  }
  return sum_of_block(mass, shared);
}

template <typename Shared>
__device__ void keep_top_k(double* row, int num_codes, int top_k, Shared* shared) {
  unsigned long long threshold = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const unsigned long long candidate = threshold | (1ULL << bit);
    const int count = count_at_least(row, num_codes, candidate, shared);
    if (count >= top_k) threshold = candidate;
    if (count == top_k) {
      // Just these: nothing lies on the threshold that would have to go.
      drop_below(row, num_codes, threshold, num_codes, shared);
      return;
    }
  }
  const int above = count_at_least(row, num_codes, threshold + 1, shared);
  drop_below(row, num_codes, threshold, top_k - above, shared);
}

// The smallest set whose mass reaches top_p of the whole: a code stays while the mass before it
// falls short. Masses are relative to the likeliest code, so codes as likely as it add up exactly.
template <typename Shared>
__device__ void keep_top_p(double* row, double* masses, int num_codes, double top, double top_p,
                           Shared* shared) {
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) masses[k] = exp(row[k] - top);
  const double target = top_p * mass_at_least(row, masses, num_codes, 0, shared);
  unsigned long long threshold = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const unsigned long long candidate = threshold | (1ULL << bit);
    if (mass_at_least(row, masses, num_codes, candidate, shared) >= target) threshold = candidate;
  }
  // top_p <= 0 still keeps the most likely code.
  const unsigned long long highest = ordered(top);
  if (threshold > highest) threshold = highest;
  const double above = mass_at_least(row, masses, num_codes, threshold + 1, shared);
  const double bits_to_value = __longlong_as_double(static_cast<long long>(
      (threshold >> 63) != 0 ? threshold & 0x7fffffffffffffffULL : ~threshold));
  const double each = exp(bits_to_value - top);
  int keep = 1;
  double before = above + each;
  while (before < target && keep < num_codes && each > 0.0) {
    before += each;
    ++keep;
  }
  drop_below(row, num_codes, threshold, each > 0.0 ? keep : num_codes, shared);
}

// Top-k and top-p of at most kRankedCodes codes. `keys` and `sorted` have an entry per code.
template <typename Shared>
__device__ void keep_first_ranks(double* row, unsigned long long* keys, double* sorted,
                                 int num_codes, double top, const SampleArgs& args,
                                 Shared* shared) {
  const int top_k =
      args.top_k > 0 && args.top_k < num_codes ? static_cast<int>(args.top_k) : num_codes;
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) keys[k] = ordered(row[k]);
  __syncthreads();
  unsigned long long mine[kCodesOfThread];
  int ranks[kCodesOfThread] = {};
#pragma unroll
  for (int i = 0; i < kCodesOfThread; ++i) {
    const int k = static_cast<int>(threadIdx.x) + i * Shared::kThreads;
    mine[i] = k < num_codes ? keys[k] : 0;
  }
#pragma unroll 4
  for (int other = 0; other < num_codes; ++other) {
    const unsigned long long key = keys[other];
#pragma unroll
    for (int i = 0; i < kCodesOfThread; ++i) {
      const int k = static_cast<int>(threadIdx.x) + i * Shared::kThreads;
      ranks[i] += key > mine[i] || (key == mine[i] && other < k) ? 1 : 0;
    }
  }
  int keep = top_k;
  if (args.top_p < 1.0) {
    // Masses relative to the likeliest code, so codes as likely as it add up exactly.
    double mass = 0.0;
#pragma unroll
    for (int i = 0; i < kCodesOfThread; ++i) {
      const int k = static_cast<int>(threadIdx.x) + i * Shared::kThreads;
      if (k >= num_codes || ranks[i] >= top_k) continue;
      const double here = exp(row[k] - top);
      sorted[ranks[i]] = here;
      mass += here;
    }
    const double target = args.top_p * sum_of_block(mass, shared);
    if (threadIdx.x == 0) {
      // A code stays while the mass before it falls short; the most likely one always does.
      double before = sorted[0];
      keep = 1;
      while (keep < top_k && before < target && sorted[keep] > 0.0) before += sorted[keep++];
      shared->running = keep;
    }
    __syncthreads();
    keep = shared->running;
  }
#pragma unroll
  for (int i = 0; i < kCodesOfThread; ++i) {
    const int k = static_cast<int>(threadIdx.x) + i * Shared::kThreads;
    if (k < num_codes && ranks[i] >= keep) row[k] = minus_infinity();
  }
  __syncthreads();
}

template <typename Shared>
__device__ Choice argmax_of_row(const double* row, int num_codes, Shared* shared) {
  Choice best = {minus_infinity(), INT32_MAX};
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) {
    const Choice here = {row[k], k};
    if (better(here, best)) best = here;
  }
  return best_of_block(best, shared);
}

template <typename Shared>
__device__ Choice argmax_with_noise(const double* row, int num_codes, uint64_t seed,
                                    uint64_t offset, Shared* shared) {
  Choice best = {minus_infinity(), INT32_MAX};
  if (Shared::kThreads == kFewThreads) {
    // A thread per code: the logarithms outweigh a Philox block, of which three words go to waste.
    for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) {
      if (row[k] == minus_infinity()) continue;
      const philox::Words words = philox::generate(seed, offset, static_cast<uint32_t>(k / 4));
      const uint32_t low = k % 2 == 0 ? words.word[0] : words.word[1];
      const uint32_t high = k % 2 == 0 ? words.word[2] : words.word[3];
      const uint32_t word = k % 4 < 2 ? low : high;
      const Choice here = {row[k] - log(-log(philox::uniform(word))), k};
      if (better(here, best)) best = here;
    }
    return best_of_block(best, shared);
  }
  for (int block = threadIdx.x; block * 4 < num_codes; block += Shared::kThreads) {
    const philox::Words words = philox::generate(seed, offset, static_cast<uint32_t>(block));
    for (int word = 0; word < 4; ++word) {
      const int k = block * 4 + word;
      if (k >= num_codes || row[k] == minus_infinity()) continue;
      const Choice here = {row[k] - log(-log(philox::uniform(words.word[word]))), k};
      if (better(here, best)) best = here;
    }
  }
  return best_of_block(best, shared);
}

struct Distribution {
  double log_mass;
  double entropy;
};

template <typename Shared>
__device__ Distribution distribution_of_row(const double* row, int num_codes, double top,
                                            Shared* shared) {
  double mass = 0.0;
  double weighted = 0.0;
  for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) {
    if (row[k] == minus_infinity()) continue;
    const double e = exp(row[k] - top);
    mass += e;
    weighted += e * (row[k] - top);
  }
  mass = sum_of_block(mass, shared);
  weighted = sum_of_block(weighted, shared);
  const double log_mass = log(mass);
  return {log_mass, log_mass - weighted / mass};
}

template <typename Acc>
__device__ void write_row(const SampleArgs& args, int64_t at, int64_t code, double logprob,
                          double logprob_full, double entropy) {
  if (threadIdx.x != 0) return;
  args.codes[at] = code;
  static_cast<Acc*>(args.logprob)[at] = static_cast<Acc>(logprob);
  static_cast<Acc*>(args.logprob_full)[at] = static_cast<Acc>(logprob_full);
  static_cast<Acc*>(args.entropy)[at] = static_cast<Acc>(entropy);
}

template <typename Shared>
__device__ void truncate(double* row, int num_codes, double top, const SampleArgs& args,
                         Shared* shared) {
  const bool fewer = args.top_k > 0 && args.top_k < num_codes;
  if (Shared::kThreads == kFewThreads) {
    if (fewer || args.top_p < 1.0) {
      auto* keys = reinterpret_cast<unsigned long long*>(row + num_codes);
      keep_first_ranks(row, keys, row + 2 * num_codes, num_codes, top, args, shared);
    }
  } else {
    if (fewer) keep_top_k(row, num_codes, static_cast<int>(args.top_k), shared);
    if (args.top_p < 1.0) keep_top_p(row, row + num_codes, num_codes, top, args.top_p, shared);
  }
  if (args.min_p > 0.0) {
    for (int k = threadIdx.x; k < num_codes; k += Shared::kThreads) {
      if (exp(row[k] - top) < args.min_p) row[k] = minus_infinity();
    }
    __syncthreads();
  }
}

// Two blocks per multiprocessor at the least: left to itself the compiler took 80 registers and
// spilled.
template <typename T, typename Acc, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) _sample_codes_kernel(SampleArgs args) {
  double* row = dynamic_shared<double>();
  __shared__ Shared<kThreads> shared;
  const int num_codes = static_cast<int>(args.num_codes);
  for (int64_t at = blockIdx.x; at < args.rows; at += gridDim.x) {
    const T* logits = static_cast<const T*>(args.logits) + at * args.row_stride;
    double highest = minus_infinity();
    int illegal = 0;
    for (int k = threadIdx.x; k < num_codes; k += kThreads) {
      const double v = to_double(logits[k]);
      illegal |= v < -minus_infinity() ? 0 : 1;  // NaN or +inf
      highest = v > highest ? v : highest;
      row[k] = v;
    }
    const double top = max_of_block(highest, &shared);
    // Logits over a tiny temperature may overflow, and then define no distribution.
    const double drawn_top = args.temperature == 0.0 ? top : top / args.temperature;
    const bool finite = drawn_top > minus_infinity() && drawn_top < -minus_infinity();
    if (count_of_block(illegal, &shared) != 0 || !finite) {
      const double nan = __longlong_as_double(0x7ff8000000000000LL);
      write_row<Acc>(args, at, -1, nan, nan, nan);
      __syncthreads();
      continue;
    }
    const Distribution full = distribution_of_row(row, num_codes, top, &shared);
    Distribution drawn_from = {0.0, 0.0};
    Choice choice;
    if (args.temperature == 0.0) {
      choice = argmax_of_row(row, num_codes, &shared);
    } else {
      // A division of float64 takes longer than the logarithm of a whole row's mass.
      if (args.temperature != 1.0) {
        for (int k = threadIdx.x; k < num_codes; k += kThreads) {
          row[k] = row[k] / args.temperature;
        }
        __syncthreads();
      }
      truncate(row, num_codes, drawn_top, args, &shared);
      const bool whole = args.temperature == 1.0 && args.top_p >= 1.0 && args.min_p <= 0.0 &&
                         (args.top_k <= 0 || args.top_k >= num_codes);
      drawn_from = whole ? full : distribution_of_row(row, num_codes, drawn_top, &shared);
      choice = argmax_with_noise(row, num_codes, static_cast<uint64_t>(args.seeds[at]),
                                 static_cast<uint64_t>(args.offsets[at]), &shared);
    }
    const bool greedy = args.temperature == 0.0;
    write_row<Acc>(
        args, at, choice.code, greedy ? 0.0 : row[choice.code] - drawn_top - drawn_from.log_mass,
        to_double(logits[choice.code]) - top - full.log_mass, greedy ? 0.0 : drawn_from.entropy);
    __syncthreads();
  }
}

template <typename T, typename Acc>
void launch_rows(const SampleArgs& args, cudaStream_t stream) {
  const char* op = "sample_codes_cuda";
  const size_t row_bytes = sizeof(double) * static_cast<size_t>(args.num_codes);
  if (args.num_codes <= kRankedCodes) {
    launch(op, _sample_codes_kernel<T, Acc, kFewThreads>, blocks_for(args.rows), kFewThreads,
           3 * row_bytes, stream, args);
  } else {
    launch(op, _sample_codes_kernel<T, Acc, kManyThreads>, blocks_for(args.rows), kManyThreads,
           (args.top_p < 1.0 ? 2 : 1) * row_bytes, stream, args);
  }
}

}  // namespace

void sample_codes(const SampleArgs& args, void* stream) {
  if (args.num_codes > kMaxSampleCodes) {
    throw std::invalid_argument("sample_codes_cuda: num_codes must be at most " +
                                std::to_string(kMaxSampleCodes) + ", got " +
                                std::to_string(args.num_codes));
  }
  if (args.rows == 0) return;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::kFloat32:
      launch_rows<float, float>(args, on);
      break;
    case DType::kFloat64:
      launch_rows<double, double>(args, on);
      break;
    case DType::kBFloat16:
      launch_rows<__nv_bfloat16, float>(args, on);
      break;
    case DType::kFloat16:
      launch_rows<__half, float>(args, on);
      break;
  }
}

}  // namespace cuda
}  // namespace latent_rl
