// The forward of a row that a block shares and holds in its registers: more than 512 codes.
//
// Nothing of the row is read twice or kept in shared memory, and noise is made for four quads of a
// thread side by side, so that the keys of a round and what does not depend on the code are made
// once. README.md counts the instructions.
#pragma once

#include "gumbel_quantize/draw.cuh"

namespace latent_rl {
namespace cuda {

constexpr int kHeldQuads = 8;  // of a thread: kMaxGumbelCodes codes in a block
static_assert(kHeldQuads * kQuad * kGumbelThreads >= 8192, "a block holds the widest row");

__device__ inline void prefetch_line(const void* at) {
#ifndef LATENT_RL_EMULATED
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
  (void)at;
#endif
}

// What the threads of a block tell one another about the codes near the best.
struct Near {
  int count;
  int code;
};

// A thread's quads are threadIdx.x, threadIdx.x + kGumbelThreads, ...
template <typename T>
struct HeldRow {
  using Block = Team<kGumbelThreads>;
  Row<T> row;                  // its values: unused
  int steps;                   // quads a thread has at most
  float p[kHeldQuads][kQuad];  // logits, then exp(logit - top), times a factor common to all

  __device__ static int quad(int step) {
    return static_cast<int>(threadIdx.x) + step * kGumbelThreads;
  }

  // Returns the greatest logit; NaN is passed over. Where every quad is whole the loads have no
  // branch between them, so that all are under way at once.
  __device__ float load() {
    if (row.aligned && row.count % kQuad == 0) {
      Vector<T, kQuad> raw[kHeldQuads];
#pragma unroll
      for (int i = 0; i < kHeldQuads; ++i) {
        for (int j = 0; j < kQuad; ++j) from_float(minus_infinity_float(), raw[i].at + j);
        if (quad(i) < row.quads()) raw[i] = load_vector<kQuad>(row.logits + quad(i) * kQuad);
      }
#pragma unroll
      for (int i = 0; i < kHeldQuads; ++i) {
        for (int j = 0; j < kQuad; ++j) p[i][j] = to_float(raw[i].at[j]);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < kHeldQuads * kQuad; ++k) {
        const int at = quad(k / kQuad) * kQuad + k % kQuad;
        const float logit = at < row.count ? to_float(row.logits[at]) : minus_infinity_float();
        // Selected, not indexed: an array with an index of run time would leave the registers.
#pragma unroll
        for (int i = 0; i < kHeldQuads; ++i) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) p[i][j] = k == i * kQuad + j ? logit : p[i][j];
        }
      }
    }
    float top = minus_infinity_float();
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) top = p[i][j] > top ? p[i][j] : top;
    }
    return top;
  }

  // Logits become probabilities. For 16-bit input logit - top is never formed: with rounded
  // constants c = log2 e and m = top c, 2^(logit c - m) is off by the factor 2^(top c - m), the
  // same for all codes, which neither ratios nor the entropy see.
  __device__ void exponentiate(float top, float* mass, float* weighted) {
    const float shift = -top * kLog2E;
    float sum = 0.0f, products = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
      if (i >= steps) break;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (Exactly<T>::value) {
          const float lower = max_or_nan(p[i][j] - top, kVeryLow);
          p[i][j] = expf(lower);
          products += p[i][j] * lower;
        } else {
          const float lower = max_or_nan(fmaf(p[i][j], kLog2E, shift), kVeryLow / kLn2);
          p[i][j] = power_of_two(lower);
          products += p[i][j] * lower;
        }
        sum += p[i][j];
      }
    }
    *mass = sum;
    *weighted = Exactly<T>::value ? products : products * kLn2;
  }

  // Whether one of a quad's codes may win: Ratios::may_win, p > t float(~w), with a little more let
  // through, as p + t float(w) > t 2^32 less what float32 may lose on the way.
  __device__ bool may_win(const Ratios& ratios, int step, const philox::Words& words) const {
    float reached = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float here = fmaf(ratios.threshold, static_cast<float>(words.word[j]), p[step][j]);
      reached = here > reached ? here : reached;
    }
    return reached > ratios.threshold * (0x1p32f * (1.0f - 1e-6f));
  }

  __device__ void scan(Ratios& ratios, int first, Block& team) {
    philox::Words words[kSideBySide];
    words_side_by_side(row.seed, static_cast<uint32_t>(quad(first)), kGumbelThreads, words);
    if (first == 0) {
      float least = 0.0f;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        // Two units off at most, far within the slack that the threshold leaves.
        const uint32_t word = words[0].word[j];
        const float ratio = __fdividef(p[0][j] * uniform_float(word), uniform_float(~word));
        least = ratio > least ? ratio : least;
      }
      ratios.raise_threshold(team.max(least));
    }
#pragma unroll
    for (int q = 0; q < kSideBySide; ++q) {
      if (first + q >= steps) break;
      if (may_win(ratios, first + q, words[q])) {
        ratios.offer_quad(p[first + q], words[q], quad(first + q) * kQuad);
      }
    }
  }

  // As draw_exactly: the flags of a thread's codes first, so that there is one copy of float64's
  // logarithms.
  __device__ int draw_exactly(float highest, Block& team) const {
    const float least = highest * ((1.0f - 2.0f * kSlack) * 0x1p-32f);
    unsigned passed = 0;
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
      if (i >= steps) break;
      const philox::Words words = row.words(quad(i));
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const bool near = p[i][j] > least * static_cast<float>(~words.word[j]);
        passed |= near ? 1u << (i * kQuad + j) : 0u;
      }
    }
    double best = -1e308;
    int code = INT32_MAX;
#pragma unroll 1
    while (passed != 0) {
      const int bit = __ffs(static_cast<int>(passed)) - 1;
      passed &= passed - 1;
      const int k = quad(bit / kQuad) * kQuad + bit % kQuad;
      const philox::Words words = row.words(quad(bit / kQuad));
      const int j = bit % kQuad;
      const uint32_t word = j < 2 ? (j == 0 ? words.word[0] : words.word[1])
                                  : (j == 2 ? words.word[2] : words.word[3]);
      const double score =
          static_cast<double>(to_float(row.logits[k])) - log(-log(philox::uniform(word)));
      if (score > best) {
        best = score;
        code = k;
      }
    }
    return team.best(best, code);
  }

  // As `draw` of draw.cuh. `near` is the block's own, in shared memory.
  __device__ int draw(Block& team, Moments* moments, Near* near) {
    const float top = team.max(load());
    if (threadIdx.x == 0) near->count = 0;
    float mass, weighted;
    exponentiate(top, &mass, &weighted);
    Ratios ratios = {0.0f, 0.0f, 0.0f, 0};
    static_assert(kHeldQuads == 2 * kSideBySide, "two rounds of quads");
    scan(ratios, 0, team);
    if (steps > kSideBySide) scan(ratios, kSideBySide, team);
    float sums[3] = {mass, weighted, ratios.best};
    team.reduce(sums, [](int i, float a, float b) { return i < 2 ? a + b : a > b ? a : b; });
    *moments = {sums[0], sums[1]};
    const float highest = sums[2];
    const int close = ratios.count_near(highest);
    if (close > 0) atomicAdd(&near->count, close);
    // Where two threads have it, the count says so, and neither is asked.
    if (ratios.best == highest) near->code = ratios.code;
    __syncthreads();
    const Near found = *near;
    if (!(sums[0] > 0.0f)) return -1;
    // Where float64 itself rounds the noise away, every code takes part.
    if (fabsf(top) > kCoarse) return draw_exactly(0.0f, team);
    if (found.count > 1) return draw_exactly(highest, team);
    return found.code;
  }

  // sums[k] += p_k share.
  __device__ void add_to(float* sums, float share) const {
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
      if (i >= steps || quad(i) >= row.quads()) break;
      Vector<float, kQuad> sum = load_vector<kQuad>(sums + quad(i) * kQuad);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum.at[j] += p[i][j] * share;
      store_vector(sums + quad(i) * kQuad, sum);
    }
  }

  // The next row's logits on their way to the second-level cache.
  __device__ static void prefetch(const T* logits, int count) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T));
    for (int k = static_cast<int>(threadIdx.x) * kLine; k < count; k += kGumbelThreads * kLine) {
      prefetch_line(logits + k);
    }
  }
};

}  // namespace cuda
}  // namespace latent_rl
