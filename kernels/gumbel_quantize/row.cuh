// A row of logits shared by a team of threads, four codes (one Philox block) at a time: loads,
// reductions and noise.
#pragma once

#include <cstdint>

#include "common/block.cuh"
#include "common/element.cuh"
#include "common/philox.h"

namespace latent_rl {
namespace cuda {

constexpr int kGumbelThreads = 256;
constexpr int kQuad = 4;
// Stands in for -inf where it would meet a probability of zero: exp of it is zero in float32.
constexpr float kVeryLow = -150.0f;

__device__ inline float minus_infinity_float() { return __int_as_float(0xff800000); }

// The larger; NaN if either is.
__device__ inline float max_or_nan(float a, float b) {
#ifdef LATENT_RL_EMULATED
  return a != a ? a : b != b ? b : a > b ? a : b;
#else
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#endif
}

// float32 input is served at float32's precision; for 16-bit input the fast functions' errors lie
// far below its own rounding.
template <typename T>
struct Exactly {
  static constexpr bool value = sizeof(T) == 4;
};

// The fast ones leave out what the compiler's own do for denormal numbers, three instructions each:
// none of their operands here is one.
// 2^v, for v from -126 up; zero below, NaN for NaN.
__device__ inline float power_of_two(float v) {
#ifdef LATENT_RL_EMULATED
  return exp2f(v);
#else
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#endif
}

// log2 v, for v from 2^-126 up.
__device__ inline float log_of_two(float v) {
#ifdef LATENT_RL_EMULATED
  return log2f(v);
#else
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <bool kExact>
__device__ float exponential_of(float v) {
  return kExact ? expf(v) : power_of_two(v * kLog2E);
}
template <bool kExact>
__device__ float logarithm_of(float v) {
  return kExact ? logf(v) : log_of_two(v) * kLn2;
}

// u = (word + 1/2) 2^-32 and v = 1 - u, each to float32's relative precision.
__device__ inline float uniform_float(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

// E = -log(u), a standard exponential; relative error below 1e-6 (exact) or 8e-6.
template <bool kExact>
__device__ float exponential_noise(uint32_t word) {
  const float u = uniform_float(word);
  const float v = uniform_float(~word);
  if (kExact) return word < 0x80000000u ? -logf(u) : -log1pf(-v);
  // -log(1 - v) = v + v^2 / 2 + ...: near u = 1 the fast logarithm keeps no relative precision.
  const float series =
      v * (1.0f + v * (0.5f + v * (1.0f / 3.0f + v * (0.25f + v * (0.2f + v * (1.0f / 6.0f))))));
  return v < 0.0625f ? series : -logarithm_of<false>(u);
}

constexpr int kSideBySide = 4;

// Philox blocks first, first + stride, ... of offset 0, round by round.
__device__ inline void words_side_by_side(uint64_t seed, uint32_t first, uint32_t stride,
                                          philox::Words (&out)[kSideBySide]) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int q = 0; q < kSideBySide; ++q) out[q] = {{first + q * stride, 0, 0, 0}};
#pragma unroll
  for (int round = 0; round < philox::kRounds; ++round) {
#pragma unroll
    for (int q = 0; q < kSideBySide; ++q) {
      uint32_t (&c)[4] = out[q].word;
      const uint64_t p0 = static_cast<uint64_t>(c[0]) * philox::kMultiplier0;
      const uint64_t p1 = static_cast<uint64_t>(c[2]) * philox::kMultiplier1;
      c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
      c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
      c[1] = static_cast<uint32_t>(p1);
      c[3] = static_cast<uint32_t>(p0);
    }
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
}

// Threads that share a row: a warp, or the block. Reductions are in an order fixed by the team.
template <int kThreads>
struct Team {
  static constexpr int kTeams = kGumbelThreads / kThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kValues = 5;

  // Two buffers in turn, so that one barrier per reduction is enough.
  struct Shared {
    float values[2][kWarps][kValues];
    float tops[2][kWarps];
    double scores[kWarps];
    int codes[kWarps];
  };

  Shared* shared;
  int turn;

  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kThreads; }
  __device__ static int index() { return static_cast<int>(threadIdx.x) / kThreads; }

  // v[i] = the team's reduction by op(i, a, b), in every thread.
  template <int kCount, typename Op>
  __device__ void reduce(float (&v)[kCount], Op op) {
    static_assert(kCount <= kValues, "more values than the buffer holds");
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        v[i] = op(i, v[i], __shfl_xor_sync(kFullWarp, v[i], step));
      }
    }
    if (kWarps == 1) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float (*buffer)[kValues] = shared->values[turn];
    turn ^= 1;
    for (int i = 0; i < kCount; ++i) {
      if (lane == 0) buffer[thread() / kWarpSize][i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = buffer[0][i];
      for (int warp = 1; warp < kWarps; ++warp) v[i] = op(i, v[i], buffer[warp][i]);
    }
  }

  // The greatest, which is no NaN: one operation per warp on integers in the order of the floats.
  __device__ float max(float value) {
    const int bits = __float_as_int(value);
    const int best = __reduce_max_sync(kFullWarp, bits ^ (bits >> 31 & 0x7fffffff));
    const float top = __int_as_float(best ^ (best >> 31 & 0x7fffffff));
    if (kWarps == 1) return top;
    float* buffer = shared->tops[turn];
    turn ^= 1;
    if (threadIdx.x % kWarpSize == 0) buffer[thread() / kWarpSize] = top;
    __syncthreads();
    float highest = buffer[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      highest = buffer[warp] > highest ? buffer[warp] : highest;
    }
    return highest;
  }

  // The code of the greatest score, the lowest on ties.
  __device__ int best(double score, int code) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(kFullWarp, score, step);
      const int id = __shfl_xor_sync(kFullWarp, code, step);
      if (other > score || (other == score && id < code)) {
        score = other;
        code = id;
      }
    }
    if (kWarps == 1) return code;
    if (threadIdx.x % kWarpSize == 0) {
      shared->scores[thread() / kWarpSize] = score;
      shared->codes[thread() / kWarpSize] = code;
    }
    __syncthreads();
    score = shared->scores[0];
    code = shared->codes[0];
    for (int warp = 1; warp < kWarps; ++warp) {
      const double other = shared->scores[warp];
      const int id = shared->codes[warp];
      if (other > score || (other == score && id < code)) {
        score = other;
        code = id;
      }
    }
    __syncthreads();
    return code;
  }
};

// Four elements of a row as float32, `fill` past its end.
template <typename T>
__device__ void load_quad(const T* row, int quad, int count, bool aligned, float fill,
                          float (&out)[kQuad]) {
  const int k = quad * kQuad;
  if (aligned && k + kQuad <= count) {
    const Vector<T, kQuad> v = load_vector<kQuad>(row + k);
    for (int j = 0; j < kQuad; ++j) out[j] = to_float(v.at[j]);
    return;
  }
  for (int j = 0; j < kQuad; ++j) out[j] = k + j < count ? to_float(row[k + j]) : fill;
}

template <typename T>
__device__ void store_quad(T* row, int quad, int count, bool aligned, const float (&v)[kQuad]) {
  const int k = quad * kQuad;
  if (aligned && k + kQuad <= count) {
    Vector<T, kQuad> out;
    for (int j = 0; j < kQuad; ++j) from_float(v[j], out.at + j);
    store_vector(row + k, out);
    return;
  }
  for (int j = 0; j < kQuad; ++j) {
    if (k + j < count) from_float(v[j], row + k + j);
  }
}

// Whether quads of rows at `stride` can be read in one access.
template <typename T>
bool quads_align(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % (kQuad * sizeof(T)) == 0 && stride % kQuad == 0;
}

// A row as the kernels see it: its logits in global memory, read from the caches after the first
// time, and room for a float per code in shared memory. A thread touches the quads that are its own
// alone, so the room needs no barrier.
template <typename T>
struct Row {
  const T* logits;
  int count;
  bool aligned;
  uint64_t seed;
  float* values;

  __device__ int quads() const { return (count + kQuad - 1) / kQuad; }
  __device__ void load(int quad, float (&out)[kQuad]) const {
    load_quad(logits, quad, count, aligned, minus_infinity_float(), out);
  }
  __device__ philox::Words words(int quad) const {
    return philox::generate(seed, 0, static_cast<uint32_t>(quad));
  }
  __device__ void put(int quad, const float (&v)[kQuad]) const {
    Vector<float, kQuad> out;
    for (int j = 0; j < kQuad; ++j) out.at[j] = v[j];
    store_vector(values + quad * kQuad, out);
  }
  __device__ Vector<float, kQuad> get(int quad) const {
    return load_vector<kQuad>(values + quad * kQuad);
  }
};

// The greatest logit; NaN is passed over.
template <int kThreads, typename T>
__device__ float top_of_row(const Row<T>& row, Team<kThreads>& team) {
  float top = minus_infinity_float();
  for (int quad = team.thread(); quad < row.quads(); quad += kThreads) {
    float logits[kQuad];
    row.load(quad, logits);
    for (int j = 0; j < kQuad; ++j) top = logits[j] > top ? logits[j] : top;
  }
  return team.max(top);
}

// row.values of a quad = (logits - top + G) / tau. Returns their maximum.
template <typename T>
__device__ float add_noise_to_quad(const Row<T>& row, int quad, const philox::Words& words,
                                   float top, float inverse_tau) {
  constexpr bool kExact = Exactly<T>::value;
  float values[kQuad];
  row.load(quad, values);
  float highest = minus_infinity_float();
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const float gumbel = -logarithm_of<kExact>(exponential_noise<kExact>(words.word[j]));
    values[j] = (values[j] - top + gumbel) * inverse_tau;
    highest = values[j] > highest ? values[j] : highest;
  }
  row.put(quad, values);
  return highest;
}

// row.values = (logits - top + G) / tau. Returns their maximum.
template <int kThreads, typename T>
__device__ float add_noise(const Row<T>& row, Team<kThreads>& team, float top, float tau) {
  // A block's threads have several quads each, a warp's often one alone.
  constexpr int kAtOnce = kThreads == kWarpSize ? 1 : kSideBySide;
  const float inverse_tau = 1.0f / tau;
  float highest = minus_infinity_float();
#pragma unroll 1
  for (int first = team.thread(); first < row.quads(); first += kAtOnce * kThreads) {
    philox::Words words[kSideBySide];
    if (kAtOnce == 1) {
      words[0] = row.words(first);
    } else {
      words_side_by_side(row.seed, static_cast<uint32_t>(first), kThreads, words);
    }
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      const int quad = first + q * kThreads;
      if (quad >= row.quads()) break;
      const float here = add_noise_to_quad(row, quad, words[q], top, inverse_tau);
      highest = here > highest ? here : highest;
    }
  }
  return team.max(highest);
}

}  // namespace cuda
}  // namespace latent_rl
