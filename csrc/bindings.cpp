// The Python face of latent_rl/_C: addresses, sizes and strides in, nothing of torch. The Python
// side (latent_rl/native) validates tensors; what is checked here is what could crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "arguments.h"
#include "float_mode.h"
#include "nvtx_range.h"
#include "ops.h"
#include "parallel.h"
#ifdef LATENT_RL_HAS_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace latent_rl {
namespace {

// Runs an op without the GIL, in the default floating-point mode, inside an NVTX range.
template <typename Args>
void run(const char* name, void (*OpTable::*op)(const Args&, int), const Args& args, int threads) {
  check_size(name, "threads", threads, 1);
  const py::gil_scoped_release release;
  const NvtxRange range(name);
  const DefaultFloatMode mode;
  (op_table().*op)(args, threads);
}

void nearest_code(int dtype_code, int metric, Address x, Address codebook, Address codes,
                  Address distance, int64_t groups, int64_t rows, int64_t num_codes, int64_t dim,
                  int64_t x_group_stride, int64_t x_row_stride, Address counters, int threads) {
  const char* op = "nearest_code";
  const DType dtype = check_dtype(op, "x", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_size(op, "groups", groups, 0);
  check_size(op, "dim", dim, 1);
  check_stride(op, "x", x_row_stride, dim);
  if (metric < 0 || metric >= kMetricCount) {
    throw std::invalid_argument("nearest_code: metric must be 0 (l2), 1 (cosine) or 2 (dot), got " +
                                std::to_string(metric));
  }
  const int64_t total = groups * rows;
  run(op, &OpTable::nearest_code,
      NearestArgs{dtype, static_cast<Metric>(metric), data(op, "x", x, total * dim, dtype),
                  data(op, "codebook", codebook, groups * num_codes * dim, dtype),
                  ids(op, "codes", codes, total),
                  optional_data(op, "distance", distance, total, acc), groups, rows, num_codes, dim,
                  x_group_stride, x_row_stride, ids(op, "counters", counters, 0)},
      threads);
}

double quantize_forward(int dtype_code, Address x, Address codebook, Address codes,
                        Address quantized, Address counts, Address sums, int64_t rows,
                        int64_t num_codes, int64_t dim, int64_t x_row_stride, int threads) {
  const char* op = "quantize_forward";
  const DType dtype = check_dtype(op, "x", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "x", x_row_stride, dim);
  double square_sum = 0.0;
  run(op, &OpTable::quantize_forward,
      QuantizeForwardArgs{
          dtype, data(op, "x", x, rows * dim, dtype),
          data(op, "codebook", codebook, num_codes * dim, dtype), ids(op, "codes", codes, rows),
          data(op, "quantized", quantized, rows * dim, dtype), &square_sum,
          ids(op, "counts", counts, num_codes), data(op, "sums", sums, num_codes * dim, acc), rows,
          num_codes, dim, x_row_stride},
      threads);
  return square_sum;
}

void quantize_backward(int dtype_code, Address grad, Address x, Address codebook, Address codes,
                       Address counts, Address sums, Address dx, Address dcodebook, double scale,
                       double codebook_scale, int64_t rows, int64_t num_codes, int64_t dim,
                       int64_t grad_row_stride, int64_t x_row_stride, int threads) {
  const char* op = "quantize_backward";
  const DType dtype = check_dtype(op, "x", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  if (grad_row_stride != 0) check_stride(op, "grad", grad_row_stride, dim);
  check_stride(op, "x", x_row_stride, dim);
  run(op, &OpTable::quantize_backward,
      QuantizeBackwardArgs{
          dtype, data(op, "grad", grad, rows * dim, dtype), data(op, "x", x, rows * dim, dtype),
          data(op, "codebook", codebook, num_codes * dim, dtype), ids(op, "codes", codes, rows),
          data(op, "dx", dx, rows * dim, dtype), ids(op, "counts", counts, num_codes),
          data(op, "sums", sums, num_codes * dim, accumulation(dtype)),
          data(op, "dcodebook", dcodebook, num_codes * dim, dtype), scale, codebook_scale, rows,
          num_codes, dim, grad_row_stride, x_row_stride},
      threads);
}

void segment_sum(int dtype_code, Address values, Address codes, Address sums, int64_t rows,
                 int64_t num_codes, int64_t dim, int64_t row_stride, int threads) {
  const char* op = "segment_sum";
  const DType dtype = check_dtype(op, "values", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "values", row_stride, dim);
  run(op, &OpTable::segment_sum,
      SegmentSumArgs{dtype, data(op, "values", values, rows * dim, dtype),
                     ids(op, "codes", codes, rows), nullptr,
                     data(op, "sums", sums, num_codes * dim, accumulation(dtype)), rows, num_codes,
                     dim, row_stride},
      threads);
}

void gumbel_forward(int dtype_code, Address logits, Address seeds, double tau, Address codes,
                    Address entropy, Address mean_probs, Address counts, Address soft, int64_t rows,
                    int64_t num_codes, int64_t row_stride, int threads) {
  const char* op = "gumbel_forward";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  run(op, &OpTable::gumbel_forward,
      GumbelForwardArgs{
          dtype, data(op, "logits", logits, rows * num_codes, dtype), ids(op, "seeds", seeds, rows),
          tau, ids(op, "codes", codes, rows), data(op, "entropy", entropy, rows, acc),
          data(op, "mean_probs", mean_probs, num_codes, acc), ids(op, "counts", counts, num_codes),
          optional_data(op, "soft", soft, rows * num_codes, acc), rows, num_codes, row_stride},
      threads);
}

void gumbel_backward(int dtype_code, Address logits, Address seeds, Address codes, Address g_soft,
                     Address g_entropy, Address g_mean_probs, double tau, int64_t valid_rows,
                     Address dlogits, Address soft, int64_t rows, int64_t num_codes,
                     int64_t row_stride, int threads) {
  const char* op = "gumbel_backward";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  run(op, &OpTable::gumbel_backward,
      GumbelBackwardArgs{
          dtype, data(op, "logits", logits, rows * num_codes, dtype), ids(op, "seeds", seeds, rows),
          ids(op, "codes", codes, rows), data(op, "g_soft", g_soft, rows * num_codes, acc),
          data(op, "g_entropy", g_entropy, rows, acc),
          data(op, "g_mean_probs", g_mean_probs, num_codes, acc), tau,
          valid_rows > 0 ? 1.0 / static_cast<double>(valid_rows) : 0.0,
          data(op, "dlogits", dlogits, rows * num_codes, dtype),
          optional_data(op, "soft", soft, rows * num_codes, acc), rows, num_codes, row_stride},
      threads);
}

void merge_forward(int dtype_code, Address pre_gate, Address pre_up, Address table_gate,
                   Address table_up, Address codes, Address activation, int64_t rows,
                   int64_t num_codes, int64_t width, int threads) {
  const char* op = "merge_forward";
  const DType dtype = check_dtype(op, "pre_gate", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "width", width, 1);
  const DType acc = accumulation(dtype);
  if ((table_gate == 0) != (table_up == 0))
    throw std::invalid_argument("merge_forward: give both tables or neither");
  run(op, &OpTable::merge_forward,
      MergeForwardArgs{dtype, data(op, "pre_gate", pre_gate, rows * width, dtype),
                       data(op, "pre_up", pre_up, rows * width, dtype),
                       optional_data(op, "table_gate", table_gate, num_codes * width, acc),
                       optional_data(op, "table_up", table_up, num_codes * width, acc),
                       ids(op, "codes", codes, rows),
                       data(op, "activation", activation, rows * width, dtype), rows, num_codes,
                       width},
      threads);
}

// The codes that occur, ascending, into `used` (room for num_codes), and every row's place among
// them, or -1, into `entry`. Returns how many they are.
int64_t codes_in_use(Address codes, Address used, Address entry, int64_t rows, int64_t num_codes) {
  const char* op = "codes_in_use";
  check_rows(op, rows, num_codes);
  const int64_t* from = ids(op, "codes", codes, rows);
  int64_t* found = ids(op, "used", used, num_codes);
  int64_t* place = ids(op, "entry", entry, rows);
  std::vector<int64_t> place_of(static_cast<size_t>(num_codes), -1);
  const auto valid = [&](int64_t code) { return code >= 0 && code < num_codes; };
  for (int64_t row = 0; row < rows; ++row)
    if (valid(from[row])) place_of[static_cast<size_t>(from[row])] = 0;
  int64_t count = 0;
  for (int64_t code = 0; code < num_codes; ++code) {
    if (place_of[static_cast<size_t>(code)] < 0) continue;
    found[count] = code;
    place_of[static_cast<size_t>(code)] = count++;
  }
  for (int64_t row = 0; row < rows; ++row)
    place[row] = valid(from[row]) ? place_of[static_cast<size_t>(from[row])] : -1;
  return count;
}

void merge_backward(int dtype_code, Address d_activation, Address pre_gate, Address pre_up,
                    Address codes, Address d_gate, Address d_up, Address activation, int64_t rows,
                    int64_t num_codes, int64_t width, int threads) {
  const char* op = "merge_backward";
  const DType dtype = check_dtype(op, "pre_gate", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "width", width, 1);
  const int64_t count = rows * width;
  run(op, &OpTable::merge_backward,
      MergeBackwardArgs{dtype, data(op, "d_activation", d_activation, count, dtype),
                        data(op, "pre_gate", pre_gate, count, dtype),
                        data(op, "pre_up", pre_up, count, dtype), ids(op, "codes", codes, rows),
                        data(op, "d_gate", d_gate, count, dtype),
                        data(op, "d_up", d_up, count, dtype),
                        data(op, "activation", activation, count, dtype), rows, num_codes, width},
      threads);
}

void sample_codes(int dtype_code, Address logits, Address seeds, Address offsets,
                  double temperature, int64_t top_k, double top_p, double min_p, Address codes,
                  Address logprob, Address logprob_full, Address entropy, int64_t rows,
                  int64_t num_codes, int64_t row_stride, int threads) {
  run("sample_codes", &OpTable::sample_codes,
      sample_args("sample_codes", dtype_code, logits, seeds, offsets, temperature, top_k, top_p,
                  min_p, codes, logprob, logprob_full, entropy, rows, num_codes, row_stride),
      threads);
}

void logprobs_forward(int dtype_code, Address logits, Address ref_logits, Address codes,
                      Address logprob, Address entropy, Address kl, int64_t rows, int64_t num_codes,
                      int64_t row_stride, int64_t ref_row_stride, int threads) {
  const char* op = "logprobs_forward";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  if (ref_logits != 0) check_stride(op, "ref_logits", ref_row_stride, num_codes);
  run(op, &OpTable::logprobs_forward,
      LogprobsForwardArgs{dtype, data(op, "logits", logits, rows * num_codes, dtype),
                          optional_data(op, "ref_logits", ref_logits, rows * num_codes, dtype),
                          ids(op, "codes", codes, rows), data(op, "logprob", logprob, rows, acc),
                          data(op, "entropy", entropy, rows, acc), data(op, "kl", kl, rows, acc),
                          rows, num_codes, row_stride, ref_row_stride},
      threads);
}

void logprobs_backward(int dtype_code, Address logits, Address ref_logits, Address codes,
                       Address g_logprob, Address g_entropy, Address g_kl, Address dlogits,
                       int64_t rows, int64_t num_codes, int64_t row_stride, int64_t ref_row_stride,
                       int threads) {
  const char* op = "logprobs_backward";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  if (ref_logits != 0) check_stride(op, "ref_logits", ref_row_stride, num_codes);
  run(op, &OpTable::logprobs_backward,
      LogprobsBackwardArgs{
          dtype, data(op, "logits", logits, rows * num_codes, dtype),
          optional_data(op, "ref_logits", ref_logits, rows * num_codes, dtype),
          ids(op, "codes", codes, rows), data(op, "g_logprob", g_logprob, rows, acc),
          data(op, "g_entropy", g_entropy, rows, acc), data(op, "g_kl", g_kl, rows, acc),
          data(op, "dlogits", dlogits, rows * num_codes, dtype), rows, num_codes, row_stride,
          ref_row_stride},
      threads);
}

void check_runs(const int64_t* runs, int64_t rows, int64_t longest, int64_t positions) {
  for (int64_t row = 0; row < rows; ++row) {
    const VisibleRuns seen(runs + 5 * row, longest);
    const bool shared_fits =
        seen.shared_count == 0 ||
        (seen.shared_at >= 0 && seen.shared_at <= positions - seen.shared_count);
    const bool own_fits =
        seen.own_count == 0 || (seen.own_at >= 0 && seen.own_at <= positions - seen.own_count);
    if (shared_fits && own_fits) continue;
    const int64_t at = shared_fits ? seen.own_at : seen.shared_at;
    const int64_t count = shared_fits ? seen.own_count : seen.shared_count;
    throw std::invalid_argument("slot_attention: runs must lie within the " +
                                std::to_string(positions) + " positions of keys, got " +
                                std::to_string(at) + " to " + std::to_string(at + count - 1) +
                                " in row " + std::to_string(row));
  }
}

void slot_attention(int dtype_code, Address query, Address keys, Address values, Address runs,
                    Address out, double scale, int64_t rows, int64_t positions, int64_t longest,
                    int64_t query_heads, int64_t key_heads, int64_t dim, int64_t value_dim,
                    const std::vector<int64_t>& key_strides,
                    const std::vector<int64_t>& value_strides, int threads) {
  const char* op = "slot_attention";
  const DType dtype = check_dtype(op, "query", dtype_code);
  check_size(op, "rows", rows, 0);
  check_size(op, "positions", positions, 1);
  check_size(op, "longest", longest, 1);
  check_size(op, "key_heads", key_heads, 1);
  check_size(op, "query_heads", query_heads, key_heads);
  check_size(op, "dim", dim, 1);
  check_size(op, "value_dim", value_dim, 1);
  if (query_heads % key_heads != 0 || key_strides.size() != 2 || value_strides.size() != 2) {
    throw std::invalid_argument(
        "slot_attention: query_heads must be a multiple of key_heads, and keys and values have "
        "two strides each");
  }
  check_runs(ids(op, "runs", runs, 5 * rows), rows, longest, positions);
  run(op, &OpTable::slot_attention,
      SlotAttentionArgs{dtype, data(op, "query", query, rows * query_heads * dim, dtype),
                        data(op, "keys", keys, positions * key_heads * dim, dtype),
                        data(op, "values", values, positions * key_heads * value_dim, dtype),
                        ids(op, "runs", runs, 5 * rows),
                        data(op, "out", out, rows * query_heads * value_dim, dtype), scale, rows,
                        positions, longest, query_heads, key_heads, dim, value_dim, key_strides[0],
                        key_strides[1], value_strides[0], value_strides[1]},
      threads);
}

std::vector<uint32_t> philox_words(int64_t seed, int64_t offset, int64_t count) {
  check_size("philox_words", "count", count, 0);
  std::vector<uint32_t> words(static_cast<size_t>(count));
  op_table().philox_words(seed, offset, count, words.data());
  return words;
}

}  // namespace
}  // namespace latent_rl

PYBIND11_MODULE(_C, m) {
  using namespace latent_rl;
  m.doc() = "C++ and CUDA backends of latent_rl's ops; raw pointers in, nothing of torch.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  const char* isa = std::getenv("LATENT_RL_ISA");
  select_isa(isa == nullptr ? "" : isa);

  m.def(
      "select_isa", [](const std::string& name) { select_isa(name.c_str()); }, py::arg("name"),
      "Choose baseline, avx2 or avx512 for every later call; '' is the best of this processor.");
  m.def("isa", [] { return std::string(op_table().isa); }, "The instruction set in use.");
#ifdef LATENT_RL_HAS_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("philox_words", &philox_words, py::arg("seed"), py::arg("offset"), py::arg("count"),
        "The first `count` words of a row's Philox4x32-10 stream.");
  m.def(
      "use_large_pages",
      [](Address address, int64_t bytes) {
        check_size("use_large_pages", "bytes", bytes, 0);
        use_large_pages(reinterpret_cast<void*>(address), bytes);
      },
      "Ask for large pages under memory about to be written for the first time.");
  m.def("nearest_code", &nearest_code);
  m.def("quantize_forward", &quantize_forward);
  m.def("quantize_backward", &quantize_backward);
  m.def("segment_sum", &segment_sum);
  m.def("gumbel_forward", &gumbel_forward);
  m.def("gumbel_backward", &gumbel_backward);
  m.def("codes_in_use", &codes_in_use);
  m.def("merge_forward", &merge_forward);
  m.def("merge_backward", &merge_backward);
  m.def("sample_codes", &sample_codes);
#ifdef LATENT_RL_HAS_CUDA
  bind_sample_codes_cuda(m);
  bind_sample_tokens_cuda(m);
  bind_segments_cuda(m);
  bind_quantize_cuda(m);
  bind_gumbel_quantize_cuda(m);
  bind_code_logprobs_cuda(m);
  bind_gated_merge_cuda(m);
  bind_nearest_code_cuda(m);
#endif
  m.def("logprobs_forward", &logprobs_forward);
  m.def("logprobs_backward", &logprobs_backward);
  m.def("slot_attention", &slot_attention);
}
