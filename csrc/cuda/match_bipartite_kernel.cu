#include "match_bipartite_kernel.h"

#include "device.h"
#include "similarity.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y

// Formula: best[b, e] = the key of (max over o of cos(x_2e, x_2o+1), the lowest o that has it), for
//          the valid tokens x of image b by rank; kNoKey where none compares.
// Plan:    one tile of cosines a block (similarity.cuh); row maxima in registers, then in shared
//          memory, then one 64-bit atomicMax a row and block. best is 0 before, that is kNoKey.
// Grid:    (tiles of the even x odd matrix, images folded to 65535). Where `valid` leaves fewer
// rows
//          than N, the tiles beyond return at once.
// Shared:  the tile's buffers; a key a row.
// Traffic: x once from memory if L2 holds it; N^2 C / 2 flops an image, so tensor-bound from N ~
// 2000. Order:   each cosine is one sum in a fixed order, and a maximum over keys has none.
template <class Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    match_kernel(const MatchBipartiteParams<T> p) {
  DYNAMIC_SHARED(shared);
  Key* best = reinterpret_cast<Key*>(shared + Tile::kSharedBytes);  // [kRows]
  const TokenRows<T>& x = p.rows;
  const int most_evens = (x.N + 1) / 2, most_odds = x.N / 2;
  const TilePlace place = tile_place(blockIdx.x, ceil_div(most_evens, Tile::kRows),
                                     ceil_div(most_odds, Tile::kColumns));
  const int first_even = place.row * Tile::kRows, first_odd = place.column * Tile::kColumns;

  for (int64_t b = blockIdx.y; b < x.B; b += gridDim.y) {
    const int count = x.count[b], evens = (count + 1) / 2, odds = count / 2;
    if (first_even >= evens || first_odd >= odds) continue;
    for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) best[i] = kNoKey;

    const int* token = x.token + b * x.N;
    const UnitScale* scale = x.scale + b * x.N;
    Tile tile;
    tile.run(shared, x.x + b * x.stride_b, x.stride_n, x.C,
             RankLines{token, scale, 2 * first_even, 2, count},
             RankLines{token, scale, 2 * first_odd + 1, 2, count});
    tile.row_max(
        [&](int i, float cosine, int j) { atomicMax(&best[i], key_of(cosine, first_odd + j)); });
    __syncthreads();  // all warps have put their part of a row
    for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) {
      if (best[i] != kNoKey) atomicMax(&p.best[b * most_evens + first_even + i], best[i]);
    }
  }
}

constexpr int kLanes = 8;  // to count for one even row
constexpr int kOrderThreads = 128;
constexpr int kOrderRows = kOrderThreads / kLanes;

__device__ __forceinline__ int sum_over_lanes(int x) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// How many pairs image b takes of its `count` valid tokens.
template <typename T>
__device__ __forceinline__ int pairs_taken(const MatchBipartiteParams<T>& p, int64_t b, int count) {
  const int wanted = p.budget ? p.budget[b] : p.R;
  return max(min(wanted, min(p.R, (count - p.class_token) / 2)), 0);
}

// Formula: order(e) = how many other sources have a larger best cosine, or the same and a lower e.
//          The pair of order t < taken is src[b, t], dst[b, t]; the other sources are unmerged in
//          this order, or with a class token left to place_unmerged_kernel.
// Plan:    no sort: kLanes lanes an even row compare its key with all others, which L1 serves. For
//          N = 576 that is 36 steps, and for N = 32768 3e8 comparisons, 2 % of the cosines' time.
// Grid:    (even rows / 16, images folded to 65535).
// Shared:  none.
// Traffic: 4 N bytes of keys in, 8 (U + 2 R) out.
// Order:   integers only.
template <typename T>
__global__ void __launch_bounds__(kOrderThreads)
    order_pairs_kernel(const MatchBipartiteParams<T> p) {
  const int half = (p.rows.N + 1) / 2;
  const int even = blockIdx.x * kOrderRows + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t b = blockIdx.y; b < p.rows.B; b += gridDim.y) {
    const int count = p.rows.count[b], evens = (count + 1) / 2;
    const int taken = pairs_taken(p, b, count);
    const Key* best = p.best + b * half;
    const Key mine = even < evens ? best[even] : kNoKey;
    const uint32_t similarity = key_ordered(mine);  // without the index: that is the partner's
    int order = 0;
    for (int other = p.class_token + lane; other < evens; other += kLanes) {
      const uint32_t its = key_ordered(best[other]);
      order += its > similarity || (its == similarity && other < even);
    }
    order = sum_over_lanes(order);
    if (lane != 0) continue;

    const int* token = p.rows.token + b * p.rows.N;
    const bool is_source = even >= p.class_token && even < evens;
    if (is_source && order < taken) {
      const int odd = mine == kNoKey ? 0 : key_index(mine);  // where none compares: the first
      p.src[b * p.R + order] = token[2 * even];
      p.dst[b * p.R + order] = token[2 * odd + 1];
    }
    if (even >= taken && even < p.R) p.src[b * p.R + even] = p.dst[b * p.R + even] = -1;
    if (p.order) {
      if (even < evens) p.order[b * half + even] = order;
      continue;
    }
    if (is_source && order >= taken) p.unmerged[b * p.U + order - taken] = token[2 * even];
    if (even >= evens - taken && even < p.U) p.unmerged[b * p.U + even] = -1;
  }
}

// Formula: unmerged[b, :] = the class token, then the even rows that are no source, ascending.
// Plan:    as above: kLanes lanes an even row count those unmerged before it.
// Grid:    (even rows / 16, images folded to 65535).
// Shared:  none.
// Traffic: 2 N bytes in, 8 U out.
// Order:   integers only.
template <typename T>
__global__ void __launch_bounds__(kOrderThreads)
    place_unmerged_kernel(const MatchBipartiteParams<T> p) {
  const int half = (p.rows.N + 1) / 2;
  const int even = blockIdx.x * kOrderRows + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t b = blockIdx.y; b < p.rows.B; b += gridDim.y) {
    const int count = p.rows.count[b], evens = (count + 1) / 2;
    const int taken = pairs_taken(p, b, count);
    const int* order = p.order + b * half;
    int before = 0;
    for (int other = lane; other < min(even, evens); other += kLanes) {
      before += other == 0 || order[other] >= taken;
    }
    before = sum_over_lanes(before);
    if (lane != 0) continue;
    if (even < evens && (even == 0 || order[even] >= taken)) {
      p.unmerged[b * p.U + before] = p.rows.token[b * p.rows.N + 2 * even];
    }
    if (even >= evens - taken && even < p.U) p.unmerged[b * p.U + even] = -1;
  }
}

template <class Tile, typename T>
cudaError_t match(const MatchBipartiteParams<T>& p, int images, cudaStream_t stream) {
  const int64_t tiles =
      ceil_div((p.rows.N + 1) / 2, Tile::kRows) * ceil_div(p.rows.N / 2, Tile::kColumns);
  if (tiles == 0) return cudaSuccess;  // a single token
  return launch(match_kernel<Tile, T>, dim3(tiles, images), dim3(Tile::kThreads),
                Tile::kSharedBytes + Tile::kRows * sizeof(Key), stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_match_bipartite(const MatchBipartiteParams<T>& p, cudaStream_t stream) {
  const int64_t half = (p.rows.N + 1) / 2;
  const int images = min(p.rows.B, kMostBlocksAcross);
  cudaError_t error = cudaMemsetAsync(p.best, 0, p.rows.B * half * sizeof(Key), stream);
  if (error != cudaSuccess) return error;

  const int64_t side = ceil_div(half, LargeTile<T>::kRows);
  error = side * side * p.rows.B >= multiprocessors() ? match<LargeTile<T>>(p, images, stream)
                                                      : match<SmallTile<T>>(p, images, stream);
  if (error != cudaSuccess) return error;

  const dim3 grid(ceil_div(half, kOrderRows), images), block(kOrderThreads);
  error = launch(order_pairs_kernel<T>, grid, block, 0, stream, p);
  if (error != cudaSuccess || p.order == nullptr) return error;
  return launch(place_unmerged_kernel<T>, grid, block, 0, stream, p);
}

template cudaError_t launch_match_bipartite(const MatchBipartiteParams<float>&, cudaStream_t);
template cudaError_t launch_match_bipartite(const MatchBipartiteParams<__half>&, cudaStream_t);
template cudaError_t launch_match_bipartite(const MatchBipartiteParams<__nv_bfloat16>&,
                                            cudaStream_t);

}  // namespace restore_ext::cuda
