// nearest_code: screen fast, prove, and look again only where the proof leaves a choice.
//
// A screened score is the greatest that a code can have, and the leader's own error bound says how
// little it can have: the code that float64 chooses is among those whose score is no lower than
// that. One such code: done. Several: they alone are compared by float32 distances of the rows
// themselves, under a bound again, and what is left by float64. So the codes of float32 (and
// bfloat16, float16) input are those of the same input in float64, bit for bit.
//
// Where there is a bfloat16 screen it looks first, and rows that it leaves with a good part of the
// codebook are screened again in float32.
#include "isa/functions.h"
#include "isa/refine.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;  // rows of a block stay in the second-level cache
constexpr int64_t kBlockRows = 96;
// Fewer rows than this do not pay for packing the codebook.
constexpr int64_t kPackingRows = 16;
constexpr int64_t kPending = -2;  // a row left to the next screen

enum Counter { kReranked = 0, kRescreened = 1, kInFloat64 = 2 };

struct Counts {
  int64_t value[3] = {0, 0, 0};

  void add_to(int64_t* total) const {
    for (int i = 0; i < 3 && total != nullptr; ++i) {
      __atomic_fetch_add(total + i, value[i], __ATOMIC_RELAXED);
    }
  }
};

// One pass over rows with one screen. Rows are those of `index`, or all of them without it.
template <typename T, typename E>
struct Pass {
  const NearestArgs& args;
  const Codebook<T>& book;
  const Panels<E>& panels;
  const T* x;
  int64_t at;  // of the group's first row in the outputs
  const int64_t* index;
  bool last;  // no other screen follows
};

struct BlockMemory {
  void* rows;
  RowNorm* norms;
  ScreenState* states;
  Candidates candidates;
};

template <typename T>
void finish_row(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t code,
                int64_t at) {
  args.codes[at] = code;
  if (args.distance == nullptr || code == kPending) return;
  Acc<T>* distance = static_cast<Acc<T>*>(args.distance) + at;
  store(distance, code < 0 ? kNaN : distance_of(book, x, code));
}

// The largest float32 surely below `value`.
float round_down(double value) {
  return static_cast<float>(value - __builtin_fabs(value) * 0x1p-23 - 0x1p-148);
}

float round_up(double value) { return static_cast<float>(value * (1.0 + 0x1p-23) + 0x1p-148); }

// The codes of the lanes whose best, or best and second, are within reach.
void gather(uint32_t best, uint32_t second, const ScreenState& state, int64_t num_codes,
            Candidates* candidates) {
  candidates->count = 0;
  for (uint32_t lanes = best; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    if ((second >> lane & 1u) == 0) {
      candidates->ids[candidates->count++] = state.vector[lane] * kLanesF + lane;
      continue;
    }
    for (int64_t code = lane; code < num_codes; code += kLanesF) {
      candidates->ids[candidates->count++] = static_cast<int32_t>(code);
    }
  }
}

template <typename T>
int64_t refine(const Codebook<T>& book, const T* x, double x_norm, Candidates* candidates,
               Counts* counts) {
  if (candidates->count > 1) drop_distant(book, x, x_norm, candidates);
  if (candidates->count == 1) return candidates->ids[0];
  ++counts->value[kInFloat64];
  return exact_choice(book, x, *candidates);
}

template <typename T>
int64_t refine_all(const Codebook<T>& book, const T* x, double x_norm, Candidates* candidates,
                   Counts* counts) {
  candidates->count = 0;
  for (int64_t code = 0; code < book.num_codes; ++code) {
    if (book.finite[code] != 0) {
      candidates->ids[candidates->count++] = static_cast<int32_t>(code);
    }
  }
  return refine(book, x, x_norm, candidates, counts);
}

// By how much the leader's score can exceed what float64 makes of it: its own error bound is in the
// score once and can be off by as much again; the part of float64's error that every code shares is
// in no score.
template <typename T, typename E>
double leader_error(const Pass<T, E>& pass, const RowNorm& norm, const ScreenState& state,
                    int64_t leader) {
  const Panels<E>& panels = pass.panels;
  const double bound = static_cast<double>(state.lost) * panels.norm[leader] +
                       static_cast<double>(state.kept) * panels.loss[leader] + panels.slack[leader];
  const Codebook<T>& book = pass.book;
  const bool l2 = book.metric == Metric::kL2;
  const double scale =
      l2 ? 2.0 * norm.length * norm.length : (norm.length + book.row_centre_norm) * book.reach();
  return 2.0 * (bound + book.exact_gamma() * scale);
}

// The code of a row that has been screened, -1 for one that is not finite, or kPending.
template <typename T, typename E>
int64_t choose(const Pass<T, E>& pass, const T* x, const RowNorm& norm, const ScreenState& state,
               Candidates* candidates, Counts* counts) {
  const Codebook<T>& book = pass.book;
  if (!book.any_finite) return -1;
  // Beyond this, or where a norm is not finite, the scores could overflow.
  const Panels<E>& panels = pass.panels;
  if (!((norm.length + norm.lost) * panels.reach + panels.bias_reach < 1e37)) {
    if (!all_finite(x, book.dim)) return -1;
    ++counts->value[kReranked];
    if (!pass.last) return kPending;
    return refine_all(book, x, kInf, candidates, counts);
  }
  const float highest = max_of(state.best);
  const int top = __builtin_ctz(lane_bits(state.best == LaneF{} + highest));
  const int64_t leader = static_cast<int64_t>(state.vector[top]) * kLanesF + top;
  const LaneF limit = LaneF{} + round_down(highest - leader_error(pass, norm, state, leader));
  const uint32_t best = lane_bits(state.best >= limit);
  const uint32_t second = lane_bits(state.second >= limit);
  if (second == 0 && (best & (best - 1)) == 0) return leader;
  ++counts->value[kReranked];
  gather(best, second, state, book.num_codes, candidates);
  // A float32 distance takes twice a multiplied column's time and more.
  const bool many = candidates->count > 8 && candidates->count * 4 > book.num_codes;
  if (many && !pass.last) return kPending;
  return refine(book, x, norm.length + book.row_centre_norm, candidates, counts);
}

template <typename T, typename E>
void screen_block(const Pass<T, E>& pass, int64_t begin, int64_t count, int64_t row_stride,
                  const BlockMemory& memory) {
  const Codebook<T>& book = pass.book;
  E* rows = static_cast<E*>(memory.rows);
  const auto row_of = [&](int64_t r) {
    return pass.index == nullptr ? begin + r : pass.index[begin + r];
  };
  const int64_t whole = (count + kScreenRows - 1) / kScreenRows * kScreenRows;
  for (int64_t r = 0; r < whole; ++r) {
    ScreenState* state = memory.states + r;
    state->lost = state->kept = 0.0f;
    if (r < count) {
      const T* row = pass.x + row_of(r) * pass.args.x_row_stride;
      const RowNorm norm = pack_row(row, book.row_centre, book.dim, rows + r * row_stride);
      memory.norms[r] = norm;
      state->lost = round_up(norm.lost);
      state->kept = round_up(norm.length + norm.lost);
    } else {
      memset(rows + r * row_stride, 0, sizeof(E) * static_cast<size_t>(row_stride));
    }
    state->best = state->second = LaneF{} - __builtin_inff();
    state->vector = LaneI{};
  }
  const int64_t columns = panel_columns<E>(book.dim);
  for (int64_t panel = 0; panel < panel_count(book.num_codes); ++panel) {
    const int64_t first = panel * kPanelCodes;
    const PanelBounds bounds = {pass.panels.bias + first, pass.panels.norm + first,
                                pass.panels.loss + first};
    for (int64_t r = 0; r < whole; r += kScreenRows) {
      screen_panel(rows + r * row_stride, row_stride,
                   pass.panels.data + panel * columns * kPanelCodes, bounds, columns,
                   static_cast<int32_t>(panel), memory.states + r);
    }
  }
  Counts counts;
  Candidates candidates = memory.candidates;
  for (int64_t r = 0; r < count; ++r) {
    const T* row = pass.x + row_of(r) * pass.args.x_row_stride;
    const int64_t code = choose(pass, row, memory.norms[r], memory.states[r], &candidates, &counts);
    if (code == kPending) ++counts.value[kRescreened];
    if (pass.index != nullptr) counts.value[kReranked] = 0;  // counted by the first screen
    finish_row(pass.args, book, row, code, pass.at + row_of(r));
  }
  counts.add_to(pass.args.counters);
}

int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Candidates candidates_at(char* base, int64_t num_codes) {
  int32_t* ids = reinterpret_cast<int32_t*>(base);
  return {ids, reinterpret_cast<float*>(base + up_to_line(4 * num_codes)), 0};
}

template <typename T, typename E>
void run_pass(const Pass<T, E>& pass, int64_t rows, int threads) {
  const int64_t dim = pass.book.dim, num_codes = pass.book.num_codes;
  // The padding keeps the rows of a block off one cache set when D is a power of two.
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  const int64_t row_stride = (dim + line - 1) / line * line + line;
  const int64_t row_bytes = row_stride * static_cast<int64_t>(sizeof(E));
  int64_t block = kBlockBytes / row_bytes / kScreenRows * kScreenRows;
  block = block < kScreenRows ? kScreenRows : block > kBlockRows ? kBlockRows : block;
  const int64_t states_at = block * row_bytes;
  const int64_t norms_at = states_at + block * static_cast<int64_t>(sizeof(ScreenState));
  const int64_t candidates_offset =
      norms_at + up_to_line(block * static_cast<int64_t>(sizeof(RowNorm)));
  const int64_t thread_bytes = candidates_offset + 2 * up_to_line(4 * num_codes);
  const Scratch scratch(static_cast<size_t>(thread_bytes * threads));
  const bool small = rows * num_codes * dim < 200000;
  parallel_rows(rows, block, small ? 1 : threads, [&](int64_t begin, int64_t end, int thread) {
    char* base = static_cast<char*>(scratch.data()) + thread_bytes * thread;
    const BlockMemory memory = {base, reinterpret_cast<RowNorm*>(base + norms_at),
                                reinterpret_cast<ScreenState*>(base + states_at),
                                candidates_at(base + candidates_offset, num_codes)};
    screen_block(pass, begin, end - begin, row_stride, memory);
  });
}

// Rows that the first screen has left are screened in float32.
template <typename T>
void screen_pending(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t at,
                    int threads) {
  int64_t count = 0;
  for (int64_t row = 0; row < args.rows; ++row) count += args.codes[at + row] == kPending;
  if (count == 0) return;
  const Scratch memory(sizeof(int64_t) * static_cast<size_t>(count));
  int64_t* index = static_cast<int64_t*>(memory.data());
  int64_t filled = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.codes[at + row] == kPending) index[filled++] = row;
  }
  const PanelMemory<float> panel_memory(book.num_codes, book.dim);
  Panels<float> panels = panel_memory.panels();
  pack_codebook(book, &panels, threads);
  run_pass(Pass<T, float>{args, book, panels, x, at, index, true}, count, threads);
}

// Too few rows for packing: float32 distances to every code, then float64.
template <typename T>
void search_few(const NearestArgs& args, const Codebook<T>& book, const T* x, int64_t at,
                int threads) {
  const int64_t thread_bytes = 2 * up_to_line(4 * book.num_codes);
  const Scratch scratch(static_cast<size_t>(thread_bytes * threads));
  const bool small = args.rows * book.num_codes * book.dim < 200000;
  parallel(args.rows, small ? 1 : threads, [&](int64_t r, int thread) {
    const T* row = x + r * args.x_row_stride;
    Candidates candidates =
        candidates_at(static_cast<char*>(scratch.data()) + thread_bytes * thread, book.num_codes);
    Counts counts;
    counts.value[kReranked] = 1;
    const double square = square_norm(row, book.dim);
    const bool valid = square < kInf && book.any_finite;
    const double norm = __builtin_sqrt(square);
    const int64_t code = valid ? refine_all(book, row, norm, &candidates, &counts) : -1;
    finish_row(args, book, row, code, at + r);
    counts.add_to(args.counters);
  });
}

template <typename T>
struct Search {
  static void run(const NearestArgs& args, Codebook<T>* book, const T* x, int64_t at, int threads) {
    if (args.rows < kPackingRows) {
      search_few(args, *book, x, at, threads);
      return;
    }
    centre_codes(book, threads);
    centre_rows(book, x, args.rows, args.x_row_stride);
    const PanelMemory<FastElement> memory(book->num_codes, book->dim);
    Panels<FastElement> panels = memory.panels();
    pack_codebook(*book, &panels, threads);
    constexpr bool last = sizeof(FastElement) == sizeof(float);
    run_pass(Pass<T, FastElement>{args, *book, panels, x, at, nullptr, last}, args.rows, threads);
    if (!last) screen_pending(args, *book, x, at, threads);
  }
};

template <>
struct Search<double> {
  static void run(const NearestArgs& args, Codebook<double>* book, const double* x, int64_t at,
                  int threads) {
    const int64_t step = rows_per_task(args.rows, book->num_codes * book->dim);
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const double* row = x + r * args.x_row_stride;
        ExactChoice<double> exact{*book, row};
        const int64_t code = all_finite(row, book->dim) ? exact.among_all() : -1;
        finish_row(args, *book, row, code, at + r);
      }
    });
  }
};

}  // namespace

void nearest_code(const NearestArgs& args, int threads) {
  if (args.rows == 0) return;
  const CodebookMemory memory(args.num_codes, args.dim);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t group = 0; group < args.groups; ++group) {
      Codebook<T> book;
      book.metric = args.metric;
      book.codes = static_cast<const T*>(args.codebook) + group * args.num_codes * args.dim;
      book.num_codes = args.num_codes;
      book.dim = args.dim;
      memory.lend(&book);
      measure_codes(&book, threads);
      const T* x = static_cast<const T*>(args.x) + group * args.x_group_stride;
      Search<T>::run(args, &book, x, group * args.rows, threads);
    }
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
