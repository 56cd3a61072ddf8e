#include "isa/functions.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

LRL_INLINE VecD sigmoid(VecD v) {
  const VecD negated = -v;
  const VecD bounded = negated > splat(708.0) ? splat(708.0) : negated;
  return splat(1.0) / (exp(bounded) + 1.0);
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
        for (int64_t i = 0; i < width; i += kLanesD) {
          const int64_t left = width - i;
          const VecD g = load_some(gate + i, left, 0.0) + load_some(table_gate + i, left, 0.0);
          const VecD u = load_some(up + i, left, 0.0) + load_some(table_up + i, left, 0.0);
          store_some(gate + i, g, left);
          store_some(up + i, u, left);
          store_some(out + i, valid ? g * sigmoid(g) * u : splat(kNaN), left);
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
        for (int64_t i = 0; i < width; i += kLanesD) {
          const int64_t left = width - i;
          const VecD d = load_some(grad + i, left, 0.0);
          const VecD g = load_some(gate + i, left, 0.0);
          const VecD u = load_some(up + i, left, 0.0);
          const VecD s = sigmoid(g);
          const VecD silu = g * s;
          store_some(activation + i, silu * u, left);
          store_some(d_up + i, d * silu, left);
          store_some(d_gate + i, d * u * s * (1.0 + g * (1.0 - s)), left);
        }
      }
    });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
