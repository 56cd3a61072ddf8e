#include "isa/float_rows.h"
#include "isa/functions.h"
#include "isa/rows.h"
#include "isa/select.h"
#include "isa/short_list.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

// Buffers of one thread, each with room for padded(num_codes) entries.
struct Workspace {
  double* row;         // the row: logits, or where double keys are needed logits / T
  double* listed;      // values of the row that stay after top-k, in the order of their ids
  double* values;      // logits / T of the kept codes, likewise
  double* masses;      // exp(value - top) of the kept codes
  int32_t* ids;        // the kept codes
  int32_t* positions;  // scratch; also the words of the noise
};

// A row as elements of S, with what selection needs to know of it.
template <typename S>
struct Scan {
  const S* row;  // of whole vectors, -inf past its end
  S top;
  S lowest;       // least value that is not masked
  int64_t legal;  // values that are not masked
  bool valid;
};

template <typename T>
LRL_INLINE VecD load_lanes(const T* p, int64_t count, double*) {
  return load_some(p, count, -kInf);
}
template <typename T>
LRL_INLINE VecF load_lanes(const T* p, int64_t count, float*) {
  VecF v;
  if (count >= kLanesOf<float>) {
    const HalfF parts[2] = {load8f(p), load8f(p + kLanesD)};
    memcpy(&v, parts, sizeof(v));
    return v;
  }
  for (int64_t lane = 0; lane < kLanesOf<float>; ++lane) {
    v[lane] = lane < count ? static_cast<float>(to_double(p[lane])) : -__builtin_inff();
  }
  return v;
}

// Reads a row, into `copy` unless it can be used where it lies.
template <typename S, typename T>
Scan<S> scan_row(const T* source, int64_t num_codes, S* copy) {
  using Vec = typename Lanes<S>::Vec;
  using Mask = typename Lanes<S>::Mask;
  const S infinity = S(kInf);
  Vec top = Vec{} - infinity;
  Vec lowest = Vec{} + infinity;
  Mask illegal = {};
  Mask unmasked = {};
  const auto note = [&](Vec v) {
    const Mask seen = v > Vec{} - infinity;
    illegal |= ~(v < Vec{} + infinity);  // true for NaN and +inf
    unmasked += seen;
    top = v > top ? v : top;
    const Vec shown = seen ? v : Vec{} + infinity;
    lowest = shown < lowest ? shown : lowest;
  };
  const S* row = copy;
  if (sizeof(S) == sizeof(float) && sizeof(T) == sizeof(float) && num_codes % kLanesOf<S> == 0) {
    row = reinterpret_cast<const S*>(source);
    for (int64_t k = 0; k < num_codes; k += kLanesOf<S>) note(load_vec(row + k));
  } else {
    for (int64_t k = 0; k < num_codes; k += kLanesOf<S>) {
      const Vec v = load_lanes(source + k, num_codes - k, static_cast<S*>(nullptr));
      memcpy(copy + k, &v, sizeof(v));
      note(v);
    }
  }
  Scan<S> out = {};
  out.row = row;
  out.top = fold<S>(top, [](auto a, auto b) { return a > b ? a : b; });
  out.lowest = fold<S>(lowest, [](auto a, auto b) { return a < b ? a : b; });
  using Key = typename Lanes<S>::Key;
  out.legal = -fold<Key>(unmasked, [](auto a, auto b) { return a + b; });
  out.valid = out.legal > 0 && !any_lane(bit_cast<VecI64>(illegal));
  return out;
}

// Lists the codes of a row at or above `low`, and their values; returns how many they are.
template <typename S>
int64_t list(const S* row, int64_t num_codes, S low, int32_t* ids, S* values) {
  int64_t size = 0;
  for (int64_t k = 0; k < num_codes; k += kLanesOf<S>) {
    const auto v = load_vec(row + k);
    const auto reached = v >= low;
    pack(reached, v, values + size);
    size += pack(reached, ids_from<S>(k), ids + size);
  }
  return size;
}

template <typename S>
LRL_INLINE void pad(S* array, int64_t size, double fill) {
  for (int64_t i = size; i % 16 != 0; ++i) array[i] = S(fill);
}

// What counts the values at or above a threshold.
template <typename S>
struct Counter {
  const S* values;
  int64_t width;

  LRL_INLINE Tally operator()(S threshold) const {
    const int64_t count = count_at_least(values, width, threshold);
    return {static_cast<double>(count), count};
  }
};

// Of a list of codes and their values, keeps the prefix of top_k that ends in the bracket.
template <typename S>
LRL_INLINE int64_t keep_prefix(S* values, int64_t listed, const Bracket<S>& bracket, int64_t top_k,
                               const Workspace& w) {
  pad(values, listed, -kInf);
  Cut<S> cut = {bracket.low, INT32_MAX};
  if (bracket.reached() != top_k) {
    cut = find_cut(values, listed, bracket, static_cast<double>(top_k), w.positions,
                   [](int64_t) { return 1.0; });
  }
  int64_t size = 0;
  for (int64_t i = 0; i < listed; i += kLanesOf<S>) {
    const auto v = load_vec(values + i);
    const auto stays = cut.keeps(v, i);
    pack(stays, v, values + size);
    size += pack(stays, load_ids<S>(w.ids + i), w.ids + size);
  }
  return size;
}

// Rows longer than this are narrowed down to a list of this many codes, or twice top_k, and then
// the list is. Apart from short rows, whose search is quicker where it stands.
constexpr int64_t kLongRow = 512;
template <typename S>
__attribute__((noinline)) int64_t list_top_k_of_long(const Scan<S>& scan, int64_t num_codes,
                                                     int64_t top_k, const Workspace& w, S* values) {
  const double target = static_cast<double>(top_k);
  const int64_t crowd = 2 * top_k < kLongRow ? kLongRow : 2 * top_k;
  Bracket<S> bracket = {scan.lowest, next_above(scan.top), {0.0, 0}, scan.legal};
  bracket = narrow(bracket, target, top_k, crowd, Counter<S>{scan.row, num_codes});
  const int64_t listed = list(scan.row, num_codes, bracket.low, w.ids, values);
  pad(values, listed, -kInf);
  bracket = narrow(bracket, target, top_k, 0, Counter<S>{values, listed});
  return keep_prefix(values, listed, bracket, top_k, w);
}

// Lists the top_k codes of a row, or all that are not masked.
template <typename S>
int64_t list_top_k(const Scan<S>& scan, int64_t num_codes, int64_t top_k, const Workspace& w,
                   S* values) {
  const S* row = scan.row;
  if (top_k <= 0 || top_k >= scan.legal) return list(row, num_codes, scan.lowest, w.ids, values);
  if (num_codes > kLongRow) return list_top_k_of_long(scan, num_codes, top_k, w, values);
  const Bracket<S> bracket =
      narrow(Bracket<S>{scan.lowest, next_above(scan.top), {0.0, 0}, scan.legal},
             static_cast<double>(top_k), top_k, 0, Counter<S>{row, num_codes});
  const int64_t listed = list(row, num_codes, bracket.low, w.ids, values);
  return listed == top_k ? listed : keep_prefix(values, listed, bracket, top_k, w);
}

// Widens the listed values to logits / T, computes their masses exp(value - top) and returns the
// sum of the masses.
template <typename S>
double weigh(const S* listed, int64_t size, double top, double divisor, const Workspace& w) {
  VecD mass = VecD{};
  for (int64_t i = 0; i < size; i += kLanesD) {
    const VecD v = load8(listed + i) / divisor;
    const VecD e = exp(v - top);
    store8(w.values + i, v);
    store8(w.masses + i, e);
    mass += e;
  }
  return sum_lanes(mass);
}

// Of the listed codes, the end of the smallest prefix whose mass reaches top_p of theirs.
Cut<double> cut_at_mass(const Workspace& w, int64_t size, double lowest, double top, double mass,
                        double top_p) {
  // The most likely code has mass 1 and stays whatever top_p is.
  const double target = top_p * mass > 0.0 ? top_p * mass : 1.0;
  Bracket<double> bracket = {lowest, next_above(top), {0.0, 0}, size};
  const auto measure = [&](double threshold) {
    return mass_at_least(w.values, w.masses, size, threshold);
  };
  if (size > 8 * kWindow) {
    // All codes below this value together weigh less than half of what top_p leaves out.
    const double tail = 0.5 * (1.0 - top_p) * mass / static_cast<double>(size);
    const double bound = tail > 0x1p-1000 ? top + log1(tail) : lowest;
    if (bound > lowest) {
      const Tally reached = measure(bound);
      if (reached.weight >= target) {
        bracket.low = bound;
        bracket.inside = reached.count;
      }
    }
  }
  bracket = narrow(bracket, target, -1, 0, measure);
  return find_cut(w.values, size, bracket, target, w.positions,
                  [&](int64_t i) { return w.masses[i]; });
}

// Applies top_p and min_p to the listed codes; returns how many stay, and the sums over them.
int64_t truncate(const SampleArgs& args, const Workspace& w, int64_t listed, double lowest,
                 double top, double listed_mass, SoftmaxSums* sums) {
  Cut<double> cut = {-kInf, -1};
  if (args.top_p < 1.0) cut = cut_at_mass(w, listed, lowest, top, listed_mass, args.top_p);
  VecD mass = VecD{};
  VecD weighted = VecD{};
  int64_t size = 0;
  for (int64_t i = 0; i < listed; i += kLanesD) {
    const VecD v = load8(w.values + i);
    const VecD e = load8(w.masses + i);
    const VecI64 stays = cut.keeps(v, i) & (e >= splat(args.min_p));
    mass += stays ? e : splat(0.0);
    weighted += stays ? e * (v - top) : splat(0.0);
    pack(stays, v, w.values + size);
    size += pack(stays, load_ids<double>(w.ids + i), w.ids + size);
  }
  sums->top = top;
  sums->mass = sum_lanes(mass);
  sums->weighted = sum_lanes(weighted);
  return size;
}

struct Drawn {
  int64_t code;
  double value;  // logit / T of the code
};

// The kept code with the greatest noisy value.
Drawn draw(const Workspace& w, int64_t size, int64_t num_codes, PhiloxKey key) {
  // The noise of a listed code costs four times that of a code in a dense row.
  if (4 * size > num_codes) {
    for (int64_t k = 0; k < padded(num_codes); k += kLanesD) store8(w.row + k, splat(-kInf));
    for (int64_t i = 0; i < size; ++i) w.row[w.ids[i]] = w.values[i];
    const int64_t code =
        argmax_with_noise(w.row, num_codes, key, reinterpret_cast<uint32_t*>(w.positions));
    return {code, w.row[code]};
  }
  pad(w.values, size, -kInf);
  int32_t* words = w.positions;
  double* upper = w.listed;
  VecD lower = splat(-kInf);
  for (int64_t i = 0; i < size; i += kLanesD) {
    HalfU32 ids;
    memcpy(&ids, w.ids + i, sizeof(ids));
    const VecU64 word = words_of_codes(key, widen(ids));
    const HalfU32 narrow_word = __builtin_convertvector(word, HalfU32);
    memcpy(words + i, &narrow_word, sizeof(narrow_word));
    const VecD value = load8(w.values + i);
    const GumbelBounds noise = gumbel_bounds(word);
    store8(upper + i, value + noise.upper);
    lower = max(lower, value + noise.lower);
  }
  // Only codes whose upper bound reaches the greatest lower bound can win: one or two of them,
  // packed to the front.
  const double reached = max_lanes(lower);
  int64_t candidates = 0;
  for (int64_t i = 0; i < size; i += kLanesD) {
    const VecI64 stays = load8(upper + i) >= splat(reached);
    pack(stays, load8(w.values + i), w.values + candidates);
    pack(stays, load_ids<double>(w.ids + i), w.ids + candidates);
    candidates += pack(stays, load_ids<double>(words + i), words + candidates);
  }
  if (candidates == 1) return {w.ids[0], w.values[0]};
  pad(w.values, candidates, -kInf);
  ArgMax running;
  for (int64_t i = 0; i < candidates; i += kLanesD) {
    HalfU32 word;
    memcpy(&word, words + i, sizeof(word));
    running.add(load8(w.values + i) + gumbel(widen(word)), i);
  }
  const int64_t at = running.lowest();
  return {w.ids[at], w.values[at]};
}

template <typename T>
void write_row(const SampleArgs& args, int64_t row, int64_t code, double logprob,
               double logprob_full, double entropy) {
  using A = Acc<T>;
  args.codes[row] = code;
  store(static_cast<A*>(args.logprob) + row, logprob);
  store(static_cast<A*>(args.logprob_full) + row, logprob_full);
  store(static_cast<A*>(args.entropy) + row, entropy);
}

template <typename T>
void write_invalid(const SampleArgs& args, int64_t row) {
  write_row<T>(args, row, -1, kNaN, kNaN, kNaN);
}

PhiloxKey key_of_row(const SampleArgs& args, int64_t row) {
  return {static_cast<uint64_t>(args.seeds[row]), static_cast<uint64_t>(args.offsets[row])};
}

// A row of what top-k left, by float64: what a row of kept codes draws, and the sums over them.
template <typename S>
Drawn draw_listed(const SampleArgs& args, const Workspace& w, const S* listed, int64_t size,
                  double lowest, double top, double divisor, PhiloxKey key, SoftmaxSums* sums) {
  const double mass = weigh(listed, size, top, divisor, w);
  size = truncate(args, w, size, lowest, top, mass, sums);
  return draw(w, size, args.num_codes, key);
}

// A row that top-k, top-p or min-p truncates. Selection compares the logits themselves, sixteen at
// a time.
template <typename T>
void truncated_row(const SampleArgs& args, int64_t at, const Workspace& w) {
  const int64_t num_codes = args.num_codes;
  const T* logits = static_cast<const T*>(args.logits) + at * args.row_stride;
  const Scan<float> scan = scan_row(logits, num_codes, reinterpret_cast<float*>(w.row));
  if (!scan.valid) return write_invalid<T>(args, at);
  const double divisor = args.temperature;
  const double top = scan.top / divisor;
  float* listed = reinterpret_cast<float*>(w.listed);
  const int64_t size = list_top_k(scan, num_codes, args.top_k, w, listed);
  pad(listed, size, -kInf);
  const double full_mass = softmax_mass(scan.row, num_codes, scan.top);
  const PhiloxKey key = key_of_row(args, at);
  Drawn drawn = {-1, 0.0};
  SoftmaxSums sums = {};
  if (size <= kShort && fits_short(divisor, top, args.min_p)) {
    const ShortList list = {listed, w.ids, size, scan.top, divisor, args.top_p, args.min_p};
    const ShortDraw found = draw_short(list, key);
    sums.mass = found.mass;
    sums.weighted = found.weighted;
    if (found.at >= 0) drawn = {w.ids[found.at], listed[found.at] / divisor};
  }
  if (drawn.code < 0) {
    const double lowest = scan.lowest / divisor;
    drawn = draw_listed(args, w, listed, size, lowest, top, divisor, key, &sums);
  }
  const VecD log_mass = log(VecD{sums.mass, full_mass, 1, 1, 1, 1, 1, 1});
  write_row<T>(args, at, drawn.code, drawn.value - top - log_mass[0],
               to_double(logits[drawn.code]) - scan.top - log_mass[1],
               log_mass[0] - sums.weighted / sums.mass);
}

// Likewise where float32 cannot tell: selection compares logits / T.
template <typename T>
void truncated_row_wide(const SampleArgs& args, int64_t at, const Workspace& w) {
  const int64_t num_codes = args.num_codes;
  const T* logits = static_cast<const T*>(args.logits) + at * args.row_stride;
  Scan<double> scan = scan_row(logits, num_codes, w.row);
  if (!scan.valid) return write_invalid<T>(args, at);
  const double full_top = scan.top;
  const double full_mass = softmax_mass(w.row, num_codes, full_top);
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    store8(w.row + k, load8(w.row + k) / args.temperature);
  }
  scan.top /= args.temperature;
  scan.lowest /= args.temperature;
  if (!(scan.top < kInf && scan.top > -kInf)) return write_invalid<T>(args, at);
  const int64_t size = list_top_k(scan, num_codes, args.top_k, w, w.listed);
  pad(w.listed, size, -kInf);
  SoftmaxSums sums = {};
  const Drawn drawn =
      draw_listed(args, w, w.listed, size, scan.lowest, scan.top, 1.0, key_of_row(args, at), &sums);
  const VecD log_mass = log(VecD{sums.mass, full_mass, 1, 1, 1, 1, 1, 1});
  write_row<T>(args, at, drawn.code, drawn.value - scan.top - log_mass[0],
               to_double(logits[drawn.code]) - full_top - log_mass[1],
               log_mass[0] - sums.weighted / sums.mass);
}

// softmax(logits), bit for bit that of code_logprobs.
struct Full {
  double top, log_mass, entropy;
  double logprob(double logit) const { return logit - top - log_mass; }
};

// `w.row` holds the logits as float64, padded.
Full full_softmax(const double*, int64_t num_codes, double top, const Workspace& w) {
  const SoftmaxSums sums = softmax_sums(w.row, num_codes, top);
  return {top, sums.log_mass, sums.entropy()};
}
template <typename T>
Full full_softmax(const T* logits, int64_t num_codes, double top, const Workspace& w) {
  const FloatRow row = read_float_row(logits, num_codes, 0, reinterpret_cast<float*>(w.listed));
  const FloatSums sums = softmax_sums(row, num_codes, reinterpret_cast<float*>(w.values));
  const FloatStatistics statistics(splat(sums.rest), splat(sums.weighted));
  return {top, statistics.log_mass[0], statistics.entropy[0]};
}

// A row with every code: one softmax at T = 1, and a second one of logits / T otherwise.
template <typename T>
void whole_row(const SampleArgs& args, int64_t at, const Workspace& w) {
  const int64_t num_codes = args.num_codes;
  const T* logits = static_cast<const T*>(args.logits) + at * args.row_stride;
  const double full_top = widen_row(logits, num_codes, w.row);
  const double top = full_top / args.temperature;
  if (!(top < kInf && top > -kInf)) return write_invalid<T>(args, at);
  const Full full = full_softmax(logits, num_codes, full_top, w);
  Full tempered = full;
  if (args.temperature != 1.0) {
    for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
      store8(w.row + k, load8(w.row + k) / args.temperature);
    }
    const SoftmaxSums sums = softmax_sums(w.row, num_codes, top);
    tempered = {top, sums.log_mass, sums.entropy()};
  }
  const int64_t code = argmax_with_noise(w.row, num_codes, key_of_row(args, at),
                                         reinterpret_cast<uint32_t*>(w.positions));
  write_row<T>(args, at, code, tempered.logprob(w.row[code]), full.logprob(to_double(logits[code])),
               tempered.entropy);
}

template <typename T>
void greedy_row(const SampleArgs& args, int64_t at, const Workspace& w) {
  const T* logits = static_cast<const T*>(args.logits) + at * args.row_stride;
  const double top = widen_row(logits, args.num_codes, w.row);
  if (is_nan(top)) return write_invalid<T>(args, at);
  const double log_mass = full_softmax(logits, args.num_codes, top, w).log_mass;
  write_row<T>(args, at, argmax(w.row, args.num_codes), 0.0, -log_mass, 0.0);
}

// Distinct float32 logits stay distinct, and finite, when divided by a temperature in this range.
bool keeps_floats_apart(double temperature) {
  return temperature > 0x1p-400 && temperature < 0x1p400;
}

template <typename T>
void sample_row(const SampleArgs& args, int64_t at, const Workspace& w) {
  if (args.temperature == 0.0) return greedy_row<T>(args, at, w);
  const bool truncated =
      (args.top_k > 0 && args.top_k < args.num_codes) || args.top_p < 1.0 || args.min_p > 0.0;
  if (!truncated) return whole_row<T>(args, at, w);
  if constexpr (sizeof(T) <= sizeof(float)) {
    if (keeps_floats_apart(args.temperature)) return truncated_row<T>(args, at, w);
  }
  truncated_row_wide<T>(args, at, w);
}

}  // namespace

void sample_codes(const SampleArgs& args, int threads) {
  if (args.rows == 0) return;
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const size_t per_thread = width * (4 * sizeof(double) + 2 * sizeof(int32_t));
  // A code costs about four nanoseconds, twenty times a plain element: a task is then about 80 us.
  const int64_t step = rows_per_task(args.rows, args.num_codes);
  const int64_t tasks = (args.rows + step - 1) / step;
  const int used = threads < tasks ? threads : static_cast<int>(tasks);
  const Scratch scratch(per_thread * static_cast<size_t>(used));
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, used, [&](int64_t begin, int64_t end, int thread) {
      char* base = static_cast<char*>(scratch.data()) + per_thread * static_cast<size_t>(thread);
      double* doubles = reinterpret_cast<double*>(base);
      int32_t* ids = reinterpret_cast<int32_t*>(doubles + 4 * width);
      const Workspace w = {doubles, doubles + width, doubles + 2 * width, doubles + 3 * width,
                           ids,     ids + width};
      for (int64_t row = begin; row < end; ++row) sample_row<T>(args, row, w);
    });
  });
}

void philox_words(int64_t seed, int64_t offset, int64_t count, uint32_t* words) {
  const PhiloxKey key = {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  for (int64_t first = 0; first < count; first += kNoiseBlock) {
    uint32_t block[kNoiseBlock];
    const NoiseBlock drawn = philox_block(key, first / kNoiseBlock);
    memcpy(block, &drawn, sizeof(block));
    for (int64_t i = first; i < count && i < first + kNoiseBlock; ++i) words[i] = block[i - first];
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
