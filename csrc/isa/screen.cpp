// Compiled with -ffp-contract=fast: the error bounds of screen.h hold with and without fusion.
#include "isa/screen.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
template <typename T>
RowNorm pack_row(const T* x, const float* centre, int64_t dim, float* out) {
  LaneF squares = LaneF{};
  for (int64_t d = 0; d < dim; d += kLanesF) {
    const LaneF v = load_some_lanes(x + d, dim - d) - load_some_lanes(centre + d, dim - d);
    memcpy(out + d, &v, sizeof(v));
    squares += v * v;
  }
  return row_norm(squares, LaneF{}, dim);
}

void screen_panel(const float* rows, int64_t row_stride, const float* panel, PanelBounds bounds,
                  int64_t dim, int32_t panel_id, ScreenState* states) {
  const auto add = [&](int64_t begin, int64_t end, Tile& scores) {
    for (int64_t d = begin; d < end; ++d) {
      LaneF codes[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) {
        codes[v] = load_lanes(panel + d * kPanelCodes + v * kLanesF);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kScreenRows; ++r) {
        const LaneF x = LaneF{} + rows[r * row_stride + d];
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) scores[r][v] += x * codes[v];
      }
    }
  };
  screen_tile<float>(bounds, dim, panel_id, states, add);
}

namespace {

template <typename T, typename Term>
LRL_INLINE float direct_sum(const T* a, const T* b, int64_t dim, const Term& term) {
  LaneF sums[kDirectChains];
  for (int i = 0; i < kDirectChains; ++i) sums[i] = LaneF{};
  constexpr int64_t kTurn = kDirectChains * kLanesF;
  int64_t d = 0;
  for (; d + kTurn <= dim; d += kTurn) {
    for (int i = 0; i < kDirectChains; ++i) {
      sums[i] += term(load_lanes(a + d + i * kLanesF), load_lanes(b + d + i * kLanesF));
    }
  }
  for (; d < dim; d += kLanesF) {
    sums[0] += term(load_some_lanes(a + d, dim - d), load_some_lanes(b + d, dim - d));
  }
  for (int i = 1; i < kDirectChains; ++i) sums[0] += sums[i];
  return sum_of(sums[0]);
}

}  // namespace

template <typename T>
float direct_square_distance(const T* a, const T* b, int64_t dim) {
  return direct_sum(a, b, dim, [](LaneF u, LaneF v) { return (u - v) * (u - v); });
}

template <typename T>
float direct_dot(const T* a, const T* b, int64_t dim) {
  return direct_sum(a, b, dim, [](LaneF u, LaneF v) { return u * v; });
}

template RowNorm pack_row(const float*, const float*, int64_t, float*);
template RowNorm pack_row(const BF16*, const float*, int64_t, float*);
template RowNorm pack_row(const F16*, const float*, int64_t, float*);
template float direct_square_distance(const float*, const float*, int64_t);
template float direct_square_distance(const BF16*, const BF16*, int64_t);
template float direct_square_distance(const F16*, const F16*, int64_t);
template float direct_dot(const float*, const float*, int64_t);
template float direct_dot(const BF16*, const BF16*, int64_t);
template float direct_dot(const F16*, const F16*, int64_t);

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
