#include "isa/functions.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

constexpr int64_t kSlab = 512;  // columns a task of the grouped pass takes
constexpr int64_t kAhead = 4;   // rows of a group asked for before they are needed

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

// Some columns of the rows of one code.
template <typename T>
struct Group {
  const T* values;
  int64_t row_stride;
  const int64_t* rows;
  int64_t count;
  int64_t width;

  // The rows of a group lie anywhere: the hardware cannot foresee them.
  LRL_INLINE void prefetch(int64_t i) const {
    if (i >= count) return;
    const char* at = reinterpret_cast<const char*>(values + rows[i] * row_stride);
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b);
  }
};

// Up to eight elements as they are.
template <typename T>
LRL_INLINE void copy_some(T* to, const T* from, int64_t count) {
  if (count >= kLanesD) {
    memcpy(to, from, sizeof(T) * kLanesD);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

struct NoVisit {
  LRL_INLINE void operator()(int64_t, int64_t, int64_t, VecD) const {}
};

// Adds the rows in order; visit(row, column, columns left, values) sees every eight of them.
template <typename T, typename Visit>
void sum_group(const Group<T>& group, Acc<T>* out, const Visit& visit) {
  VecD sums[kSlab / kLanesD];
  const int64_t width = group.width;
  for (int64_t v = 0; v * kLanesD < width; ++v) sums[v] = VecD{};
  for (int64_t i = 0; i < group.count; ++i) {
    group.prefetch(i + kAhead);
    const int64_t id = group.rows[i];
    const T* row = group.values + id * group.row_stride;
    for (int64_t d = 0; d < width; d += kLanesD) {
      const VecD v = load_some(row + d, width - d, 0.0);
      sums[d / kLanesD] += v;
      visit(id, d, width - d, v);
    }
  }
  for (int64_t d = 0; d < width; d += kLanesD) store_some(out + d, sums[d / kLanesD], width - d);
}

// Calls body(code, first column, group) for the rows of every code, slab of columns by slab.
template <typename T, typename Body>
void for_groups(const T* values, int64_t row_stride, const int64_t* codes, int64_t rows,
                int64_t num_codes, int64_t dim, int64_t* counts, int threads, const Body& body) {
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
    body(c, d, Group<T>{values + d, row_stride, order + first[c], first[c + 1] - first[c], width});
  });
}

// All that follows the search, in one reading of x: the rows of a code are gathered, compared with
// it and added while they are at hand. Returns the sum of |x - c|^2.
template <typename T>
double gather_and_sum(const QuantizeForwardArgs& args, int threads) {
  const int64_t dim = args.dim;
  const int64_t slabs = (dim + kSlab - 1) / kSlab;
  const int64_t tasks = args.num_codes * slabs;
  const Scratch scratch(sizeof(double) * static_cast<size_t>(tasks));
  double* squares = static_cast<double*>(scratch.data());
  T* quantized = static_cast<T*>(args.quantized);
  for_groups(static_cast<const T*>(args.x), args.x_row_stride, args.codes, args.rows,
             args.num_codes, dim, args.counts, threads,
             [&](int64_t c, int64_t d, const Group<T>& group) {
               const T* code = static_cast<const T*>(args.codebook) + c * dim + d;
               Acc<T>* sums = static_cast<Acc<T>*>(args.sums) + c * dim + d;
               VecD error = VecD{};
               sum_group(group, sums, [&](int64_t row, int64_t at, int64_t left, VecD v) {
                 const VecD diff = v - load_some(code + at, left, 0.0);
                 error += diff * diff;
                 copy_some(quantized + row * dim + d + at, code + at, left);
               });
               squares[c * slabs + d / kSlab] = sum_lanes(error);
             });
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.codes[row] >= 0) continue;
    for (int64_t d = 0; d < dim; ++d) store(quantized + row * dim + d, kNaN);
  }
  double total = 0.0;
  for (int64_t task = 0; task < tasks; ++task) total += squares[task];
  return total;
}

// dc = scale (n c - s); a code without rows gets zero whatever it is: it need not be finite.
template <typename T>
void codebook_gradient(const QuantizeBackwardArgs& args, int threads) {
  const int64_t dim = args.dim;
  const int64_t step = rows_per_task(args.num_codes, dim);
  parallel_rows(args.num_codes, step, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t code = begin; code < end; ++code) {
      T* out = static_cast<T*>(args.dcodebook) + code * dim;
      const double count = static_cast<double>(args.counts[code]);
      if (count == 0.0) {
        memset(out, 0, sizeof(T) * static_cast<size_t>(dim));
        continue;
      }
      const T* c = static_cast<const T*>(args.codebook) + code * dim;
      const Acc<T>* sums = static_cast<const Acc<T>*>(args.sums) + code * dim;
      for (int64_t d = 0; d < dim; d += kLanesD) {
        const int64_t left = dim - d;
        const VecD pull = count * load_some(c + d, left, 0.0) - load_some(sums + d, left, 0.0);
        store_some(out + d, args.codebook_scale * pull, left);
      }
    }
  });
}

}  // namespace

void quantize_forward(const QuantizeForwardArgs& args, int threads) {
  use_large_pages(args.quantized, args.rows * args.dim * element_bytes(args.dtype));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    *args.square_sum = gather_and_sum<T>(args, threads);
  });
}

// dx = g + scale (x - c); an invalid row gets zero.
void quantize_backward(const QuantizeBackwardArgs& args, int threads) {
  const int64_t dim = args.dim;
  const int64_t step = rows_per_task(args.rows, dim);
  use_large_pages(args.dx, args.rows * dim * element_bytes(args.dtype));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    codebook_gradient<T>(args, threads);
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
    for_groups(static_cast<const T*>(args.values), args.row_stride, args.codes, args.rows,
               args.num_codes, args.dim, args.counts, threads,
               [&](int64_t c, int64_t d, const Group<T>& group) {
                 sum_group(group, static_cast<Acc<T>*>(args.sums) + c * args.dim + d, NoVisit());
               });
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
