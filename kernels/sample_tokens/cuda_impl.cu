// sample_tokens: argmax of logit + Gumbel noise over a vocabulary, in one pass over the logits.
//
// Rows are cut into stretches, a block each, so that one row fills the device as well as many. The
// scores that decide are float64, as in sample_codes, but hardly any is computed: a bound without a
// logarithm of a logarithm passes over nearly all tokens, float32 scores over the rest, and float64
// settles what float32 cannot tell apart. README.md has the errors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/block.cuh"
#include "common/element.cuh"
#include "common/launch.h"
#include "common/philox.h"
#include "sample_tokens/cuda_impl.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Tokens of one Philox block.
constexpr int kQuad = 4;
// Turns of a block's loop: few rows want many short stretches, many rows long ones, of which all
// but the first turn know a good score to beat.
constexpr int kShortTurns = 2;
constexpr int kLongTurns = 8;
constexpr int64_t kFewRows = 16;

int64_t turns_of(int64_t rows) { return rows <= kFewRows ? kShortTurns : kLongTurns; }

int64_t stretches_of(int64_t rows, int64_t num_tokens) {
  const int64_t length = turns_of(rows) * kThreads * kQuad;
  return (num_tokens + length - 1) / length;
}

__device__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ double lowest_score() { return __longlong_as_double(0xfff0000000000000LL); }

// How far apart two float32 scores of this size may lie although float64 would order them the other
// way: ten times what logarithms and additions lose.
__device__ float slack_of(float score) { return 1e-4f + 1e-6f * fabsf(score); }

// (word + 1/2) 2^-32, to float32's relative precision.
__device__ float uniform_float(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

__device__ float gumbel_float(uint32_t word) {
  // Near u = 1 the logarithm of u loses what 1 - u still holds.
  const float e = word < 0x80000000u ? -logf(uniform_float(word)) : -log1pf(-uniform_float(~word));
  return -logf(e);
}

// Since -log u >= 1 - u, noise is at most -log(1 - u), up to the fast logarithm's error.
__device__ float noise_bound(uint32_t word) { return -__logf(uniform_float(~word)); }

__device__ double exact_score(float logit, uint32_t word) {
  return static_cast<double>(logit) - log(-log(philox::uniform(word)));
}

struct Choice {
  double score;
  int token;

  __device__ void offer(Choice other) {
    if (other.score > score || (other.score == score && other.token < token)) *this = other;
  }
};

template <typename T>
struct Stretch {
  const T* logits;  // of the row
  int64_t count;    // V
  bool aligned;     // whether quads can be read in one access
  uint64_t seed, offset;
  int64_t first, last;  // quads

  __device__ philox::Words words(int64_t quad) const {
    return philox::generate(seed, offset, static_cast<uint32_t>(quad));
  }
  __device__ void load(int64_t quad, float (&out)[kQuad]) const {
    const int64_t k = quad * kQuad;
    if (aligned && k + kQuad <= count) {
      const Vector<T, kQuad> v = load_vector<kQuad>(logits + k);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) out[j] = to_float(v.at[j]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      out[j] = k + j < count ? to_float(logits[k + j]) : minus_infinity();
  }
};

// What a thread has seen: its best score in float32 and the next, which tokens they belong to
// alone.
struct Seen {
  float best, second;
  float logit;
  uint32_t word;
  int token;
  int illegal;

  __device__ void offer(float candidate, uint32_t noise, int k) {
    const float score = candidate + gumbel_float(noise);
    if (score > best) {
      second = best;
      best = score;
      logit = candidate;
      word = noise;
      token = k;
    } else {
      second = score > second ? score : second;
    }
  }
};

__device__ float warp_max(float value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

template <typename T>
__device__ Seen scan(const Stretch<T>& stretch) {
  Seen seen = {minus_infinity(), minus_infinity(), 0.0f, 0, INT32_MAX, 0};
  // A score that some token of the warp's has for sure.
  float reached = minus_infinity();
  const float infinity = -minus_infinity();
#pragma unroll 1
  for (int64_t base = stretch.first; base < stretch.last; base += kThreads) {
    const int64_t quad = base + threadIdx.x;
    float logits[kQuad] = {minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()};
    float bounds[kQuad];
    philox::Words words = {};
    if (quad < stretch.last) {
      stretch.load(quad, logits);
      words = stretch.words(quad);
    }
    float lower = seen.best;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      seen.illegal |= logits[j] < infinity ? 0 : 1;
      bounds[j] = logits[j] + noise_bound(words.word[j]);
      // -log u <= (1 - u) / u: for u >= 1/2 the bound is at most log 2 too high.
      const float surely = words.word[j] >= 0x80000000u ? bounds[j] - 0.6932f : minus_infinity();
      lower = surely > lower ? surely : lower;
    }
    reached = warp_max(lower > reached ? lower : reached);
    const float least = reached - slack_of(reached);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const bool may_win = bounds[j] >= least && bounds[j] > minus_infinity();
      if (may_win) seen.offer(logits[j], words.word[j], static_cast<int>(quad) * kQuad + j);
    }
  }
  return seen;
}

// The thread's choice among its tokens that `least` does not rule out.
template <typename T>
__device__ Choice settle(const Stretch<T>& stretch, const Seen& seen, float least) {
  Choice choice = {lowest_score(), INT32_MAX};
  if (!(seen.best >= least) || seen.token == INT32_MAX) return choice;
  if (seen.second < least) return {exact_score(seen.logit, seen.word), seen.token};
#pragma unroll 1
  for (int64_t quad = stretch.first + threadIdx.x; quad < stretch.last; quad += kThreads) {
    float logits[kQuad];
    stretch.load(quad, logits);
    const philox::Words words = stretch.words(quad);
    for (int j = 0; j < kQuad; ++j) {
      if (!(logits[j] + noise_bound(words.word[j]) >= least) || !(logits[j] > minus_infinity())) {
        continue;
      }
      choice.offer({exact_score(logits[j], words.word[j]), static_cast<int>(quad) * kQuad + j});
    }
  }
  return choice;
}

__device__ Choice best_of_warp(Choice mine) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const double score = __shfl_xor_sync(kFullWarp, mine.score, step);
    mine.offer({score, __shfl_xor_sync(kFullWarp, mine.token, step)});
  }
  return mine;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    _sample_tokens_kernel(SampleTokensArgs args, int64_t stretches, int64_t length, bool aligned) {
  __shared__ float tops[kWarps + 1];
  __shared__ int flags[kWarps + 1];
  __shared__ Choice choices[kWarps];
  const int64_t quads = (args.num_tokens + kQuad - 1) / kQuad;
  for (int64_t task = blockIdx.x; task < args.rows * stretches; task += gridDim.x) {
    const int64_t row = task / stretches;
    const int64_t first = (task - row * stretches) * length;
    const int64_t last = first + length < quads ? first + length : quads;
    const Stretch<T> stretch = {static_cast<const T*>(args.logits) + row * args.row_stride,
                                args.num_tokens,
                                aligned,
                                static_cast<uint64_t>(args.seeds[row]),
                                static_cast<uint64_t>(args.offsets[row]),
                                first,
                                last};
    const Seen seen = scan(stretch);
    const float top = block_reduce<kThreads>(seen.best, Max<float>(), tops);
    const int illegal = block_reduce<kThreads>(seen.illegal, Max<int>(), flags);
    const Choice mine = best_of_warp(settle(stretch, seen, top - 2.0f * slack_of(top)));
    if (threadIdx.x % kWarpSize == 0) choices[threadIdx.x / kWarpSize] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      Choice best = choices[0];
      for (int warp = 1; warp < kWarps; ++warp) best.offer(choices[warp]);
      args.parts[task] = {best.score, best.token, illegal};
    }
    __syncthreads();
  }
}

// A warp per row joins its stretches.
__global__ void __launch_bounds__(kThreads)
    _sample_tokens_join_kernel(SampleTokensArgs args, int64_t stretches) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (; row < args.rows; row += warps) {
    Choice choice = {lowest_score(), INT32_MAX};
    int illegal = 0;
    for (int64_t at = lane; at < stretches; at += kWarpSize) {
      const TokenPart part = args.parts[row * stretches + at];
      choice.offer({part.score, part.token});
      illegal |= part.illegal;
    }
    choice = best_of_warp(choice);
    illegal = __any_sync(kFullWarp, illegal != 0) ? 1 : 0;
    if (lane == 0) {
      args.tokens[row] = illegal != 0 || choice.token == INT32_MAX ? -1 : choice.token;
    }
  }
}

}  // namespace

int64_t sample_tokens_workspace(int64_t rows, int64_t num_tokens) {
  return rows * stretches_of(rows, num_tokens);
}

void sample_tokens(const SampleTokensArgs& args, void* stream) {
  if (args.rows == 0) return;
  const char* op = "sample_tokens_cuda";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t stretches = stretches_of(args.rows, args.num_tokens);
  const int64_t length = turns_of(args.rows) * kThreads;
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = reinterpret_cast<uintptr_t>(args.logits) % (kQuad * sizeof(T)) == 0 &&
                         args.row_stride % kQuad == 0;
    launch(op, _sample_tokens_kernel<T>, blocks_for(args.rows * stretches), kThreads, 0, on, args,
           stretches, length, aligned);
  });
  launch(op, _sample_tokens_join_kernel, blocks_for((args.rows + kWarps - 1) / kWarps), kThreads, 0,
         on, args, stretches);
}

}  // namespace cuda
}  // namespace latent_rl
