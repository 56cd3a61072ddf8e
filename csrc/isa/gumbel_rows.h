// A row of gumbel_quantize in float32: the draw, exactly float64's, and the relaxation.
//
// argmax l + G = argmax p / E with p = exp(l - top) and E = -log u: the softmax needs p anyway. As
// E >= v = 1 - u, which is the word's complement, p / v bounds the ratio without a logarithm. The
// block of codes with the greatest bound is scored in float64, and then only the blocks whose bound
// reaches what it found. kSlack covers the rounding of p (difference 1.6e-6 within 27 of the top,
// exponential 2.4e-7), of v and of the quotient (6e-8 each), and float64's own, 1e-8 at most for a
// top within kLargestTop; beyond that, where float64 rounds the noise itself, every block is
// scored. Codes further than 27 below the top cannot win: the noise lies in [-3.2, 22.9].
#pragma once

#include "isa/float_noise.h"
#include "isa/float_rows.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

constexpr int64_t kVectors = kNoiseBlock / kLanesRow;
constexpr double kSlack = 1e-4;

// Widens a row to float32, padded with -inf to padded(num_codes). Returns the maximum, or NaN for
// an invalid row: it holds NaN or +inf, or nothing but -inf.
template <typename T>
float widen_row_f(const T* row, int64_t num_codes, float* out) {
  const int64_t width = padded(num_codes);
  int64_t k = 0;
  for (; k + kLanesD <= num_codes; k += kLanesD) {
    const HalfF v = load8f(row + k);
    memcpy(out + k, &v, sizeof(v));
  }
  for (; k < num_codes; ++k) out[k] = static_cast<float>(to_double(row[k]));
  for (; k < width; ++k) out[k] = -__builtin_inff();
  VecF top = splat_f(-__builtin_inff());
  VecI32 legal = VecI32{} - 1;
  for (k = 0; k < width; k += kLanesRow) {
    const VecF v = load16(out + k);
    legal &= v < splat_f(__builtin_inff());  // false for NaN and +inf
    top = max_f(top, v);
  }
  bool valid = true;
  for (int lane = 0; lane < kLanesRow; ++lane) valid = valid && legal[lane] != 0;
  const float best = max_lanes_f(top);
  return valid && best > -__builtin_inff() ? best : __builtin_nanf("");
}

struct Scores {
  double value[kNoiseBlock];
};

// The scores the draw is defined by, of 32 codes.
template <typename S>
LRL_INLINE Scores scores_of_block(const S* row, PhiloxKey key, int64_t block) {
  const NoiseBlock words = philox_block(key, block);
  Scores scores;
  for (int64_t part = 0; part < kNoiseBlock / kLanesD; ++part) {
    const int64_t at = part * kLanesD;
    store8(scores.value + at,
           load8(row + block * kNoiseBlock + at) + gumbel(widen(words.part[part])));
  }
  return scores;
}

// argmax of row + noise in float64, lowest id first. `bounds` holds 16 bounds of p / v, up to a
// common factor, for every block.
inline int64_t draw(const float* row, int64_t num_codes, float top, PhiloxKey key,
                    const float* bounds, float greatest) {
  const int64_t blocks = padded(num_codes) / kNoiseBlock;
  int64_t likely = 0;
  while (!any_lane(bit_cast<VecI64>(load16(bounds + likely * kLanesRow) == splat_f(greatest)))) {
    ++likely;
  }
  const Scores first = scores_of_block(row, key, likely);
  double reached = -kInf;
  for (int64_t i = 0; i < kNoiseBlock; ++i) {
    reached = first.value[i] > reached ? first.value[i] : reached;
  }
  const bool all = top > kLargestTop || top < -kLargestTop;
  // p / (2^32 v) must reach this.
  const float least =
      all ? -1.0f : static_cast<float>(exp(splat(reached - top))[0] * (1.0 - kSlack) * 0x1p-32);
  ArgMax running;
  for (int64_t block = 0; block < blocks; ++block) {
    const VecI32 reaching = load16(bounds + block * kLanesRow) >= splat_f(least);
    if (block != likely && !any_lane(bit_cast<VecI64>(reaching))) continue;
    const Scores scores = block == likely ? first : scores_of_block(row, key, block);
    for (int64_t i = 0; i < kNoiseBlock; i += kLanesD) {
      running.add(load8(scores.value + i), block * kNoiseBlock + i);
    }
  }
  return running.lowest();
}

struct RowSums {
  double mass;
  double entropy;
};

// exps = exp(row - top), the sums of it, and the code drawn. `bounds` has room for half a row.
inline RowSums softmax_and_draw(const float* row, int64_t num_codes, float top, PhiloxKey key,
                                float* exps, float* bounds, int64_t* code) {
  WideSum mass;
  WideSum weighted;
  VecF best = VecF{};
  for (int64_t k = 0; k < padded(num_codes); k += kNoiseBlock) {
    const NoiseBlock words = philox_block(key, k / kNoiseBlock);
    VecF bound = VecF{};
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const int64_t at = k + vector * kLanesRow;
      const VecF d = load16(row + at) - top;
      const VecF e = exp(d);
      store16(exps + at, e);
      mass.add(e);
      weighted.add(e * max_f(d, splat_f(kVeryLowF)));
      bound = max_f(bound, e / complement(words16(words, vector)));
    }
    store16(bounds + k / kNoiseBlock * kLanesRow, bound);
    best = max_f(best, bound);
  }
  *code = draw(row, num_codes, top, key, bounds, max_lanes_f(best));
  const double total = mass.total();
  return {total, log1(total) - weighted.total() / total};
}

// soft = softmax((row + G) / tau).
inline void relax(const float* row, int64_t num_codes, float row_top, double tau, PhiloxKey key,
                  float* soft) {
  const int64_t width = padded(num_codes);
  VecF best = splat_f(-__builtin_inff());
  for (int64_t k = 0; k < width; k += kNoiseBlock) {
    const NoiseBlock words = philox_block(key, k / kNoiseBlock);
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const int64_t at = k + vector * kLanesRow;
      const VecF score = (load16(row + at) - row_top) + gumbel_f(words16(words, vector));
      store16(soft + at, score);
      best = max_f(best, score);
    }
  }
  const float top = max_lanes_f(best);
  const float inverse_tau = static_cast<float>(1.0 / tau);
  WideSum mass;
  for (int64_t k = 0; k < width; k += kLanesRow) {
    const VecF e = exp((load16(soft + k) - top) * inverse_tau);
    store16(soft + k, e);
    mass.add(e);
  }
  const float inverse = static_cast<float>(1.0 / mass.total());
  for (int64_t k = 0; k < width; k += kLanesRow) store16(soft + k, load16(soft + k) * inverse);
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
