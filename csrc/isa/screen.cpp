// Compiled with -ffp-contract=fast: the error bound of screen.h holds with and without fusion.
#include "isa/screen.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

LRL_INLINE LaneF load_lanes(const float* p) {
  LaneF v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// One chain over [0, dim) columns for kScreenRows rows by kPanelCodes codes, in registers.
LRL_INLINE void chain(const float* __restrict rows, int64_t row_stride,
                      const float* __restrict panel, int64_t dim,
                      LaneF (&sums)[kScreenRows][kPanelVectors]) {
  for (int r = 0; r < kScreenRows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = LaneF{};
  }
  // Two columns a turn would not help: the loop is bound by the multiply-adds.
  for (int64_t d = 0; d < dim; ++d) {
    LaneF codes[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) codes[v] = load_lanes(panel + v * kLanesF);
    panel += kPanelCodes;
#pragma GCC unroll 16
    for (int r = 0; r < kScreenRows; ++r) {
      const LaneF x = LaneF{} + rows[r * row_stride + d];
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] += x * codes[v];
    }
  }
}

LRL_INLINE void keep_lowest(LaneF score, int32_t id, ScreenState* state) {
  const LaneI better = score < state->best;
  const LaneF loser = better ? state->best : score;
  state->second = loser < state->second ? loser : state->second;
  state->best = better ? score : state->best;
  state->panel = better ? LaneI{} + id : state->panel;
}

}  // namespace

void screen_panel(const float* rows, int64_t row_stride, const float* panel, const float* offsets,
                  int64_t dim, int32_t panel_id, ScreenState* states) {
  LaneF sums[kScreenRows][kPanelVectors];
  chain(rows, row_stride, panel, dim < kChain ? dim : kChain, sums);
  if (dim > kChain) {
    LaneF total[kScreenRows][kPanelVectors];
    memcpy(total, sums, sizeof(total));
    for (int64_t d = kChain; d < dim; d += kChain) {
      chain(rows + d, row_stride, panel + d * kPanelCodes, dim - d < kChain ? dim - d : kChain,
            sums);
      for (int r = 0; r < kScreenRows; ++r) {
        for (int v = 0; v < kPanelVectors; ++v) total[r][v] += sums[r][v];
      }
    }
    memcpy(sums, total, sizeof(total));
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    const LaneF offset = load_lanes(offsets + v * kLanesF);
    // A panel has kPanelVectors vectors that share lanes, so the id says which one it was too.
    const int32_t id = panel_id * kPanelVectors + v;
    for (int r = 0; r < kScreenRows; ++r) keep_lowest(offset - sums[r][v], id, states + r);
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
