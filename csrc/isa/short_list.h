// The draw from a short list of codes in float32, as long as nothing it decides is in doubt.
//
// Which codes top-p and min-p keep, and which one is drawn, is defined in float64. Here masses and
// noise are float32 with known errors: a decision closer than these is left to float64, about three
// rows in a thousand. So the codes are float64's, on every instruction set.
#pragma once

#include "isa/float_noise.h"
#include "isa/float_rows.h"
#include "isa/select.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

constexpr int64_t kShort = 64;
// Of the whole mass. The exponent (l - top) / T is good to 1.8e-7 of itself and the exponential to
// 2.4e-7, which together move the mass of n codes by (2.4e-7 + 1.8e-7 log n) of it at most; adding
// 64 of them in float32 by 4e-6.
constexpr float kMassSlack = 2e-5f;
// Of one mass: exponents end at -86.
constexpr float kTermSlack = 2e-5f;
// Of the ratio mass / (-log u), the draw's score: 5e-6 within 27 of the top (what is further behind
// cannot win, see float_noise.h), 3e-7 of the logarithm, and 3e-8 of float64's own scores where the
// top is within kLargestTop.
constexpr float kRatioSlack = 1e-4f;

struct ShortList {
  const float* values;  // logits, padded with -inf to whole vectors
  const int32_t* ids;   // in rising order
  int64_t size;         // at most kShort
  float top;
  double temperature;
  double top_p, min_p;
};

struct ShortDraw {
  int64_t at;       // position in the list, or -1: in doubt
  double mass;      // sum of exp((l - top) / T) over the codes kept
  double weighted;  // sum of exp((l - top) / T) (l - top) / T
};

// Whether float32 can tell temperatures and tops of this size.
LRL_INLINE bool fits_short(double temperature, double top, double min_p) {
  return temperature > 0x1p-60 && temperature < 0x1p60 && top < kLargestTop && top > -kLargestTop &&
         (min_p == 0.0 || min_p > 1e-30);
}

struct ShortTerms {
  float mass[kShort];
  float exponent[kShort];
  int32_t key[kShort];  // in the order of the logits
};

LRL_INLINE VecI32 load_key(const int32_t* p) {
  VecI32 v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// The mass before each code of a vector, in the order of the prefix: greater logits first, and of
// equal ones the lower id.
LRL_INLINE VecF mass_before(const ShortTerms& terms, int64_t size, int64_t first) {
  // Loaded from after + 15 - lane: -1 in the lanes behind `lane`.
  static const int32_t after[31] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,
                                    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const VecI32 key = load_key(terms.key + first);
  const int64_t end = first + kLanesRow < size ? first + kLanesRow : size;
  // Two sums, so that additions wait for each other half as long.
  VecF even = VecF{};
  VecF odd = VecF{};
  const auto add = [&](int64_t j, VecI32 ahead) {
    const VecF one = splat_f(terms.mass[j]);
    if (j % 2 == 0) {
      even = ahead ? even + one : even;
    } else {
      odd = ahead ? odd + one : odd;
    }
  };
  const auto key_of_code = [&](int64_t j) { return VecI32{} + terms.key[j]; };
  for (int64_t j = 0; j < first; ++j) add(j, key_of_code(j) >= key);
  for (int64_t j = first; j < end; ++j) {
    add(j, key_of_code(j) > key + load_key(after + (kLanesRow - 1) - (j - first)));
  }
  for (int64_t j = end; j < size; ++j) add(j, key_of_code(j) > key);
  return even + odd;
}

// Fills in the terms of the list and returns their mass.
inline double weigh_short(const ShortList& list, ShortTerms* terms) {
  const float inverse = static_cast<float>(1.0 / list.temperature);
  WideSum mass;
  for (int64_t i = 0; i < list.size; i += kLanesRow) {
    const VecF v = load16(list.values + i);
    const VecF x = (v - list.top) * inverse;
    const VecF clamped = max_f(splat_f(kLeastExponent), x);
    const VecF e = exp(x, clamped);
    const VecI32 bits = bit_cast<VecI32>(v);
    const VecI32 key = bits < 0 ? Lanes<float>::kLowest - bits : bits;
    store16(terms->mass + i, e);
    store16(terms->exponent + i, clamped);
    memcpy(terms->key + i, &key, sizeof(key));
    mass.add(e);
  }
  return mass.total();
}

// Sets the masses of the codes that top-p and min-p drop to zero; false when in doubt.
inline bool truncate_short(const ShortList& list, double total, ShortTerms* terms) {
  const float target = static_cast<float>(list.top_p * total);
  const float slack = kMassSlack * static_cast<float>(total);
  const float min_p = static_cast<float>(list.min_p);
  const auto near = [](VecF a, float b, float distance) {
    return (a > b - distance) & (a < b + distance);
  };
  VecI32 doubt = VecI32{};
  float kept[kShort];
  for (int64_t i = 0; i < list.size; i += kLanesRow) {
    VecF mass = load16(terms->mass + i);
    if (list.min_p > 0.0) {
      doubt |= near(mass, min_p, kTermSlack * min_p);
      mass = mass >= splat_f(min_p) ? mass : VecF{};
    }
    if (list.top_p < 1.0) {
      const VecF before = mass_before(*terms, list.size, i);
      doubt |= near(before, target, slack);
      mass = before < splat_f(target) ? mass : VecF{};
    }
    store16(kept + i, mass);
  }
  memcpy(terms->mass, kept, sizeof(kept));
  return !any_lane(bit_cast<VecI64>(doubt));
}

inline ShortDraw draw_short(const ShortList& list, PhiloxKey key) {
  const ShortDraw in_doubt = {-1, 0.0, 0.0};
  ShortTerms terms;
  const double total = weigh_short(list, &terms);
  if ((list.top_p < 1.0 || list.min_p > 0.0) && !truncate_short(list, total, &terms)) {
    return in_doubt;
  }
  WideSum mass, weighted;
  // The score of a code is mass / E with E = -log u: argmax l / T + G = argmax exp(l / T) / E.
  NoiseBlock words;
  float ratio[kShort];
  VecF best = VecF{};
  for (int64_t i = 0; i < list.size; i += kLanesRow) {
    if (i % kNoiseBlock == 0) words = words_of_codes(key, list.ids + i);
    const VecF e = load16(terms.mass + i);
    mass.add(e);
    weighted.add(e * load16(terms.exponent + i));
    const VecF score = e / exponential_f(words16(words, i % kNoiseBlock / kLanesRow));
    store16(ratio + i, score);
    best = max_f(best, score);
  }
  const float least = max_lanes_f(best) * (1.0f - kRatioSlack);
  int64_t at = -1;
  for (int64_t i = 0; i < list.size; i += kLanesRow) {
    const uint32_t reached = lanes_of(load16(ratio + i) >= splat_f(least));
    if (reached == 0) continue;
    if (at >= 0 || (reached & (reached - 1)) != 0) return in_doubt;
    at = i + __builtin_ctz(reached);
  }
  return {at, mass.total(), weighted.total()};
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
