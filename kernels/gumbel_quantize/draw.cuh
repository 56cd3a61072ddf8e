// The code that float64 scores choose, found in float32.
//
// argmax l_k + G_k is argmax R_k, R_k = p_k / E_k with p_k = exp(l_k - top) and E_k = -log u_k.
// Since E_k >= v_k = 1 - u_k, a code with p_k < T v_k, T the ratio of any code seen, cannot win: no
// logarithm is taken of nearly all codes (of about one per row on average, beyond those passed on
// the way to a good T). Of the few that remain R_k is computed with a relative error below 1e-5. If
// one code alone reaches the best within kSlack, it is the choice: any other lies 4e-5 lower in
// score, where float64 errs by 1e-14. Otherwise, about once in ten thousand rows, the codes within
// kSlack are scored in float64. README.md has the error budget.
#pragma once

#include "gumbel_quantize/row.cuh"

namespace latent_rl {
namespace cuda {

constexpr float kSlack = 1e-4f;
// From logits of this size on, a score's rounding in float64 could bridge the slack.
constexpr float kCoarse = 1e8f;

// What a thread has seen of its codes' ratios.
struct Ratios {
  float threshold;  // p must exceed this times float(~word)
  float best, second;
  int code;

  __device__ void raise_threshold(float ratio) {
    const float at = ratio * ((1.0f - kSlack) * 0x1p-32f);
    threshold = at > threshold ? at : threshold;
  }

  __device__ bool may_win(float p, uint32_t word) const {
    return p > threshold * static_cast<float>(~word);
  }

  __device__ void offer(float p, uint32_t word, int k) {
    const float ratio = p / exponential_noise<true>(word);
    if (ratio > best) {
      second = best;
      best = ratio;
      code = k;
      raise_threshold(ratio);
    } else {
      second = ratio > second ? ratio : second;
    }
  }

  // Rarely does a code pass, so the loop over those that do holds one copy of the logarithms.
  __device__ void offer_quad(const float (&p)[kQuad], const philox::Words& words, int first) {
    unsigned passed = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) passed |= may_win(p[j], words.word[j]) ? 1u << j : 0u;
#pragma unroll 1
    while (passed != 0) {
      const int j = __ffs(static_cast<int>(passed)) - 1;
      passed &= passed - 1;
      // Selections, not indices: an array with an index of run time would leave the registers.
      const float weight = j < 2 ? (j == 0 ? p[0] : p[1]) : (j == 2 ? p[2] : p[3]);
      const uint32_t word = j < 2 ? (j == 0 ? words.word[0] : words.word[1])
                                  : (j == 2 ? words.word[2] : words.word[3]);
      offer(weight, word, first + j);
    }
  }

  __device__ int count_near(float highest) const {
    const float least = highest * (1.0f - kSlack);
    return (best >= least ? 1 : 0) + (second >= least ? 1 : 0);
  }
};

// A lower bound of the ratio without a logarithm: E <= v / u.
__device__ inline float least_ratio(float p, uint32_t word) {
  return p * uniform_float(word) / uniform_float(~word);
}

// exp, at the precision that suits T.
template <typename T>
__device__ float weight_of(float lower) {
  return exponential_of<Exactly<T>::value>(lower);
}

// Scores in float64 every code whose ratio may reach `highest` within kSlack. row.values are the p.
template <int kThreads, typename T>
__device__ int draw_exactly(const Row<T>& row, Team<kThreads>& team, float highest) {
  const float least = highest * ((1.0f - 2.0f * kSlack) * 0x1p-32f);
  double best = -1e308;
  int code = INT32_MAX;
#pragma unroll 1
  for (int quad = team.thread(); quad < row.quads(); quad += kThreads) {
    const philox::Words words = row.words(quad);
    const Vector<float, kQuad> p = row.get(quad);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (!(p.at[j] > least * static_cast<float>(~words.word[j]))) continue;
      const int k = quad * kQuad + j;
      const double noise = -log(-log(philox::uniform(words.word[j])));
      const double score = static_cast<double>(to_float(row.logits[k])) + noise;
      if (score > best) {
        best = score;
        code = k;
      }
    }
  }
  return team.best(best, code);
}

// Sums of a row without noise.
struct Moments {
  float mass;      // of p
  float weighted;  // of p (logit - top)
};

// Draws, and leaves p in row.values. The code is -1 when the mass is NaN: the row holds NaN or
// +inf, or nothing but -inf.
template <int kThreads, typename T>
__device__ int draw(const Row<T>& row, Team<kThreads>& team, float top, Moments* moments) {
  Ratios ratios = {0.0f, 0.0f, 0.0f, 0};
  float mass = 0.0f;
  float weighted = 0.0f;
#pragma unroll 1
  for (int base = 0; base < row.quads(); base += kThreads) {
    const int quad = base + team.thread();
    const bool inside = quad < row.quads();
    float p[kQuad] = {};
    philox::Words words = {};
    float least = 0.0f;
    if (inside) {
      words = row.words(quad);
      row.load(quad, p);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const float lower = max_or_nan(p[j] - top, kVeryLow);
        p[j] = weight_of<T>(lower);
        mass += p[j];
        weighted += p[j] * lower;
      }
      row.put(quad, p);
    }
    // The first codes of every thread give all of them a threshold to start from.
    if (base == 0) {
      for (int j = 0; j < kQuad; ++j) {
        const float ratio = inside ? least_ratio(p[j], words.word[j]) : 0.0f;
        least = ratio > least ? ratio : least;
      }
      ratios.raise_threshold(team.max(least));
    }
    ratios.offer_quad(p, words, quad * kQuad);
  }
  float sums[3] = {mass, weighted, ratios.best};
  team.reduce(sums, [](int i, float a, float b) { return i < 2 ? a + b : a > b ? a : b; });
  *moments = {sums[0], sums[1]};
  const float highest = sums[2];
  // At most 2^13 codes: exact in float32.
  float found[2] = {static_cast<float>(ratios.count_near(highest)),
                    ratios.best == highest ? static_cast<float>(ratios.code) : -1.0f};
  team.reduce(found, [](int i, float a, float b) { return i == 0 ? a + b : a > b ? a : b; });
  if (!(sums[0] > 0.0f)) return -1;
  // Where float64 itself rounds the noise away, every code takes part.
  if (fabsf(top) > kCoarse) return draw_exactly(row, team, 0.0f);
  if (found[0] > 1.0f) return draw_exactly(row, team, highest);
  return static_cast<int>(found[1]);
}

}  // namespace cuda
}  // namespace latent_rl
