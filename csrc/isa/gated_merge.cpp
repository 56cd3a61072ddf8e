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

typedef uint32_t WordsU32 __attribute__((vector_size(64)));
typedef uint16_t WordsU16 __attribute__((vector_size(32)));

// float64 is computed eight lanes at a time, everything else in float32, sixteen at a time.
template <typename T>
constexpr int64_t kStep = 2 * kLanesD;
template <>
constexpr int64_t kStep<double> = kLanesD;

// Up to kStep elements, the missing ones zero.
template <typename Vec, typename T>
LRL_INLINE Vec copied(const T* p, int64_t count) {
  Vec v = {};
  if (count >= kStep<T>) {
    memcpy(&v, p, sizeof(v));
  } else {
    memcpy(&v, p, sizeof(T) * static_cast<size_t>(count));
  }
  return v;
}
template <typename Vec, typename T>
LRL_INLINE void copy_out(T* p, const Vec& v, int64_t count) {
  if (count >= kStep<T>) {
    memcpy(p, &v, sizeof(v));
  } else {
    memcpy(p, &v, sizeof(T) * static_cast<size_t>(count));
  }
}

LRL_INLINE VecD fetch(const double* p, int64_t count) { return copied<VecD>(p, count); }
LRL_INLINE VecF fetch(const float* p, int64_t count) { return copied<VecF>(p, count); }
LRL_INLINE VecF fetch(const BF16* p, int64_t count) {
  return bit_cast<VecF>(__builtin_convertvector(copied<WordsU16>(p, count), WordsU32) << 16);
}
LRL_INLINE VecF fetch(const F16* p, int64_t count) {
  QuarterU16 low, high;
  split(copied<WordsU16>(p, count), &low, &high);
  const HalfF halves[2] = {half_to_float(low), half_to_float(high)};
  VecF v;
  memcpy(&v, halves, sizeof(v));
  return v;
}

LRL_INLINE void put(double* p, VecD v, int64_t count) { copy_out(p, v, count); }
LRL_INLINE void put(float* p, VecF v, int64_t count) { copy_out(p, v, count); }
// Rounded to nearest, ties to even; NaN stays NaN.
LRL_INLINE void put(BF16* p, VecF v, int64_t count) {
  const WordsU32 bits = bit_cast<WordsU32>(v);
  const WordsU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordsU32 nan = (bits >> 16) | 0x40u;
  const WordsU32 half = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  copy_out(p, __builtin_convertvector(half, WordsU16), count);
}
LRL_INLINE void put(F16* p, VecF v, int64_t count) {
  for (int64_t lane = 0; lane < kStep<F16> && lane < count; ++lane) store(p + lane, v[lane]);
}

}  // namespace

// activation = silu(pre_gate) * pre_up, NaN for a row without a code. With tables, first
// pre_gate += table_gate[code] and pre_up += table_up[code]; the activation is that of the sums
// before they are rounded to the dtype.
void merge_forward(const MergeForwardArgs& args, int threads) {
  const int64_t width = args.width;
  const int64_t step = rows_per_task(args.rows, width * 4);
  const bool with_tables = args.table_gate != nullptr;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        T* gate = static_cast<T*>(args.pre_gate) + row * width;
        T* up = static_cast<T*>(args.pre_up) + row * width;
        T* out = static_cast<T*>(args.activation) + row * width;
        const int64_t code = args.codes[row];
        const bool valid = code >= 0 && code < args.num_codes;
        const float absent = valid ? 0.0f : static_cast<float>(kNaN);
        if (!with_tables) {
          for (int64_t i = 0; i < width; i += kStep<T>) {
            const int64_t left = width - i;
            const auto g = fetch(gate + i, left);
            put(out + i, g * sigmoid(g) * fetch(up + i, left) + absent, left);
          }
          continue;
        }
        const int64_t entry = (valid ? code : 0) * width;
        const Acc<T>* table_gate = static_cast<const Acc<T>*>(args.table_gate) + entry;
        const Acc<T>* table_up = static_cast<const Acc<T>*>(args.table_up) + entry;
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
