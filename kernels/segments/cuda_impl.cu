// group_rows: a stable counting sort of rows by code. segment_sum: the sums of each code's rows.
//
// Integer atomics alone, whose result does not depend on their order.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/block.cuh"
#include "common/launch.h"
#include "common/segments.cuh"
#include "segments/cuda_impl.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr int kScanThreads = 1024;
// Counters of more codes than this are kept in global memory.
constexpr int64_t kSharedCodes = 8192;
constexpr int64_t kMostChunks = 256;

// Rows a block sorts: as many as codes at the least, so that the counts are no larger than the
// codes.
int64_t chunk_rows(int64_t rows, int64_t num_codes) {
  int64_t length = 1024;
  while (length < num_codes || length * kMostChunks < rows) length *= 2;
  return length;
}
int64_t chunks_of(int64_t rows, int64_t num_codes) {
  const int64_t length = chunk_rows(rows, num_codes);
  return rows == 0 ? 1 : (rows + length - 1) / length;
}

struct Sort {
  const int64_t* codes;
  Placed* placed;
  int* first;
  int64_t* counts;
  int* offsets;  // [chunks, K + 1]: counts, then how many rows of the code earlier chunks hold
  int* totals;   // [K + 1]
  int64_t rows, num_codes, chunk_rows, chunks;
};

__device__ int code_of(const Sort& sort, int64_t row) {
  const int64_t code = sort.codes[row];
  return static_cast<int>(code >= 0 && code < sort.num_codes ? code : sort.num_codes);
}

__device__ int* counters_of(const Sort& sort) {
  if (sort.num_codes <= kSharedCodes) return dynamic_shared<int>();
  return sort.offsets + blockIdx.x * (sort.num_codes + 1);
}

__global__ void __launch_bounds__(kCountThreads) _count_codes_kernel(Sort sort) {
  int* counters = counters_of(sort);
  int* out = sort.offsets + blockIdx.x * (sort.num_codes + 1);
  for (int64_t b = threadIdx.x; b <= sort.num_codes; b += kCountThreads) counters[b] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * sort.chunk_rows;
  const int64_t end = min(begin + sort.chunk_rows, sort.rows);
  for (int64_t row = begin + threadIdx.x; row < end; row += kCountThreads) {
    atomicAdd(counters + code_of(sort, row), 1);
  }
  if (counters == out) return;
  __syncthreads();
  for (int64_t b = threadIdx.x; b <= sort.num_codes; b += kCountThreads) out[b] = counters[b];
}

// A warp per code: how many of its rows lie in earlier chunks, for every chunk, and in all.
__global__ void __launch_bounds__(kCountThreads) _offset_chunks_kernel(Sort sort) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t code = (static_cast<int64_t>(blockIdx.x) * kCountThreads + threadIdx.x) / kWarpSize;
  if (code > sort.num_codes) return;
  int before = 0;
  for (int64_t first = 0; first < sort.chunks; first += kWarpSize) {
    const int64_t chunk = first + lane;
    int* at = sort.offsets + chunk * (sort.num_codes + 1) + code;
    const int mine = chunk < sort.chunks ? *at : 0;
    int sum = mine;
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int lower = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += lower;
    }
    if (chunk < sort.chunks) *at = before + sum - mine;
    before += __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }
  if (lane == 0) sort.totals[code] = before;
}

// Where each code begins; one block.
__global__ void __launch_bounds__(kScanThreads) _begin_codes_kernel(Sort sort) {
  __shared__ int sums[kScanThreads];
  const int64_t buckets = sort.num_codes + 1;
  const int64_t each = (buckets + kScanThreads - 1) / kScanThreads;
  const int64_t begin = threadIdx.x * each;
  const int64_t end = min(begin + each, buckets);
  int mine = 0;
  for (int64_t b = begin; b < end; ++b) mine += sort.totals[b];
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned step = 1; step < kScanThreads; step *= 2) {
    const int lower = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += lower;
    __syncthreads();
  }
  int at = sums[threadIdx.x] - mine;
  for (int64_t b = begin; b < end; ++b) {
    sort.first[b] = at;
    at += sort.totals[b];
    if (b < sort.num_codes) sort.counts[b] = sort.totals[b];
  }
}

// One warp per chunk, thirty-two rows at a time in row order: rows of one code in a warp are ranked
// by lane, so the sort is stable.
__global__ void __launch_bounds__(kWarpSize) _place_rows_kernel(Sort sort) {
  int* counters = counters_of(sort);
  const int* before = sort.offsets + blockIdx.x * (sort.num_codes + 1);
  for (int64_t b = threadIdx.x; b <= sort.num_codes; b += kWarpSize) {
    counters[b] = before[b] + sort.first[b];
  }
  __syncwarp();
  const int64_t begin = blockIdx.x * sort.chunk_rows;
  const int64_t end = min(begin + sort.chunk_rows, sort.rows);
  const unsigned lower_lanes = (1u << threadIdx.x) - 1;
  int next = begin + threadIdx.x < end ? code_of(sort, begin + threadIdx.x) : -1;
  for (int64_t base = begin; base < end; base += kWarpSize) {
    const int64_t row = base + threadIdx.x;
    const int code = next;
    next = row + kWarpSize < end ? code_of(sort, row + kWarpSize) : -1;
    const unsigned mates = __match_any_sync(kFullWarp, code);
    const int rank = __popc(mates & lower_lanes);
    const int at = code >= 0 ? counters[code] : 0;
    __syncwarp();
    if (code >= 0) {
      if (rank == 0) counters[code] = at + __popc(mates);
      sort.placed[at + rank] = {static_cast<int>(row), code};
    }
    __syncwarp();
  }
}

// Rows that one block sorts by itself: codes and places of a warp's rows stay in its registers.
constexpr int kSortThreads = 1024;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kRowsOfThread = 16;
constexpr int kCodeBits = 16;
static_assert(kRowsOfThread * kWarpSize < 1 << (31 - kCodeBits), "places fit above the code");
static_assert(kSharedCodes < 1 << kCodeBits, "codes fit below the place");
constexpr int64_t kRowsOfBlock = int64_t{kSortThreads} * kRowsOfThread;
// Counters of every warp, where codes begin, and sums of the scan.
constexpr size_t kMostSortBytes = 160 * 1024;
size_t sort_bytes(int64_t num_codes) {
  return sizeof(int) * static_cast<size_t>((kSortWarps + 1) * (num_codes + 1) + kSortWarps);
}
bool one_block_sorts(int64_t rows, int64_t num_codes) {
  return rows <= kRowsOfBlock && num_codes < kSharedCodes &&
         sort_bytes(num_codes) <= kMostSortBytes;
}

// Of the code's rows in this warp so far, how many; then this turn's lanes are added, by rank.
__device__ int place_in_warp(int* counters, int code) {
  const unsigned mates = __match_any_sync(kFullWarp, code);
  const int rank = __popc(mates & ((1u << threadIdx.x % kWarpSize) - 1));
  const int before = code >= 0 ? counters[code] : 0;
  __syncwarp();
  if (code >= 0 && rank == 0) counters[code] = before + __popc(mates);
  __syncwarp();
  return before + rank;
}

// counters[w][code] becomes the number of the code's rows in warps before w. Returns their sum.
__device__ int offset_warps(int* counters, int64_t buckets) {
  constexpr int kAtOnce = 8;
  int before = 0;
  for (int first = 0; first < kSortWarps; first += kAtOnce) {
    int here[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) here[w] = counters[(first + w) * buckets];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      counters[(first + w) * buckets] = before;
      before += here[w];
    }
  }
  return before;
}

// The sum of `value` over the threads before this one.
__device__ int sum_before(int value, int* warp_sums) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int sum = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int lower = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += lower;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  int below = lane < warp ? warp_sums[lane] : 0;
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    below += __shfl_xor_sync(kFullWarp, below, step);
  }
  return below + sum - value;
}

// group_rows in one launch, for as many rows as the registers of a block hold. A warp takes
// neighbouring rows, so that the order of warps, turns and lanes is that of the rows.
__global__ void __launch_bounds__(kSortThreads) _group_rows_kernel(Sort sort) {
  const int64_t buckets = sort.num_codes + 1;
  int* counters = dynamic_shared<int>();
  int* begins = counters + kSortWarps * buckets;
  int* warp_sums = begins + buckets;
  for (int64_t i = threadIdx.x; i < kSortWarps * buckets; i += kSortThreads) counters[i] = 0;
  const int warp = threadIdx.x / kWarpSize;
  const int turns = static_cast<int>((sort.rows + kSortThreads - 1) / kSortThreads);
  const int64_t first_row =
      int64_t{warp} * turns * kWarpSize + static_cast<int64_t>(threadIdx.x % kWarpSize);
  // A row's code, then its place among the warp's rows of that code above the code's bits.
  int codes[kRowsOfThread];
#pragma unroll
  for (int turn = 0; turn < kRowsOfThread; ++turn) {
    const int64_t row = first_row + turn * kWarpSize;
    codes[turn] = turn < turns && row < sort.rows ? code_of(sort, row) : -1;
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kRowsOfThread; ++turn) {
    if (turn >= turns) continue;
    const int place = place_in_warp(counters + warp * buckets, codes[turn]);
    if (codes[turn] >= 0) codes[turn] |= place << kCodeBits;
  }
  __syncthreads();
  // Neighbouring buckets to a thread, so that a scan over threads is one over buckets.
  const int64_t each = (buckets + kSortThreads - 1) / kSortThreads;
  const int64_t begin = threadIdx.x * each;
  const int64_t end = min(begin + each, buckets);
  int mine = 0;
  for (int64_t b = begin; b < end; ++b) {
    begins[b] = offset_warps(counters + b, buckets);
    mine += begins[b];
  }
  int at = sum_before(mine, warp_sums);
  for (int64_t b = begin; b < end; ++b) {
    const int count = begins[b];
    begins[b] = at;
    sort.first[b] = at;
    if (b < sort.num_codes) sort.counts[b] = count;
    at += count;
  }
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kRowsOfThread; ++turn) {
    if (turn >= turns || codes[turn] < 0) continue;
    const int code = codes[turn] & ((1 << kCodeBits) - 1);
    const int place = codes[turn] >> kCodeBits;
    sort.placed[begins[code] + counters[warp * buckets + code] + place] = {
        static_cast<int>(first_row + turn * kWarpSize), code};
  }
}

struct SumOnly {
  __device__ void begin_code(int, int64_t) {}
  __device__ void row(int, int64_t, const float*) {}
  __device__ void invalid_row(int, int64_t) {}
  __device__ void finish() {}
};

__global__ void __launch_bounds__(kSegmentThreads)
    _segment_combine_kernel(SegmentTiles tiles, int64_t tasks, Combine combine) {
  __shared__ double shared[kSegmentThreads * kCombineWidth];
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    combine_code(tiles, combine, task, shared);
  }
}

void check_rows_fit(const char* op, int64_t rows, int64_t num_codes) {
  if (rows > INT32_MAX || num_codes >= INT32_MAX) {
    throw std::invalid_argument(std::string(op) + ": rows and codes must be fewer than 2^31, got " +
                                std::to_string(rows) + " and " + std::to_string(num_codes));
  }
}

}  // namespace

int64_t group_rows_workspace(int64_t rows, int64_t num_codes) {
  return (chunks_of(rows, num_codes) + 1) * (num_codes + 1);
}

int64_t segment_sum_workspace(int64_t rows, int64_t dim) {
  const int64_t length = tile_rows(rows, dim);
  return (rows + length - 1) / length * 2 * dim;
}

void group_rows(const GroupRowsArgs& args, void* stream) {
  const char* op = "group_rows_cuda";
  check_rows_fit(op, args.rows, args.num_codes);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t chunks = chunks_of(args.rows, args.num_codes);
  const int64_t buckets = args.num_codes + 1;
  const Sort sort = {args.codes,  args.placed,    args.first,
                     args.counts, args.workspace, args.workspace + chunks * buckets,
                     args.rows,   args.num_codes, chunk_rows(args.rows, args.num_codes),
                     chunks};
  if (one_block_sorts(args.rows, args.num_codes)) {
    launch(op, _group_rows_kernel, 1, kSortThreads, sort_bytes(args.num_codes), on, sort);
    return;
  }
  const size_t shared =
      args.num_codes <= kSharedCodes ? sizeof(int) * static_cast<size_t>(buckets) : 0;
  launch(op, _count_codes_kernel, static_cast<unsigned>(chunks), kCountThreads, shared, on, sort);
  const int64_t warps = kCountThreads / kWarpSize;
  launch(op, _offset_chunks_kernel, static_cast<unsigned>((buckets + warps - 1) / warps),
         kCountThreads, 0, on, sort);
  launch(op, _begin_codes_kernel, 1, kScanThreads, 0, on, sort);
  launch(op, _place_rows_kernel, static_cast<unsigned>(chunks), kWarpSize, shared, on, sort);
}

void segment_sum(const SegmentSumCudaArgs& args, void* stream) {
  const char* op = "segment_sum_cuda";
  check_rows_fit(op, args.rows, args.num_codes);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWidth = kVectorWidth<T>;
    const bool wide = vectorises<T>(args.values, args.row_stride, args.dim);
    const SegmentTiles tiles = segment_tiles(args, wide ? kWidth : 1);
    const auto kernel =
        wide ? _segment_tiles_kernel<T, kWidth, SumOnly> : _segment_tiles_kernel<T, 1, SumOnly>;
    launch(op, kernel, segment_blocks(tiles), kSegmentThreads, 0, on, tiles, SumOnly());
    const Combine combine = combine_of(tiles);
    const int64_t tasks = combine_tasks(tiles, combine);
    launch(op, _segment_combine_kernel, blocks_for(tasks), kSegmentThreads, 0, on, tiles, tasks,
           combine);
  });
}

}  // namespace cuda
}  // namespace latent_rl
