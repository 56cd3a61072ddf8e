// Approximate scores of codes in float32 or bfloat16, with bounds on their error. The proofs are in
// kernels/nearest_code/README.md.
//
// A panel holds kPanelCodes codes, transposed; kColumns<E> neighbouring columns of a code stay
// together: panel[(d / kColumns) * kPanelCodes * kColumns + j * kColumns + d % kColumns]. For every
// row r and code j the kernel forms the greatest score that code can truly have,
//
//   s = bias_j + lost_r norm_j + kept_r loss_j + x_r . p_j,
//
// and keeps per row and per lane (the codes with the same j % kLanesF) the highest s with the
// vector of codes (j / kLanesF) it came from, and the second highest s.
#pragma once

#include "isa/lanes.h"

#if defined(__AVX512BF16__)
#define LATENT_RL_BF16_SCREEN
#endif

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

#if defined(LATENT_RL_LANES_16)
constexpr int kScreenRows = 6;
constexpr int kPanelVectors = 4;
#elif defined(LATENT_RL_LANES_8)
constexpr int kScreenRows = 6;
constexpr int kPanelVectors = 2;
#else
constexpr int kScreenRows = 4;
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanelCodes = kPanelVectors * kLanesF;

// Of one panel, kPanelCodes each; see pack_codebook.
struct PanelBounds {
  const float* bias;
  const float* norm;
  const float* loss;
};

struct ScreenState {
  float lost;  // what rounding took from the row, |u - u'|
  float kept;  // |u'|
  LaneF best;
  LaneF second;
  LaneI vector;
};

// Upper bounds on the length of a centred row, |x - centre|, and of what rounding it lost.
struct RowNorm {
  double length;
  double lost;
};

template <typename E>
struct ScreenTraits;
template <>
struct ScreenTraits<float> {
  static constexpr int64_t kColumns = 1;
  // Columns summed in one chain, before the chains are added up: short chains round less.
  static constexpr int64_t kChain = 256;
  static constexpr double kStep = 0x1p-24;
};
template <>
struct ScreenTraits<BF16> {
  static constexpr int64_t kColumns = 2;
  static constexpr int64_t kChain = 1024;
  // vdpbf16ps rounds to nearest after each of its two additions; twice that also covers a unit that
  // truncates, or adds the pair first.
  static constexpr double kStep = 0x1p-23;
};

// What accumulating seeds + x . p rounds away is at most screen_gamma(D) (|seeds| + sum |x_i p_i|):
// a term passes through no more than a chain's steps, the additions of the chains and the seeds,
// and the rounding of its product where there is no fused multiply-add.
template <typename E>
double screen_gamma(int64_t dim) {
  const int64_t chain = ScreenTraits<E>::kChain;
  const double steps = static_cast<double>((dim < chain ? dim : chain) + (dim + chain - 1) / chain);
  const double n = (steps + 8.0) * ScreenTraits<E>::kStep;
  return n / (1.0 - n);
}

// Subtracts the centre from a row, rounds it to the element of the screen, and fills it up with
// zeros to a multiple of kLanesF. Not finite norms mean a row that is not finite or too long.
template <typename T>
RowNorm pack_row(const T* x, const float* centre, int64_t dim, float* out);
// Scores kScreenRows rows, `row_stride` elements apart, against one panel.
void screen_panel(const float* rows, int64_t row_stride, const float* panel, PanelBounds bounds,
                  int64_t dim, int32_t panel_id, ScreenState* states);

#if defined(LATENT_RL_BF16_SCREEN)
using FastElement = BF16;
template <typename T>
RowNorm pack_row(const T* x, const float* centre, int64_t dim, BF16* out);
void screen_panel(const BF16* rows, int64_t row_stride, const BF16* panel, PanelBounds bounds,
                  int64_t dim, int32_t panel_id, ScreenState* states);
#else
using FastElement = float;
#endif

// Squared distance and dot product of two rows in float32: within direct_gamma(D) of the sum of the
// terms' magnitudes, besides underflow.
template <typename T>
float direct_square_distance(const T* a, const T* b, int64_t dim);
template <typename T>
float direct_dot(const T* a, const T* b, int64_t dim);

constexpr int kDirectChains = 4;
inline double direct_gamma(int64_t dim) {
  const double chain = static_cast<double>(dim) / (kDirectChains * kLanesF);
  // The chain, adding up chains and lanes, and the roundings of difference, square and tail.
  const double n = (chain + kDirectChains + kLanesF + 8.0) * 0x1p-24;
  return n / (1.0 - n);
}

// The scores of one tile. Every loop over it is unrolled, so that it lives in registers.
typedef LaneF Tile[kScreenRows][kPanelVectors];

LRL_INLINE void keep_highest(LaneF score, int32_t id, ScreenState* state) {
  const LaneF best = state->best;
  state->vector = score > best ? LaneI{} + id : state->vector;
  state->second = max(state->second, min(score, best));
  state->best = max(score, best);
}

// What the screens of both elements share: seeds the scores with bias and bounds, sums chain by
// chain with add(begin, end, &scores), and keeps the highest.
template <typename E, typename Add>
LRL_INLINE void screen_tile(PanelBounds bounds, int64_t dim, int32_t panel_id, ScreenState* states,
                            const Add& add) {
  constexpr int64_t kChain = ScreenTraits<E>::kChain;
  Tile scores;
  Tile total;
#pragma GCC unroll 8
  for (int r = 0; r < kScreenRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t at = v * kLanesF;
      scores[r][v] = load_lanes(bounds.bias + at) + states[r].lost * load_lanes(bounds.norm + at) +
                     states[r].kept * load_lanes(bounds.loss + at);
    }
  }
  int64_t begin = 0;
  for (; begin + kChain < dim; begin += kChain) {
    add(begin, begin + kChain, scores);
#pragma GCC unroll 8
    for (int r = 0; r < kScreenRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) {
        total[r][v] = begin == 0 ? scores[r][v] : total[r][v] + scores[r][v];
        scores[r][v] = LaneF{};
      }
    }
  }
  add(begin, dim, scores);
  if (begin > 0) {
#pragma GCC unroll 8
    for (int r = 0; r < kScreenRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) scores[r][v] += total[r][v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kScreenRows; ++r) {
    ScreenState state = states[r];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      // The vectors of a panel share lanes, so the id says which one it was too.
      keep_highest(scores[r][v], panel_id * kPanelVectors + v, &state);
    }
    states[r] = state;
  }
}

// An upper bound on sqrt(sum of squares), from lanes of squares summed in float32.
inline double upper_root(LaneF squares, int64_t dim) {
  const double n = static_cast<double>(dim) / kLanesF + kLanesF + 8.0;
  const double sum = static_cast<double>(sum_of(squares)) * (1.0 + n * 0x1p-23);
  // Squares below the normal range may have been rounded to nothing.
  return __builtin_sqrt(sum + static_cast<double>(dim) * 0x1p-148);
}

inline RowNorm row_norm(LaneF squares, LaneF lost, int64_t dim) {
  const double length = upper_root(squares, dim) * (1.0 + 0x1p-22);
  // Rounding of the subtraction of the centre comes on top of what was measured.
  return {length, upper_root(lost, dim) + length * 0x1p-23};
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
