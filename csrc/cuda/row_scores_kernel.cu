#include "row_scores_kernel.h"

#include <algorithm>

#include "device.h"
#include "row_scores_tiles.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostSplits = 64, kBlocksPerMultiprocessor = 4;
constexpr int kLeastKeys = 128;  // of a row split: what is worth a block

// Formula: sums[b, h, r] = max_k logit[k], sum_k exp(logit[k] - max), of a share of the keys.
// Plan:    a block has 16 rows of a key head, those of all heads that share it one after the other,
//          and walks their keys 64 (float32: 32) at a time. The four warps multiply by mma.sync (16
//          bits) or fmaf, then a warp has 4 rows, a lane a key of each 32, with sums of its own
//          that meet at the end.
// Grid:    (tiles of rows * row_splits). Where rows are few their keys are split.
// Shared:  a tile of queries, one of keys, their products.
// Traffic: queries once; the keys of a head once for each 16 of its rows, from L2 but the first
//          time; 8 bytes a row and split out.
// Order:   keys in order, lanes by a tree: the same bits every run.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    row_sums_kernel(const RowScoresParams<T> p, const RowScoresPlan plan) {
  DYNAMIC_SHARED(bytes);
  const CalibratedAttentionParams<T>& a = p.attention;
  const Tiles<T> tiles(bytes, a.D);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int heads = static_cast<int>(plan.row_tiles / a.B), per_head = heads / a.Hkv;
  const int unit = blockIdx.x / plan.row_splits, split = blockIdx.x % plan.row_splits;
  const int b = unit / heads, key_head = unit % heads / per_head, tile = unit % per_head;

  // The counters of the next kernel, which starts when all of this one is over.
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       plan.key_splits > 1 && i < plan.key_tiles; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    p.arrived[i] = 0;
  }
  if (threadIdx.x < kRows) tiles.row[threadIdx.x] = row_of(p, b, key_head, tile, threadIdx.x);
  __syncthreads();
  const KeyRange hull = hull_of(tiles.row, {0, a.Lk});
  const int share =
      static_cast<int>(ceil_div(ceil_div(hull.past - hull.first, plan.row_splits), kKeys<T>)) *
      kKeys<T>;
  const int begin = min(hull.first + split * share, hull.past);
  const int end = min(begin + share, hull.past);
  load_queries(p, tiles, b, {begin, end});

  float most[kWarpRows], sum[kWarpRows] = {};
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) most[r] = kNever;
  for (int first = begin; first < end; first += kKeys<T>) {
    __syncthreads();  // all are done with the tile before
    load_keys(p, tiles, b, key_head, first, end);
    float size[kOwn<T>], x[kWarpRows][kOwn<T>];
    load_sizes(p, b, first, end, size);
    __syncthreads();
    multiply(tiles, a.D, x);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Row& row = tiles.row[warp * kWarpRows + r];
      float larger = most[r];
#pragma unroll
      for (int k = 0; k < kOwn<T>; ++k) {
        finish_logit(p, b, row, first + k * kLanes + lane, size[k], x[r][k]);
        larger = fmaxf(larger, x[r][k]);
      }
      const float shift = larger == kNever ? 0.f : larger;  // nothing seen yet
      sum[r] *= expf(most[r] - shift);
      most[r] = larger;
#pragma unroll
      for (int k = 0; k < kOwn<T>; ++k) sum[r] += expf(x[r][k] - shift);
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    float larger = most[r];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, lanes));
    }
    float all = sum[r] * expf(most[r] - (larger == kNever ? 0.f : larger));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(~0u, all, lanes);
    const int line = warp * kWarpRows + r;
    if (lane != 0 || tile * kRows + line >= a.Hq / a.Hkv * a.Lq) continue;
    const Row& row = tiles.row[line];
    const int64_t at = (static_cast<int64_t>(b) * a.Hq + row.head) * a.Lq + row.r;
    p.sums[at * plan.row_splits + split] = {larger, all};
  }
}

// What a logit of the row counts for, from the sums of its splits in their order.
template <typename T>
__device__ __forceinline__ void share_row(const RowScoresParams<T>& p, int splits, int64_t b,
                                          Row& row) {
  const CalibratedAttentionParams<T>& a = p.attention;
  if (row.seen.first >= row.seen.past) return;
  const RowSums* own = p.sums + ((b * a.Hq + row.head) * a.Lq + row.r) * splits;
  float most = kNever, sum = 0.f;
  for (int n = 0; n < splits; ++n) most = fmaxf(most, own[n].max);
  row.max = most == kNever ? 0.f : most;
  for (int n = 0; n < splits; ++n) sum += own[n].sum * expf(own[n].max - row.max);
  row.factor = sum == 0.f ? 0.f : weight_of(p, b, row.r) / (sum * static_cast<float>(a.Hq));
}

// Formula: score[b, k] = sum over h, r of factor[h, r] * exp(logit[h, r, k] - max[h, r]).
// Plan:    a block has a tile of keys and walks a share of the tiles of rows, as above: the warps
//          multiply, then a lane adds up its keys over 4 rows of the tile. Tiles of rows that see
//          none of the keys are passed over. The last of the blocks that share a tile of keys adds
//          what all have left.
// Grid:    (tiles of keys * key_splits).
// Shared:  as above, and at the end the sums of the four warps.
// Traffic: keys once a split; the queries once for each 64 (float32: 32) keys, from L2.
// Order:   tiles in order, then warps, then splits; long sums carry what they round away: the same
//          bits every run.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    column_scores_kernel(const RowScoresParams<T> p, const RowScoresPlan plan) {
  DYNAMIC_SHARED(bytes);
  STATIC_SHARED(bool, is_last);
  const CalibratedAttentionParams<T>& a = p.attention;
  const Tiles<T> tiles(bytes, a.D);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int unit = blockIdx.x / plan.key_splits, split = blockIdx.x % plan.key_splits;
  const int per_image = static_cast<int>(plan.key_tiles / a.B);
  const int b = unit / per_image, first = unit % per_image * kKeys<T>;
  const KeyRange keys{first, min(first + kKeys<T>, a.Lk)};
  const int steps = static_cast<int>(plan.row_tiles / a.B), per_head = steps / a.Hkv;
  const int share = static_cast<int>(ceil_div(steps, plan.key_splits));

  float size[kOwn<T>], total[kOwn<T>] = {}, lost[kOwn<T>] = {};
  load_sizes(p, b, first, keys.past, size);
  int loaded = -1;  // of which head the keys are there
  for (int step = split * share; step < min((split + 1) * share, steps); ++step) {
    const int key_head = step / per_head;
    __syncthreads();  // all are done with the tile before
    if (threadIdx.x < kRows) {
      Row row = row_of(p, b, key_head, step % per_head, threadIdx.x);
      share_row(p, plan.row_splits, b, row);
      if (row.factor == 0.f) row.seen = {0, 0};
      tiles.row[threadIdx.x] = row;
    }
    __syncthreads();
    const KeyRange hull = hull_of(tiles.row, keys);
    if (hull.first >= hull.past) continue;
    if (loaded != key_head) load_keys(p, tiles, b, key_head, first, keys.past);
    loaded = key_head;
    load_queries(p, tiles, b, keys);
    __syncthreads();
    float x[kWarpRows][kOwn<T>];
    multiply(tiles, a.D, x);
#pragma unroll
    for (int k = 0; k < kOwn<T>; ++k) {
      float part = -lost[k];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const Row& row = tiles.row[warp * kWarpRows + r];
        const bool seen = finish_logit(p, b, row, first + k * kLanes + lane, size[k], x[r][k]);
        // A row of NaN gives nothing to what it does not see.
        part += seen ? row.factor * expf(x[r][k] - row.max) : 0.f;
      }
      const float sum = total[k] + part;
      lost[k] = (sum - total[k]) - part;
      total[k] = sum;
    }
  }

  __syncthreads();
  float* warps = reinterpret_cast<float*>(bytes);  // [kWarps, kKeys], where the queries were
#pragma unroll
  for (int k = 0; k < kOwn<T>; ++k) warps[warp * kKeys<T> + k * kLanes + lane] = total[k];
  __syncthreads();
  const bool has_key = threadIdx.x < kKeys<T> && first + static_cast<int>(threadIdx.x) < a.Lk;
  const int64_t j = first + threadIdx.x, image = static_cast<int64_t>(b) * a.Lk;
  if (has_key) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w * kKeys<T> + threadIdx.x];
    if (plan.key_splits == 1) {
      p.score[image + j] = sum;
    } else {
      p.parts[image * plan.key_splits + static_cast<int64_t>(split) * a.Lk + j] = sum;
    }
  }
  if (plan.key_splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block leaves is seen by whoever sees its arrival
    is_last = atomicAdd(p.arrived + unit, 1) == plan.key_splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || !has_key) return;
  float sum = 0.f;
  for (int n = 0; n < plan.key_splits; ++n) {
    sum += p.parts[image * plan.key_splits + static_cast<int64_t>(n) * a.Lk + j];
  }
  p.score[image + j] = sum;
}

}  // namespace

template <typename T>
RowScoresPlan plan_row_scores(const RowScoresParams<T>& p) {
  const CalibratedAttentionParams<T>& a = p.attention;
  const int64_t heads = a.Hkv * ceil_div(a.Hq / a.Hkv * static_cast<int64_t>(a.Lq), kRows);
  RowScoresPlan plan{};
  plan.row_tiles = a.B * heads;
  plan.key_tiles = a.B * ceil_div(a.Lk, kKeys<T>);
  if (plan.row_tiles == 0 || plan.key_tiles == 0) return plan;
  // A few blocks for every multiprocessor, if there is work for so many.
  const int64_t blocks = static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessors();
  const auto splits = [&](int64_t units, int64_t most) {
    const int64_t wanted = std::min(blocks / units, int64_t{kMostSplits});
    return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
  };
  plan.row_splits = splits(plan.row_tiles, ceil_div(a.Lk, kLeastKeys));
  plan.key_splits = splits(plan.key_tiles, heads);
  plan.sums = static_cast<int64_t>(a.B) * a.Hq * a.Lq * plan.row_splits;
  plan.parts = plan.key_splits > 1 ? static_cast<int64_t>(a.B) * a.Lk * plan.key_splits : 0;
  return plan;
}

template <typename T>
cudaError_t launch_row_scores(const RowScoresParams<T>& p, const RowScoresPlan& plan,
                              cudaStream_t stream) {
  const CalibratedAttentionParams<T>& a = p.attention;
  if (plan.row_tiles == 0) {  // no rows: nobody sees anything
    return cudaMemsetAsync(p.score, 0, sizeof(float) * a.B * a.Lk, stream);
  }
  const size_t shared = Tiles<T>::bytes(a.D);
  const dim3 rows(static_cast<unsigned>(plan.row_tiles * plan.row_splits));
  const cudaError_t error =
      launch(row_sums_kernel<T>, rows, dim3(kThreads), shared, stream, p, plan);
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(plan.key_tiles * plan.key_splits));
  return launch(column_scores_kernel<T>, columns, dim3(kThreads), shared, stream, p, plan);
}

#define INSTANTIATE(T)                                                                    \
  template RowScoresPlan plan_row_scores(const RowScoresParams<T>&);                      \
  template cudaError_t launch_row_scores(const RowScoresParams<T>&, const RowScoresPlan&, \
                                         cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace restore_ext::cuda
