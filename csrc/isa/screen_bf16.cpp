// The bfloat16 screen: vdpbf16ps multiplies twice as many columns a cycle as float32 fused
// multiply-adds do. Nothing on instruction sets without it.
#include "isa/screen.h"

#if defined(LATENT_RL_BF16_SCREEN)

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

LRL_INLINE __m512bh load_pairs(const BF16* p) {
  __m512bh v;
  memcpy(&v, p, sizeof(v));
  return v;
}

LRL_INLINE __m512bh splat_pair(const BF16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof(pair));
  return bit_cast<__m512bh>(_mm512_set1_epi32(pair));
}

}  // namespace

template <typename T>
RowNorm pack_row(const T* x, const float* centre, int64_t dim, BF16* out) {
  LaneF squares = LaneF{};
  LaneF lost = LaneF{};
  for (int64_t d = 0; d < dim; d += kLanesF) {
    const LaneF v = load_some_lanes(x + d, dim - d) - load_some_lanes(centre + d, dim - d);
    // Rounds to nearest and flushes subnormals, as the multiplication would.
    const __m256bh rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
    memcpy(out + d, &rounded, sizeof(rounded));
    const LaneF rest =
        v - bit_cast<LaneF>(__builtin_convertvector(bit_cast<LaneU16>(rounded), LaneU) << 16);
    squares += v * v;
    lost += rest * rest;
  }
  return row_norm(squares, lost, dim);
}

void screen_panel(const BF16* rows, int64_t row_stride, const BF16* panel, PanelBounds bounds,
                  int64_t dim, int32_t panel_id, ScreenState* states) {
  const auto add = [&](int64_t begin, int64_t end, Tile& scores) {
    for (int64_t d = begin; d < end; d += 2) {
      __m512bh codes[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) {
        codes[v] = load_pairs(panel + d * kPanelCodes + v * 2 * kLanesF);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kScreenRows; ++r) {
        const __m512bh x = splat_pair(rows + r * row_stride + d);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
          scores[r][v] =
              bit_cast<LaneF>(_mm512_dpbf16_ps(bit_cast<__m512>(scores[r][v]), x, codes[v]));
        }
      }
    }
  };
  screen_tile<BF16>(bounds, dim, panel_id, states, add);
}

template RowNorm pack_row(const float*, const float*, int64_t, BF16*);
template RowNorm pack_row(const BF16*, const float*, int64_t, BF16*);
template RowNorm pack_row(const F16*, const float*, int64_t, BF16*);

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl

#endif
