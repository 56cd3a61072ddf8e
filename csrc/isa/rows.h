// What the ops over rows of logits share: a row widened to float64 and its softmax sums.
#pragma once

#include "isa/noise.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

// Stands in for -inf in products with a probability of exactly zero (0 * log 0 = 0).
constexpr double kVeryLow = -1e300;

LRL_INLINE int64_t padded(int64_t num_codes) {
  return (num_codes + kNoiseBlock - 1) / kNoiseBlock * kNoiseBlock;
}

// Widens a row into `out`, padded with -inf to padded(num_codes). Returns the maximum, or NaN when
// the row is invalid: it holds NaN or +inf, or nothing but -inf.
template <typename T>
double widen_row(const T* row, int64_t num_codes, double* out) {
  VecD top = splat(-kInf);
  VecI64 all_legal = VecI64{} - 1;
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
    const VecD v = k < num_codes ? load_some(row + k, num_codes - k, -kInf) : splat(-kInf);
    all_legal &= v < splat(kInf);  // false for NaN and +inf
    top = max(top, v);
    store8(out + k, v);
  }
  bool legal = true;
  for (int lane = 0; lane < kLanesD; ++lane) legal = legal && all_legal[lane] != 0;
  const double best = max_lanes(top);
  return legal && best > -kInf ? best : kNaN;
}

LRL_INLINE bool is_nan(double v) { return v != v; }

// With p = exp(v - top) / mass: log p = v - top - log_mass, entropy = log_mass - weighted / mass.
struct SoftmaxSums {
  double top;
  double mass;      // sum of exp(v - top)
  double weighted;  // sum of exp(v - top) * (v - top)
  double log_mass;
  double entropy() const { return log_mass - weighted / mass; }
  double logprob(double v) const { return v - top - log_mass; }
};

// The mass alone. `row` is readable up to padded(num_codes).
inline double softmax_mass(const double* row, int64_t num_codes, double top) {
  VecD mass = VecD{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) mass += exp(load8(row + k) - top);
  return sum_lanes(mass);
}

inline SoftmaxSums softmax_sums(const double* row, int64_t num_codes, double top) {
  VecD mass = VecD{};
  VecD weighted = VecD{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD d = load8(row + k) - top;
    const VecD e = exp(d);
    mass += e;
    weighted += e * max(d, splat(kVeryLow));
  }
  SoftmaxSums sums;
  sums.top = top;
  sums.mass = sum_lanes(mass);
  sums.weighted = sum_lanes(weighted);
  sums.log_mass = log1(sums.mass);
  return sums;
}

// The running maximum with the lowest index that reaches it.
struct ArgMax {
  VecD best = splat(-kInf);
  VecI64 index = VecI64{} - 1;

  LRL_INLINE void add(VecD score, int64_t first) {
    const VecI64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const VecI64 better = score > best;
    best = better ? score : best;
    index = better ? lane + first : index;
  }

  // -1 when nothing above -inf was added.
  LRL_INLINE int64_t lowest() const {
    const VecI64 none = VecI64{} - INT64_MAX;
    const VecI64 wins = (best == splat(max_lanes(best))) & (index >= 0);
    const int64_t at = -max_lanes(wins ? -index : none);
    return at == INT64_MAX ? -1 : at;
  }
};

inline int64_t argmax(const double* row, int64_t num_codes) {
  ArgMax running;
  for (int64_t k = 0; k < num_codes; k += kLanesD) running.add(load8(row + k), k);
  return running.lowest();
}

// argmax of row + Gumbel noise; -inf entries are never chosen. `scratch` has room for
// padded(num_codes) 32-bit entries.
//
// Most codes cannot win whatever their noise's exact value. The first pass bounds the scores from
// above, for each lane of each block of 32 codes, and the best score from below; the second scores
// only vectors of codes in which some upper bound reaches the best score so far.
inline int64_t argmax_with_noise(const double* row, int64_t num_codes, PhiloxKey key,
                                 uint32_t* scratch) {
  constexpr int64_t kParts = kNoiseBlock / kLanesD;
  const int64_t blocks = padded(num_codes) / kNoiseBlock;
  double* bounds = reinterpret_cast<double*>(scratch);
  VecD lower = splat(-kInf);
  for (int64_t block = 0; block < blocks; ++block) {
    const NoiseBlock words = philox_block(key, block);
    VecD upper = splat(-kInf);
    for (int64_t part = 0; part < kParts; ++part) {
      const VecD value = load8(row + block * kNoiseBlock + part * kLanesD);
      const GumbelBounds noise = gumbel_bounds(widen(words.part[part]));
      upper = max(upper, value + noise.upper);
      lower = max(lower, value + noise.lower);
    }
    store8(bounds + block * kLanesD, upper);
  }
  // Rounding is monotone, so bounds of the noise are bounds of the rounded sums too.
  double reached = max_lanes(lower);
  ArgMax running;
  for (int64_t block = 0; block < blocks; ++block) {
    if (!any_lane(load8(bounds + block * kLanesD) >= splat(reached))) continue;
    const NoiseBlock words = philox_block(key, block);
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t first = block * kNoiseBlock + part * kLanesD;
      const VecD value = load8(row + first);
      const VecU64 word = widen(words.part[part]);
      if (!any_lane(value + gumbel_bounds(word).upper >= splat(reached))) continue;
      const VecD scores = value + gumbel(word);
      running.add(scores, first);
      const double top = max_lanes(scores);
      reached = top > reached ? top : reached;
    }
  }
  return running.lowest();
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
