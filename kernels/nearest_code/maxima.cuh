// Best score, its code and the runner-up of rows whose scores lie in registers.
#pragma once

#include <cstdint>

#include "common/element.cuh"
#include "nearest_code/pipeline.cuh"

namespace latent_rl {
namespace cuda {
namespace nearest {

// A thread's 32 scores of a row and tile form a grid: 4 stretches of 8 slots.
constexpr int kStretches = 4;
constexpr int kSlots = 8;
constexpr int kFragments = kSlots / 2;  // of 8 columns, of which a thread has two

__device__ inline float keyed(float score, int mask, int id) {
  return __int_as_float((__float_as_int(score) & ~mask) | id);
}

// What a thread knows of one of its rows.
//
// Every score enters two maxima: of its stretch (this tile, a quarter of the columns) and of its
// slot (place within the quarter, all tiles). The best score is the largest of either; any other
// score lies in another stretch or in another slot, so the larger of the two runners-up is the
// runner-up. Two maxima a score, where finding best, code and runner-up directly takes four
// operations.
struct Best {
  float best = kUnusable, second = kUnusable;  // of the stretches, keyed by their number
  int tile = 0;                                // of the best
  float slots[kSlots];

  __device__ void start() {
    best = second = kUnusable;
    tile = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) slots[s] = kUnusable;
  }
  __device__ static void enter(float key, float& best, float& second) {
    second = fmaxf(second, fminf(best, key));
    best = fmaxf(best, key);
  }
  // Best score, runner-up and code [tile, column] of the thread's columns.
  __device__ void finish(float& top, float& runner_up, int& code) const {
    float slot_best = kUnusable, slot_second = kUnusable;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) enter(keyed(slots[s], kSlots - 1, s), slot_best, slot_second);
    const int slot = __float_as_int(slot_best) & (kSlots - 1);
    const int stretch = __float_as_int(best) & (kStretches - 1);
    const int lane = static_cast<int>(threadIdx.x % 4);
    code = tile * kTileCodes + (stretch * kFragments + slot / 2) * 8 + lane * 2 + slot % 2;
    // Where the two disagree on the winner they differ by less than the bound: not decided.
    top = fminf(best, slot_best);
    runner_up = fmaxf(second, slot_second);
  }
};

template <bool kScaled>
__device__ void enter_scores(const float (&sums)[kProducts][hopper::kSums], const float* biases,
                             const float* scales, int tile, Best (&rows)[kProducts][kHalves]) {
  const int column = static_cast<int>(threadIdx.x % 4) * 2;
  float before[kProducts][kHalves];
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) before[p][h] = rows[p][h].best;
  }
#pragma unroll
  for (int q = 0; q < kStretches; ++q) {
    Vector<float, 2> bias[kFragments], scale[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      bias[f] = load_vector<2>(biases + (q * kFragments + f) * 8 + column);
      if (kScaled) scale[f] = load_vector<2>(scales + (q * kFragments + f) * 8 + column);
    }
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        Best& row = rows[p][h];
        float top = kUnusable;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int f = s / 2, e = s % 2;
          const float sum = sums[p][(q * kFragments + f) * 4 + h * 2 + e];
          const float score =
              kScaled ? fmaf(sum, scale[f].at[e], bias[f].at[e]) : sum + bias[f].at[e];
          row.slots[s] = fmaxf(row.slots[s], score);
          top = s == 0 ? score : fmaxf(top, score);
        }
        Best::enter(keyed(top, kStretches - 1, q), row.best, row.second);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (rows[p][h].best > before[p][h]) rows[p][h].tile = tile;
    }
  }
}

}  // namespace nearest
}  // namespace cuda
}  // namespace latent_rl
