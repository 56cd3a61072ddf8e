// nearest_code: screen in float32, prove, and look again in float64 where the proof leaves a
// choice.
//
// Every code's screened score is within `eps` of its true score, and the float64 score within the
// float64 part of `eps`, so the code that float64 chooses is among those whose screened score is at
// most the lowest plus 2 eps. One such code: done. Several: they alone are scored in float64. So
// the codes of float32 (and bfloat16, float16) input are those of the same input in float64, bit
// for bit.
#include "isa/functions.h"
#include "isa/screen.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;  // rows of a block stay in the second-level cache
constexpr int64_t kBlockRows = 96;
constexpr double kUlp = 0x1p-24;

// One group's codebook: exact data for the second look, packed panels for the screen.
template <typename T>
struct Codebook {
  const T* codes;
  double* norms;    // [K], Euclidean
  uint8_t* finite;  // [K]
  float* panels;    // [panels, D, kPanelCodes]
  float* offsets;   // [panels * kPanelCodes]
  int64_t num_codes, dim;
  double panel_norm;  // greatest norm of a packed code
  double offset_max;  // greatest finite offset
  int64_t first_finite;
};

template <typename T>
double square_norm(const T* row, int64_t dim) {
  VecD sum = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    const VecD v = load_some(row + d, dim - d, 0.0);
    sum += v * v;
  }
  return sum_lanes(sum);
}

template <typename T>
bool all_finite(const T* row, int64_t dim) {
  VecD zero = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    const VecD v = load_some(row + d, dim - d, 0.0);
    zero += v - v;  // NaN where v is not finite
  }
  return sum_lanes(zero) == 0.0;
}

template <typename T>
double dot(const T* a, const T* b, int64_t dim) {
  VecD sum = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    sum += load_some(a + d, dim - d, 0.0) * load_some(b + d, dim - d, 0.0);
  }
  return sum_lanes(sum);
}

template <typename T>
double square_distance(const T* a, const T* b, int64_t dim) {
  VecD sum = VecD{};
  for (int64_t d = 0; d < dim; d += kLanesD) {
    const VecD diff = load_some(a + d, dim - d, 0.0) - load_some(b + d, dim - d, 0.0);
    sum += diff * diff;
  }
  return sum_lanes(sum);
}

// What float64 minimises. The norm of x scales all cosines alike and is left out.
template <typename T>
double exact_key(Metric metric, const Codebook<T>& book, const T* x, int64_t code) {
  const T* c = book.codes + code * book.dim;
  if (metric == Metric::kL2) return square_distance(x, c, book.dim);
  const double product = dot(x, c, book.dim);
  if (metric == Metric::kDot) return -product;
  return book.norms[code] > 0.0 ? -product / book.norms[code] : 0.0;
}

// The lowest key, ties to the lowest id, in whatever order the codes are offered.
template <typename T>
struct ExactChoice {
  Metric metric;
  const Codebook<T>& book;
  const T* x;
  int64_t code = -1;
  double key = kInf;

  void offer(int64_t candidate) {
    if (candidate >= book.num_codes || book.finite[candidate] == 0) return;
    const double value = exact_key(metric, book, x, candidate);
    if (code < 0 || value < key || (value == key && candidate < code)) {
      code = candidate;
      key = value;
    }
  }

  int64_t among_all() {
    for (int64_t j = 0; j < book.num_codes; ++j) offer(j);
    return code;
  }
};

template <typename T>
double distance_of(Metric metric, const Codebook<T>& book, const T* x, int64_t code) {
  const double key = exact_key(metric, book, x, code);
  if (metric != Metric::kCosine) return key;
  const double norm = __builtin_sqrt(square_norm(x, book.dim));
  return norm > 0.0 ? 1.0 + key / norm : 1.0;
}

// Packs one panel and measures its codes; returns the greatest packed norm and offset through
// `book` later, so that panels can be packed in parallel.
template <typename T>
void pack_panel(Metric metric, const Codebook<T>& book, int64_t panel) {
  const int64_t dim = book.dim;
  float* out = book.panels + panel * dim * kPanelCodes;
  for (int64_t j = 0; j < kPanelCodes; ++j) {
    const int64_t code = panel * kPanelCodes + j;
    const bool usable = code < book.num_codes && book.finite[code] != 0;
    float* offset = book.offsets + code;
    *offset = __builtin_inff();
    if (!usable) {
      for (int64_t d = 0; d < dim; ++d) out[d * kPanelCodes + j] = 0.0f;
      continue;
    }
    const T* c = book.codes + code * dim;
    const double norm = book.norms[code];
    *offset = metric == Metric::kL2 ? static_cast<float>(norm * norm * 0.5) : 0.0f;
    const bool unit = metric == Metric::kCosine && norm > 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      const double v = to_double(c[d]);
      out[d * kPanelCodes + j] = static_cast<float>(unit ? v / norm : v);
    }
  }
}

template <typename T>
void measure_codes(const Codebook<T>& book, int64_t begin, int64_t end) {
  for (int64_t code = begin; code < end; ++code) {
    const T* c = book.codes + code * book.dim;
    book.finite[code] = all_finite(c, book.dim) ? 1 : 0;
    book.norms[code] = book.finite[code] != 0 ? __builtin_sqrt(square_norm(c, book.dim)) : 0.0;
  }
}

template <typename T>
void summarize(Metric metric, Codebook<T>* book) {
  book->panel_norm = 0.0;
  book->first_finite = -1;
  double norm_max = 0.0;
  for (int64_t code = 0; code < book->num_codes; ++code) {
    if (book->finite[code] == 0) continue;
    if (book->first_finite < 0) book->first_finite = code;
    if (book->norms[code] > norm_max) norm_max = book->norms[code];
  }
  // A packed unit vector is rounded, component by component: its norm is at most 1 + 2^-23.
  book->panel_norm = metric == Metric::kCosine ? 1.0 + 0x1p-23 : norm_max;
  book->offset_max = metric == Metric::kL2 ? norm_max * norm_max * 0.5 : 0.0;
}

// How far a screened score can be from the true one, and the float64 score from the true one.
template <typename T>
double screen_error(Metric metric, const Codebook<T>& book, double x_norm) {
  const double dim = static_cast<double>(book.dim);
  const double product = x_norm * book.panel_norm;
  // Dot product; rounding of the offset and of the subtraction; rounding of packed unit vectors.
  double eps = screen_gamma(book.dim) * product + 3.0 * kUlp * (book.offset_max + product);
  // Results below the normal range may be flushed to zero.
  eps += dim * 0x1p-125 * (1.0 + x_norm + book.panel_norm);
  const double reach = x_norm + book.panel_norm;
  const double scale = metric == Metric::kL2 ? reach * reach : product;
  return eps + (dim + 8.0) * 0x1p-52 * scale;
}

template <typename T>
int64_t choose(Metric metric, const Codebook<T>& book, const T* x, double x_norm,
               const ScreenState& state) {
  ExactChoice<T> exact{metric, book, x};
  // Beyond this the float32 scores could overflow.
  if (!(x_norm * book.panel_norm + book.offset_max < 1e37)) return exact.among_all();
  float lowest = __builtin_inff();
  for (int lane = 0; lane < kLanesF; ++lane) {
    lowest = state.best[lane] < lowest ? state.best[lane] : lowest;
  }
  const double limit = static_cast<double>(lowest) + 2.0 * screen_error(metric, book, x_norm);
  int64_t candidate = -1;
  int candidates = 0;
  for (int lane = 0; lane < kLanesF; ++lane) {
    if (!(state.best[lane] <= limit)) continue;
    candidate = static_cast<int64_t>(state.panel[lane]) * kLanesF + lane;
    candidates += state.second[lane] <= limit ? 2 : 1;
  }
  if (candidates == 1) return candidate;
  for (int lane = 0; lane < kLanesF; ++lane) {
    if (!(state.best[lane] <= limit)) continue;
    if (state.second[lane] <= limit) {
      for (int64_t code = lane; code < book.num_codes; code += kLanesF) exact.offer(code);
    } else {
      exact.offer(static_cast<int64_t>(state.panel[lane]) * kLanesF + lane);
    }
  }
  return exact.code;
}

LRL_INLINE void widen_to_float(const float* from, float* to, int64_t dim) {
  memcpy(to, from, sizeof(float) * static_cast<size_t>(dim));
}
template <typename T>
LRL_INLINE void widen_to_float(const T* from, float* to, int64_t dim) {
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const HalfF v = load8f(from + d);
    memcpy(to + d, &v, sizeof(v));
  }
  for (; d < dim; ++d) to[d] = static_cast<float>(to_double(from[d]));
}

template <typename T>
void finish_row(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t code,
                int64_t at) {
  args.codes[at] = code;
  Acc<T>* distance = static_cast<Acc<T>*>(args.distance) + at;
  store(distance, code < 0 ? kNaN : distance_of(args.metric, book, x, code));
}

struct BlockBuffers {
  float* rows;
  double* norms;
  ScreenState* states;
};

template <typename T>
void screened_block(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t at,
                    int64_t count, int64_t row_stride, const BlockBuffers& buffers) {
  const int64_t dim = book.dim;
  const int64_t whole = (count + kScreenRows - 1) / kScreenRows * kScreenRows;
  for (int64_t r = 0; r < whole; ++r) {
    float* row = buffers.rows + r * row_stride;
    // Squares of float32 cannot overflow float64, so the norm is finite exactly when the row is.
    buffers.norms[r] =
        r < count ? __builtin_sqrt(square_norm(x + r * args.x_row_stride, dim)) : kNaN;
    if (buffers.norms[r] < kInf) {
      widen_to_float(x + r * args.x_row_stride, row, dim);
    } else {
      memset(row, 0, sizeof(float) * static_cast<size_t>(dim));
    }
    ScreenState* state = buffers.states + r;
    state->best = LaneF{} + __builtin_inff();
    state->second = state->best;
    state->panel = LaneI{};
  }
  const int64_t panels = (book.num_codes + kPanelCodes - 1) / kPanelCodes;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t r = 0; r < whole; r += kScreenRows) {
      screen_panel(buffers.rows + r * row_stride, row_stride,
                   book.panels + panel * dim * kPanelCodes, book.offsets + panel * kPanelCodes, dim,
                   static_cast<int32_t>(panel), buffers.states + r);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* row = x + r * args.x_row_stride;
    const bool valid = buffers.norms[r] < kInf && book.first_finite >= 0;
    const int64_t code =
        valid ? choose(args.metric, book, row, buffers.norms[r], buffers.states[r]) : -1;
    finish_row(args, book, row, code, at + r);
  }
}

template <typename T>
struct Screened {
  static void run(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t at,
                  int threads) {
    // The padding keeps the rows of a block off one cache set when D is a power of two.
    const int64_t row_stride = (book.dim + 15) / 16 * 16 + 16;
    int64_t block = kBlockBytes / (4 * row_stride) / kScreenRows * kScreenRows;
    block = block < kScreenRows ? kScreenRows : block > kBlockRows ? kBlockRows : block;
    const int64_t rows_bytes = block * row_stride * 4;
    const int64_t states_bytes = block * static_cast<int64_t>(sizeof(ScreenState));
    const int64_t norms_bytes = (block * 8 + 63) / 64 * 64;
    const int64_t thread_bytes = rows_bytes + states_bytes + norms_bytes;
    const Scratch scratch(static_cast<size_t>(thread_bytes * threads));
    const bool small = args.rows * book.num_codes * book.dim < 200000;
    parallel_rows(args.rows, block, small ? 1 : threads,
                  [&](int64_t begin, int64_t end, int thread) {
                    char* base = static_cast<char*>(scratch.data()) + thread_bytes * thread;
                    BlockBuffers buffers;
                    buffers.rows = reinterpret_cast<float*>(base);
                    buffers.states = reinterpret_cast<ScreenState*>(base + rows_bytes);
                    buffers.norms = reinterpret_cast<double*>(base + rows_bytes + states_bytes);
                    screened_block(args, book, x + begin * args.x_row_stride, at + begin,
                                   end - begin, row_stride, buffers);
                  });
  }
  static constexpr bool kNeedsPanels = true;
};

template <>
struct Screened<double> {
  static void run(const NearestArgs& args, const Codebook<double>& book, const double* x,
                  int64_t at, int threads) {
    const int64_t step = rows_per_task(args.rows, book.num_codes * book.dim);
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const double* row = x + r * args.x_row_stride;
        ExactChoice<double> exact{args.metric, book, row};
        const int64_t code = all_finite(row, book.dim) ? exact.among_all() : -1;
        finish_row(args, book, row, code, at + r);
      }
    });
  }
  static constexpr bool kNeedsPanels = false;
};

template <typename T>
void nearest_of_group(const NearestArgs& args, int64_t group, const Scratch& norms,
                      const Scratch& finite, const Scratch& panels, const Scratch& offsets,
                      int threads) {
  Codebook<T> book;
  book.codes = static_cast<const T*>(args.codebook) + group * args.num_codes * args.dim;
  book.norms = static_cast<double*>(norms.data());
  book.finite = static_cast<uint8_t*>(finite.data());
  book.panels = static_cast<float*>(panels.data());
  book.offsets = static_cast<float*>(offsets.data());
  book.num_codes = args.num_codes;
  book.dim = args.dim;
  const int64_t step = rows_per_task(args.num_codes, args.dim);
  parallel_rows(args.num_codes, step, threads,
                [&](int64_t begin, int64_t end, int) { measure_codes(book, begin, end); });
  summarize(args.metric, &book);
  if (Screened<T>::kNeedsPanels) {
    const int64_t count = (args.num_codes + kPanelCodes - 1) / kPanelCodes;
    parallel(count, args.num_codes * args.dim < 20000 ? 1 : threads,
             [&](int64_t panel, int) { pack_panel(args.metric, book, panel); });
  }
  const T* x = static_cast<const T*>(args.x) + group * args.x_group_stride;
  Screened<T>::run(args, book, x, group * args.rows, threads);
}

}  // namespace

void nearest_code(const NearestArgs& args, int threads) {
  if (args.rows == 0) return;
  const size_t codes = static_cast<size_t>(args.num_codes);
  const size_t packed = (codes + kPanelCodes - 1) / kPanelCodes * kPanelCodes;
  const bool screened = args.dtype != DType::kFloat64;
  const Scratch norms(sizeof(double) * codes);
  const Scratch finite(codes);
  const Scratch panels(screened ? sizeof(float) * packed * static_cast<size_t>(args.dim) : 0);
  const Scratch offsets(sizeof(float) * packed);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t group = 0; group < args.groups; ++group) {
      nearest_of_group<T>(args, group, norms, finite, panels, offsets, threads);
    }
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
