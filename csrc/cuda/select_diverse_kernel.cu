#include "select_diverse_kernel.h"

#include "row_loads.cuh"
#include "select_diverse_reach.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLoopThreads = 1024, kLoopWarps = kLoopThreads / 32;
constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;
constexpr int kStepRows = 4;  // of a warp

struct Farthest {
  uint32_t reach;
  int rank;
};

struct FarthestOfWarps {
  uint32_t reach[kLoopWarps];
  int rank[kLoopWarps];
};

using FourRanks = Pack<uint32_t, 4>;
using LoopSlots = FarthestOfWarps[2];
using StepKeys = Key[kStepWarps];

// Of equal ones the lowest rank. All lanes of the warp call it, and get it.
__device__ __forceinline__ Farthest farthest_of_warp(Farthest mine) {
  const uint32_t reach = __reduce_max_sync(kAllLanes, mine.reach);
  const unsigned rank = mine.reach == reach ? static_cast<unsigned>(mine.rank) : kAllLanes;
  return {reach, static_cast<int>(__reduce_min_sync(kAllLanes, rank))};
}

// The same of the block, with one barrier: who calls it again must pass the other slot.
__device__ __forceinline__ int farthest_of_block(Farthest mine, FarthestOfWarps& slot) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  mine = farthest_of_warp(mine);
  if (lane == 0) slot.reach[warp] = mine.reach, slot.rank[warp] = mine.rank;
  __syncthreads();
  return farthest_of_warp({slot.reach[lane], slot.rank[lane]}).rank;
}

// Formula: picks[b, 0] = argmax over i of the distance to its nearest neighbour; picks[b, t] =
//          argmax over i of the least distance to picks[b, 0 ... t - 1]; of equal ones the lowest.
// Plan:    one block an image goes through all picks, since each needs the one before. A thread has
//          every 1024th four ranks: it reads their cosines to the pick, 16 bytes at a time, lessens
//          what they have in shared memory, and keeps the farthest; one barrier a pick makes that
//          the block's.
// Grid:    images.
// Shared:  N distances, as integers; a slot a warp, twice.
// Traffic: 4 N bytes a pick, from L2 while the matrix fits there; bound by latency, not by them.
// Order:   minima and maxima over integers have none.
template <typename T>
__global__ void __launch_bounds__(kLoopThreads)
    select_diverse_kernel(const SelectDiverseParams<T> p) {
  DYNAMIC_SHARED(shared);
  STATIC_SHARED(LoopSlots, slots);
  auto* reach = reinterpret_cast<FourRanks*>(shared);  // [N / 4], each read by its thread alone
  const int64_t b = blockIdx.x, N = p.rows.N;
  const int count = p.rows.count[b], take = picks_taken(p.budget, p.K, b, count);
  int64_t* picks = p.picks + b * p.K;
  for (int t = take + threadIdx.x; t < p.K; t += kLoopThreads) picks[t] = -1;
  if (take == 0) return;

  Farthest farthest{kPicked, 0};
  const auto consider = [&](uint32_t reach, int rank) {
    if (reach > farthest.reach) farthest = {reach, rank};  // ranks ascend
  };
  for (int first = 4 * threadIdx.x; first < count; first += 4 * kLoopThreads) {
    FourRanks own;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int64_t at = b * N + first + v;
      own.at[v] = first + v < count ? first_reach(p.rows.scale[at], p.nearest[at]) : kPicked;
      consider(own.at[v], first + v);
    }
    reach[first / 4] = own;
  }
  for (int t = 0;; ++t) {
    const int pick = farthest_of_block(farthest, slots[t % 2]);
    if (threadIdx.x == 0) picks[t] = p.rows.token[b * N + pick];
    if (t + 1 == take) break;
    const float* cosines = p.cosines + (b * N + pick) * p.cosine_stride;
    farthest = {kPicked, 0};
#pragma unroll 2
    for (int first = 4 * threadIdx.x; first < count; first += 4 * kLoopThreads) {
      const Pack<float, 4> to_pick = pack_at<4>(cosines + first);
      FourRanks own = reach[first / 4];
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        own.at[v] = first + v == pick ? kPicked : reach_after(own.at[v], t, to_pick.at[v]);
        consider(own.at[v], first + v);
      }
      reach[first / 4] = own;
    }
  }
}

// The cosines of the ranks first ... first + kStepRows - 1 to the rank `pick`, one to each of as
// many lanes. Behind the last rank that one's again.
template <typename T>
__device__ __forceinline__ float cosine_to(const TokenRows<T>& x, int64_t b, int pick, int first,
                                           int count) {
  constexpr int kVec = kWidestPack<T>;
  const int lane = threadIdx.x % 32;
  const auto row_of = [&](int rank) {
    return x.x + b * x.stride_b + x.token[b * x.N + rank] * x.stride_n;
  };
  const T* picked_row = row_of(pick);
  const UnitScale picked_scale = x.scale[b * x.N + pick];
  const T* row[kStepRows];
  UnitScale scale[kStepRows];
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) {
    row[r] = row_of(min(first + r, count - 1));
    scale[r] = x.scale[b * x.N + min(first + r, count - 1)];
  }
  float sum[kStepRows][kVec] = {};
  for (int c = lane * kVec; c < x.C; c += 32 * kVec) {
    const Pack<T, kVec> picked = channels<kVec>(picked_row, c, x.C);
    Pack<T, kVec> own[kStepRows];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) own[r] = channels<kVec>(row[r], c, x.C);
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const float factor = to_float(picked.at[v]) * picked_scale.power;
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        sum[r][v] = fmaf(to_float(own[r].at[v]) * scale[r].power, factor, sum[r][v]);
      }
    }
  }
  float cosine = 0;
#pragma unroll
  for (int r = 0; r < kStepRows; ++r) {
    const float of_row = warp_sum(sum[r]) * (scale[r].inverse * picked_scale.inverse);
    if (lane == r) cosine = of_row;
  }
  return cosine;
}

// Formula: best[b, t] = the key of (max over i of reach[b, i], the lowest i that has it), after
//          reach[b, i] is lessened by the distance from i to pick t - 1.
// Plan:    where no matrix of cosines is kept, one launch a pick, so that all multiprocessors read
//          the rows: a warp kStepRows of them, one load of the picked row for all. Farthest in the
//          warp, in the block, then one 64-bit atomicMax a block. best is 0 before.
// Grid:    (rows of an image / 32, images folded to 65535).
// Shared:  a key a warp.
// Traffic: x once a pick; bound by memory.
// Order:   each cosine is one sum in a fixed order, and a maximum over keys has none.
template <typename T>
__global__ void __launch_bounds__(kStepThreads) step_kernel(const SelectDiverseParams<T> p, int t) {
  STATIC_SHARED(StepKeys, keys);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = (blockIdx.x * kStepWarps + warp) * kStepRows, rank = first + lane;

  for (int64_t b = blockIdx.y; b < p.rows.B; b += gridDim.y) {
    const int count = p.rows.count[b];
    if (t >= picks_taken(p.budget, p.K, b, count)) continue;
    if (static_cast<int>(blockIdx.x) * kStepWarps * kStepRows >= count) continue;
    const int64_t at = b * p.rows.N + rank;
    const bool own = lane < kStepRows && rank < count;
    uint32_t reach = kPicked;
    if (t == 0) {
      if (own) reach = first_reach(p.rows.scale[at], p.nearest[at]);
    } else {
      const int pick = key_index(p.best[b * p.K + t - 1]);
      const float cosine = cosine_to(p.rows, b, pick, first, count);
      if (own) reach = rank == pick ? kPicked : reach_after(p.reach[at], t - 1, cosine);
    }
    if (own) p.reach[at] = reach;
    const Farthest farthest = farthest_of_warp({reach, rank});
    if (lane == 0) keys[warp] = key_of(farthest.reach, farthest.rank);
    __syncthreads();
    if (threadIdx.x == 0) {
      Key best = keys[0];
      for (int w = 1; w < kStepWarps; ++w) best = larger(best, keys[w]);
      atomicMax(&p.best[b * p.K + t], best);
    }
    __syncthreads();  // the keys are read before those of the next image are written
  }
}

// Formula: picks[b, t] = the token of best[b, t], -1 from the number of picks taken on.
// Plan:    a thread a pick.
// Grid:    (K / 256, images folded to 65535).
// Shared:  none.
// Traffic: 8 K bytes in, 8 K out.
// Order:   no sums.
template <typename T>
__global__ void __launch_bounds__(kStepThreads) name_picks_kernel(const SelectDiverseParams<T> p) {
  const int t = blockIdx.x * kStepThreads + threadIdx.x;
  for (int64_t b = blockIdx.y; b < p.rows.B && t < p.K; b += gridDim.y) {
    const bool taken = t < picks_taken(p.budget, p.K, b, p.rows.count[b]);
    const int64_t at = b * p.K + t;
    p.picks[at] = taken ? p.rows.token[b * p.rows.N + key_index(p.best[at])] : -1;
  }
}

// The same of some images alone.
template <typename T>
SelectDiverseParams<T> images(SelectDiverseParams<T> p, int first, int B) {
  p.rows.x += first * p.rows.stride_b;
  p.rows.token += int64_t{first} * p.rows.N;
  p.rows.count += first;
  p.rows.scale += int64_t{first} * p.rows.N;
  p.rows.B = B;
  if (p.budget) p.budget += first;
  p.nearest += int64_t{first} * p.rows.N;
  p.picks += int64_t{first} * p.K;
  return p;
}

template <typename T>
cudaError_t find_neighbours(const SelectDiverseParams<T>& p, cudaStream_t stream) {
  NearestRivalsParams<T> rivals{};
  rivals.rows = p.rows;
  rivals.nearest = p.nearest;
  rivals.cosines = p.cosines;
  rivals.cosine_stride = p.cosine_stride;
  return launch_nearest_rivals(rivals, stream);
}

template <typename T>
cudaError_t pick_step_by_step(const SelectDiverseParams<T>& p, cudaStream_t stream) {
  cudaError_t error = find_neighbours(p, stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(p.best, 0, sizeof(Key) * p.rows.B * p.K, stream);
  const int images = min(p.rows.B, kMostBlocksAcross);
  const dim3 steps(ceil_div(p.rows.N, kStepWarps * kStepRows), images);
  for (int t = 0; t < p.K && error == cudaSuccess; ++t) {
    error = launch(step_kernel<T>, steps, dim3(kStepThreads), 0, stream, p, t);
  }
  if (error != cudaSuccess) return error;
  const dim3 names(ceil_div(p.K, kStepThreads), images);
  return launch(name_picks_kernel<T>, names, dim3(kStepThreads), 0, stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_select_diverse(const SelectDiverseParams<T>& p, cudaStream_t stream) {
  cudaError_t error = launch_token_rows(p.rows, stream);
  if (error != cudaSuccess) return error;
  if (p.cosines == nullptr) return pick_step_by_step(p, stream);
  const size_t shared = sizeof(uint32_t) * p.cosine_stride;
  for (int first = 0; first < p.rows.B && error == cudaSuccess; first += p.kept) {
    const SelectDiverseParams<T> some = images(p, first, min(p.kept, p.rows.B - first));
    error = find_neighbours(some, stream);
    if (error != cudaSuccess) return error;
    error = launch(select_diverse_kernel<T>, dim3(some.rows.B), dim3(kLoopThreads), shared, stream,
                   some);
  }
  return error;
}

template cudaError_t launch_select_diverse(const SelectDiverseParams<float>&, cudaStream_t);
template cudaError_t launch_select_diverse(const SelectDiverseParams<__half>&, cudaStream_t);
template cudaError_t launch_select_diverse(const SelectDiverseParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
