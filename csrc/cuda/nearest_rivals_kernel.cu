#include "nearest_rivals_kernel.h"

#include "device.h"
#include "similarity.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y
constexpr unsigned kAllLanes = 0xffffffffu;

// Where a tile lies in the matrix of cosines of one image.
struct Corner {
  int row, column;
};

// The matrix is symmetric: a tile wholly below the diagonal says what its mirror says.
template <class Tile>
__device__ __forceinline__ bool computed(Corner tile) {
  return tile.column + Tile::kColumns > tile.row;
}

// A cosine goes to both its places, unless this tile or another computed writes the second one.
template <class Tile>
__device__ __forceinline__ void keep(const Tile& tile, Corner at, float* cosines, int count,
                                     int64_t stride) {
  static_assert(Tile::kColumns % Tile::kRows == 0);  // so tiles on the diagonal mirror each other
  const bool on_diagonal = at.column <= at.row;
#pragma unroll
  for (int r = 0; r < Tile::kOwnRows; ++r) {
    const int i = at.row + tile.row(r);
    if (i >= count) continue;
    float* row = cosines + i * stride;
#pragma unroll
    for (int c = 0; c < Tile::kOwnColumns; ++c) {
      const int j = at.column + tile.column(c);
      if (j < stride) row[j] = tile.cosine(r, c);
    }
  }
#pragma unroll
  for (int c = 0; c < Tile::kOwnColumns; ++c) {
    const int j = at.column + tile.column(c);
    if (on_diagonal || j >= count) continue;
    float* row = cosines + j * stride;
#pragma unroll
    for (int r = 0; r < Tile::kOwnRows; ++r) row[at.row + tile.row(r)] = tile.cosine(r, c);
  }
}

// Leaves in best[line], of every line of the tile, `ordered` of its largest cosine with a rival: a
// line of more weight, or with all_others every line but itself, which stands at row - diagonal.
template <class Tile>
__device__ __forceinline__ void put_best(const Tile& tile, const float* weight, unsigned* best,
                                         bool all_others, int diagonal) {
  float column_weight[Tile::kOwnColumns], column_best[Tile::kOwnColumns];
#pragma unroll
  for (int c = 0; c < Tile::kOwnColumns; ++c) {
    column_weight[c] = weight[Tile::kRows + tile.column(c)];
    column_best[c] = -INFINITY;
  }
#pragma unroll
  for (int r = 0; r < Tile::kOwnRows; ++r) {
    const float row_weight = weight[tile.row(r)];
    float row_best = -INFINITY;
#pragma unroll
    for (int c = 0; c < Tile::kOwnColumns; ++c) {
      const float cosine = tile.cosine(r, c);  // NaN, over the edge, is no maximum
      const bool other = tile.row(r) - tile.column(c) != diagonal;
      if (all_others ? other : column_weight[c] > row_weight) row_best = fmaxf(row_best, cosine);
      if (all_others ? other : row_weight > column_weight[c]) {
        column_best[c] = fmaxf(column_best[c], cosine);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < Tile::kRowLanes; lanes *= 2) {
      row_best = fmaxf(row_best, __shfl_xor_sync(kAllLanes, row_best, lanes));
    }
    if (threadIdx.x % Tile::kRowLanes == 0 && row_best > -INFINITY) {
      atomicMax(&best[tile.row(r)], ordered(row_best));
    }
  }
#pragma unroll
  for (int c = 0; c < Tile::kOwnColumns; ++c) {
#pragma unroll
    for (int lanes = Tile::kRowLanes; lanes < 32; lanes *= 2) {
      column_best[c] = fmaxf(column_best[c], __shfl_xor_sync(kAllLanes, column_best[c], lanes));
    }
    if (threadIdx.x % 32 < Tile::kRowLanes && column_best[c] > -INFINITY) {
      atomicMax(&best[Tile::kRows + tile.column(c)], ordered(column_best[c]));
    }
  }
}

// Formula: nearest[b, i] = max over the rivals j of i of cos(x_i, x_j): the j with density_j >
//          density_i, or <, or all but i. The maximum goes in as an integer that orders alike.
// Plan:    one tile of cosines a block (similarity.cuh), only those on and above the diagonal: a
//          pair is looked at once, for the one of the two whose rival the other is. Row maxima in
//          registers and by shuffles, column maxima likewise, then both in shared memory, then one
//          atomicMax a line. Pairs near the diagonal come twice: to a maximum it is all the same.
// Grid:    (tiles of the N x N matrix, images folded to 65535). Blocks below the diagonal, and
//          beyond the last valid token, return at once.
// Shared:  the tile's buffers, and after the cosines in their place a maximum for each line; a
//          weight for each line. Just within the 99 KiB that the smallest devices have.
// Traffic: x once from memory if L2 holds it; N^2 C flops an image, so tensor-bound from N ~ 2000.
//          No N x N matrix, unless `cosines` asks for it: 4 N^2 bytes then.
// Order:   each cosine is one sum in a fixed order, and a maximum has none.
template <class Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    nearest_rivals_kernel(const NearestRivalsParams<T> p) {
  static_assert(Tile::kLines <= Tile::kThreads);
  DYNAMIC_SHARED(shared);
  unsigned* best = reinterpret_cast<unsigned*>(shared);                   // [kLines]
  float* weight = reinterpret_cast<float*>(shared + Tile::kSharedBytes);  // [kLines]
  const TokenRows<T>& x = p.rows;
  const TilePlace place =
      tile_place(blockIdx.x, ceil_div(x.N, Tile::kRows), ceil_div(x.N, Tile::kColumns));
  const Corner at{place.row * Tile::kRows, place.column * Tile::kColumns};
  if (!computed<Tile>(at)) return;
  const int line = threadIdx.x;
  const int rank = line < Tile::kRows ? at.row + line : at.column + line - Tile::kRows;

  for (int64_t b = blockIdx.y; b < x.B; b += gridDim.y) {
    const int count = x.count[b];
    if (at.row >= count || at.column >= count) continue;
    const bool has_token = line < Tile::kLines && rank < count;
    if (line < Tile::kLines) {
      const float density = p.density && has_token ? p.density[b * x.N + rank] : 0.f;
      weight[line] = p.denser ? density : -density;  // NaN outweighs nothing
    }
    const int* token = x.token + b * x.N;
    const UnitScale* scale = x.scale + b * x.N;
    Tile tile;
    tile.run(shared, x.x + b * x.stride_b, x.stride_n, x.C,
             RankLines{token, scale, at.row, 1, count},
             RankLines{token, scale, at.column, 1, count});
    if (p.cosines) {
      keep(tile, at, p.cosines + b * x.N * p.cosine_stride, count, p.cosine_stride);
    }
    __syncthreads();  // all are done with the tile's buffers
    if (line < Tile::kLines) best[line] = 0;
    __syncthreads();
    put_best(tile, weight, best, p.density == nullptr, at.column - at.row);
    __syncthreads();  // all warps have put their part
    if (has_token && best[line] > 0) atomicMax(&p.nearest[b * x.N + rank], best[line]);
  }
}

template <class Tile, typename T>
cudaError_t find(const NearestRivalsParams<T>& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.rows.N, Tile::kRows) * ceil_div(p.rows.N, Tile::kColumns);
  const dim3 grid(tiles, min(p.rows.B, kMostBlocksAcross));
  constexpr size_t shared = Tile::kSharedBytes + Tile::kLines * sizeof(float);
  static_assert(shared <= 99 << 10);
  return launch(nearest_rivals_kernel<Tile, T>, grid, dim3(Tile::kThreads), shared, stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_nearest_rivals(const NearestRivalsParams<T>& p, cudaStream_t stream) {
  const size_t bytes = sizeof(uint32_t) * p.rows.B * p.rows.N;
  const cudaError_t error = cudaMemsetAsync(p.nearest, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  const int64_t side = ceil_div(p.rows.N, LargeTile<T>::kRows);
  return side * (side + 1) / 2 * p.rows.B >= multiprocessors() ? find<LargeTile<T>>(p, stream)
                                                               : find<SmallTile<T>>(p, stream);
}

template cudaError_t launch_nearest_rivals(const NearestRivalsParams<float>&, cudaStream_t);
template cudaError_t launch_nearest_rivals(const NearestRivalsParams<__half>&, cudaStream_t);
template cudaError_t launch_nearest_rivals(const NearestRivalsParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
