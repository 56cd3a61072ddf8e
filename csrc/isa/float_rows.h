// Rows of logits in float32, sixteen codes at a time: what the ops over float32 and narrower share.
#pragma once

#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

typedef uint32_t VecU32 __attribute__((vector_size(64)));
typedef uint16_t HalfU16 __attribute__((vector_size(32)));

constexpr int64_t kLanesRow = 16;
constexpr float kInfF = __builtin_inff();
// Stands in for -inf in products with a probability of exactly zero (0 * log 0 = 0).
constexpr float kVeryLowF = -1e30f;

LRL_INLINE int64_t padded_to_lanes(int64_t num_codes) {
  return (num_codes + kLanesRow - 1) / kLanesRow * kLanesRow;
}

LRL_INLINE VecF load16(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof(v));
  return v;
}
LRL_INLINE VecF load16(const BF16* p) {
  HalfU16 h;
  memcpy(&h, p, sizeof(h));
  return bit_cast<VecF>(__builtin_convertvector(h, VecU32) << 16);
}
LRL_INLINE VecF load16(const F16* p) {
  const HalfF parts[2] = {load8f(p), load8f(p + kLanesD)};
  return bit_cast<VecF>(parts);
}
// Up to sixteen elements; the missing ones are `fill`.
template <typename T>
LRL_INLINE VecF load_some16(const T* p, int64_t count, float fill = 0.0f) {
  if (count >= kLanesRow) return load16(p);
  VecF v = splat_f(fill);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<float>(to_double(p[lane]));
  return v;
}

LRL_INLINE void store16(float* p, VecF v) { memcpy(p, &v, sizeof(v)); }
// Rounds to nearest, ties to even; NaN stays NaN.
LRL_INLINE void store16(BF16* p, VecF v) {
  const VecU32 bits = bit_cast<VecU32>(v);
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 quiet = (bits >> 16) | 0x40u;
  const HalfU16 h = __builtin_convertvector(v == v ? rounded : quiet, HalfU16);
  memcpy(p, &h, sizeof(h));
}
LRL_INLINE void store16(F16* p, VecF v) {
#if defined(__F16C__)
  HalfF low, high;
  split(v, &low, &high);
  const __m128i halves[2] = {_mm256_cvtps_ph(bit_cast<__m256>(low), _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(bit_cast<__m256>(high), _MM_FROUND_TO_NEAREST_INT)};
  memcpy(p, halves, sizeof(halves));
#else
  for (int64_t lane = 0; lane < kLanesRow; ++lane) store(p + lane, v[lane]);
#endif
}
template <typename T>
LRL_INLINE void store_some16(T* p, VecF v, int64_t count) {
  if (count >= kLanesRow) {
    store16(p, v);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) store(p + lane, v[lane]);
}

LRL_INLINE float max_lanes_f(VecF v) {
  typedef float QuarterF __attribute__((vector_size(16)));
  HalfF low, high;
  split(v, &low, &high);
  low = low > high ? low : high;
  QuarterF a, b;
  split(low, &a, &b);
  a = a > b ? a : b;
  const float even = a[0] > a[2] ? a[0] : a[2];
  const float odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}

// A sum in float64 of float32 lanes.
struct WideSum {
  VecD low = VecD{};
  VecD high = VecD{};

  LRL_INLINE void add(VecF v) {
    HalfF a, b;
    split(v, &a, &b);
    low += widen(a);
    high += widen(b);
  }
  LRL_INLINE double total() const { return sum_lanes(low + high); }
};

// A row as float32 with a length of whole vectors, -inf past its end.
struct FloatRow {
  const float* at;
  float top;           // the greatest logit
  bool valid;          // neither NaN nor +inf in it, and a code that is not masked
  uintptr_t next;      // the row that is read some rows later, as it lies in memory
  int64_t next_bytes;  // of its elements

  // Fetches the codes from k on of the later row: memory would otherwise lie idle while the passes
  // over rows in the cache run. An address past the last row does no harm.
  LRL_INLINE void prefetch(int64_t k) const {
    __builtin_prefetch(
        reinterpret_cast<const void*>(next + static_cast<uintptr_t>(k * next_bytes)));
  }
  double behind_top(int64_t code) const {
    return static_cast<double>(at[code]) - static_cast<double>(top);
  }
};

// Reads a row where it lies when it is float32 of whole vectors, else widens it into `copy`.
// `ahead` is the distance in elements to the row to prefetch meanwhile.
template <typename T>
FloatRow read_float_row(const T* source, int64_t num_codes, int64_t ahead, float* copy) {
  VecF top = splat_f(-kInfF);
  // NaNs are the bit patterns above that of infinity; a maximum of values would drop them.
  VecI32 largest = VecI32{};
  const auto note = [&](VecF v) {
    const VecI32 magnitude = bit_cast<VecI32>(v) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    top = max_f(v, top);
  };
  const float* at = copy;
  if (sizeof(T) == sizeof(float) && num_codes % kLanesRow == 0) {
    at = reinterpret_cast<const float*>(source);
    for (int64_t k = 0; k < num_codes; k += kLanesRow) note(load16(at + k));
  } else {
    for (int64_t k = 0; k < num_codes; k += kLanesRow) {
      const VecF v = load_some16(source + k, num_codes - k, -kInfF);
      store16(copy + k, v);
      note(v);
    }
  }
  const VecI32 nan = largest > 0x7f800000;
  const float best = max_lanes_f(top);
  const bool valid = best > -kInfF && best < kInfF && !any_lane(bit_cast<VecI64>(nan));
  const uintptr_t next =
      reinterpret_cast<uintptr_t>(source) + static_cast<uintptr_t>(ahead) * sizeof(T);
  return {at, best, valid, next, static_cast<int64_t>(sizeof(T))};
}

// A softmax by its likeliest code and the rest: mass = 1 + rest, log mass = log1p(rest), entropy =
// log mass - weighted / mass.
struct FloatSums {
  double rest;      // sum of exp(l - top), less 1
  double weighted;  // sum of exp(l - top) (l - top)
};

// What follows from the sums of eight rows.
struct FloatStatistics {
  VecD log_mass, inverse, entropy;  // inverse = 1 / mass

  LRL_INLINE FloatStatistics(VecD rest, VecD weighted)
      : log_mass(log1p(rest)),
        inverse(1.0 / (1.0 + rest)),
        entropy(log_mass - weighted * inverse) {}
};

// Codes whose lanes are added in float32, before the sums go on in float64: eight terms a lane.
constexpr int64_t kSumBlock = 8 * kLanesRow;
LRL_INLINE int64_t end_of_block(int64_t block, int64_t num_codes) {
  return block + kSumBlock < num_codes ? block + kSumBlock : num_codes;
}

// mass - 1. Where the row is nearly certain the rest is added again without the 1 of its likeliest
// code: next to it the digits of the others, which are those of a small entropy, are lost.
inline double rest_of(const FloatRow& row, int64_t num_codes, const float* exps, double mass) {
  if (mass >= 1.5) return mass - 1.0;
  WideSum behind, likeliest;
  for (int64_t k = 0; k < num_codes; k += kLanesRow) {
    const VecI32 less = load16(row.at + k) < splat_f(row.top);
    behind.add(less ? load16(exps + k) : VecF{});
    likeliest.add(less ? VecF{} : splat_f(1.0f));
  }
  // Of equally likely ones, all but one belong to the rest.
  return (likeliest.total() - 1.0) + behind.total();
}

// exp(l - top) of a row, and what its sums take of it.
struct FloatTerms {
  VecF d;        // l - top
  VecF clamped;  // at least kLeastExponent: where it is not d, the exponential is 0
  VecF e;        // exp(d)

  LRL_INLINE FloatTerms(const FloatRow& row, int64_t k)
      : d(load16(row.at + k) - row.top),
        clamped(max_f(splat_f(kLeastExponent), d)),
        e(exp(d, clamped)) {}
};

// The sums of a row, with exps[k] = exp(row[k] - top).
inline FloatSums softmax_sums(const FloatRow& row, int64_t num_codes, float* exps) {
  WideSum mass, weighted;
  for (int64_t block = 0; block < num_codes; block += kSumBlock) {
    VecF masses = VecF{};
    VecF products = VecF{};
    for (int64_t k = block; k < end_of_block(block, num_codes); k += kLanesRow) {
      row.prefetch(k);
      const FloatTerms terms(row, k);
      store16(exps + k, terms.e);
      masses += terms.e;
      products += terms.e * terms.clamped;
    }
    mass.add(masses);
    weighted.add(products);
  }
  return {rest_of(row, num_codes, exps, mass.total()), weighted.total()};
}

// The mass alone, of a row of whole vectors.
inline double softmax_mass(const float* row, int64_t num_codes, float top) {
  WideSum mass;
  for (int64_t block = 0; block < num_codes; block += kSumBlock) {
    VecF terms = VecF{};
    for (int64_t k = block; k < end_of_block(block, num_codes); k += kLanesRow) {
      terms += exp(load16(row + k) - top);
    }
    mass.add(terms);
  }
  return mass.total();
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
