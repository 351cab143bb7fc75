#include "anchor_scores_kernel.h"

#include "nearest_rivals_kernel.h"
#include "row_loads.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y or z
constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;

// Formula: partial[b, k, c] = sum of x_r[c] / |x_r| over the comparable ranks r of chunk k.
// Plan:    a block has kUnitsSummed ranks by 32 packs of channels, a warp an eighth of the ranks,
//          all of whose packs are in flight at once; the first warps add up what the eight found.
// Grid:    (chunks, slabs of 32 packs, images folded to 65535).
// Shared:  a sum for each warp and channel of the slab.
// Traffic: x once; 4 C bytes out a chunk, 1 / 32 of x in 16-bit types.
// Order:   fixed, by rank alone: where `valid` left tokens out, and where rows lie, does not show.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_units_kernel(const AnchorScoresParams<T> p) {
  constexpr int kVec = kWidestPack<T>, kSlab = kLanes * kVec, kOwn = kUnitsSummed / kWarps;
  using Sums = float[kWarps][kSlab];
  STATIC_SHARED(Sums, sums);
  const TokenRows<T>& x = p.rows;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int slab = blockIdx.y * kSlab, c = slab + lane * kVec;

  for (int64_t b = blockIdx.z; b < x.B; b += gridDim.z) {
    const int count = x.count[b];
    if (static_cast<int>(blockIdx.x) * kUnitsSummed >= count) continue;
    const int first = blockIdx.x * kUnitsSummed + warp * kOwn;
    UnitScale scale[kOwn];
    Pack<T, kVec> row[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool exists = first + i < count;
      scale[i] = exists ? x.scale[b * x.N + first + i] : UnitScale{0.f, 0.f};
      const bool comparable = scale[i].inverse == scale[i].inverse;
      if (!comparable) scale[i] = {0.f, 0.f};
      const int64_t token = exists && comparable ? x.token[b * x.N + first + i] : -1;
      // What cannot be compared must not be read: 0 * NaN would be NaN.
      row[i] = channels<kVec>(x.x + b * x.stride_b + max(token, int64_t{0}) * x.stride_n, c,
                              token >= 0 ? x.C : 0);
    }
    float sum[kVec] = {};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        sum[v] = fmaf(to_float(row[i].at[v]) * scale[i].power, scale[i].inverse, sum[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) sums[warp][lane * kVec + v] = sum[v];
    __syncthreads();
    const int mine = threadIdx.x;  // channel of the slab
    if (mine < kSlab && slab + mine < x.C) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += sums[w][mine];
      const int64_t chunk = b * ceil_div(x.N, kUnitsSummed) + blockIdx.x;
      p.partial[chunk * p.sum_stride + slab + mine] = all;
    }
    __syncthreads();  // the sums are read before those of the next image are written
  }
}

// Formula: total[b, c] = sum over the chunks k of image b of partial[b, k, c].
// Plan:    a block has 32 channels; each of its warps adds up every eighth chunk, the first warp
//          adds up theirs.
// Grid:    (C / 32, images folded to 65535).
// Shared:  a sum for each warp and channel.
// Traffic: N C / 16 bytes in, 4 C out; latency-bound.
// Order:   fixed by the number of valid tokens alone.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(const AnchorScoresParams<T> p) {
  using Sums = float[kWarps][kLanes];
  STATIC_SHARED(Sums, sums);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int c = blockIdx.x * kLanes + lane;
  const int64_t most_chunks = ceil_div(p.rows.N, kUnitsSummed);

  for (int64_t b = blockIdx.y; b < p.rows.B; b += gridDim.y) {
    const int chunks = static_cast<int>(ceil_div(p.rows.count[b], kUnitsSummed));
    float sum = 0;
#pragma unroll 4
    for (int k = warp; k < chunks && c < p.rows.C; k += kWarps) {
      sum += p.partial[(b * most_chunks + k) * p.sum_stride + c];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && c < p.rows.C) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
      p.total[b * p.sum_stride + c] = sum;
    }
    __syncthreads();  // the sums are read before those of the next image are written
  }
}

// Formula: density[b, r] = x_r . total[b] / |x_r|, which is the sum of r's cosines with all tokens.
// Plan:    one warp a row, 16 bytes a lane, a sum an element. The rows come from L2, where the sum
//          over them has just left them.
// Grid:    (rows of an image / 8, images folded to 65535).
// Shared:  none.
// Traffic: x once, the totals from L1; 4 N bytes out.
// Order:   the same for every row wherever it lies: copies of a token get the same bits, so they
//          are no rivals of each other.
template <typename T>
__global__ void __launch_bounds__(kThreads) density_kernel(const AnchorScoresParams<T> p) {
  constexpr int kVec = kWidestPack<T>;
  const TokenRows<T>& x = p.rows;
  const int lane = threadIdx.x % kLanes, rank = blockIdx.x * kWarps + threadIdx.x / kLanes;

  for (int64_t b = blockIdx.y; b < x.B; b += gridDim.y) {
    if (rank >= x.count[b]) continue;
    const T* row = x.x + b * x.stride_b + x.token[b * x.N + rank] * x.stride_n;
    const float* total = p.total + b * p.sum_stride;
    const UnitScale scale = x.scale[b * x.N + rank];
    float sum[kVec] = {};
#pragma unroll 2
    for (int c = lane * kVec; c < x.C; c += kLanes * kVec) {
      const Pack<T, kVec> own = channels<kVec>(row, c, x.C);
      const Pack<float, kVec> all = channels<kVec>(total, c, x.C);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        sum[v] = fmaf(to_float(own.at[v]) * scale.power, all.at[v], sum[v]);
      }
    }
    const float density = warp_sum(sum) * scale.inverse;  // NaN where not comparable
    if (lane == 0) p.density[b * x.N + rank] = density;
  }
}

template <typename T>
cudaError_t find_densities(const AnchorScoresParams<T>& p, cudaStream_t stream) {
  const TokenRows<T>& x = p.rows;
  const int images = min(x.B, kMostBlocksAcross);
  if (x.C > 0) {  // else there is nothing to sum, and all densities are 0
    const dim3 sums(ceil_div(x.N, kUnitsSummed), ceil_div(x.C, kLanes * kWidestPack<T>), images);
    cudaError_t error = launch(sum_units_kernel<T>, sums, dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
    const dim3 channels(ceil_div(x.C, kLanes), images);
    error = launch(add_chunks_kernel<T>, channels, dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  const dim3 rows(ceil_div(x.N, kWarps), images);
  return launch(density_kernel<T>, rows, dim3(kThreads), 0, stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_anchor_scores(const AnchorScoresParams<T>& p, cudaStream_t stream) {
  cudaError_t error = launch_token_rows(p.rows, stream);
  if (error != cudaSuccess) return error;
  error = find_densities(p, stream);
  if (error != cudaSuccess) return error;
  NearestRivalsParams<T> rivals{};
  rivals.rows = p.rows;
  rivals.density = p.density;
  rivals.denser = p.denser;
  rivals.nearest = p.nearest;
  return launch_nearest_rivals(rivals, stream);
}

template cudaError_t launch_anchor_scores(const AnchorScoresParams<float>&, cudaStream_t);
template cudaError_t launch_anchor_scores(const AnchorScoresParams<__half>&, cudaStream_t);
template cudaError_t launch_anchor_scores(const AnchorScoresParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
