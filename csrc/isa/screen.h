// Float32 screening of codes, with a bound on its error.
//
// A panel holds kPanelCodes codes, transposed: panel[d * kPanelCodes + j]. For every row r and code
// j the kernel forms s = offset_j - x_r . p_j, and keeps per row and per lane (the codes with the
// same j % kLanesF) the lowest s with the vector of codes (j / kLanesF) it came from, and the
// second lowest s.
#pragma once

#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

#if defined(LATENT_RL_LANES_16)
constexpr int kLanesF = 16;
constexpr int kScreenRows = 12;
#elif defined(LATENT_RL_LANES_8)
constexpr int kLanesF = 8;
constexpr int kScreenRows = 6;
#else
constexpr int kLanesF = 4;
constexpr int kScreenRows = 4;
#endif
constexpr int kPanelVectors = 2;
constexpr int kPanelCodes = kPanelVectors * kLanesF;
// Columns summed in one chain of fused multiply-adds; the chains are then added up. Shorter chains
// make the error bound, and with it the number of rows to look at again, smaller.
constexpr int64_t kChain = 256;

typedef float LaneF __attribute__((vector_size(4 * kLanesF)));
typedef int32_t LaneI __attribute__((vector_size(4 * kLanesF)));

struct ScreenState {
  LaneF best;
  LaneF second;
  LaneI panel;
};

// `rows` is row-major with `row_stride` floats between rows, kScreenRows rows of it. `states` has
// kScreenRows entries.
void screen_panel(const float* rows, int64_t row_stride, const float* panel, const float* offsets,
                  int64_t dim, int32_t panel_id, ScreenState* states);

// The relative error of a dot product: |error| <= screen_gamma(D) * sum |x_i p_i|.
// A chain of n operations each within 2^-24 is within n u / (1 - n u); the sum of the chains, the
// rounding of products where there is no fused multiply-add, and of the final subtraction add to n.
inline double screen_gamma(int64_t dim) {
  const double chain = static_cast<double>(dim < kChain ? dim : kChain);
  const double chains = static_cast<double>((dim + kChain - 1) / kChain);
  const double n = chain + chains + 4.0;
  const double u = 0x1p-24;
  return n * u / (1.0 - n * u);
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
