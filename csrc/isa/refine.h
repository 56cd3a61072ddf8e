// Choosing among the codes a screen has left: float32 distances of the rows themselves, then, where
// those leave a choice too, float64.
#pragma once

#include "isa/codebook.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

template <typename T>
double dot(const T* a, const T* b, int64_t dim) {
  VecD sum = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    sum += load_some(a + d, dim - d, 0.0) * load_some(b + d, dim - d, 0.0);
  }
  return sum_lanes(sum);
}

template <typename T>
double square_distance(const T* a, const T* b, int64_t dim) {
  VecD sum = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    const VecD diff = load_some(a + d, dim - d, 0.0) - load_some(b + d, dim - d, 0.0);
    sum += diff * diff;
  }
  return sum_lanes(sum);
}

// What float64 minimises. The norm of x scales all cosines alike and is left out.
template <typename T>
double exact_key(const Codebook<T>& book, const T* x, int64_t code) {
  const T* c = book.codes + code * book.dim;
  if (book.metric == Metric::kL2) return square_distance(x, c, book.dim);
  const double product = dot(x, c, book.dim);
  if (book.metric == Metric::kDot) return -product;
  return book.norms[code] > 0.0 ? -product / book.norms[code] : 0.0;
}

// The lowest key, ties to the lowest id, in whatever order the codes are offered.
template <typename T>
struct ExactChoice {
  const Codebook<T>& book;
  const T* x;
  int64_t code = -1;
  double key = kInf;

  void offer(int64_t candidate) {
    if (book.finite[candidate] == 0) return;
    const double value = exact_key(book, x, candidate);
    if (code < 0 || value < key || (value == key && candidate < code)) {
      code = candidate;
      key = value;
    }
  }

  int64_t among_all() {
    for (int64_t j = 0; j < book.num_codes; ++j) offer(j);
    return code;
  }
};

template <typename T>
double distance_of(const Codebook<T>& book, const T* x, int64_t code) {
  const double key = exact_key(book, x, code);
  if (book.metric != Metric::kCosine) return key;
  const double norm = __builtin_sqrt(square_norm(x, book.dim));
  return norm > 0.0 ? 1.0 + key / norm : 1.0;
}

// Codes that may be a row's nearest; room for every code.
struct Candidates {
  int32_t* ids;
  float* keys;
  int64_t count;
};

// The float32 key of one code.
template <typename T>
float direct_key(const Codebook<T>& book, const T* x, int64_t code) {
  const T* c = book.codes + code * book.dim;
  if (book.metric == Metric::kL2) return direct_square_distance(x, c, book.dim);
  const float product = direct_dot(x, c, book.dim);
  return static_cast<float>(-product * book.scale(code));
}

// The highest float32 key that the nearest code can have when the lowest is `lowest`.
template <typename T>
double direct_limit(const Codebook<T>& book, double lowest, double x_norm) {
  const double relative = direct_gamma(book.dim) + book.exact_gamma();
  // What products below the normal range can lose.
  const double under = static_cast<double>(book.dim) * 0x1p-148;
  if (book.metric == Metric::kL2) return (lowest + under) * (1.0 + 2.5 * relative) + under;
  // Dividing by a short code's length magnifies what its product lost.
  const double reach = x_norm * book.reach();
  return lowest + 2.0 * (relative + 0x1p-23) * reach + 2.0 * under * book.scale_max();
}

template <typename T>
int64_t exact_choice(const Codebook<T>& book, const T* x, const Candidates& candidates) {
  ExactChoice<T> exact{book, x};
  for (int64_t i = 0; i < candidates.count; ++i) exact.offer(candidates.ids[i]);
  return exact.code;
}

// Drops the candidates that float32 distances rule out. Keys that are not finite rule nothing out.
template <typename T>
void drop_distant(const Codebook<T>& book, const T* x, double x_norm, Candidates* candidates) {
  const bool l2 = book.metric == Metric::kL2;
  if (!l2 && !(x_norm * book.norm_max < 1e37)) return;  // products could overflow
  float lowest = __builtin_inff();
  int64_t count = 0;
  for (int64_t i = 0; i < candidates->count; ++i) {
    const int32_t code = candidates->ids[i];
    if (book.finite[code] == 0) continue;
    const float key = direct_key(book, x, code);
    lowest = key < lowest ? key : lowest;
    candidates->ids[count] = code;
    candidates->keys[count++] = key;
  }
  const double limit = direct_limit(book, static_cast<double>(lowest), x_norm);
  candidates->count = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(static_cast<double>(candidates->keys[i]) > limit)) {
      candidates->ids[candidates->count++] = candidates->ids[i];
    }
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
