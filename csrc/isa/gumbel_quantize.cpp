#include "isa/functions.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

// Partial sums over rows are kept for a number of slices that depends on the row count alone, then
// added in order: the same bits for every number of threads.
constexpr int64_t kMaxSlices = 64;
constexpr int64_t kLeastSliceRows = 16;

int64_t slice_rows(int64_t rows) {
  const int64_t wanted = (rows + kMaxSlices - 1) / kMaxSlices;
  return wanted < kLeastSliceRows ? kLeastSliceRows : wanted;
}

PhiloxKey row_key(const int64_t* seeds, int64_t row) {
  return {static_cast<uint64_t>(seeds[row]), 0};
}

// soft = softmax((logits + noise) / tau) in place of the noise in `noisy`.
void tempered_softmax(const double* logits, double* noisy, int64_t num_codes, double tau) {
  VecD top = splat(-kInf);
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
    const VecD v = (load8(logits + k) + load8(noisy + k)) / tau;
    store8(noisy + k, v);
    top = max(top, v);
  }
  const double best = max_lanes(top);
  VecD mass = VecD{};
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
    const VecD e = exp(load8(noisy + k) - best);
    store8(noisy + k, e);
    mass += e;
  }
  const double total = sum_lanes(mass);
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
    store8(noisy + k, load8(noisy + k) / total);
  }
}

template <typename A>
void store_row(A* out, const double* row, int64_t count) {
  for (int64_t k = 0; k < count; k += kLanesD) store_some(out + k, load8(row + k), count - k);
}

template <typename T>
void forward_row(const GumbelForwardArgs& args, int64_t row, double* logits, double* noise,
                 double* prob_sums) {
  using A = Acc<T>;
  const int64_t num_codes = args.num_codes;
  A* entropy = static_cast<A*>(args.entropy) + row;
  A* soft = args.soft == nullptr ? nullptr : static_cast<A*>(args.soft) + row * num_codes;
  const T* source = static_cast<const T*>(args.logits) + row * args.row_stride;
  const double top = widen_row(source, num_codes, logits);
  if (is_nan(top)) {
    args.codes[row] = -1;
    store(entropy, kNaN);
    for (int64_t k = 0; soft != nullptr && k < num_codes; ++k) store(soft + k, kNaN);
    return;
  }
  const PhiloxKey key = row_key(args.seeds, row);
  // The noise buffer is free until the soft part.
  args.codes[row] = argmax_with_noise(logits, num_codes, key, reinterpret_cast<uint32_t*>(noise));
  VecD mass = VecD{};
  VecD weighted = VecD{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD d = load8(logits + k) - top;
    const VecD e = exp(d);
    mass += e;
    weighted += e * max(d, splat(kVeryLow));
    store8(noise + k, e);
  }
  const double total = sum_lanes(mass);
  store(entropy, log1(total) - sum_lanes(weighted) / total);
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    store8(prob_sums + k, load8(prob_sums + k) + load8(noise + k) / total);
  }
  if (soft == nullptr) return;
  gumbel_noise(key, num_codes, noise);
  tempered_softmax(logits, noise, num_codes, args.tau);
  store_row(soft, noise, num_codes);
}

template <typename T>
void backward_row(const GumbelBackwardArgs& args, int64_t row, double* logits, double* soft) {
  using A = Acc<T>;
  const int64_t num_codes = args.num_codes;
  T* out = static_cast<T*>(args.dlogits) + row * num_codes;
  A* soft_out = args.soft == nullptr ? nullptr : static_cast<A*>(args.soft) + row * num_codes;
  const T* source = static_cast<const T*>(args.logits) + row * args.row_stride;
  const double top = widen_row(source, num_codes, logits);
  if (is_nan(top)) {
    for (int64_t k = 0; k < num_codes; ++k) store(out + k, 0.0);
    for (int64_t k = 0; soft_out != nullptr && k < num_codes; ++k) store(soft_out + k, 0.0);
    return;
  }
  gumbel_noise(row_key(args.seeds, row), num_codes, soft);
  tempered_softmax(logits, soft, num_codes, args.tau);
  if (soft_out != nullptr) store_row(soft_out, soft, num_codes);

  const A* g_soft = static_cast<const A*>(args.g_soft) + row * num_codes;
  const A* g_mean = static_cast<const A*>(args.g_mean_probs);
  const double g_entropy = to_double(static_cast<const A*>(args.g_entropy)[row]);
  const SoftmaxSums p = softmax_sums(logits, num_codes, top);
  const double entropy = p.entropy();
  VecD soft_dot = VecD{};
  VecD mean_dot = VecD{};
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    soft_dot += load8(soft + k) * load_some(g_soft + k, num_codes - k, 0.0);
    mean_dot += exp(load8(logits + k) - top) * load_some(g_mean + k, num_codes - k, 0.0);
  }
  const double soft_mean = sum_lanes(soft_dot);
  const double mean_mean = sum_lanes(mean_dot) / p.mass;
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD l = load8(logits + k);
    const VecD d = max(l - top, splat(kVeryLow));
    const VecD probability = exp(l - top) / p.mass;
    VecD grad =
        load8(soft + k) * (load_some(g_soft + k, num_codes - k, 0.0) - soft_mean) / args.tau;
    grad += probability *
            (args.inverse_valid_rows * (load_some(g_mean + k, num_codes - k, 0.0) - mean_mean) -
             g_entropy * (d - p.log_mass + entropy));
    store_some(out + k, grad, num_codes - k);
  }
}

}  // namespace

void gumbel_forward(const GumbelForwardArgs& args, int threads) {
  const int64_t num_codes = args.num_codes;
  const int64_t width = padded(num_codes);
  const int64_t step = slice_rows(args.rows);
  const int64_t slices = (args.rows + step - 1) / step;
  const Scratch rows_scratch(sizeof(double) * static_cast<size_t>(2 * width * threads));
  const Scratch sums_scratch(sizeof(double) * static_cast<size_t>(width * (slices + 1)));
  double* sums = static_cast<double*>(sums_scratch.data());
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(rows_scratch.data()) + 2 * width * thread;
      double* slice = sums + width * (begin / step);
      memset(slice, 0, sizeof(double) * static_cast<size_t>(width));
      for (int64_t row = begin; row < end; ++row) {
        forward_row<T>(args, row, buffer, buffer + width, slice);
      }
    });
    for (int64_t k = 0; k < num_codes; ++k) args.counts[k] = 0;
    int64_t valid = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
      if (args.codes[row] < 0) continue;
      ++args.counts[args.codes[row]];
      ++valid;
    }
    double* total = sums + width * slices;
    memset(total, 0, sizeof(double) * static_cast<size_t>(width));
    for (int64_t slice = 0; slice < slices; ++slice) {
      for (int64_t k = 0; k < width; k += kLanesD) {
        store8(total + k, load8(total + k) + load8(sums + width * slice + k));
      }
    }
    A* mean = static_cast<A*>(args.mean_probs);
    const double divisor = static_cast<double>(valid == 0 ? 1 : valid);
    for (int64_t k = 0; k < num_codes; ++k) store(mean + k, total[k] / divisor);
  });
}

void gumbel_backward(const GumbelBackwardArgs& args, int threads) {
  const int64_t width = padded(args.num_codes);
  const Scratch scratch(sizeof(double) * static_cast<size_t>(2 * width * threads));
  const int64_t step = rows_per_task(args.rows, args.num_codes * 8);
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
