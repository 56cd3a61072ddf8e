// quantize after the search. Forward: one pass over the rows sorted by code writes the quantized
// rows and adds up errors and sums; a second launch finishes both. Backward: one elementwise pass.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/block.cuh"
#include "common/element.cuh"
#include "common/launch.h"
#include "common/segments.cuh"
#include "quantize/cuda_impl.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kThreads = kSegmentThreads;
constexpr int kReduceEntries = kThreads / kWarpSize + 1;

// Of one thread's columns: the code's values stay in registers while its rows pass by.
template <typename T, int kWidth>
struct WriteQuantized {
  const T* codebook;
  T* quantized;
  double* block_errors;
  int64_t dim;

  Vector<T, kWidth> code;
  double error;

  __device__ void begin_code(int id, int64_t column) {
    code = load_vector<kWidth>(codebook + id * dim + column);
  }

  __device__ void row(int row, int64_t column, const float* x) {
    float squares = 0.0f;
    for (int w = 0; w < kWidth; ++w) {
      const float difference = x[w] - to_float(code.at[w]);
      squares += difference * difference;
    }
    error += static_cast<double>(squares);
    store_vector(quantized + row * dim + column, code);
  }

  __device__ void invalid_row(int row, int64_t column) {
    Vector<T, kWidth> nan;
    for (int w = 0; w < kWidth; ++w) from_float(nan_float(), nan.at + w);
    store_vector(quantized + row * dim + column, nan);
  }

  __device__ void finish() {
    __shared__ double shared[kReduceEntries];
    const double total = block_reduce<kThreads>(error, Sum<double>(), shared);
    if (threadIdx.x == 0) block_errors[blockIdx.x] = total;
  }
};

struct Statistics {
  const double* block_errors;
  int64_t blocks;
  float* error;
  float* perplexity;
};

// One block: the mean error, and exp of the entropy of the codes' shares.
__device__ void finish_statistics(const SegmentTiles& tiles, const Statistics& statistics,
                                  double* shared) {
  double error = 0.0;
  for (int64_t i = threadIdx.x; i < statistics.blocks; i += kThreads) {
    error += statistics.block_errors[i];
  }
  error = block_reduce<kThreads>(error, Sum<double>(), shared);
  const int valid = tiles.first[tiles.num_codes];
  const float total = static_cast<float>(valid > 0 ? valid : 1);
  double entropy = 0.0;
  for (int64_t code = threadIdx.x; code < tiles.num_codes; code += kThreads) {
    const int count = tiles.first[code + 1] - tiles.first[code];
    const float share = static_cast<float>(count) / total;
    if (count > 0) entropy -= static_cast<double>(share * logf(share));
  }
  entropy = block_reduce<kThreads>(entropy, Sum<double>(), shared);
  if (threadIdx.x == 0) {
    const double elements = static_cast<double>(valid > 0 ? valid : 1) * tiles.dim;
    *statistics.error = static_cast<float>(error / elements);
    *statistics.perplexity = expf(static_cast<float>(entropy));
  }
}

__global__ void __launch_bounds__(kThreads)
    _quantize_finish_kernel(SegmentTiles tiles, int64_t tasks, Combine combine,
                            Statistics statistics) {
  __shared__ double shared[kThreads * kCombineWidth];
  if (blockIdx.x == gridDim.x - 1) {
    finish_statistics(tiles, statistics, shared);
    return;
  }
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x - 1) {
    combine_code(tiles, combine, task, shared);
  }
}

template <typename T, int kWidth>
void forward_pass(const char* op, const QuantizeForwardCudaArgs& args, cudaStream_t stream) {
  const SegmentTiles tiles =
      segment_tiles({args.dtype, args.x, args.placed, args.first, args.sums, args.partials,
                     args.rows, args.num_codes, args.dim, args.x_row_stride},
                    kWidth);
  WriteQuantized<T, kWidth> visitor = {};
  visitor.codebook = static_cast<const T*>(args.codebook);
  visitor.quantized = static_cast<T*>(args.quantized);
  visitor.block_errors = args.block_errors;
  visitor.dim = args.dim;
  const int64_t wanted = segment_blocks(tiles);
  const int64_t blocks = wanted < kQuantizeBlocks ? wanted : kQuantizeBlocks;
  launch(op, _segment_tiles_kernel<T, kWidth, WriteQuantized<T, kWidth>>,
         static_cast<unsigned>(blocks), kThreads, 0, stream, tiles, visitor);
  const Combine combine = combine_of(tiles);
  const int64_t tasks = combine_tasks(tiles, combine);
  launch(op, _quantize_finish_kernel, blocks_for(tasks) + 1, kThreads, 0, stream, tiles, tasks,
         combine, Statistics{args.block_errors, blocks, args.error, args.perplexity});
}

// scales = {grad_commitment, grad_codebook_loss} * 2 / (V D), on the device: no host sync.
__global__ void __launch_bounds__(kThreads) _quantize_scales_kernel(QuantizeBackwardCudaArgs args) {
  __shared__ long long shared[kReduceEntries];
  long long valid = 0;
  for (int64_t code = threadIdx.x; code < args.num_codes; code += kThreads) {
    valid += args.counts[code];
  }
  valid = block_reduce<kThreads>(valid, Sum<long long>(), shared);
  if (threadIdx.x != 0) return;
  const double elements = static_cast<double>(valid > 0 ? valid : 1) * args.dim;
  args.scales[0] = static_cast<double>(*args.grad_commitment) * 2.0 / elements;
  args.scales[1] = static_cast<double>(*args.grad_codebook_loss) * 2.0 / elements;
}

// dx = g + scale (x - c) of kAhead rows at once, so that their loads overlap; zero without a code.
template <typename T, int kWidth, int kAhead>
__device__ void row_gradients(const QuantizeBackwardCudaArgs& args, float scale, int64_t row,
                              int64_t step, int64_t column) {
  int64_t codes[kAhead];
  Vector<T, kWidth> g[kAhead], x[kAhead], c[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    codes[j] = row + j * step < args.rows ? args.codes[row + j * step] : -1;
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int64_t at = row + j * step;
    if (at >= args.rows) continue;
    // Whatever the code: only the codebook's row waits for it.
    g[j] =
        load_vector<kWidth>(static_cast<const T*>(args.grad) + at * args.grad_row_stride + column);
    x[j] = load_vector<kWidth>(static_cast<const T*>(args.x) + at * args.x_row_stride + column);
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    if (codes[j] < 0 || codes[j] >= args.num_codes) continue;
    c[j] = load_vector<kWidth>(static_cast<const T*>(args.codebook) + codes[j] * args.dim + column);
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int64_t at = row + j * step;
    if (at >= args.rows) continue;
    const bool valid = codes[j] >= 0 && codes[j] < args.num_codes;
    Vector<T, kWidth> out;
    for (int w = 0; w < kWidth; ++w) {
      const float difference = valid ? to_float(x[j].at[w]) - to_float(c[j].at[w]) : 0.0f;
      from_float(valid ? to_float(g[j].at[w]) + scale * difference : 0.0f, out.at + w);
    }
    store_vector(static_cast<T*>(args.dx) + at * args.dim + column, out);
  }
}

// dc = scale (n c - s). A code without rows gets zero, not 0 * c: it need not be finite.
template <typename T>
__device__ void codebook_gradient(const QuantizeBackwardCudaArgs& args, int64_t first,
                                  int64_t stride) {
  const float scale = static_cast<float>(args.scales[1]);
  const T* codebook = static_cast<const T*>(args.codebook);
  T* out = static_cast<T*>(args.dcodebook);
  for (int64_t code = first; code < args.num_codes; code += stride) {
    const float count = static_cast<float>(args.counts[code]);
    for (int64_t d = threadIdx.x; d < args.dim; d += kThreads) {
      const int64_t at = code * args.dim + d;
      const float pull = count > 0.0f ? count * to_float(codebook[at]) - args.sums[at] : 0.0f;
      from_float(scale * pull, out + at);
    }
  }
}

constexpr int kAheadRows = 2;
constexpr int64_t kCodebookBlocks = 1024;

// The blocks of a row-major pass: `lanes` threads side by side on the vectors of one row.
struct RowBlocks {
  int lanes;
  int rows_at_once;
  int64_t rows_of_block;
  unsigned count;

  RowBlocks(int64_t rows, int64_t vectors) {
    lanes = static_cast<int>(vectors < kThreads ? vectors : kThreads);
    rows_at_once = kThreads / lanes;
    rows_of_block = static_cast<int64_t>(rows_at_once) * kAheadRows;
    count = blocks_for((rows + rows_of_block - 1) / rows_of_block);
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    _quantize_backward_kernel(QuantizeBackwardCudaArgs args, RowBlocks blocks) {
  if (blockIdx.x >= blocks.count) {
    codebook_gradient<T>(args, blockIdx.x - blocks.count, gridDim.x - blocks.count);
    return;
  }
  const float scale = static_cast<float>(args.scales[0]);
  const int offset = static_cast<int>(threadIdx.x) / blocks.lanes;
  const int lane = static_cast<int>(threadIdx.x) - offset * blocks.lanes;
  if (offset >= blocks.rows_at_once) return;
  for (int64_t row = blockIdx.x * blocks.rows_of_block + offset; row < args.rows;
       row += blocks.count * blocks.rows_of_block) {
    for (int64_t column = static_cast<int64_t>(lane) * kWidth; column < args.dim;
         column += static_cast<int64_t>(blocks.lanes) * kWidth) {
      row_gradients<T, kWidth, kAheadRows>(args, scale, row, blocks.rows_at_once, column);
    }
  }
}

template <typename T, int kWidth>
void backward_pass(const char* op, const QuantizeBackwardCudaArgs& args, cudaStream_t stream) {
  const RowBlocks blocks(args.rows, args.dim / kWidth);
  const int64_t codebook_blocks =
      args.num_codes < kCodebookBlocks ? args.num_codes : kCodebookBlocks;
  launch(op, _quantize_backward_kernel<T, kWidth>,
         blocks.count + static_cast<unsigned>(codebook_blocks), kThreads, 0, stream, args, blocks);
}

}  // namespace

void quantize_forward(const QuantizeForwardCudaArgs& args, void* stream) {
  const char* op = "quantize_forward_cuda";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = vectorises<T>(args.x, args.x_row_stride, args.dim) &&
                      vectorises<T>(args.codebook, args.dim, args.dim) &&
                      vectorises<T>(args.quantized, args.dim, args.dim);
    if (wide) {
      forward_pass<T, kVectorWidth<T>>(op, args, on);
    } else {
      forward_pass<T, 1>(op, args, on);
    }
  });
}

void quantize_backward(const QuantizeBackwardCudaArgs& args, void* stream) {
  const char* op = "quantize_backward_cuda";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  launch(op, _quantize_scales_kernel, 1, kThreads, 0, on, args);
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = vectorises<T>(args.grad, args.grad_row_stride, args.dim) &&
                      vectorises<T>(args.x, args.x_row_stride, args.dim) &&
                      vectorises<T>(args.codebook, args.dim, args.dim) &&
                      vectorises<T>(args.dx, args.dim, args.dim);
    if (wide) {
      backward_pass<T, kVectorWidth<T>>(op, args, on);
    } else {
      backward_pass<T, 1>(op, args, on);
    }
  });
}

}  // namespace cuda
}  // namespace latent_rl
