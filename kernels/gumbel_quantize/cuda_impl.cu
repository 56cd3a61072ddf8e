// gumbel_quantize: a warp per row up to 512 codes, a block per row above. Of a row only its
// probabilities are kept, in shared memory or registers; the noise is never stored.
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/element.cuh"
#include "common/launch.h"
#include "gumbel_quantize/cuda_impl.h"
#include "gumbel_quantize/draw.cuh"
#include "gumbel_quantize/held_row.cuh"
#include "gumbel_quantize/row.cuh"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;
// A team's float32 sums of probabilities take no more rows than this.
constexpr int64_t kMostRowsOfTeam = 1024;
constexpr int64_t kWarpCodes = 512;

template <typename Args>
__device__ int64_t padded(const Args& args) {
  return (args.num_codes + kQuad - 1) / kQuad * kQuad;
}

template <typename T, typename Args>
__device__ Row<T> row_at(const Args& args, int64_t at, bool aligned, float* values) {
  return {static_cast<const T*>(args.logits) + at * args.row_stride,
          static_cast<int>(args.num_codes), aligned, static_cast<uint64_t>(args.seeds[at]), values};
}

// Copies the code's vector, or NaN, sixteen bytes at a time where `wide`.
template <int kThreads, typename T>
__device__ void write_vector(const GumbelForwardCudaArgs& args, int64_t row, int code, bool wide) {
  constexpr int kWidth = kVectorWidth<T>;
  T* out = static_cast<T*>(args.vectors) + row * args.dim;
  const T* from = static_cast<const T*>(args.codebook) + (code < 0 ? 0 : code) * args.dim;
  const int thread = Team<kThreads>::thread();
  if (code >= 0 && wide) {
    for (int64_t d = static_cast<int64_t>(thread) * kWidth; d < args.dim; d += kThreads * kWidth) {
      store_vector(out + d, load_vector<kWidth>(from + d));
    }
    return;
  }
  for (int64_t d = thread; d < args.dim; d += kThreads) {
    if (code >= 0) {
      out[d] = from[d];
    } else {
      from_float(nan_float(), out + d);
    }
  }
}

template <int kThreads, typename T>
__device__ void write_soft(const GumbelForwardCudaArgs& args, const Row<T>& row,
                           Team<kThreads>& team, int64_t at, float top, bool valid, bool aligned) {
  T* out = static_cast<T*>(args.soft) + at * args.num_codes;
  const float highest = add_noise(row, team, top, args.tau);
  float mass[1] = {0.0f};
  for (int quad = team.thread(); quad < row.quads(); quad += kThreads) {
    const Vector<float, kQuad> noisy = row.get(quad);
    for (int j = 0; j < kQuad; ++j) mass[0] += weight_of<T>(noisy.at[j] - highest);
  }
  team.reduce(mass, [](int, float a, float b) { return a + b; });
  for (int quad = team.thread(); quad < row.quads(); quad += kThreads) {
    const Vector<float, kQuad> noisy = row.get(quad);
    float soft[kQuad];
    for (int j = 0; j < kQuad; ++j) {
      soft[j] = valid ? weight_of<T>(noisy.at[j] - highest) / mass[0] : nan_float();
    }
    store_quad(out, quad, row.count, aligned, soft);
  }
}

struct Alignment {
  bool logits, rows;  // of quads of logits, and of [N, K] results
  bool vectors;       // of code vectors; in the backward of quads of [K] gradients
};

// Adds the row's probabilities to the team's sums.
template <int kThreads, typename T>
__device__ void add_probabilities(const Row<T>& row, Team<kThreads>& team, float share,
                                  float* sums) {
  for (int quad = team.thread(); quad < row.quads(); quad += kThreads) {
    const Vector<float, kQuad> p = row.get(quad);
    Vector<float, kQuad> sum = load_vector<kQuad>(sums + quad * kQuad);
    for (int j = 0; j < kQuad; ++j) sum.at[j] += p.at[j] * share;
    store_vector(sums + quad * kQuad, sum);
  }
}

// Draws from a row, adds its probabilities to the team's sums, and returns the code.
template <typename T>
__device__ int take_row(const Row<T>& row, Team<kWarpSize>& team, float top, Moments* moments,
                        float* sums, Near*, const T*) {
  const int code = draw(row, team, top, moments);
  if (code >= 0) add_probabilities(row, team, 1.0f / moments->mass, sums);
  return code;
}
template <typename T>
__device__ int take_row(const Row<T>& row, Team<kGumbelThreads>& team, float, Moments* moments,
                        float* sums, Near* near, const T* next) {
  if (next != nullptr) HeldRow<T>::prefetch(next, row.count);
  HeldRow<T> held = {row, (row.quads() + kGumbelThreads - 1) / kGumbelThreads, {}};
  const int code = held.draw(team, moments, near);
  if (code >= 0) held.add_to(sums, 1.0f / moments->mass);
  return code;
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kGumbelThreads, kBlocksPerProcessor)
    _gumbel_forward_kernel(GumbelForwardCudaArgs args, Alignment alignment, int64_t teams) {
  using ThisTeam = Team<kThreads>;
  __shared__ typename ThisTeam::Shared shared[ThisTeam::kTeams];
  ThisTeam team = {shared + ThisTeam::index(), 0};
  const int64_t id = static_cast<int64_t>(blockIdx.x) * ThisTeam::kTeams + ThisTeam::index();
  if (id >= teams) return;  // whole warps or whole blocks
  // A row's own room is the second half: a block that holds its rows needs it for soft codes alone.
  __shared__ Near near;
  const bool roomy = kThreads == kWarpSize || args.soft != nullptr;
  float* sums = dynamic_shared<float>() + ThisTeam::index() * (roomy ? 2 : 1) * padded(args);
  float* values = sums + padded(args);
  for (int64_t k = ThisTeam::thread(); k < padded(args) / kQuad; k += kThreads) {
    store_vector(sums + k * kQuad, Vector<float, kQuad>{});
  }
  int valid = 0;
#pragma unroll 1
  for (int64_t at = id; at < args.rows; at += teams) {
    const Row<T> row = row_at<T>(args, at, alignment.logits, values);
    const float top = roomy ? top_of_row(row, team) : 0.0f;
    Moments moments;
    const T* next = at + teams < args.rows ? row.logits + teams * args.row_stride : nullptr;
    const int code = take_row(row, team, top, &moments, sums, &near, next);
    valid += code >= 0 ? 1 : 0;
    if (ThisTeam::thread() == 0) {
      args.codes[at] = code;
      args.entropy[at] =
          code < 0 ? nan_float() : logf(moments.mass) - moments.weighted / moments.mass;
      // Integers: the sum does not depend on the order.
      if (code >= 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(args.counts) + code, 1ULL);
      }
    }
    if (args.vectors != nullptr) write_vector<kThreads, T>(args, at, code, alignment.vectors);
    if (args.soft != nullptr) {
      write_soft(args, row, team, at, top, code >= 0, alignment.rows);
    }
  }
  float* out = args.partials + id * args.num_codes;
  for (int64_t quad = ThisTeam::thread(); quad < padded(args) / kQuad; quad += kThreads) {
    const Vector<float, kQuad> sum = load_vector<kQuad>(sums + quad * kQuad);
    for (int j = 0; j < kQuad; ++j) {
      if (quad * kQuad + j < args.num_codes) out[quad * kQuad + j] = sum.at[j];
    }
  }
  if (ThisTeam::thread() == 0) args.valid[id] = valid;
}

constexpr int kMeanColumns = 32;

// Mean probabilities from the teams' sums, added in the order of the teams.
__global__ void __launch_bounds__(kGumbelThreads)
    _gumbel_mean_kernel(GumbelForwardCudaArgs args, int64_t teams) {
  constexpr int kSlices = kGumbelThreads / kMeanColumns;
  __shared__ double shared[kGumbelThreads];
  __shared__ int counts[kGumbelThreads / kWarpSize + 1];
  int valid = 0;
  for (int64_t i = threadIdx.x; i < teams; i += kGumbelThreads) valid += args.valid[i];
  valid = block_reduce<kGumbelThreads>(valid, Sum<int>(), counts);
  const int lane = static_cast<int>(threadIdx.x) % kMeanColumns;
  const int slice = static_cast<int>(threadIdx.x) / kMeanColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMeanColumns + lane;
  const int64_t share = (teams + kSlices - 1) / kSlices;
  const int64_t end = (slice + 1) * share < teams ? (slice + 1) * share : teams;
  double sum = 0.0;
  if (column < args.num_codes) {
#pragma unroll 8
    for (int64_t i = slice * share; i < end; ++i) {
      sum += static_cast<double>(args.partials[i * args.num_codes + column]);
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || column >= args.num_codes) return;
  for (int s = 1; s < kSlices; ++s) sum += shared[s * kMeanColumns + lane];
  args.mean_probs[column] = static_cast<float>(sum / (valid > 0 ? valid : 1));
}

// What the backward sums over a row: the relaxed one-hot and p, and their products with gradients.
enum { kSoftMass, kSoftDot, kMass, kWeighted, kMeanDot, kSums };

template <typename T>
struct BackwardRow {
  Row<T> row;  // its values: (logits - top + G) / tau
  const T* g_soft;
  const float* g_mean;
  float top, highest;
  bool aligned, mean_aligned;

  // Logits less the top, the relaxed one-hot but for its sum, and the gradients of four codes.
  __device__ void load(int quad, float (&lower)[kQuad], float (&soft)[kQuad], float (&g)[kQuad],
                       float (&mean)[kQuad]) const {
    row.load(quad, lower);
    load_quad(g_soft, quad, row.count, aligned, 0.0f, g);
    load_quad(g_mean, quad, row.count, mean_aligned, 0.0f, mean);
    const Vector<float, kQuad> noisy = row.get(quad);
    for (int j = 0; j < kQuad; ++j) {
      lower[j] = max_or_nan(lower[j] - top, kVeryLow);
      soft[j] = weight_of<T>(noisy.at[j] - highest);
    }
  }
};

template <typename T, int kThreads>
__device__ void row_sums(const BackwardRow<T>& here, Team<kThreads>& team, float (&sums)[kSums]) {
#pragma unroll 1
  for (int quad = team.thread(); quad < here.row.quads(); quad += kThreads) {
    float lower[kQuad], soft[kQuad], g[kQuad], mean[kQuad];
    here.load(quad, lower, soft, g, mean);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float p = weight_of<T>(lower[j]);
      sums[kSoftMass] += soft[j];
      sums[kSoftDot] += soft[j] * g[j];
      sums[kMass] += p;
      sums[kWeighted] += p * lower[j];
      sums[kMeanDot] += p * mean[j];
    }
  }
  team.reduce(sums, [](int, float a, float b) { return a + b; });
}

// dl = y (g - <y, g>) / tau + p ((m - <p, m>) / V - g_entropy (log p + H)), quad by quad.
template <typename T, int kThreads>
__device__ void write_gradients(const GumbelBackwardCudaArgs& args, const BackwardRow<T>& here,
                                Team<kThreads>& team, int64_t at, const float (&sums)[kSums]) {
  const int64_t begin = at * args.num_codes;
  const float inverse_tau = 1.0f / args.tau;
  const float soft_share = 1.0f / sums[kSoftMass];
  const float soft_mean = sums[kSoftDot] * soft_share;
  const float share = 1.0f / sums[kMass];
  const float mean_mean = sums[kMeanDot] * share;
  const float log_mass = logf(sums[kMass]);
  const float entropy = log_mass - sums[kWeighted] * share;
  const float g_entropy = args.g_entropy[at];
  const int64_t valid = *args.valid_rows;
  const float per_row = valid > 0 ? 1.0f / static_cast<float>(valid) : 0.0f;
#pragma unroll 1
  for (int quad = team.thread(); quad < here.row.quads(); quad += kThreads) {
    float lower[kQuad], soft[kQuad], g[kQuad], mean[kQuad];
    here.load(quad, lower, soft, g, mean);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float p = weight_of<T>(lower[j]) * share;
      soft[j] *= soft_share;
      g[j] = soft[j] * (g[j] - soft_mean) * inverse_tau +
             p * (per_row * (mean[j] - mean_mean) - g_entropy * (lower[j] - log_mass + entropy));
    }
    store_quad(static_cast<T*>(args.dlogits) + begin, quad, here.row.count, here.aligned, g);
    if (args.soft != nullptr) {
      store_quad(static_cast<T*>(args.soft) + begin, quad, here.row.count, here.aligned, soft);
    }
  }
}

template <int kThreads, typename T>
__device__ void write_zeros(const Row<T>& row, T* out, bool aligned) {
  const float zeros[kQuad] = {};
  for (int quad = Team<kThreads>::thread(); quad < row.quads(); quad += kThreads) {
    store_quad(out, quad, row.count, aligned, zeros);
  }
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kGumbelThreads, kBlocksPerProcessor)
    _gumbel_backward_kernel(GumbelBackwardCudaArgs args, Alignment alignment) {
  using ThisTeam = Team<kThreads>;
  __shared__ typename ThisTeam::Shared shared[ThisTeam::kTeams];
  ThisTeam team = {shared + ThisTeam::index(), 0};
  float* values = dynamic_shared<float>() + ThisTeam::index() * padded(args);
  const int64_t teams = static_cast<int64_t>(gridDim.x) * ThisTeam::kTeams;
#pragma unroll 1
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * ThisTeam::kTeams + ThisTeam::index();
       at < args.rows; at += teams) {
    const Row<T> row = row_at<T>(args, at, alignment.logits, values);
    const int64_t begin = at * args.num_codes;
    if (args.codes[at] < 0) {
      write_zeros<kThreads>(row, static_cast<T*>(args.dlogits) + begin, alignment.rows);
      if (args.soft != nullptr) {
        write_zeros<kThreads>(row, static_cast<T*>(args.soft) + begin, alignment.rows);
      }
      continue;
    }
    const float top = top_of_row(row, team);
    const float highest = add_noise(row, team, top, args.tau);
    const BackwardRow<T> here = {row,
                                 static_cast<const T*>(args.g_soft) + begin,
                                 args.g_mean_probs,
                                 top,
                                 highest,
                                 alignment.rows,
                                 alignment.vectors};
    float sums[kSums] = {};
    row_sums(here, team, sums);
    write_gradients(args, here, team, at, sums);
  }
}

void check_codes(const char* op, int64_t num_codes) {
  if (num_codes <= kMaxGumbelCodes) return;
  throw std::invalid_argument(std::string(op) + ": num_codes must be at most " +
                              std::to_string(kMaxGumbelCodes) + ", got " +
                              std::to_string(num_codes));
}

int threads_of_team(int64_t num_codes) {
  return num_codes <= kWarpCodes ? kWarpSize : kGumbelThreads;
}

// Calls `run` with the number of threads that share a row.
template <typename Run>
void with_team(int64_t num_codes, Run run) {
  if (threads_of_team(num_codes) == kWarpSize) {
    run(std::integral_constant<int, kWarpSize>());
  } else {
    run(std::integral_constant<int, kGumbelThreads>());
  }
}

// Shared memory of a block: `arrays` floats per code for each of its teams.
size_t shared_bytes(int64_t num_codes, int teams, int arrays) {
  const int64_t width = (num_codes + kQuad - 1) / kQuad * kQuad;
  return sizeof(float) * static_cast<size_t>(width * teams * arrays);
}

}  // namespace

int64_t gumbel_teams(int64_t rows, int64_t num_codes) {
  int device = 0;
  int processors = 1;
  check("gumbel_quantize_cuda", cudaGetDevice(&device), "cudaGetDevice");
  check("gumbel_quantize_cuda",
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const int64_t resident = static_cast<int64_t>(processors) * kBlocksPerProcessor *
                           (kGumbelThreads / threads_of_team(num_codes));
  const int64_t least = (rows + kMostRowsOfTeam - 1) / kMostRowsOfTeam;
  const int64_t wanted = resident > least ? resident : least;
  return rows < 1 ? 1 : rows < wanted ? rows : wanted;
}

void gumbel_forward(const GumbelForwardCudaArgs& args, void* stream) {
  const char* op = "gumbel_forward_cuda";
  check_codes(op, args.num_codes);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t teams = gumbel_teams(args.rows, args.num_codes);
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Alignment alignment = {quads_align<T>(args.logits, args.row_stride),
                                 quads_align<T>(args.soft, args.num_codes),
                                 vectorises<T>(args.codebook, args.dim, args.dim) &&
                                     vectorises<T>(args.vectors, args.dim, args.dim)};
    with_team(args.num_codes, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value;
      constexpr int kTeams = Team<kThreads>::kTeams;
      launch(op, _gumbel_forward_kernel<T, kThreads>,
             static_cast<unsigned>((teams + kTeams - 1) / kTeams), kGumbelThreads,
             shared_bytes(args.num_codes, kTeams,
                          kThreads == kWarpSize || args.soft != nullptr ? 2 : 1),
             on, args, alignment, teams);
    });
  });
  launch(op, _gumbel_mean_kernel,
         static_cast<unsigned>((args.num_codes + kMeanColumns - 1) / kMeanColumns), kGumbelThreads,
         0, on, args, teams);
}

void gumbel_backward(const GumbelBackwardCudaArgs& args, void* stream) {
  const char* op = "gumbel_backward_cuda";
  check_codes(op, args.num_codes);
  if (args.rows == 0) return;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  with_device_type(op, args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Alignment alignment = {quads_align<T>(args.logits, args.row_stride),
                                 quads_align<T>(args.g_soft, args.num_codes) &&
                                     quads_align<T>(args.dlogits, args.num_codes) &&
                                     quads_align<T>(args.soft, args.num_codes),
                                 quads_align<float>(args.g_mean_probs, args.num_codes)};
    with_team(args.num_codes, [&](auto threads) {
      constexpr int kThreads = decltype(threads)::value;
      constexpr int kTeams = Team<kThreads>::kTeams;
      launch(op, _gumbel_backward_kernel<T, kThreads>,
             blocks_for((args.rows + kTeams - 1) / kTeams), kGumbelThreads,
             shared_bytes(args.num_codes, kTeams, 1), on, args, alignment);
    });
  });
}

}  // namespace cuda
}  // namespace latent_rl
