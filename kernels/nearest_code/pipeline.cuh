// How the Hopper screen's operands come to the multiprocessor: what lies where in shared memory,
// and the warps that fill it.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/block.cuh"
#include "common/hopper.cuh"
#include "common/tensor_map.h"

namespace latent_rl {
namespace cuda {
namespace nearest {

constexpr int kConsumers = 2;
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
// 65,536 registers: 168 a thread at entry; 40 are enough to copy, and leave 232 to compute.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

constexpr int kProducts = 2;               // of 64 rows each, per consumer
constexpr int kHalves = 2;                 // a thread has rows r and r + 8 of each product
constexpr int kTileRows = 64 * kProducts;  // of a consumer
constexpr int kBlockRows = kConsumers * kTileRows;
constexpr int kTileCodes = 128;
constexpr int kStep = 16;                  // columns of one product
constexpr int kChunk = kSwizzleBytes / 2;  // columns of one copy
constexpr int kChunkBytes = kTileRows * kSwizzleBytes;
static_assert(kTileCodes == kTileRows, "rows and codes are copied in boxes of one size");

constexpr float kUnusable = -3.0e38f;  // UNUSABLE of prepare.py

struct Screen {
  const float* bias;
  const float* scale;
  const float* limits;
  int64_t* codes;
  int64_t* listed;
  float* threshold;
  int* count;
  int64_t rows, num_codes;
  unsigned tiles, group_tiles;  // tiles of kBlockRows rows: all, and of one group
  int code_tiles;
  float accumulation, underflow, slack;
};

// Shared memory of a block. Narrow rows are held twice, so that the next ones come in time.
template <int kChunks>
struct Shared {
  static constexpr int kMost = 224 * 1024;  // leaves 3 KB of 227 to the rest
  static constexpr int kRowBuffers = kChunks <= 2 ? 2 : 1;
  static constexpr int kRowBytes = kConsumers * kRowBuffers * kChunks * kChunkBytes;
  static constexpr int kFit = (kMost - kRowBytes) / kChunkBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBiasBuffers = 2;
  static_assert(kStages > kChunks, "a tile of codes and the begin of the next");

  struct Barriers {
    uint64_t codes_full[kStages], codes_empty[kStages];
    uint64_t rows_full[kConsumers][kRowBuffers], rows_empty[kConsumers][kRowBuffers];
    uint64_t bias_full[kBiasBuffers], bias_empty[kBiasBuffers];
    uint64_t turn[kConsumers];
  };
  static constexpr size_t kBiasAt = kRowBytes + static_cast<size_t>(kStages) * kChunkBytes;
  static constexpr size_t kBarriersAt = kBiasAt + 2 * kBiasBuffers * kTileCodes * sizeof(float);
  static constexpr size_t kBytes = kBarriersAt + sizeof(Barriers);

  unsigned char* base;

  __device__ unsigned char* rows(int consumer, int buffer, int chunk) const {
    return base + ((consumer * kRowBuffers + buffer) * kChunks + chunk) * kChunkBytes;
  }
  __device__ unsigned char* codes(int stage) const {
    return base + kRowBytes + stage * kChunkBytes;
  }
  __device__ float* bias(int buffer) const {
    return reinterpret_cast<float*>(base + kBiasAt) + 2 * buffer * kTileCodes;
  }
  __device__ float* scale(int buffer) const { return bias(buffer) + kTileCodes; }
  __device__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(base + kBarriersAt); }

  __device__ void init_barriers() const {
    // Consumers arrive once per warp: a warp's own wait tells that its part of a product is done.
    constexpr int kAllWarps = kConsumers * kGroupWarps;
    Barriers& b = barriers();
    for (int i = 0; i < kStages; ++i) {
      hopper::init_barrier(&b.codes_full[i], 1);
      hopper::init_barrier(&b.codes_empty[i], kAllWarps);
    }
    for (int c = 0; c < kConsumers; ++c) {
      for (int i = 0; i < kRowBuffers; ++i) {
        hopper::init_barrier(&b.rows_full[c][i], 1);
        hopper::init_barrier(&b.rows_empty[c][i], kGroupWarps);
      }
      hopper::init_barrier(&b.turn[c], kGroupWarps);
    }
    for (int i = 0; i < kBiasBuffers; ++i) {
      hopper::init_barrier(&b.bias_full[i], kWarpSize);
      hopper::init_barrier(&b.bias_empty[i], kAllWarps);
    }
  }
};

// A place in a ring of buffers. Its parity is that of the phase in which the buffer is filled; the
// one in which it was emptied before has the other.
template <int kSize>
struct Place {
  int at = 0;
  unsigned parity = 0;
  __device__ void next() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Where a tile of rows begins.
struct RowTile {
  int group;
  int64_t first;
};
__device__ inline RowTile row_tile(const Screen& screen, unsigned tile) {
  const unsigned group = tile / screen.group_tiles;
  return {static_cast<int>(group),
          static_cast<int64_t>(tile - group * screen.group_tiles) * kBlockRows};
}

// producers: one warp for codes, one per consumer for its rows, one for biases

template <int kChunks>
__device__ void copy_codes(const Shared<kChunks>& shared, const CUtensorMap* map,
                           const Screen& screen) {
  auto& barriers = shared.barriers();
  Place<Shared<kChunks>::kStages> place;
  for (unsigned tile = blockIdx.x; tile < screen.tiles; tile += gridDim.x) {
    const int group = row_tile(screen, tile).group;
    for (int t = 0; t < screen.code_tiles; ++t) {
      for (int c = 0; c < kChunks; ++c, place.next()) {
        hopper::wait(&barriers.codes_empty[place.at], place.parity ^ 1);
        hopper::arrive_expecting(&barriers.codes_full[place.at], kChunkBytes);
        hopper::copy_box(shared.codes(place.at), map, &barriers.codes_full[place.at], c * kChunk,
                         t * kTileCodes, group);
      }
    }
  }
}

template <int kChunks>
__device__ void copy_rows(const Shared<kChunks>& shared, const CUtensorMap* map,
                          const Screen& screen, int consumer) {
  auto& barriers = shared.barriers();
  Place<Shared<kChunks>::kRowBuffers> place;
  for (unsigned tile = blockIdx.x; tile < screen.tiles; tile += gridDim.x, place.next()) {
    const RowTile at = row_tile(screen, tile);
    const int row = static_cast<int>(at.first) + consumer * kTileRows;
    uint64_t* full = &barriers.rows_full[consumer][place.at];
    hopper::wait(&barriers.rows_empty[consumer][place.at], place.parity ^ 1);
    hopper::arrive_expecting(full, kChunks * kChunkBytes);
    for (int c = 0; c < kChunks; ++c) {
      hopper::copy_box(shared.rows(consumer, place.at, c), map, full, c * kChunk, row, at.group);
    }
  }
}

// By ordinary loads, since K need not be a multiple of four; codes past the last are unusable.
template <int kChunks, bool kScaled>
__device__ void copy_biases(const Shared<kChunks>& shared, const Screen& screen) {
  constexpr int kEach = kTileCodes / kWarpSize;
  auto& barriers = shared.barriers();
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  Place<Shared<kChunks>::kBiasBuffers> place;
  for (unsigned tile = blockIdx.x; tile < screen.tiles; tile += gridDim.x) {
    const int64_t group = row_tile(screen, tile).group * screen.num_codes;
    for (int t = 0; t < screen.code_tiles; ++t, place.next()) {
      // Loaded before the buffer is free: the latency passes while the consumers still read it.
      float bias[kEach], scale[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t code = static_cast<int64_t>(t) * kTileCodes + i * kWarpSize + lane;
        const bool inside = code < screen.num_codes;
        bias[i] = inside ? screen.bias[group + code] : kUnusable;
        scale[i] = inside && kScaled ? screen.scale[group + code] : 0.0f;
      }
      hopper::wait(&barriers.bias_empty[place.at], place.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        shared.bias(place.at)[i * kWarpSize + lane] = bias[i];
        if (kScaled) shared.scale(place.at)[i * kWarpSize + lane] = scale[i];
      }
      hopper::arrive(&barriers.bias_full[place.at]);
    }
  }
}

}  // namespace nearest
}  // namespace cuda
}  // namespace latent_rl
