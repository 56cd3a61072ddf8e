#include "isa/functions.h"
#include "isa/rows.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {
namespace {

// Yields ids by descending value, ties by lowest id: a heap, so m ids cost O(K + m log K).
class Descending {
 public:
  // `ids` has room for num_codes entries; entries of -inf are left out.
  Descending(const double* values, int64_t num_codes, int32_t* ids) : values_(values), heap_(ids) {
    for (int64_t k = 0; k < num_codes; ++k) {
      if (values[k] > -kInf) heap_[size_++] = static_cast<int32_t>(k);
    }
    for (int64_t at = size_ / 2; at-- > 0;) sift(at);
  }

  int64_t left() const { return size_; }

  int32_t next() {
    const int32_t top = heap_[0];
    heap_[0] = heap_[--size_];
    sift(0);
    return top;
  }

 private:
  bool before(int32_t a, int32_t b) const {
    return values_[a] > values_[b] || (values_[a] == values_[b] && a < b);
  }

  void sift(int64_t at) {
    for (;;) {
      int64_t first = at;
      const int64_t left = 2 * at + 1;
      if (left < size_ && before(heap_[left], heap_[first])) first = left;
      if (left + 1 < size_ && before(heap_[left + 1], heap_[first])) first = left + 1;
      if (first == at) return;
      const int32_t swap = heap_[at];
      heap_[at] = heap_[first];
      heap_[first] = swap;
      at = first;
    }
  }

  const double* values_;
  int32_t* heap_;
  int64_t size_ = 0;
};

struct Workspace {
  double* logits;
  double* tempered;
  double* kept;
  int32_t* ids;
  uint32_t* words;
};

LRL_INLINE void clear(double* row, int64_t num_codes) {
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) store8(row + k, splat(-kInf));
}

// The `wanted` greatest values, ties to the lowest ids: a heap of the chosen with the worst on top.
class Greatest {
 public:
  Greatest(const double* values, int64_t wanted, int32_t* ids)
      : values_(values), wanted_(wanted), heap_(ids) {}

  void offer_all(int64_t num_codes) {
    int64_t k = 0;
    for (; k < num_codes && size_ < wanted_; ++k) {
      if (values_[k] > -kInf) heap_[size_++] = static_cast<int32_t>(k);
    }
    for (int64_t at = size_ / 2; at-- > 0;) sift(at);
    while (k < num_codes) {
      // Later ids lose ties, so only a strictly greater value gets in; eight are ruled out at once.
      if (k % kLanesD == 0 && !any_lane(load8(values_ + k) > splat(values_[heap_[0]]))) {
        k += kLanesD;
        continue;
      }
      if (values_[k] > values_[heap_[0]]) {
        heap_[0] = static_cast<int32_t>(k);
        sift(0);
      }
      ++k;
    }
  }

  int64_t size() const { return size_; }

 private:
  bool worse(int32_t a, int32_t b) const {
    return values_[a] < values_[b] || (values_[a] == values_[b] && a > b);
  }

  void sift(int64_t at) {
    for (;;) {
      int64_t last = at;
      const int64_t left = 2 * at + 1;
      if (left < size_ && worse(heap_[left], heap_[last])) last = left;
      if (left + 1 < size_ && worse(heap_[left + 1], heap_[last])) last = left + 1;
      if (last == at) return;
      const int32_t swap = heap_[at];
      heap_[at] = heap_[last];
      heap_[last] = swap;
      at = last;
    }
  }

  const double* values_;
  int64_t wanted_;
  int32_t* heap_;
  int64_t size_ = 0;
};

// Copies the top_k entries of `from` to `to`, and -inf elsewhere.
void keep_top_k(const double* from, double* to, int64_t num_codes, int64_t top_k, int32_t* ids) {
  clear(to, num_codes);
  Greatest greatest(from, top_k, ids);
  greatest.offer_all(num_codes);
  for (int64_t i = 0; i < greatest.size(); ++i) to[ids[i]] = from[ids[i]];
}

// Copies the smallest set of entries whose mass reaches top_p, and -inf elsewhere.
void keep_top_p(const double* from, double* to, int64_t num_codes, double top, double top_p,
                int32_t* ids) {
  const double mass = softmax_sums(from, num_codes, top).mass;
  clear(to, num_codes);
  Descending order(from, num_codes, ids);
  double before = 0.0;
  bool first = true;
  while (order.left() > 0 && (first || before < top_p)) {
    const int32_t id = order.next();
    to[id] = from[id];
    before += exp(splat(from[id] - top))[0] / mass;
    first = false;
  }
}

void drop_below_min_p(double* kept, int64_t num_codes, double top, double min_p) {
  for (int64_t k = 0; k < num_codes; k += kLanesD) {
    const VecD v = load8(kept + k);
    store8(kept + k, exp(v - top) < splat(min_p) ? splat(-kInf) : v);
  }
}

template <typename T>
void sample_row(const SampleArgs& args, int64_t row, const Workspace& w) {
  using A = Acc<T>;
  const int64_t num_codes = args.num_codes;
  A* logprob = static_cast<A*>(args.logprob) + row;
  A* logprob_full = static_cast<A*>(args.logprob_full) + row;
  A* entropy = static_cast<A*>(args.entropy) + row;
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
  const double top = widen_row(logits, num_codes, w.logits);
  if (is_nan(top)) {
    args.codes[row] = -1;
    store(logprob, kNaN);
    store(logprob_full, kNaN);
    store(entropy, kNaN);
    return;
  }
  const SoftmaxSums full = softmax_sums(w.logits, num_codes, top);
  if (args.temperature == 0.0) {
    const int64_t code = argmax(w.logits, num_codes);
    args.codes[row] = code;
    store(logprob, 0.0);
    store(logprob_full, full.logprob(w.logits[code]));
    store(entropy, 0.0);
    return;
  }
  const PhiloxKey key = {static_cast<uint64_t>(args.seeds[row]),
                         static_cast<uint64_t>(args.offsets[row])};
  const bool truncated =
      (args.top_k > 0 && args.top_k < num_codes) || args.top_p < 1.0 || args.min_p > 0.0;
  if (args.temperature == 1.0 && !truncated) {
    const int64_t code = argmax_with_noise(w.logits, num_codes, key, w.words);
    args.codes[row] = code;
    store(logprob, full.logprob(w.logits[code]));
    store(logprob_full, full.logprob(w.logits[code]));
    store(entropy, full.entropy());
    return;
  }
  for (int64_t k = 0; k < padded(num_codes); k += kLanesD) {
    store8(w.tempered + k, load8(w.logits + k) / args.temperature);
  }
  const double tempered_top = top / args.temperature;
  double* source = w.tempered;
  double* spare = w.kept;
  if (args.top_k > 0 && args.top_k < num_codes) {
    keep_top_k(source, spare, num_codes, args.top_k, w.ids);
    double* const swap = source;
    source = spare;
    spare = swap;
  }
  if (args.top_p < 1.0) {
    keep_top_p(source, spare, num_codes, tempered_top, args.top_p, w.ids);
    source = spare;
  }
  if (args.min_p > 0.0) drop_below_min_p(source, num_codes, tempered_top, args.min_p);
  const SoftmaxSums sums = softmax_sums(source, num_codes, tempered_top);
  const int64_t code = argmax_with_noise(source, num_codes, key, w.words);
  args.codes[row] = code;
  store(logprob, sums.logprob(source[code]));
  store(logprob_full, full.logprob(w.logits[code]));
  store(entropy, sums.entropy());
}

}  // namespace

void sample_codes(const SampleArgs& args, int threads) {
  if (args.rows == 0) return;
  const size_t width = static_cast<size_t>(padded(args.num_codes));
  const size_t per_thread = width * (3 * sizeof(double) + sizeof(int32_t) + sizeof(uint32_t));
  const Scratch scratch(per_thread * static_cast<size_t>(threads));
  // Noise, exps and logs make an element of a sampler several times dearer than a plain one.
  const int64_t step = rows_per_task(args.rows, args.num_codes * 8);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_rows(args.rows, step, threads, [&](int64_t begin, int64_t end, int thread) {
      char* base = static_cast<char*>(scratch.data()) + per_thread * static_cast<size_t>(thread);
      double* doubles = reinterpret_cast<double*>(base);
      int32_t* ids = reinterpret_cast<int32_t*>(doubles + 3 * width);
      const Workspace w = {doubles, doubles + width, doubles + 2 * width, ids,
                           reinterpret_cast<uint32_t*>(ids + width)};
      for (int64_t row = begin; row < end; ++row) sample_row<T>(args, row, w);
    });
  });
}

void philox_words(int64_t seed, int64_t offset, int64_t count, uint32_t* words) {
  uint32_t block[kNoiseBlock];
  const PhiloxKey key = {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  for (int64_t first = 0; first < count; first += kNoiseBlock) {
    philox_block(key, first / kNoiseBlock, block);
    for (int64_t i = first; i < count && i < first + kNoiseBlock; ++i) words[i] = block[i - first];
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
