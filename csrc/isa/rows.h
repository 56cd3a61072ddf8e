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

  LRL_INLINE int64_t lowest() const {
    int64_t at = -1;
    double top = -kInf;
    for (int lane = 0; lane < kLanesD; ++lane) {
      if (index[lane] < 0) continue;
      if (at < 0 || best[lane] > top || (best[lane] == top && index[lane] < at)) {
        at = index[lane];
        top = best[lane];
      }
    }
    return at;
  }
};

inline int64_t argmax(const double* row, int64_t num_codes) {
  ArgMax running;
  for (int64_t k = 0; k < num_codes; k += kLanesD) running.add(load8(row + k), k);
  return running.lowest();
}

LRL_INLINE bool any_lane(VecI64 mask) {
  int64_t lanes[kLanesD];
  memcpy(lanes, &mask, sizeof(mask));
  return ((lanes[0] | lanes[1]) | (lanes[2] | lanes[3]) | (lanes[4] | lanes[5]) |
          (lanes[6] | lanes[7])) != 0;
}

// argmax of row + Gumbel noise; -inf entries are never chosen. `words` has room for
// padded(num_codes) entries.
//
// Most codes cannot win whatever their noise's exact value: the code with the greatest upper bound
// is scored first, and then only the vectors of codes in which some bound reaches the best score so
// far.
inline int64_t argmax_with_noise(const double* row, int64_t num_codes, PhiloxKey key,
                                 uint32_t* words) {
  ArgMax bounds;
  for (int64_t k = 0; k < num_codes; k += kNoiseBlock) {
    philox_block(key, k / kNoiseBlock, words + k);
    for (int64_t part = k; part < k + kNoiseBlock; part += kLanesD) {
      bounds.add(load8(row + part) + gumbel_bound(words + part), part);
    }
  }
  const int64_t likely = bounds.lowest() / kLanesD * kLanesD;
  const double reached = max_lanes(load8(row + likely) + gumbel_of_words(words + likely));
  ArgMax running;
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD value = load8(row + k);
    if (!any_lane(value + gumbel_bound(words + k) >= splat(reached))) continue;
    running.add(value + gumbel_of_words(words + k), k);
  }
  return running.lowest();
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
