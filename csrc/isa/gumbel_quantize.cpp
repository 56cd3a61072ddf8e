#include "isa/functions.h"
#include "isa/gumbel_rows.h"
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

// float64 input: everything in float64. `memory` holds two padded rows of float64.
void forward_row(const GumbelForwardArgs& args, const double* source, int64_t row, double* memory,
                 double* prob_sums) {
  const int64_t num_codes = args.num_codes;
  double* entropy = static_cast<double*>(args.entropy) + row;
  double* soft = args.soft == nullptr ? nullptr : static_cast<double*>(args.soft) + row * num_codes;
  double* logits = memory;
  double* noise = memory + padded(num_codes);
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

// Narrower input, in float32 with sums in float64.
template <typename T>
void forward_row(const GumbelForwardArgs& args, const T* source, int64_t row, double* memory,
                 double* prob_sums) {
  const int64_t num_codes = args.num_codes;
  const int64_t width = padded(num_codes);
  float* logits = reinterpret_cast<float*>(memory);
  float* exps = logits + width;
  float* bounds = exps + width;
  float* entropy = static_cast<float*>(args.entropy) + row;
  float* soft = args.soft == nullptr ? nullptr : static_cast<float*>(args.soft) + row * num_codes;
  const float top = widen_row_f(source, num_codes, logits);
  if (is_nan(top)) {
    args.codes[row] = -1;
    store(entropy, kNaN);
    for (int64_t k = 0; soft != nullptr && k < num_codes; ++k) store(soft + k, kNaN);
    return;
  }
  const PhiloxKey key = row_key(args.seeds, row);
  const RowSums sums =
      softmax_and_draw(logits, num_codes, top, key, exps, bounds, args.codes + row);
  store(entropy, sums.entropy);
  const double inverse = 1.0 / sums.mass;
  for (int64_t k = 0; k < width; k += kLanesD) {
    store8(prob_sums + k, load8(prob_sums + k) + load8(exps + k) * inverse);
  }
  if (soft == nullptr) return;
  relax(logits, num_codes, top, args.tau, key, exps);
  memcpy(soft, exps, sizeof(float) * static_cast<size_t>(num_codes));
}

// `memory` holds two padded rows of float64.
void backward_row(const GumbelBackwardArgs& args, const double* source, int64_t row, double* memory,
                  bool) {
  const int64_t num_codes = args.num_codes;
  double* out = static_cast<double*>(args.dlogits) + row * num_codes;
  double* soft_out =
      args.soft == nullptr ? nullptr : static_cast<double*>(args.soft) + row * num_codes;
  double* logits = memory;
  double* soft = memory + padded(num_codes);
  const double top = widen_row(source, num_codes, logits);
  if (is_nan(top)) {
    for (int64_t k = 0; k < num_codes; ++k) store(out + k, 0.0);
    for (int64_t k = 0; soft_out != nullptr && k < num_codes; ++k) store(soft_out + k, 0.0);
    return;
  }
  gumbel_noise(row_key(args.seeds, row), num_codes, soft);
  tempered_softmax(logits, soft, num_codes, args.tau);
  if (soft_out != nullptr) store_row(soft_out, soft, num_codes);

  const double* g_soft = static_cast<const double*>(args.g_soft) + row * num_codes;
  const double* g_mean = static_cast<const double*>(args.g_mean_probs);
  const double g_entropy = to_double(static_cast<const double*>(args.g_entropy)[row]);
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

// dlogits += p * (g_mean / V - <p, g_mean / V> - g_entropy (log p + H)), row by row.
struct SoftmaxGradient {
  const float* logits;
  const float* exps;
  const float* g_mean;
  float top, inverse_mass, mean_scale, mean_dot, g_entropy, log_term;

  SoftmaxGradient(const GumbelBackwardArgs& args, const float* row, float row_top,
                  double row_g_entropy, float* row_exps)
      : logits(row),
        exps(row_exps),
        g_mean(static_cast<const float*>(args.g_mean_probs)),
        top(row_top) {
    WideSum mass, weighted, mean;
    for (int64_t k = 0; k < args.num_codes; k += kLanesRow) {
      const VecF d = load16(row + k) - top;
      const VecF e = exp(d);
      store16(row_exps + k, e);
      mass.add(e);
      weighted.add(e * max_f(d, splat_f(kVeryLowF)));
      mean.add(e * load_some16(g_mean + k, args.num_codes - k));
    }
    const double total = mass.total();
    inverse_mass = static_cast<float>(1.0 / total);
    mean_scale = static_cast<float>(args.inverse_valid_rows);
    mean_dot = static_cast<float>(mean.total() / total * args.inverse_valid_rows);
    g_entropy = static_cast<float>(row_g_entropy);
    // log p + H = (l - top) - log(total) + H, and H = log(total) - weighted / total.
    log_term = static_cast<float>(-weighted.total() / total);
  }

  LRL_INLINE VecF at(int64_t k, int64_t left) const {
    const VecF d = max_f(load16(logits + k) - top, splat_f(kVeryLowF));
    const VecF mean = load_some16(g_mean + k, left) * mean_scale - mean_dot;
    return load16(exps + k) * inverse_mass * (mean - g_entropy * (d + log_term));
  }
};

template <typename T>
void backward_row(const GumbelBackwardArgs& args, const T* source, int64_t row, double* memory,
                  bool mean_unused) {
  const int64_t num_codes = args.num_codes;
  float* logits = reinterpret_cast<float*>(memory);
  float* soft = logits + padded(num_codes);
  float* exps = soft + padded(num_codes);
  T* out = static_cast<T*>(args.dlogits) + row * num_codes;
  float* soft_out =
      args.soft == nullptr ? nullptr : static_cast<float*>(args.soft) + row * num_codes;
  const float top = widen_row_f(source, num_codes, logits);
  if (is_nan(top)) {
    for (int64_t k = 0; k < num_codes; ++k) store(out + k, 0.0);
    for (int64_t k = 0; soft_out != nullptr && k < num_codes; ++k) store(soft_out + k, 0.0);
    return;
  }
  relax(logits, num_codes, top, args.tau, row_key(args.seeds, row), soft);
  if (soft_out != nullptr) {
    memcpy(soft_out, soft, sizeof(float) * static_cast<size_t>(num_codes));
  }
  const float* g_soft = static_cast<const float*>(args.g_soft) + row * num_codes;
  WideSum dot;
  for (int64_t k = 0; k < num_codes; k += kLanesRow) {
    dot.add(load16(soft + k) * load_some16(g_soft + k, num_codes - k));
  }
  const float soft_mean = static_cast<float>(dot.total());
  const float inverse_tau = static_cast<float>(1.0 / args.tau);
  const auto relaxed = [&](int64_t k) {
    return load16(soft + k) * (load_some16(g_soft + k, num_codes - k) - soft_mean) * inverse_tau;
  };
  const double g_entropy = to_double(static_cast<const float*>(args.g_entropy)[row]);
  // Most losses ask for no gradient of the statistics, which saves the second softmax.
  if (g_entropy == 0.0 && mean_unused) {
    for (int64_t k = 0; k < num_codes; k += kLanesRow) {
      store_some16(out + k, relaxed(k), num_codes - k);
    }
    return;
  }
  const SoftmaxGradient statistics(args, logits, top, g_entropy, exps);
  for (int64_t k = 0; k < num_codes; k += kLanesRow) {
    store_some16(out + k, relaxed(k) + statistics.at(k, num_codes - k), num_codes - k);
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
        const T* source = static_cast<const T*>(args.logits) + row * args.row_stride;
        forward_row(args, source, row, buffer, slice);
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
    bool mean_unused = true;
    for (int64_t k = 0; k < args.num_codes; ++k) {
      mean_unused = mean_unused && static_cast<const Acc<T>*>(args.g_mean_probs)[k] == 0;
    }
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      double* buffer = static_cast<double*>(scratch.data()) + 2 * width * thread;
      for (int64_t row = begin; row < end; ++row) {
        const T* source = static_cast<const T*>(args.logits) + row * args.row_stride;
        backward_row(args, source, row, buffer, mean_unused);
      }
    });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
