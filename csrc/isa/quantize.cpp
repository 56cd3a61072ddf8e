#include "isa/functions.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

constexpr int64_t kSlab = 256;  // columns a task of the segment sum takes

// Row ids grouped by code, ascending inside a group: first[c] .. first[c + 1] of `order`.
void group_rows(const int64_t* codes, int64_t rows, int64_t num_codes, int64_t* first,
                int64_t* order) {
  for (int64_t c = 0; c <= num_codes; ++c) first[c] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (codes[row] >= 0 && codes[row] < num_codes) ++first[codes[row] + 1];
  }
  for (int64_t c = 0; c < num_codes; ++c) first[c + 1] += first[c];
  for (int64_t row = 0; row < rows; ++row) {
    if (codes[row] >= 0 && codes[row] < num_codes) order[first[codes[row]]++] = row;
  }
  for (int64_t c = num_codes; c > 0; --c) first[c] = first[c - 1];
  first[0] = 0;
}

template <typename T>
void sum_slab(const T* values, int64_t row_stride, const int64_t* order, int64_t count,
              int64_t width, Acc<T>* out) {
  VecD sums[kSlab / kLanesD];
  for (int64_t v = 0; v < kSlab / kLanesD; ++v) sums[v] = VecD{};
  for (int64_t i = 0; i < count; ++i) {
    const T* row = values + order[i] * row_stride;
    for (int64_t d = 0; d < width; d += kLanesD) {
      sums[d / kLanesD] += load_some(row + d, width - d, 0.0);
    }
  }
  for (int64_t d = 0; d < width; d += kLanesD) store_some(out + d, sums[d / kLanesD], width - d);
}

template <typename T>
void segment_sums(const T* values, int64_t row_stride, const int64_t* codes, int64_t rows,
                  int64_t num_codes, int64_t dim, int64_t* counts, Acc<T>* sums, int threads) {
  const Scratch scratch(sizeof(int64_t) * static_cast<size_t>(num_codes + 1 + rows));
  int64_t* first = static_cast<int64_t*>(scratch.data());
  int64_t* order = first + num_codes + 1;
  group_rows(codes, rows, num_codes, first, order);
  if (counts != nullptr) {
    for (int64_t c = 0; c < num_codes; ++c) counts[c] = first[c + 1] - first[c];
  }
  const int64_t slabs = (dim + kSlab - 1) / kSlab;
  parallel(num_codes * slabs, rows * dim < 20000 ? 1 : threads, [&](int64_t task, int) {
    const int64_t c = task / slabs;
    const int64_t d = (task % slabs) * kSlab;
    const int64_t width = dim - d < kSlab ? dim - d : kSlab;
    sum_slab(values + d, row_stride, order + first[c], first[c + 1] - first[c], width,
             sums + c * dim + d);
  });
}

template <typename T>
void gather_rows(const QuantizeForwardArgs& args, double* row_squares, int threads) {
  const int64_t dim = args.dim;
  const int64_t step = rows_per_task(args.rows, dim);
  parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(args.quantized) + row * dim;
      row_squares[row] = 0.0;
      const int64_t code = args.codes[row];
      if (code < 0) {
        for (int64_t d = 0; d < dim; ++d) store(out + d, kNaN);
        continue;
      }
      const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
      const T* c = static_cast<const T*>(args.codebook) + code * dim;
      VecD squares = VecD{};
      for (int64_t d = 0; d < dim; d += kLanesD) {
        const VecD diff = load_some(x + d, dim - d, 0.0) - load_some(c + d, dim - d, 0.0);
        squares += diff * diff;
      }
      memcpy(out, c, sizeof(T) * static_cast<size_t>(dim));
      row_squares[row] = sum_lanes(squares);
    }
  });
}

}  // namespace

void quantize_forward(const QuantizeForwardArgs& args, int threads) {
  const Scratch scratch(sizeof(double) * static_cast<size_t>(args.rows));
  double* row_squares = static_cast<double*>(scratch.data());
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_rows<T>(args, row_squares, threads);
    segment_sums(static_cast<const T*>(args.x), args.x_row_stride, args.codes, args.rows,
                 args.num_codes, args.dim, args.counts, static_cast<Acc<T>*>(args.sums), threads);
  });
  double total = 0.0;
  for (int64_t row = 0; row < args.rows; ++row) total += row_squares[row];
  *args.square_sum = total;
}

// dx = g + scale (x - c); an invalid row gets zero.
void quantize_backward(const QuantizeBackwardArgs& args, int threads) {
  const int64_t dim = args.dim;
  const int64_t step = rows_per_task(args.rows, dim);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        T* out = static_cast<T*>(args.dx) + row * dim;
        const int64_t code = args.codes[row];
        if (code < 0 || code >= args.num_codes) {
          memset(out, 0, sizeof(T) * static_cast<size_t>(dim));
          continue;
        }
        const T* g = static_cast<const T*>(args.grad) + row * args.grad_row_stride;
        const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
        const T* c = static_cast<const T*>(args.codebook) + code * dim;
        for (int64_t d = 0; d < dim; d += kLanesD) {
          const int64_t left = dim - d;
          const VecD diff = load_some(x + d, left, 0.0) - load_some(c + d, left, 0.0);
          store_some(out + d, load_some(g + d, left, 0.0) + args.scale * diff, left);
        }
      }
    });
  });
}

void segment_sum(const SegmentSumArgs& args, int threads) {
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    segment_sums(static_cast<const T*>(args.values), args.row_stride, args.codes, args.rows,
                 args.num_codes, args.dim, args.counts, static_cast<Acc<T>*>(args.sums), threads);
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
