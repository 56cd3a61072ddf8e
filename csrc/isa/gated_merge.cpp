#include "isa/functions.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

LRL_INLINE VecD sigmoid(VecD v) {
  const VecD negated = -v;
  const VecD bounded = negated > splat(708.0) ? splat(708.0) : negated;
  return 1.0 / (exp(bounded) + 1.0);
}
// float32 is computed in float32: to a few units in the last place of what is stored.
LRL_INLINE VecF sigmoid(VecF v) {
  const VecF most = VecF{} + 86.0f;
  const VecF negated = -v;
  return 1.0f / (exp(negated > most ? most : negated) + 1.0f);
}

template <typename T>
constexpr int64_t kStep = kLanesD;
template <>
constexpr int64_t kStep<float> = 2 * kLanesD;

template <typename T>
LRL_INLINE VecD fetch(const T* p, int64_t count) {
  return load_some(p, count, 0.0);
}
LRL_INLINE VecF fetch(const float* p, int64_t count) {
  VecF v = {};
  if (count >= kStep<float>) {
    memcpy(&v, p, sizeof(v));
  } else {
    memcpy(&v, p, sizeof(float) * static_cast<size_t>(count));
  }
  return v;
}
template <typename T>
LRL_INLINE void put(T* p, VecD v, int64_t count) {
  store_some(p, v, count);
}
LRL_INLINE void put(float* p, VecF v, int64_t count) {
  if (count >= kStep<float>) {
    memcpy(p, &v, sizeof(v));
  } else {
    memcpy(p, &v, sizeof(float) * static_cast<size_t>(count));
  }
}

}  // namespace

// pre_gate += table_gate[code]; pre_up += table_up[code]; activation = silu(pre_gate) * pre_up.
// The activation of a row without a code is NaN.
void merge_forward(const MergeForwardArgs& args, int threads) {
  const int64_t width = args.width;
  const int64_t step = rows_per_task(args.rows, width * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        T* gate = static_cast<T*>(args.pre_gate) + row * width;
        T* up = static_cast<T*>(args.pre_up) + row * width;
        T* out = static_cast<T*>(args.activation) + row * width;
        const int64_t code = args.codes[row];
        const bool valid = code >= 0 && code < args.num_codes;
        const T* table_gate = static_cast<const T*>(args.table_gate) + (valid ? code : 0) * width;
        const T* table_up = static_cast<const T*>(args.table_up) + (valid ? code : 0) * width;
        const float absent = valid ? 0.0f : static_cast<float>(kNaN);
        for (int64_t i = 0; i < width; i += kStep<T>) {
          const int64_t left = width - i;
          const auto g = fetch(gate + i, left) + fetch(table_gate + i, left);
          const auto u = fetch(up + i, left) + fetch(table_up + i, left);
          put(gate + i, g, left);
          put(up + i, u, left);
          put(out + i, g * sigmoid(g) * u + absent, left);
        }
      }
    });
  });
}

// With s = sigmoid(gate): d_up = d silu(gate), d_gate = d up s (1 + gate (1 - s)). A row without a
// code passes no gradient on.
void merge_backward(const MergeBackwardArgs& args, int threads) {
  const int64_t width = args.width;
  const int64_t step = rows_per_task(args.rows, width * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * width;
        T* d_gate = static_cast<T*>(args.d_gate) + at;
        T* d_up = static_cast<T*>(args.d_up) + at;
        T* activation = static_cast<T*>(args.activation) + at;
        if (args.codes[row] < 0 || args.codes[row] >= args.num_codes) {
          const size_t bytes = sizeof(T) * static_cast<size_t>(width);
          memset(d_gate, 0, bytes);
          memset(d_up, 0, bytes);
          memset(activation, 0, bytes);
          continue;
        }
        const T* grad = static_cast<const T*>(args.d_activation) + at;
        const T* gate = static_cast<const T*>(args.pre_gate) + at;
        const T* up = static_cast<const T*>(args.pre_up) + at;
        for (int64_t i = 0; i < width; i += kStep<T>) {
          const int64_t left = width - i;
          const auto d = fetch(grad + i, left);
          const auto g = fetch(gate + i, left);
          const auto u = fetch(up + i, left);
          const auto s = sigmoid(g);
          const auto silu = g * s;
          put(activation + i, silu * u, left);
          put(d_up + i, d * silu, left);
          put(d_gate + i, d * u * s * (1.0f + g * (1.0f - s)), left);
        }
      }
    });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
