#include "isa/functions.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

// KL(softmax(row) || softmax(ref)) from the sums of both rows; 0 * log 0 = 0.
double exact_kl(const double* row, const double* ref, int64_t num_codes, const SoftmaxSums& p,
                const SoftmaxSums& q) {
  VecD total = VecD{};
  VecI64 unsupported = VecI64{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD l = load8(row + k);
    const VecD r = load8(ref + k);
    const VecI64 masked = l == splat(-kInf);
    unsupported |= (r == splat(-kInf)) & ~masked;
    const VecD log_ratio = (l - p.top - p.log_mass) - (r - q.top - q.log_mass);
    total += masked ? splat(0.0) : exp(l - p.top) * log_ratio;
  }
  for (int lane = 0; lane < kLanesD; ++lane) {
    if (unsupported[lane] != 0) return kInf;
  }
  return sum_lanes(total) / p.mass;
}

// A row with its distribution, and its reference's where there is one.
struct Row {
  bool valid;  // both distributions exist and the code names one of the K
  int64_t code;
  SoftmaxSums p;
  SoftmaxSums q;
};

template <typename T, typename Args>
Row read_row(const Args& args, int64_t row, double* logits, double* ref) {
  Row out = {};
  out.code = args.codes[row];
  if (out.code < 0 || out.code >= args.num_codes) return out;
  const T* source = static_cast<const T*>(args.logits) + row * args.row_stride;
  const double top = widen_row(source, args.num_codes, logits);
  if (is_nan(top)) return out;
  out.p = softmax_sums(logits, args.num_codes, top);
  if (args.ref_logits != nullptr) {
    const T* ref_source = static_cast<const T*>(args.ref_logits) + row * args.ref_row_stride;
    const double ref_top = widen_row(ref_source, args.num_codes, ref);
    if (is_nan(ref_top)) return out;
    out.q = softmax_sums(ref, args.num_codes, ref_top);
  }
  out.valid = true;
  return out;
}

template <typename T>
void forward_row(const LogprobsForwardArgs& args, int64_t at, double* logits, double* ref) {
  using A = Acc<T>;
  const Row row = read_row<T>(args, at, logits, ref);
  double kl = 0.0;
  if (row.valid && args.ref_logits != nullptr) {
    kl = exact_kl(logits, ref, args.num_codes, row.p, row.q);
  }
  store(static_cast<A*>(args.logprob) + at, row.valid ? row.p.logprob(logits[row.code]) : kNaN);
  store(static_cast<A*>(args.entropy) + at, row.valid ? row.p.entropy() : kNaN);
  store(static_cast<A*>(args.kl) + at, row.valid ? kl : kNaN);
}

// dl_k = g_logprob ([k = code] - p_k) - g_entropy p_k (log p_k + H) + g_kl p_k (log p_k - log q_k -
// KL); an invalid row gets zero.
template <typename T>
void backward_row(const LogprobsBackwardArgs& args, int64_t at, double* logits, double* ref) {
  using A = Acc<T>;
  const int64_t num_codes = args.num_codes;
  T* out = static_cast<T*>(args.dlogits) + at * num_codes;
  const Row row = read_row<T>(args, at, logits, ref);
  if (!row.valid) {
    memset(out, 0, sizeof(T) * static_cast<size_t>(num_codes));
    return;
  }
  const SoftmaxSums& p = row.p;
  const double g_logprob = to_double(static_cast<const A*>(args.g_logprob)[at]);
  const double g_entropy = to_double(static_cast<const A*>(args.g_entropy)[at]);
  const bool with_ref = args.ref_logits != nullptr;
  const double g_kl = with_ref ? to_double(static_cast<const A*>(args.g_kl)[at]) : 0.0;
  const double kl = with_ref ? exact_kl(logits, ref, num_codes, p, row.q) : 0.0;
  const double entropy = p.entropy();
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD l = load8(logits + k);
    const VecI64 masked = l == splat(-kInf);
    const VecD log_p = l - p.top - p.log_mass;
    VecD slope = -g_logprob - g_entropy * (log_p + entropy);
    if (with_ref) slope += g_kl * (log_p - (load8(ref + k) - row.q.top - row.q.log_mass) - kl);
    VecD grad = masked ? splat(0.0) : exp(l - p.top) / p.mass * slope;
    if (row.code >= k && row.code < k + kLanesD) grad[row.code - k] += g_logprob;
    store_some(out + k, grad, num_codes - k);
  }
}

}  // namespace

void logprobs_forward(const LogprobsForwardArgs& args, int threads) {
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const Scratch scratch(2 * width * sizeof(double) * static_cast<size_t>(threads));
  const int64_t step = rows_per_task(args.rows, args.num_codes * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 2 * width * thread;
      for (int64_t row = begin; row < end; ++row) {
        forward_row<T>(args, row, buffer, buffer + width);
      }
    });
  });
}

void logprobs_backward(const LogprobsBackwardArgs& args, int threads) {
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const Scratch scratch(2 * width * sizeof(double) * static_cast<size_t>(threads));
  const int64_t step = rows_per_task(args.rows, args.num_codes * 4);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 2 * width * thread;
      for (int64_t row = begin; row < end; ++row) {
        backward_row<T>(args, row, buffer, buffer + width);
      }
    });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
