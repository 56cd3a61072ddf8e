// One pass over rows sorted by code: sums of every code, and what else an op does to a row.
//
// The sorted rows are cut into tiles of equal length, whatever the codes, so that a code with all
// the rows costs no more than even codes. A thread takes one vector of columns of one tile and
// walks down its rows. Codes that lie inside one tile are finished there; the rest leave partial
// sums, at most two per tile, that combine_code adds in the order of the tiles. Every order is
// fixed by N, D and the codes: results repeat bit for bit.
#pragma once

#include <cstdint>

#include "common/element.cuh"
#include "common/launch.h"
#include "segments/cuda_impl.h"

namespace latent_rl {
namespace cuda {

constexpr int kSegmentThreads = 256;

// Rows per tile: enough threads to fill a device, then longer tiles for fewer partial sums. Widths
// enter as if vectorised, so that a misaligned input gets the same sums.
inline int64_t tile_rows(int64_t rows, int64_t dim) {
  constexpr int64_t kThreadsWanted = 1 << 17;
  const int64_t vectors = (dim + 7) / 8;
  int64_t length = 8;
  while (length < 64 && rows * vectors > length * kThreadsWanted) length *= 2;
  return length;
}

struct SegmentTiles {
  const void* values;
  const Placed* placed;
  const int* first;
  float* sums;
  float* partials;  // [tiles, 2, D]
  int64_t rows, num_codes, dim, row_stride;
  int64_t length;  // rows of a tile
  int64_t tiles;
  int64_t vectors;  // of a row
};

inline SegmentTiles segment_tiles(const SegmentSumCudaArgs& args, int width) {
  const int64_t length = tile_rows(args.rows, args.dim);
  return {args.values,
          args.placed,
          args.first,
          args.sums,
          args.partials,
          args.rows,
          args.num_codes,
          args.dim,
          args.row_stride,
          length,
          (args.rows + length - 1) / length,
          args.dim / width};
}

// A code that begins before a tile, or at its begin, leaves its sum in slot 0; one that begins
// further down and goes on in the next tile in slot 1.
template <int kWidth>
__device__ void leave_sum(const SegmentTiles& tiles, int64_t tile, int64_t column, int code,
                          const float* sum) {
  const int64_t begin = tile * tiles.length;
  const int64_t from = tiles.first[code];
  const int64_t to = tiles.first[code + 1];
  float* out = tiles.sums + code * tiles.dim;
  if (from < begin || to > begin + tiles.length) {
    out = tiles.partials + (tile * 2 + (from > begin ? 1 : 0)) * tiles.dim;
  }
  for (int i = 0; i < kWidth; ++i) out[column + i] = sum[i];
}

// Visitor: begin_code(code, column), row(row, column, values) for rows with a code, and
// invalid_row(row, column). `values` are float32.
template <typename T, int kWidth, typename Visitor>
__device__ void walk_tile(const SegmentTiles& tiles, int64_t tile, int64_t column,
                          Visitor& visitor) {
  constexpr int kAhead = 4;  // rows whose loads are under way at once
  const T* values = static_cast<const T*>(tiles.values) + column;
  const int64_t begin = tile * tiles.length;
  const int64_t end = begin + tiles.length < tiles.rows ? begin + tiles.length : tiles.rows;
  const int none = static_cast<int>(tiles.num_codes);
  int current = -1;
  float sum[kWidth];
  // The places of the next rows come while these rows do: else every step waits for memory twice.
  Placed next[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) next[j] = tiles.placed[begin + j < end ? begin + j : end - 1];
  for (int64_t i = begin; i < end; i += kAhead) {
    Placed placed[kAhead];
    Vector<T, kWidth> loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      placed[j] = next[j];
      if (i + j < end) loaded[j] = load_vector<kWidth>(values + placed[j].row * tiles.row_stride);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = i + kAhead + j;
      next[j] = tiles.placed[at < end ? at : end - 1];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j >= end) break;
      if (placed[j].code == none) {
        visitor.invalid_row(placed[j].row, column);
        continue;
      }
      if (placed[j].code != current) {
        if (current >= 0) leave_sum<kWidth>(tiles, tile, column, current, sum);
        current = placed[j].code;
        visitor.begin_code(current, column);
        for (int w = 0; w < kWidth; ++w) sum[w] = 0.0f;
      }
      float row[kWidth];
      for (int w = 0; w < kWidth; ++w) {
        row[w] = to_float(loaded[j].at[w]);
        sum[w] += row[w];
      }
      visitor.row(placed[j].row, column, row);
    }
  }
  if (current >= 0) leave_sum<kWidth>(tiles, tile, column, current, sum);
}

// Two blocks per multiprocessor at the least: left to itself the compiler took 64 registers for the
// float32 kernel, and spilled.
template <typename T, int kWidth, typename Visitor>
__global__ void __launch_bounds__(kSegmentThreads, 2)
    _segment_tiles_kernel(SegmentTiles tiles, Visitor visitor) {
  const int64_t total = tiles.tiles * tiles.vectors;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSegmentThreads;
  for (int64_t id = static_cast<int64_t>(blockIdx.x) * kSegmentThreads + threadIdx.x; id < total;
       id += stride) {
    const int64_t tile = id / tiles.vectors;
    walk_tile<T, kWidth>(tiles, tile, (id - tile * tiles.vectors) * kWidth, visitor);
  }
  visitor.finish();
}

inline unsigned segment_blocks(const SegmentTiles& tiles) {
  const int64_t blocks = (tiles.tiles * tiles.vectors + kSegmentThreads - 1) / kSegmentThreads;
  return blocks_for(blocks < 1 ? 1 : blocks);
}

// How a block of combine_code shares out: `lanes` threads side by side on vectors of columns, the
// rest of its threads share out the tiles of the code. By D alone, and so is the order of its sums.
struct Combine {
  int width;  // columns of a thread
  int lanes;
  int64_t groups;  // blocks of a code
};
constexpr int kCombineWidth = 4;
inline Combine combine_of(const SegmentTiles& tiles) {
  const int width = tiles.dim % kCombineWidth == 0 ? kCombineWidth : 1;
  const int64_t vectors = tiles.dim / width;
  int lanes = 2;
  while (lanes < 64 && lanes < vectors) lanes *= 2;
  return {width, lanes, (vectors + lanes - 1) / lanes};
}
inline int64_t combine_tasks(const SegmentTiles& tiles, const Combine& combine) {
  return tiles.num_codes * combine.groups;
}

template <int kWidth>
__device__ void combine_columns(const SegmentTiles& tiles, const Combine& combine, int64_t task,
                                double* shared) {
  const int64_t code = task / combine.groups;
  const int64_t from = tiles.first[code], to = tiles.first[code + 1];
  const int64_t first_tile = from / tiles.length;
  const int64_t last_tile = to > from ? (to - 1) / tiles.length : first_tile;
  if (to > from && first_tile == last_tile) return;  // the same for every thread of the block
  const int lane = static_cast<int>(threadIdx.x) % combine.lanes;
  const int slice = static_cast<int>(threadIdx.x) / combine.lanes;
  const int slices = kSegmentThreads / combine.lanes;
  const int64_t column = ((task - code * combine.groups) * combine.lanes + lane) * kWidth;
  const int64_t count = to > from ? last_tile - first_tile + 1 : 0;
  const int64_t share = (count + slices - 1) / slices;
  double sum[kWidth] = {};
  if (column < tiles.dim) {
    const int64_t end = (slice + 1) * share < count ? (slice + 1) * share : count;
#pragma unroll 4
    for (int64_t i = slice * share; i < end; ++i) {
      const int64_t tile = first_tile + i;
      const int64_t slot = i == 0 && from > tile * tiles.length ? 1 : 0;
      const Vector<float, kWidth> part =
          load_vector<kWidth>(tiles.partials + (tile * 2 + slot) * tiles.dim + column);
      for (int w = 0; w < kWidth; ++w) sum[w] += static_cast<double>(part.at[w]);
    }
  }
  for (int w = 0; w < kWidth; ++w) shared[w * kSegmentThreads + threadIdx.x] = sum[w];
  __syncthreads();
  if (slice == 0 && column < tiles.dim) {
    const int busy = static_cast<int>(count < slices ? count : slices);
    for (int s = 1; s < busy; ++s) {
      for (int w = 0; w < kWidth; ++w) {
        sum[w] += shared[w * kSegmentThreads + s * combine.lanes + lane];
      }
    }
    Vector<float, kWidth> out;
    for (int w = 0; w < kWidth; ++w) out.at[w] = static_cast<float>(sum[w]);
    store_vector(tiles.sums + code * tiles.dim + column, out);
  }
  __syncthreads();
}

// Finishes some columns of a code that spans several tiles, and writes the zeros of one without
// rows. Called by all threads of the block; `shared` has kCombineWidth entries per thread.
__device__ inline void combine_code(const SegmentTiles& tiles, const Combine& combine, int64_t task,
                                    double* shared) {
  if (combine.width == kCombineWidth) {
    combine_columns<kCombineWidth>(tiles, combine, task, shared);
  } else {
    combine_columns<1>(tiles, combine, task, shared);
  }
}

}  // namespace cuda
}  // namespace latent_rl
