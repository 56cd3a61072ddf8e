// Cutting a row at a rank or at a mass without sorting it.
//
// A truncation keeps a prefix of the order "greater value first, then lower id". The value at which
// the prefix ends is bracketed by bisection, each step one vectorised pass, until few elements are
// left in the bracket; only those are ranked. Bisection alternates between the middle of the values
// and the middle of their bit patterns: the first is quick on ordinary rows, the second bounds the
// number of passes (4 per bit) whatever the values are.
#pragma once

#include "isa/vec.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

// A bracket of at most this many elements is ranked: one vector.
constexpr int64_t kWindow = kLanesD;

typedef int32_t HalfI32 __attribute__((vector_size(32)));

template <typename S>
struct Lanes;
template <>
struct Lanes<double> {
  using Vec = VecD;
  using Mask = VecI64;
  using Ids = HalfI32;
  using Key = int64_t;
  static constexpr Key kLowest = INT64_MIN;
};
template <>
struct Lanes<float> {
  using Vec = VecF;
  using Mask = VecI32;
  using Ids = VecI32;
  using Key = int32_t;
  static constexpr Key kLowest = INT32_MIN;
};
template <typename S>
constexpr int64_t kLanesOf = 64 / static_cast<int64_t>(sizeof(S));

template <typename S>
LRL_INLINE typename Lanes<S>::Vec load_vec(const S* p) {
  typename Lanes<S>::Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename S>
LRL_INLINE typename Lanes<S>::Ids load_ids(const int32_t* p) {
  typename Lanes<S>::Ids v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename S>
LRL_INLINE typename Lanes<S>::Ids ids_from(int64_t first) {
  const VecI32 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_ids<S>(reinterpret_cast<const int32_t*>(&lanes)) + static_cast<int32_t>(first);
}

// Writes the lanes that a mask keeps side by side, may write anything to the rest of a vector's
// room, and returns their number.
template <typename Mask, typename Vec, typename S>
LRL_INLINE int64_t pack_lanes(const Mask& keep, const Vec& v, S* out) {
  int64_t count = 0;
  for (size_t lane = 0; lane < sizeof(Vec) / sizeof(S); ++lane) {
    out[count] = v[lane];
    count -= keep[lane];
  }
  return count;
}
#if defined(__AVX512F__)
LRL_INLINE int64_t pack(VecI32 keep, VecF v, float* out) {
  const __mmask16 kept = _mm512_movepi32_mask(bit_cast<__m512i>(keep));
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(kept, bit_cast<__m512>(v)));
  return __builtin_popcount(kept);
}
LRL_INLINE int64_t pack(VecI32 keep, VecI32 v, int32_t* out) {
  const __mmask16 kept = _mm512_movepi32_mask(bit_cast<__m512i>(keep));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(kept, bit_cast<__m512i>(v)));
  return __builtin_popcount(kept);
}
LRL_INLINE int64_t pack(VecI64 keep, VecD v, double* out) {
  const __mmask8 kept = _mm512_movepi64_mask(bit_cast<__m512i>(keep));
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(kept, bit_cast<__m512d>(v)));
  return __builtin_popcount(kept);
}
LRL_INLINE int64_t pack(VecI64 keep, HalfI32 v, int32_t* out) {
  const __mmask8 kept = _mm512_movepi64_mask(bit_cast<__m512i>(keep));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_maskz_compress_epi32(kept, bit_cast<__m256i>(v)));
  return __builtin_popcount(kept);
}
#else
template <typename Mask, typename Vec, typename S>
LRL_INLINE int64_t pack(const Mask& keep, const Vec& v, S* out) {
  return pack_lanes(keep, v, out);
}
#endif

// Integers in the order of the floating-point numbers; -0 and 0 share one.
template <typename S>
LRL_INLINE typename Lanes<S>::Key key_of(S v) {
  const auto bits = bit_cast<typename Lanes<S>::Key>(v);
  return bits < 0 ? Lanes<S>::kLowest - bits : bits;
}
template <typename S>
LRL_INLINE S value_of(typename Lanes<S>::Key key) {
  return bit_cast<S>(key < 0 ? Lanes<S>::kLowest - key : key);
}
template <typename S>
LRL_INLINE S next_above(S v) {
  return value_of<S>(key_of(v) + 1);
}

// What lies at or above a threshold.
struct Tally {
  double weight;
  int64_t count;
};

// `row` is readable up to a multiple of the lanes, and -inf there.
template <typename S>
inline int64_t count_at_least(const S* row, int64_t width, S threshold) {
  typename Lanes<S>::Mask found = {};
  for (int64_t k = 0; k < width; k += kLanesOf<S>) found += load_vec(row + k) >= threshold;
  return -fold<typename Lanes<S>::Key>(found, [](auto a, auto b) { return a + b; });
}
#if defined(__AVX512F__)
template <>
inline int64_t count_at_least<float>(const float* row, int64_t width, float threshold) {
  const __m512 least = _mm512_set1_ps(threshold);
  int64_t count = 0;
  for (int64_t k = 0; k < width; k += kLanesOf<float>) {
    count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(row + k), least, _CMP_GE_OQ));
  }
  return count;
}
#endif

inline Tally mass_at_least(const double* values, const double* masses, int64_t width,
                           double threshold) {
  VecD mass = VecD{};
  VecI64 found = {};
  for (int64_t k = 0; k < width; k += kLanesD) {
    const VecI64 reached = load8(values + k) >= threshold;
    mass += reached ? load8(masses + k) : splat(0.0);
    found += reached;
  }
  int64_t count = 0;
  for (int64_t lane = 0; lane < kLanesD; ++lane) count -= found[lane];
  return {sum_lanes(mass), count};
}

// The prefix ends in [low, high): what is at or above `high` weighs less than the target.
template <typename S>
struct Bracket {
  S low;
  S high;
  Tally above;
  int64_t inside;
  int64_t reached() const { return above.count + inside; }  // how many are at or above `low`
};

// Of a count that is wanted, steps taken to meet it exactly where ranking would do already: a step
// is cheaper, but equal values at the end of the prefix never come apart.
constexpr int kExtraSteps = 6;

// Narrows a bracket until at most kWindow elements, or elements of one value alone, are inside, or
// until `exact` elements reach its low end (-1 for no such end), or at most `crowd` do.
// `measure(threshold)` gives the Tally at or above a threshold. Inlined: a bracket that goes
// through memory costs a short row 15 ns.
template <typename S, typename Measure>
LRL_INLINE Bracket<S> narrow(Bracket<S> b, double target, int64_t exact, int64_t crowd,
                             const Measure& measure) {
  using Key = typename Lanes<S>::Key;
  int extra = exact < 0 ? 0 : kExtraSteps;
  for (int step = 1; b.reached() != exact && b.reached() > crowd; ++step) {
    if (b.inside <= kWindow && extra-- == 0) break;
    const Key low = key_of(b.low);
    const Key high = key_of(b.high);
    if (high - low == 1) break;
    S middle = b.low * S(0.5) + b.high * S(0.5);
    if (step % 4 == 0 || !(middle > b.low && middle < b.high)) {
      // The keys may lie further apart than a signed key holds.
      middle = value_of<S>((low & high) + ((low ^ high) >> 1));
    }
    const Tally reached = measure(middle);
    // Which half it is cannot be predicted, so both are computed and one is selected.
    const bool upper = reached.weight >= target;
    const int64_t low_count = upper ? reached.count : b.reached();
    b.low = upper ? middle : b.low;
    b.high = upper ? b.high : middle;
    b.above.weight = upper ? b.above.weight : reached.weight;
    b.above.count = upper ? b.above.count : reached.count;
    b.inside = low_count - b.above.count;
  }
  return b;
}

// The last element of a prefix: kept are all greater values, and equal ones up to this position.
template <typename S>
struct Cut {
  S value;
  int32_t at;
  // Lanes of a vector of values at positions first, first + 1, ... that stay.
  LRL_INLINE typename Lanes<S>::Mask keeps(typename Lanes<S>::Vec v, int64_t first) const {
    const auto early = ids_from<S>(first) <= at;
    return (v > value) | ((v == value) & __builtin_convertvector(early, typename Lanes<S>::Mask));
  }
};

// The end of the prefix among at most kWindow elements with the given weights: an element stays
// while the weight before it, `above` included, falls short of the target. Returns its index.
inline int64_t last_in_window(const double* values, const double* weights, int64_t count,
                              double above, double target) {
  const VecI64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const VecD all = load8(values);
  VecD before = splat(above);
  for (int64_t i = 0; i < kWindow; ++i) {
    const VecD v = splat(values[i]);
    const VecI64 behind = (v > all) | ((v == all) & (lane > i));
    before += behind ? splat(weights[i]) : splat(0.0);
  }
  // The last of those that stay is the least, and of equal ones the one of the highest index.
  const VecI64 stays = (before < splat(target)) & (lane < count);
  const double least = -max_lanes(stays ? -all : splat(-kInf));
  return max_lanes(stays & (all == splat(least)) ? lane : VecI64{});
}

// The end of the prefix in a narrowed bracket over `size` listed values. `positions` has room for
// size + 16.
template <typename S, typename Weight>
Cut<S> find_cut(const S* values, int64_t size, const Bracket<S>& bracket, double target,
                int32_t* positions, const Weight& weight) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kLanesOf<S>) {
    const auto v = load_vec(values + i);
    count += pack((v >= bracket.low) & (v < bracket.high), ids_from<S>(i), positions + count);
  }
  int32_t at = positions[0];
  if (count <= kWindow) {
    double window[kWindow];
    double weights[kWindow];
    for (int64_t i = 0; i < kWindow; ++i) {
      window[i] = i < count ? values[positions[i]] : -kInf;
      weights[i] = i < count ? weight(positions[i]) : 0.0;
    }
    at = positions[last_in_window(window, weights, count, bracket.above.weight, target)];
  } else {
    // A longer window holds one value, so it is in order already.
    double before = bracket.above.weight;
    for (int64_t i = 0; i < count && before < target; ++i) {
      at = positions[i];
      before += weight(at);
    }
  }
  return {values[at], at};
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
