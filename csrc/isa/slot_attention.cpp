// slot_attention: one query position per row over a run of shared keys and one of its own.
//
// One task is a row's key head and the queries that share it, so its keys come from memory once and
// for the other queries from cache. Eight keys at a time are scored and their sums transposed
// together, so that narrow heads do not pay a horizontal sum each.
#include "isa/functions.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

constexpr int kKeys = 8;             // scored together
constexpr int64_t kMostQueries = 4;  // of one key head, scored together

// Float32 lanes for all but float64.
template <typename T>
struct LanesOf {
  using type = HalfF;
};
template <>
struct LanesOf<double> {
  using type = VecD;
};

template <typename T>
LRL_INLINE typename LanesOf<T>::type load_lanes(const T* p) {
  return load8f(p);
}
template <>
LRL_INLINE VecD load_lanes<double>(const double* p) {
  return load8(p);
}

template <typename V, typename T>
LRL_INLINE V load_lanes_some(const T* p, int64_t count) {
  V v = V{};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<Acc<T>>(to_double(p[lane]));
  return v;
}

// Lane i of the result is the sum of the lanes of v[i], in one fixed order.
template <typename V>
LRL_INLINE V transposed_sums(const V (&v)[kKeys]) {
  V pairs[4];
  for (int i = 0; i < 4; ++i) {
    const V a = v[2 * i];
    const V b = v[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) +
               __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
  V quads[2];
  for (int i = 0; i < 2; ++i) {
    const V a = pairs[2 * i];
    const V b = pairs[2 * i + 1];
    quads[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 2, 3, 10, 11) +
               __builtin_shufflevector(a, b, 4, 5, 12, 13, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Products of kQueries queries with `count` <= 8 keys, [kQueries, 8]; lanes from `count` on are 0.
// With kWhole the count is eight, which the compiler unrolls.
template <int kQueries, bool kWhole, typename T>
LRL_INLINE void score_keys(const Acc<T>* queries, const T* keys, int64_t stride, int64_t count,
                           int64_t dim, typename LanesOf<T>::type (&out)[kQueries]) {
  using V = typename LanesOf<T>::type;
  V sums[kQueries][kKeys];
  for (int g = 0; g < kQueries; ++g) {
    for (int j = 0; j < kKeys; ++j) sums[g][j] = V{};
  }
  int64_t d = 0;
  for (; d + kLanesD <= dim; d += kLanesD) {
    V q[kQueries];
    for (int g = 0; g < kQueries; ++g) memcpy(&q[g], queries + g * dim + d, sizeof(V));
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      if (!kWhole && j >= count) break;
      const V k = load_lanes(keys + j * stride + d);
#pragma GCC unroll 4
      for (int g = 0; g < kQueries; ++g) sums[g][j] += q[g] * k;
    }
  }
  if (d < dim) {
    for (int j = 0; j < kKeys; ++j) {
      if (!kWhole && j >= count) break;
      const V k = load_lanes_some<V>(keys + j * stride + d, dim - d);
      for (int g = 0; g < kQueries; ++g) {
        sums[g][j] += load_lanes_some<V>(queries + g * dim + d, dim - d) * k;
      }
    }
  }
  for (int g = 0; g < kQueries; ++g) out[g] = transposed_sums(sums[g]);
}

// exp of lanes at most 0, within 2 ulp.
LRL_INLINE VecD exp_lanes(VecD v) { return exp(v); }
LRL_INLINE HalfF exp_lanes(HalfF x) {
  typedef int32_t HalfI __attribute__((vector_size(32)));
  const HalfF shifter = HalfF{} + 0x1.8p23f;
  // Below -87 the weight is under 2e-38 of the largest: nothing.
  const HalfF clamped = x < -87.0f ? HalfF{} - 87.0f : x;
  const HalfF shifted = clamped * 0x1.715476p0f + shifter;
  const HalfF n = shifted - shifter;
  const HalfF r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  // Taylor: |r| <= 0.347, so the first term left out is below 6e-9 of the sum.
  HalfF p = HalfF{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const HalfI exponent = (bit_cast<HalfI>(shifted) - bit_cast<HalfI>(shifter) + 127) << 23;
  return x < -87.0f ? HalfF{} : p * bit_cast<HalfF>(exponent);
}

// Scores become weights that sum to one; a query without keys gets zeros.
template <typename A>
void softmax_row(A* scores, int64_t count) {
  using V = typename LanesOf<A>::type;
  const int64_t whole = (count + kKeys - 1) / kKeys * kKeys;
  A top = static_cast<A>(-kInf);
  for (int64_t j = 0; j < count; ++j) top = scores[j] > top ? scores[j] : top;
  for (int64_t j = count; j < whole; ++j) scores[j] = static_cast<A>(-kInf);
  V total = V{};
  for (int64_t j = 0; j < whole; j += kKeys) {
    V v;
    memcpy(&v, scores + j, sizeof(v));
    v = exp_lanes(v - top);
    total += v;
    memcpy(scores + j, &v, sizeof(v));
  }
  const A sum = ((total[0] + total[1]) + (total[2] + total[3])) +
                ((total[4] + total[5]) + (total[6] + total[7]));
  for (int64_t j = 0; j < whole; ++j) scores[j] /= sum;
}

// Columns [e, e + 8) of kQueries weighted sums of values; weights are [kQueries, stride_w].
template <int kQueries, typename T>
LRL_INLINE void add_values(const Acc<T>* weights, int64_t weight_stride, const T* values,
                           int64_t stride, int64_t count, int64_t left,
                           typename LanesOf<T>::type (&out)[kQueries]) {
  using V = typename LanesOf<T>::type;
  // Four chains per query hide the latency of the additions.
  V sums[kQueries][4];
  for (int g = 0; g < kQueries; ++g) {
    for (int c = 0; c < 4; ++c) sums[g][c] = V{};
  }
  int64_t j = 0;
  if (left >= kLanesD) {
    for (; j + 4 <= count; j += 4) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const V v = load_lanes(values + (j + c) * stride);
#pragma GCC unroll 4
        for (int g = 0; g < kQueries; ++g) sums[g][c] += weights[g * weight_stride + j + c] * v;
      }
    }
  }
  for (; j < count; ++j) {
    const V v = left >= kLanesD ? load_lanes(values + j * stride)
                                : load_lanes_some<V>(values + j * stride, left);
    for (int g = 0; g < kQueries; ++g) sums[g][0] += weights[g * weight_stride + j] * v;
  }
  for (int g = 0; g < kQueries; ++g) {
    out[g] = (sums[g][0] + sums[g][1]) + (sums[g][2] + sums[g][3]);
  }
}

template <typename T>
struct Visible {
  const T* keys;
  const T* values;
  int64_t count;
};

// Scores of one run of keys go to `scores` [kQueries, stride], which has room for eight more.
template <int kQueries, typename T>
void score_run(const SlotAttentionArgs& args, const Visible<T>& seen, const Acc<T>* queries,
               Acc<T>* scores, int64_t score_stride) {
  using V = typename LanesOf<T>::type;
  V products[kQueries];
  for (int64_t j = 0; j < seen.count; j += kKeys) {
    const T* keys = seen.keys + j * args.key_stride;
    if (j + kKeys <= seen.count) {
      score_keys<kQueries, true>(queries, keys, args.key_stride, kKeys, args.dim, products);
    } else {
      score_keys<kQueries, false>(queries, keys, args.key_stride, seen.count - j, args.dim,
                                  products);
    }
    // Lanes past the run's end are overwritten by the next run.
    for (int g = 0; g < kQueries; ++g) {
      memcpy(scores + g * score_stride + j, &products[g], sizeof(V));
    }
  }
}

// Scratch of one thread: scaled queries [kMostQueries, dim], scores [kMostQueries, score_stride].
template <int kQueries, typename T>
void attend(const SlotAttentionArgs& args, const Visible<T> (&seen)[2], int64_t first_query,
            Acc<T>* scratch, int64_t score_stride) {
  using A = Acc<T>;
  using V = typename LanesOf<T>::type;
  A* queries = scratch;
  A* scores = queries + kMostQueries * args.dim;
  const T* q = static_cast<const T*>(args.query) + first_query * args.dim;
  for (int64_t d = 0; d < kQueries * args.dim; ++d) {
    queries[d] = static_cast<A>(to_double(q[d]) * args.scale);
  }
  score_run<kQueries>(args, seen[0], queries, scores, score_stride);
  score_run<kQueries>(args, seen[1], queries, scores + seen[0].count, score_stride);
  for (int g = 0; g < kQueries; ++g) {
    softmax_row(scores + g * score_stride, seen[0].count + seen[1].count);
  }
  T* out = static_cast<T*>(args.out) + first_query * args.value_dim;
  for (int64_t e = 0; e < args.value_dim; e += kLanesD) {
    const int64_t left = args.value_dim - e;
    V shared[kQueries];
    V own[kQueries];
    add_values<kQueries>(scores, score_stride, seen[0].values + e, args.value_stride, seen[0].count,
                         left, shared);
    add_values<kQueries>(scores + seen[0].count, score_stride, seen[1].values + e,
                         args.value_stride, seen[1].count, left, own);
    for (int g = 0; g < kQueries; ++g) {
      const V sum = shared[g] + own[g];
      T* to = out + g * args.value_dim + e;
      for (int64_t lane = 0; lane < left && lane < kLanesD; ++lane) {
        store(to + lane, static_cast<double>(sum[lane]));
      }
    }
  }
}

template <typename T>
void attend_head(const SlotAttentionArgs& args, int64_t row, int64_t head, Acc<T>* scratch,
                 int64_t score_stride) {
  const int64_t group = args.query_heads / args.key_heads;
  const VisibleRuns runs(args.runs + 5 * row, args.longest);
  const T* keys = static_cast<const T*>(args.keys) + head * args.key_head_stride;
  const T* values = static_cast<const T*>(args.values) + head * args.value_head_stride;
  const auto at = [&](int64_t position, int64_t count) {
    const int64_t from = count > 0 ? position : 0;
    return Visible<T>{keys + from * args.key_stride, values + from * args.value_stride, count};
  };
  const Visible<T> seen[2] = {at(runs.shared_at, runs.shared_count),
                              at(runs.own_at, runs.own_count)};
  const int64_t first = row * args.query_heads + head * group;
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) attend<4>(args, seen, first + g, scratch, score_stride);
  for (; g + 2 <= group; g += 2) attend<2>(args, seen, first + g, scratch, score_stride);
  if (g < group) attend<1>(args, seen, first + g, scratch, score_stride);
}

}  // namespace

void slot_attention(const SlotAttentionArgs& args, int threads) {
  const int64_t tasks = args.rows * args.key_heads;
  if (tasks == 0) return;
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    int64_t most = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
      const VisibleRuns runs(args.runs + 5 * row, args.longest);
      const int64_t count = runs.shared_count + runs.own_count;
      most = count > most ? count : most;
    }
    const int64_t score_stride = (most + kKeys + 15) / 16 * 16;
    const int64_t numbers = kMostQueries * ((args.dim + 15) / 16 * 16 + score_stride);
    const Scratch scratch(static_cast<size_t>(numbers * threads) * sizeof(Acc<T>));
    const int64_t group = args.query_heads / args.key_heads;
    const int64_t work = group * most * (args.dim + args.value_dim) / 8;
    parallel_rows(
        tasks, rows_per_task(tasks, work), threads, [&](int64_t begin, int64_t end, int thread) {
          Acc<T>* mine = static_cast<Acc<T>*>(scratch.data()) + numbers * thread;
          for (int64_t task = begin; task < end; ++task) {
            attend_head<T>(args, task / args.key_heads, task % args.key_heads, mine, score_stride);
          }
        });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
