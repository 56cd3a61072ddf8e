#include "isa/functions.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

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

template <typename T, typename Args>
Row read_row(const Args& args, int64_t at, const Buffers& buffers) {
  Row row = {};
  row.code = args.codes[at];
  if (row.code < 0 || row.code >= args.num_codes) return row;
  const T* source = static_cast<const T*>(args.logits) + at * args.row_stride;
  const double top = widen_row(source, args.num_codes, buffers.logits);
  if (is_nan(top)) return row;
  row.p = sums_of(buffers, args.num_codes, top);
  if (args.ref_logits != nullptr) {
    const T* ref_source = static_cast<const T*>(args.ref_logits) + at * args.ref_row_stride;
    const double top_q = widen_row(ref_source, args.num_codes, buffers.ref);
    if (is_nan(top_q)) return row;
    compare(buffers, args.num_codes, top_q, &row);
  }
  row.valid = true;
  return row;
}

template <typename T>
void forward_row(const LogprobsForwardArgs& args, int64_t at, const Buffers& buffers) {
  using A = Acc<T>;
  const Row row = read_row<T>(args, at, buffers);
  const double logprob = row.valid ? row.p.logprob(buffers.logits[row.code]) : kNaN;
  store(static_cast<A*>(args.logprob) + at, logprob);
  store(static_cast<A*>(args.entropy) + at, row.valid ? row.p.entropy() : kNaN);
  store(static_cast<A*>(args.kl) + at, row.valid ? row.kl : kNaN);
}

// dl_k = g_logprob ([k = code] - p_k) - g_entropy p_k (log p_k + H) + g_kl p_k (log p_k - log q_k -
// KL); an invalid row gets zero.
template <typename T>
void backward_row(const LogprobsBackwardArgs& args, int64_t at, const Buffers& buffers) {
  using A = Acc<T>;
  const int64_t num_codes = args.num_codes;
  T* out = static_cast<T*>(args.dlogits) + at * num_codes;
  const Row row = read_row<T>(args, at, buffers);
  if (!row.valid) {
    memset(out, 0, sizeof(T) * static_cast<size_t>(num_codes));
    return;
  }
  const SoftmaxSums& p = row.p;
  const double g_logprob = to_double(static_cast<const A*>(args.g_logprob)[at]);
  const double g_entropy = to_double(static_cast<const A*>(args.g_entropy)[at]);
  // An infinite KL that the loss does not use must not make its gradient NaN.
  const double g_kl =
      args.ref_logits != nullptr ? to_double(static_cast<const A*>(args.g_kl)[at]) : 0.0;
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

}  // namespace

void logprobs_forward(const LogprobsForwardArgs& args, int threads) {
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const Scratch scratch(3 * width * sizeof(double) * static_cast<size_t>(threads));
  const int64_t step = rows_per_task(args.rows, args.num_codes * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 3 * width * thread;
      for (int64_t row = begin; row < end; ++row) {
        forward_row<T>(args, row, {buffer, buffer + width, buffer + 2 * width});
      }
    });
  });
}

void logprobs_backward(const LogprobsBackwardArgs& args, int threads) {
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const Scratch scratch(3 * width * sizeof(double) * static_cast<size_t>(threads));
  const int64_t step = rows_per_task(args.rows, args.num_codes * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 3 * width * thread;
      for (int64_t row = begin; row < end; ++row) {
        backward_row<T>(args, row, {buffer, buffer + width, buffer + 2 * width});
      }
    });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
