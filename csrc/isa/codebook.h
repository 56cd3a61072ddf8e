// A codebook as a search needs it: measured, centred, and packed in panels for a screen.
#pragma once

#include "isa/screen.h"
#include "ops.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

template <typename T>
struct Codebook {
  Metric metric;
  const T* codes;  // [K, D]
  int64_t num_codes, dim;
  double* norms;      // [K], Euclidean; 0 where a code is not finite
  uint8_t* finite;    // [K]
  float* centre;      // [D]: mean of the finite codes (of their directions, for cosine)
  float* row_centre;  // [D]: what rows have subtracted, see centre_rows
  double row_centre_norm;
  double norm_min, norm_max;  // of the finite codes that are not zero; kInf and 0 without any
  bool any_finite;

  // What a code is multiplied by before anything else.
  double scale(int64_t code) const {
    if (metric != Metric::kCosine) return 1.0;
    return norms[code] > 0.0 ? 1.0 / norms[code] : 0.0;
  }
  double scale_max() const { return metric == Metric::kCosine ? 1.0 / norm_min : 1.0; }
  // How far a float64 distance is from the true one, relative to the lengths it is made of.
  double exact_gamma() const { return (static_cast<double>(dim) + 8.0) * 0x1p-52; }
  // The greatest length of a scaled code.
  double reach() const { return metric == Metric::kCosine ? 1.0 : norm_max; }
};

// The centred codes in the element of a screen, and what bounds the error E of a screened score
// (README.md): E = lost_r norm_j + kept_r loss_j + slack_j. All arrays are [panels * kPanelCodes].
template <typename E>
struct Panels {
  E* data;       // [panels, D rounded up to kColumns, kPanelCodes]
  float* bias;   // b_j + slack_j; -inf marks a code that cannot be chosen
  float* norm;   // |v_j|
  float* loss;   // |v_j - v'_j| and what accumulation loses of |v_j|
  float* slack;  // the rest: rounding of b_j, flushed results, float64
  double reach;  // no score exceeds (|u| + lost) reach + bias_reach
  double bias_reach;
};

constexpr int64_t kColumnSlab = 64;

inline int64_t panel_count(int64_t num_codes) {
  return (num_codes + kPanelCodes - 1) / kPanelCodes;
}
template <typename E>
int64_t panel_columns(int64_t dim) {
  constexpr int64_t kColumns = ScreenTraits<E>::kColumns;
  return (dim + kColumns - 1) / kColumns * kColumns;
}

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
void measure_codes(Codebook<T>* book, int threads) {
  const int64_t step = rows_per_task(book->num_codes, book->dim);
  parallel_rows(book->num_codes, step, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t code = begin; code < end; ++code) {
      const T* c = book->codes + code * book->dim;
      book->finite[code] = all_finite(c, book->dim) ? 1 : 0;
      book->norms[code] = book->finite[code] != 0 ? __builtin_sqrt(square_norm(c, book->dim)) : 0.0;
    }
  });
  book->any_finite = false;
  book->norm_min = kInf;
  book->norm_max = 0.0;
  for (int64_t code = 0; code < book->num_codes; ++code) {
    const double norm = book->norms[code];
    book->any_finite = book->any_finite || book->finite[code] != 0;
    if (norm > book->norm_max) book->norm_max = norm;
    if (norm > 0.0 && norm < book->norm_min) book->norm_min = norm;
  }
}

// Four times the median norm, to a factor of two: what is longer is left out of the centre. A
// single code gone astray would otherwise drag it, and all that is measured from it, along.
template <typename T>
double usual_norm(const Codebook<T>& book) {
  constexpr int kExponents = 2048;
  int64_t counts[kExponents] = {};
  int64_t finite = 0;
  const auto exponent = [&](int64_t code) {
    return static_cast<int>(bit_cast<uint64_t>(book.norms[code]) >> 52);
  };
  for (int64_t code = 0; code < book.num_codes; ++code) {
    if (book.finite[code] == 0) continue;
    ++finite;
    ++counts[exponent(code)];
  }
  int median = 0;
  for (int64_t below = counts[0]; 2 * below < finite; below += counts[median]) ++median;
  return bit_cast<double>(static_cast<uint64_t>(median + 3) << 52);
}

// Any centre gives the same codes; the mean keeps what is rounded short.
template <typename T>
void centre_codes(Codebook<T>* book, int threads) {
  const int64_t dim = book->dim;
  const int64_t slabs = (dim + kColumnSlab - 1) / kColumnSlab;
  const bool small = book->num_codes * dim < 20000;
  const double longest = usual_norm(*book);
  parallel(slabs, small ? 1 : threads, [&](int64_t slab, int) {
    const int64_t begin = slab * kColumnSlab;
    const int64_t width = dim - begin < kColumnSlab ? dim - begin : kColumnSlab;
    VecD sums[kColumnSlab / kLanesD] = {};
    double count = 0.0;
    for (int64_t code = 0; code < book->num_codes; ++code) {
      if (book->finite[code] == 0 || book->norms[code] > longest) continue;
      count += 1.0;
      const T* c = book->codes + code * dim + begin;
      const double scale = book->scale(code);
      for (int64_t d = 0; d < width; d += kLanesD) {
        sums[d / kLanesD] += load_some(c + d, width - d, 0.0) * scale;
      }
    }
    const double inverse = count > 0.0 ? 1.0 / count : 0.0;
    for (int64_t d = 0; d < width; d += kLanesD) {
      store_some(book->centre + begin + d, sums[d / kLanesD] * inverse, width - d);
    }
  });
}

// Chooses what rows have subtracted: the codes' centre for l2. For dot and cosine a mean of some
// rows where they lie together away from the origin, and nothing otherwise, since rounded rows of
// bfloat16 input lose nothing.
template <typename T>
void centre_rows(Codebook<T>* book, const T* x, int64_t rows, int64_t row_stride) {
  constexpr int64_t kSample = 64;
  const int64_t dim = book->dim;
  const size_t bytes = sizeof(float) * static_cast<size_t>(dim);
  memset(book->row_centre, 0, bytes);
  if (book->metric == Metric::kL2) {
    memcpy(book->row_centre, book->centre, bytes);
  } else {
    const Scratch memory(sizeof(double) * static_cast<size_t>(dim));
    double* sums = static_cast<double*>(memory.data());
    memset(sums, 0, sizeof(double) * static_cast<size_t>(dim));
    double squares = 0.0, count = 0.0;
    for (int64_t r = 0; r < rows; r += (rows + kSample - 1) / kSample) {
      const T* row = x + r * row_stride;
      const double square = square_norm(row, dim);
      if (!(square < kInf)) continue;
      squares += square;
      count += 1.0;
      for (int64_t d = 0; d < dim; ++d) sums[d] += to_double(row[d]);
    }
    if (4.0 * square_norm(sums, dim) > squares * count) {
      for (int64_t d = 0; d < dim; ++d) book->row_centre[d] = static_cast<float>(sums[d] / count);
    }
  }
  book->row_centre_norm = __builtin_sqrt(square_norm(book->row_centre, dim));
}

// Rounds to the element of the screen and gives back the value kept.
LRL_INLINE HalfF round_to(float* out, HalfF v) {
  memcpy(out, &v, sizeof(v));
  return v;
}
LRL_INLINE HalfF round_to(BF16* out, HalfF v) {
  const HalfU32 bits = bit_cast<HalfU32>(v);
  HalfU32 kept = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  // The multiplication reads subnormals as zero.
  kept = (kept & 0x7f800000u) == 0u ? HalfU32{} : kept;
  const QuarterU16 high = __builtin_convertvector(kept >> 16, QuarterU16);
  memcpy(out, &high, sizeof(high));
  return bit_cast<HalfF>(kept);
}

struct CodeSums {
  VecD square;  // of v
  VecD lost;    // square of v - v'
  VecD shift;   // product of v and the rows' centre
};

// Columns [begin, begin + width) of one code, centred and rounded; adds to its sums.
template <typename T, typename E>
void pack_code(const Codebook<T>& book, int64_t code, int64_t begin, int64_t width, E* out,
               CodeSums* sums) {
  const T* c = book.codes + code * book.dim + begin;
  const double scale = book.scale(code);
  for (int64_t d = 0; d < width; d += kLanesD) {
    const VecD v = load_some(c + d, width - d, 0.0) * scale -
                   load_some(book.centre + begin + d, width - d, 0.0);
    const VecD kept = widen(round_to(out + d, __builtin_convertvector(v, HalfF)));
    sums->square += v * v;
    sums->lost += (v - kept) * (v - kept);
    sums->shift += v * load_some(book.row_centre + begin + d, width - d, 0.0);
  }
}

template <typename T, typename E>
void bound_code(const Codebook<T>& book, const Panels<E>& panels, int64_t code,
                const CodeSums& sums) {
  // Covers the rounding of these sums, of the float32 arrays, and of E itself in the scores.
  constexpr double kRoom = 1.0 + 0x1p-9;
  const double square = sum_lanes(sums.square);
  const double norm = __builtin_sqrt(square);
  const double lost = __builtin_sqrt(sum_lanes(sums.lost));
  const double gamma = screen_gamma<E>(book.dim) + 0x1p-22;
  const bool l2 = book.metric == Metric::kL2;
  const double bias = l2 ? -0.5 * square : sum_lanes(sums.shift);
  // Results below the normal range may be flushed to zero.
  const double flushed = static_cast<double>(book.dim) * 0x1p-124;
  const double exact = book.exact_gamma() * norm * (l2 ? 2.0 * norm : book.row_centre_norm);
  const float slack = static_cast<float>(kRoom * (exact + flushed + gamma * __builtin_fabs(bias)));
  const bool usable = code < book.num_codes && book.finite[code] != 0;
  panels.norm[code] = static_cast<float>(kRoom * norm);
  panels.loss[code] = static_cast<float>(kRoom * (lost + gamma * (norm + lost)));
  panels.slack[code] = slack;
  panels.bias[code] = usable ? static_cast<float>(bias + slack) : -__builtin_inff();
}

template <typename T, typename E>
void pack_panel(const Codebook<T>& book, const Panels<E>& panels, int64_t panel) {
  constexpr int64_t kColumns = ScreenTraits<E>::kColumns;
  const int64_t columns = panel_columns<E>(book.dim);
  const int64_t first = panel * kPanelCodes;
  CodeSums sums[kPanelCodes] = {};
  E rows[kPanelCodes][kColumnSlab];
  for (int64_t begin = 0; begin < columns; begin += kColumnSlab) {
    const int64_t width = columns - begin < kColumnSlab ? columns - begin : kColumnSlab;
    const int64_t real = book.dim - begin < width ? book.dim - begin : width;
    memset(rows, 0, sizeof(rows));
    for (int64_t j = 0; j < kPanelCodes; ++j) {
      if (first + j >= book.num_codes || book.finite[first + j] == 0) continue;
      pack_code(book, first + j, begin, real, rows[j], sums + j);
    }
    E* out = panels.data + (panel * columns + begin) * kPanelCodes;
    for (int64_t d = 0; d < width; d += kColumns) {
      for (int64_t j = 0; j < kPanelCodes; ++j) {
        memcpy(out, rows[j] + d, sizeof(E) * kColumns);
        out += kColumns;
      }
    }
  }
  for (int64_t j = 0; j < kPanelCodes; ++j) {
    bound_code(book, panels, first + j, sums[j]);
  }
}

template <typename T, typename E>
void pack_codebook(const Codebook<T>& book, Panels<E>* panels, int threads) {
  const int64_t count = panel_count(book.num_codes);
  parallel(count, book.num_codes * book.dim < 20000 ? 1 : threads,
           [&](int64_t panel, int) { pack_panel(book, *panels, panel); });
  double norm = 0.0, loss = 0.0, slack = 0.0;
  for (int64_t code = 0; code < count * kPanelCodes; ++code) {
    if (panels->norm[code] > norm) norm = panels->norm[code];
    if (panels->loss[code] > loss) loss = panels->loss[code];
    if (panels->slack[code] > slack) slack = panels->slack[code];
  }
  panels->reach = 2.0 * (norm + loss);
  panels->bias_reach = norm * (norm + book.row_centre_norm) + 2.0 * slack;
}

// Memory of a codebook's measures and of its panels.
class CodebookMemory {
 public:
  CodebookMemory(int64_t num_codes, int64_t dim)
      : norms_(sizeof(double) * static_cast<size_t>(num_codes)),
        finite_(static_cast<size_t>(num_codes)),
        centres_(2 * sizeof(float) * static_cast<size_t>(dim)) {}

  template <typename T>
  void lend(Codebook<T>* book) const {
    book->norms = static_cast<double*>(norms_.data());
    book->finite = static_cast<uint8_t*>(finite_.data());
    book->centre = static_cast<float*>(centres_.data());
    book->row_centre = book->centre + book->dim;
  }

 private:
  Scratch norms_, finite_, centres_;
};

template <typename E>
class PanelMemory {
 public:
  PanelMemory(int64_t num_codes, int64_t dim)
      : codes_(panel_count(num_codes) * kPanelCodes),
        data_(sizeof(E) * static_cast<size_t>(codes_ * panel_columns<E>(dim))),
        bounds_(4 * sizeof(float) * static_cast<size_t>(codes_)) {}

  Panels<E> panels() const {
    float* bounds = static_cast<float*>(bounds_.data());
    return {static_cast<E*>(data_.data()),
            bounds,
            bounds + codes_,
            bounds + 2 * codes_,
            bounds + 3 * codes_,
            0.0,
            0.0};
  }

 private:
  int64_t codes_;
  Scratch data_, bounds_;
};

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
