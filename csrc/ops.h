// The CPU entry points of every op, compiled once per instruction set and chosen at run time.
//
// Symbols: G groups, N rows, B rows of a sampler, K codes, D code width, I intermediate width.
// `*_stride` is the distance between rows in elements; rows themselves are contiguous. Arrays
// without a stride are contiguous. `acc` below means float64 for float64 input and float32 else.
// A code of -1 marks an invalid row everywhere.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {

enum class Metric : int { kL2 = 0, kCosine = 1, kDot = 2 };
constexpr int kMetricCount = 3;

struct NearestArgs {
  DType dtype;
  Metric metric;
  const void* x;         // [G, N, D]
  const void* codebook;  // [G, K, D], contiguous
  int64_t* codes;        // [G, N]
  void* distance;        // acc [G, N], or null
  int64_t groups, rows, num_codes, dim;
  int64_t x_group_stride, x_row_stride;
  // [3] or null; added to: rows whose screen left several codes, those of them screened again in
  // float32 (after bfloat16), and rows that float64 decided. Zero for float64 input.
  int64_t* counters = nullptr;
};

struct QuantizeForwardArgs {
  DType dtype;
  const void* x;         // [N, D]
  const void* codebook;  // [K, D]
  const int64_t* codes;  // [N]
  void* quantized;       // [N, D]
  double* square_sum;    // [1]: sum over valid rows and D of (x - c)^2
  int64_t* counts;       // [K]
  void* sums;            // acc [K, D]
  int64_t rows, num_codes, dim;
  int64_t x_row_stride;
};

struct QuantizeBackwardArgs {
  DType dtype;
  const void* grad;       // [N, D]
  const void* x;          // [N, D]
  const void* codebook;   // [K, D]
  const int64_t* codes;   // [N]
  void* dx;               // [N, D]
  const int64_t* counts;  // [K]
  const void* sums;       // acc [K, D]
  void* dcodebook;        // [K, D]
  double scale;           // grad_commitment * 2 / (Nv * D)
  double codebook_scale;  // grad_codebook_loss * 2 / (Nv * D)
  int64_t rows, num_codes, dim;
  int64_t grad_row_stride, x_row_stride;  // grad_row_stride 0: one row serves all
};

struct SegmentSumArgs {
  DType dtype;
  const void* values;    // [N, D]
  const int64_t* codes;  // [N]
  int64_t* counts;       // [K] or null
  void* sums;            // acc [K, D]
  int64_t rows, num_codes, dim;
  int64_t row_stride;
};

struct GumbelForwardArgs {
  DType dtype;
  const void* logits;    // [N, K]
  const int64_t* seeds;  // [N]
  double tau;
  int64_t* codes;    // [N]
  void* entropy;     // acc [N]
  void* mean_probs;  // acc [K]
  int64_t* counts;   // [K]
  void* soft;        // acc [N, K]: softmax((logits + G) / tau), or null
  int64_t rows, num_codes;
  int64_t row_stride;
};

struct GumbelBackwardArgs {
  DType dtype;
  const void* logits;        // [N, K]
  const int64_t* seeds;      // [N]
  const int64_t* codes;      // [N]
  const void* g_soft;        // acc [N, K]
  const void* g_entropy;     // acc [N]
  const void* g_mean_probs;  // acc [K]
  double tau;
  double inverse_valid_rows;
  void* dlogits;  // [N, K]
  void* soft;     // acc [N, K] or null
  int64_t rows, num_codes;
  int64_t row_stride;
};

struct MergeForwardArgs {
  DType dtype;             // of every array below but the tables
  void* pre_gate;          // [N, I]; with tables e We^T in and the whole pre-activation out
  void* pre_up;            // [N, I]
  const void* table_gate;  // [K, I], accumulator's dtype; both null: pre-activations are whole
  const void* table_up;    // [K, I]
  const int64_t* codes;    // [N]
  void* activation;        // [N, I]: silu(pre_gate) * pre_up
  int64_t rows, num_codes, width;
};

struct MergeBackwardArgs {
  DType dtype;
  const void* d_activation;  // [N, I]
  const void* pre_gate;      // [N, I]
  const void* pre_up;        // [N, I]
  const int64_t* codes;      // [N]
  void* d_gate;              // [N, I]
  void* d_up;                // [N, I]
  void* activation;          // [N, I]
  int64_t rows, num_codes, width;
};

struct SampleArgs {
  DType dtype;
  const void* logits;      // [B, K]
  const int64_t* seeds;    // [B]
  const int64_t* offsets;  // [B]
  double temperature, top_p, min_p;
  int64_t top_k;
  int64_t* codes;      // [B]
  void* logprob;       // acc [B]
  void* logprob_full;  // acc [B]
  void* entropy;       // acc [B]
  int64_t rows, num_codes;
  int64_t row_stride;
};

struct LogprobsForwardArgs {
  DType dtype;
  const void* logits;      // [N, K]
  const void* ref_logits;  // [N, K] or null
  const int64_t* codes;    // [N]
  void* logprob;           // acc [N]
  void* entropy;           // acc [N]
  void* kl;                // acc [N]
  int64_t rows, num_codes;
  int64_t row_stride, ref_row_stride;
};

struct LogprobsBackwardArgs {
  DType dtype;
  const void* logits;
  const void* ref_logits;
  const int64_t* codes;
  const void* g_logprob;  // acc [N]
  const void* g_entropy;  // acc [N]
  const void* g_kl;       // acc [N]
  void* dlogits;          // [N, K]
  int64_t rows, num_codes;
  int64_t row_stride, ref_row_stride;
};

// What a row sees: `shared_count` positions from `shared_at` on, then `own_count` from `own_at` on.
struct VisibleRuns {
  int64_t shared_at, shared_count, own_at, own_count;

  // Position j < shared lies at shared_at + j, others at own_at + j - shared; begin <= j < end are
  // seen, none from `longest` on.
  VisibleRuns(const int64_t* run, int64_t longest) {
    const int64_t shared = run[3] > 0 ? run[3] : 0;
    const int64_t begin = run[0] > 0 ? run[0] : 0;
    const int64_t end = run[1] < longest ? run[1] : longest;
    const int64_t shared_end = end < shared ? end : shared;
    const int64_t own_begin = begin > shared ? begin : shared;
    shared_at = run[2] + begin;
    shared_count = shared_end > begin ? shared_end - begin : 0;
    own_at = run[4] + own_begin - shared;
    own_count = end > own_begin ? end - own_begin : 0;
  }
};

struct SlotAttentionArgs {
  DType dtype;
  const void* query;    // [N, query_heads, dim], contiguous
  const void* keys;     // [positions, key_heads, dim], heads contiguous
  const void* values;   // [positions, key_heads, value_dim]
  const int64_t* runs;  // [N, 5], begin, end, shared_at, shared, own_at: see VisibleRuns
  void* out;            // [N, query_heads, value_dim]
  double scale;
  int64_t rows, positions, longest, query_heads, key_heads, dim, value_dim;
  int64_t key_stride, key_head_stride;
  int64_t value_stride, value_head_stride;
};

struct OpTable {
  const char* isa;
  void (*nearest_code)(const NearestArgs&, int threads);
  void (*quantize_forward)(const QuantizeForwardArgs&, int threads);
  void (*quantize_backward)(const QuantizeBackwardArgs&, int threads);
  void (*segment_sum)(const SegmentSumArgs&, int threads);
  void (*gumbel_forward)(const GumbelForwardArgs&, int threads);
  void (*gumbel_backward)(const GumbelBackwardArgs&, int threads);
  void (*merge_forward)(const MergeForwardArgs&, int threads);
  void (*merge_backward)(const MergeBackwardArgs&, int threads);
  void (*sample_codes)(const SampleArgs&, int threads);
  void (*logprobs_forward)(const LogprobsForwardArgs&, int threads);
  void (*logprobs_backward)(const LogprobsBackwardArgs&, int threads);
  void (*slot_attention)(const SlotAttentionArgs&, int threads);
  // The raw stream, for tests: words[i] is word i of the row's Philox stream.
  void (*philox_words)(int64_t seed, int64_t offset, int64_t count, uint32_t* words);
};

// Chooses the instruction set of every later call: baseline, avx2, avx512, avx512bf16, or "" for
// the best this processor has. Throws std::invalid_argument for a name it does not know or cannot
// run.
void select_isa(const char* name);

const OpTable& op_table();

}  // namespace latent_rl
