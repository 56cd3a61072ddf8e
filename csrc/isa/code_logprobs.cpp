// Two forms of the same maths: float32 and narrower in float32 terms that do not cancel, added in
// float64 (README.md); float64 in float64 throughout.
#include "isa/float_rows.h"
#include "isa/functions.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

// Rows whose logarithms are taken together: one to a lane.
constexpr int64_t kGroup = kLanesD;
// Rows of floats that a row needs room for.
constexpr int64_t kBuffers = 4;

// As many as leave the buffers in the first-level cache.
int64_t rows_of_group(int64_t num_codes) {
  const int64_t fitting = 1024 / num_codes;
  return fitting < 1 ? 1 : fitting < kGroup ? fitting : kGroup;
}

struct FloatSide {
  FloatRow logits;
  float* exps;  // exp(logit - top)
};

struct FloatPair {
  FloatSide p, q;
  int64_t code;
  bool valid;  // both distributions exist and the code names one of the K
};

// Up to eight rows, and in the lanes of a vector what their passes share.
struct Group {
  FloatPair row[kGroup];
  VecD rest, log_mass, inverse, entropy;  // of p; `inverse` is 1 / mass
  VecD gap;                               // log p - log q = l - r - gap
  VecD share;                             // mass of p / mass of q
  VecD kl;                                // cancels where policy and reference are close
};

// Below this KL the sum of terms of both signs is not trusted.
constexpr double kCloseKl = 0.25;

// A difference of logits in products with p: a code masked in p has p = 0 and no ratio.
LRL_INLINE VecF finite_ratio(VecF ratio) { return max_f(ratio, splat_f(kVeryLowF)); }

// Reads the rows of a pair and checks them. The thread's next group begins `ahead` rows later.
template <typename T, typename Args>
FloatPair read_pair(const Args& args, int64_t at, int64_t ahead, float* buffers) {
  const int64_t width = padded_to_lanes(args.num_codes);
  FloatPair row = {};
  row.p.exps = buffers;
  row.q.exps = buffers + width;
  row.code = args.codes[at];
  if (row.code < 0 || row.code >= args.num_codes) return row;
  const T* source = static_cast<const T*>(args.logits) + at * args.row_stride;
  row.p.logits =
      read_float_row(source, args.num_codes, ahead * args.row_stride, buffers + 2 * width);
  row.valid = row.p.logits.valid;
  if (args.ref_logits == nullptr) return row;
  const T* ref_source = static_cast<const T*>(args.ref_logits) + at * args.ref_row_stride;
  row.q.logits =
      read_float_row(ref_source, args.num_codes, ahead * args.ref_row_stride, buffers + 3 * width);
  row.valid = row.valid && row.q.logits.valid;
  return row;
}

// The sums of both softmaxes, and that of exp(l - top) (l - top - (r - top of r)).
struct PairSums {
  FloatSums p;
  double ref_rest;
  double crossed;
};

PairSums pair_sums(const FloatPair& row, int64_t num_codes) {
  WideSum mass, weighted, ref_mass, crossed;
  for (int64_t block = 0; block < num_codes; block += kSumBlock) {
    VecF masses = VecF{};
    VecF products = VecF{};
    VecF ref_masses = VecF{};
    VecF crossings = VecF{};
    for (int64_t k = block; k < end_of_block(block, num_codes); k += kLanesRow) {
      row.p.logits.prefetch(k);
      row.q.logits.prefetch(k);
      const FloatTerms p(row.p.logits, k);
      const FloatTerms q(row.q.logits, k);
      store16(row.p.exps + k, p.e);
      store16(row.q.exps + k, q.e);
      masses += p.e;
      products += p.e * p.clamped;
      ref_masses += q.e;
      crossings += p.e * finite_ratio(p.d - q.d);
    }
    mass.add(masses);
    weighted.add(products);
    ref_mass.add(ref_masses);
    crossed.add(crossings);
  }
  return {{rest_of(row.p.logits, num_codes, row.p.exps, mass.total()), weighted.total()},
          rest_of(row.q.logits, num_codes, row.q.exps, ref_mass.total()),
          crossed.total()};
}

// `wants_kl(i)` says whether the softmax of the reference of row begin + i is needed. Row after row
// in each pass, so that none waits for what the same row has just computed.
template <typename T, typename Args, typename Wants>
void read_group(const Args& args, int64_t begin, int64_t count, float* buffers,
                const Wants& wants_kl, Group* group) {
  const int64_t num_codes = args.num_codes;
  const int64_t size = kBuffers * padded_to_lanes(num_codes);
  VecD rest = VecD{};
  VecD weighted = VecD{};
  VecD ref_rest = VecD{};
  VecD crossed = VecD{};
  VecD tops = VecD{};
  for (int64_t i = 0; i < count; ++i) {
    group->row[i] = read_pair<T>(args, begin + i, count, buffers + size * i);
  }
  for (int64_t i = 0; i < count; ++i) {
    const FloatPair& row = group->row[i];
    if (!row.valid) continue;
    PairSums sums = {};
    if (wants_kl(i)) {
      sums = pair_sums(row, num_codes);
      tops[i] = static_cast<double>(row.p.logits.top) - static_cast<double>(row.q.logits.top);
    } else {
      sums.p = softmax_sums(row.p.logits, num_codes, row.p.exps);
    }
    rest[i] = sums.p.rest;
    weighted[i] = sums.p.weighted;
    ref_rest[i] = sums.ref_rest;
    crossed[i] = sums.crossed;
  }
  const FloatStatistics p(rest, weighted);
  const VecD mass_gap = p.log_mass - log1p(ref_rest);
  group->rest = rest;
  group->log_mass = p.log_mass;
  group->inverse = p.inverse;
  group->entropy = p.entropy;
  group->gap = tops + mass_gap;
  group->share = (1.0 + rest) / (1.0 + ref_rest);
  group->kl = crossed * p.inverse - mass_gap;
}

// x + exp(-x) - 1 for |x| <= 1/2, where the difference would cancel: x^2 times its degree-5
// Chebyshev fit, good to 2.6e-8 relatively.
LRL_INLINE VecF gap_cost(VecF x) {
  VecF s = splat_f(-0x1.a2463ap-13f);
  s = s * x + 0x1.6e88dcp-10f;
  s = s * x - 0x1.111040p-7f;
  s = s * x + 0x1.555380p-5f;
  s = s * x - 0x1.555556p-3f;
  s = s * x + 0.5f;
  return x * x * s;
}

// KL(p || q) as the sum of p log(p / q) - p + q: no term of it is negative.
double close_divergence(const Group& group, int64_t i, int64_t num_codes) {
  const FloatPair& row = group.row[i];
  const float gap = static_cast<float>(group.gap[i]);
  const float share = static_cast<float>(group.share[i]);
  WideSum sum;
  for (int64_t block = 0; block < num_codes; block += kSumBlock) {
    VecF terms = VecF{};
    for (int64_t k = block; k < end_of_block(block, num_codes); k += kLanesRow) {
      const VecF l = load16(row.p.logits.at + k);
      const VecF x = finite_ratio((l - load16(row.q.logits.at + k)) - gap);
      const VecF e = load16(row.p.exps + k);  // p and q times the mass of p
      const VecF f = load16(row.q.exps + k) * share;
      terms += x * x < splat_f(0.25f) ? e * gap_cost(x) : e * (x - 1.0f) + f;
    }
    sum.add(terms);
  }
  return sum.total() * group.inverse[i];
}

// The KL as the sums of the first pass have it is good to about 1e-7 absolutely; where that is not
// enough, it is added up again.
double divergence(const Group& group, int64_t i, int64_t num_codes) {
  const double kl = group.kl[i] < kCloseKl ? close_divergence(group, i, num_codes) : group.kl[i];
  // The ratio of a code that q alone masks made the sum infinite, or NaN where p rounds to 0.
  return kl < kInf ? kl : kInf;
}

template <typename T>
void forward_group(const LogprobsForwardArgs& args, int64_t begin, int64_t count, float* buffers) {
  const bool has_ref = args.ref_logits != nullptr;
  float* logprob = static_cast<float*>(args.logprob) + begin;
  float* entropy = static_cast<float*>(args.entropy) + begin;
  float* kl = static_cast<float*>(args.kl) + begin;
  Group group;
  read_group<T>(args, begin, count, buffers, [&](int64_t) { return has_ref; }, &group);
  for (int64_t i = 0; i < count; ++i) {
    const FloatRow& logits = group.row[i].p.logits;
    const bool valid = group.row[i].valid;
    store(logprob + i, valid ? logits.behind_top(group.row[i].code) - group.log_mass[i] : kNaN);
    store(entropy + i, valid ? group.entropy[i] : kNaN);
    store(kl + i, !valid ? kNaN : has_ref ? divergence(group, i, args.num_codes) : 0.0);
  }
}

// dl_k = g_logprob ([k = code] - p_k) - g_entropy p_k (log p_k + H) + g_kl p_k (log p_k - log q_k -
// KL); masked codes get zero.
struct Gradient {
  const FloatPair& row;
  float g_logprob, g_entropy, g_kl;
  float inverse;
  float log_term;  // H - log mass
  float gap;
  float kl;

  // Without the [k = code].
  template <bool kWithKl>
  LRL_INLINE VecF at(int64_t k) const {
    const VecF l = load16(row.p.logits.at + k);
    const VecF e = load16(row.p.exps + k);
    VecF slope = -g_logprob - g_entropy * ((l - row.p.logits.top) + log_term);
    if (kWithKl) slope += g_kl * (((l - load16(row.q.logits.at + k)) - gap) - kl);
    return e > VecF{} ? e * inverse * slope : VecF{};
  }
};

template <bool kWithKl, typename T>
void write_gradient(const Gradient& gradient, int64_t num_codes, double rest, T* out) {
  const FloatPair& row = gradient.row;
  const int64_t home = row.code / kLanesRow * kLanesRow;
  // 1 - p of the code without the difference, for a policy that is nearly certain of it.
  const float others =
      static_cast<float>((rest + (1.0 - static_cast<double>(row.p.exps[row.code]))) / (1.0 + rest));
  for (int64_t k = 0; k < num_codes; k += kLanesRow) {
    store_some16(out + k, gradient.at<kWithKl>(k), num_codes - k);
  }
  Gradient rest_of = gradient;
  rest_of.g_logprob = 0.0f;
  const VecF at_home = rest_of.at<kWithKl>(home);
  store(out + row.code, at_home[row.code - home] + gradient.g_logprob * others);
}

template <typename T>
void backward_group(const LogprobsBackwardArgs& args, int64_t begin, int64_t count,
                    float* buffers) {
  const int64_t num_codes = args.num_codes;
  const float* g_logprob = static_cast<const float*>(args.g_logprob) + begin;
  const float* g_entropy = static_cast<const float*>(args.g_entropy) + begin;
  const float* g_kl = static_cast<const float*>(args.g_kl) + begin;
  // An infinite KL that the loss does not use must not make its gradient NaN.
  const auto wants_kl = [&](int64_t i) { return args.ref_logits != nullptr && g_kl[i] != 0.0f; };
  Group group;
  read_group<T>(args, begin, count, buffers, wants_kl, &group);
  for (int64_t i = 0; i < count; ++i) {
    const FloatPair& row = group.row[i];
    T* out = static_cast<T*>(args.dlogits) + (begin + i) * num_codes;
    if (!row.valid) {
      memset(out, 0, sizeof(T) * static_cast<size_t>(num_codes));
      continue;
    }
    Gradient gradient = {row,
                         g_logprob[i],
                         g_entropy[i],
                         g_kl[i],
                         static_cast<float>(group.inverse[i]),
                         static_cast<float>(group.entropy[i] - group.log_mass[i]),
                         static_cast<float>(group.gap[i]),
                         0.0f};
    if (wants_kl(i)) {
      gradient.kl = static_cast<float>(divergence(group, i, num_codes));
      write_gradient<true>(gradient, num_codes, group.rest[i], out);
    } else {
      write_gradient<false>(gradient, num_codes, group.rest[i], out);
    }
  }
}

// --- float64. ---

// Buffers of one thread, each with room for padded(num_codes) entries.
struct Buffers {
  double* logits;
  double* ref;
  double* mass;  // exp(logit - top)
};

// A row with its distribution p, and its reference's q where there is one.
struct Row {
  bool valid;  // both distributions exist and the code names one of the K
  int64_t code;
  SoftmaxSums p;
  double top_q;
  double log_mass_q;
  double kl;  // KL(p || q)
};

// The sums of p, which leave its masses in `mass`.
SoftmaxSums sums_of(const Buffers& at, int64_t num_codes, double top) {
  SoftmaxSums sums;
  VecD mass = VecD{};
  VecD weighted = VecD{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD d = load8(at.logits + k) - top;
    const VecD e = exp(d);
    store8(at.mass + k, e);
    mass += e;
    weighted += e * max(d, splat(kVeryLow));
  }
  sums.top = top;
  sums.mass = sum_lanes(mass);
  sums.weighted = sum_lanes(weighted);
  sums.log_mass = log1(sums.mass);
  return sums;
}

// Fills in what q adds, from its own mass and the sum of p times log q. A code of p that q masks
// makes KL infinite; where p masks it too, 0 * log 0 = 0.
void compare(const Buffers& at, int64_t num_codes, double top_q, Row* row) {
  VecD mass = VecD{};
  VecD crossed = VecD{};
  VecI64 unsupported = VecI64{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD r = load8(at.ref + k);
    const VecD d = r - top_q;
    mass += exp(d);
    crossed += load8(at.mass + k) * max(d, splat(kVeryLow));
    unsupported |= (r == splat(-kInf)) & (load8(at.logits + k) > splat(-kInf));
  }
  row->top_q = top_q;
  row->log_mass_q = log1(sum_lanes(mass));
  const double kl =
      (row->p.weighted - sum_lanes(crossed)) / row->p.mass - row->p.log_mass + row->log_mass_q;
  row->kl = any_lane(unsupported) ? kInf : kl;
}

template <typename Args>
Row read_row(const Args& args, int64_t at, const Buffers& buffers) {
  Row row = {};
  row.code = args.codes[at];
  if (row.code < 0 || row.code >= args.num_codes) return row;
  const double* source = static_cast<const double*>(args.logits) + at * args.row_stride;
  const double top = widen_row(source, args.num_codes, buffers.logits);
  if (is_nan(top)) return row;
  row.p = sums_of(buffers, args.num_codes, top);
  if (args.ref_logits != nullptr) {
    const double* ref_source =
        static_cast<const double*>(args.ref_logits) + at * args.ref_row_stride;
    const double top_q = widen_row(ref_source, args.num_codes, buffers.ref);
    if (is_nan(top_q)) return row;
    compare(buffers, args.num_codes, top_q, &row);
  }
  row.valid = true;
  return row;
}

void forward_row(const LogprobsForwardArgs& args, int64_t at, const Buffers& buffers) {
  const Row row = read_row(args, at, buffers);
  const double logprob = row.valid ? row.p.logprob(buffers.logits[row.code]) : kNaN;
  store(static_cast<double*>(args.logprob) + at, logprob);
  store(static_cast<double*>(args.entropy) + at, row.valid ? row.p.entropy() : kNaN);
  store(static_cast<double*>(args.kl) + at, row.valid ? row.kl : kNaN);
}

// dl_k = g_logprob ([k = code] - p_k) - g_entropy p_k (log p_k + H) + g_kl p_k (log p_k - log q_k -
// KL); an invalid row gets zero.
void backward_row(const LogprobsBackwardArgs& args, int64_t at, const Buffers& buffers) {
  const int64_t num_codes = args.num_codes;
  double* out = static_cast<double*>(args.dlogits) + at * num_codes;
  const Row row = read_row(args, at, buffers);
  if (!row.valid) {
    memset(out, 0, sizeof(double) * static_cast<size_t>(num_codes));
    return;
  }
  const SoftmaxSums& p = row.p;
  const double g_logprob = static_cast<const double*>(args.g_logprob)[at];
  const double g_entropy = static_cast<const double*>(args.g_entropy)[at];
  // An infinite KL that the loss does not use must not make its gradient NaN.
  const double g_kl = args.ref_logits != nullptr ? static_cast<const double*>(args.g_kl)[at] : 0.0;
  const double scale = 1.0 / p.mass;
  // log p_k = l + shift_p and log q_k = r + shift_q.
  const double shift_p = -p.top - p.log_mass;
  const double shift_q = -row.top_q - row.log_mass_q;
  const double entropy = p.entropy();
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD l = load8(buffers.logits + k);
    const VecD log_p = l + shift_p;
    VecD slope = -g_logprob - g_entropy * (log_p + entropy);
    if (g_kl != 0.0) slope += g_kl * (log_p - (load8(buffers.ref + k) + shift_q) - row.kl);
    VecD grad = l == splat(-kInf) ? splat(0.0) : load8(buffers.mass + k) * scale * slope;
    if (row.code >= k && row.code < k + kLanesD) grad[row.code - k] += g_logprob;
    store_some(out + k, grad, num_codes - k);
  }
}

void run_rows(const LogprobsForwardArgs& args, int64_t begin, int64_t end, const Buffers& buffers) {
  for (int64_t row = begin; row < end; ++row) forward_row(args, row, buffers);
}
void run_rows(const LogprobsBackwardArgs& args, int64_t begin, int64_t end,
              const Buffers& buffers) {
  for (int64_t row = begin; row < end; ++row) backward_row(args, row, buffers);
}

template <typename T>
void run_group(const LogprobsForwardArgs& args, int64_t begin, int64_t count, float* buffers) {
  forward_group<T>(args, begin, count, buffers);
}
template <typename T>
void run_group(const LogprobsBackwardArgs& args, int64_t begin, int64_t count, float* buffers) {
  backward_group<T>(args, begin, count, buffers);
}

template <typename T, typename Args>
void run(const Args& args, int threads) {
  const int64_t step = (rows_per_task(args.rows, args.num_codes) + kGroup - 1) / kGroup * kGroup;
  if constexpr (sizeof(T) == sizeof(double)) {
    const int64_t width = padded(args.num_codes);
    const Scratch scratch(3 * sizeof(double) * static_cast<size_t>(width * threads));
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 3 * width * thread;
      run_rows(args, begin, end, {buffer, buffer + width, buffer + 2 * width});
    });
  } else {
    const int64_t group = rows_of_group(args.num_codes);
    const int64_t size = kBuffers * padded_to_lanes(args.num_codes) * group;
    const Scratch scratch(sizeof(float) * static_cast<size_t>(size * threads));
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      float* buffers = static_cast<float*>(scratch.data()) + size * thread;
      for (int64_t row = begin; row < end; row += group) {
        run_group<T>(args, row, end - row < group ? end - row : group, buffers);
      }
    });
  }
}

}  // namespace

void logprobs_forward(const LogprobsForwardArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto tag) { run<typename decltype(tag)::type>(args, threads); });
}

void logprobs_backward(const LogprobsBackwardArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto tag) { run<typename decltype(tag)::type>(args, threads); });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
