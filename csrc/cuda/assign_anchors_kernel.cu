#include "assign_anchors_kernel.h"

#include "device.h"
#include "similarity.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y

// The rank of a token among the valid ones, -1 where it is none of them.
template <typename T>
__device__ int rank_of(const TokenRows<T>& rows, int64_t b, int64_t token) {
  if (token < 0 || token >= rows.N) return -1;
  if (rows.valid == nullptr) return static_cast<int>(token);
  const int* tokens = rows.token + b * rows.N;
  int first = 0, past = rows.count[b];
  while (first < past) {
    const int middle = first + (past - first) / 2;
    if (tokens[middle] < token) {
      first = middle + 1;
    } else {
      past = middle;
    }
  }
  return first < rows.count[b] && tokens[first] == token ? first : -1;
}

// Formula: anchor_rank[b, k] = the rank of token anchors[b, k]; own_slot[b, r] = the lowest k with
//          that rank; first_slot[b] = the lowest k with any; group[b, :] = -1 to begin with.
// Plan:    one block an image.
// Grid:    images, folded to 65535.
// Shared:  first_slot.
// Traffic: 12 N + 12 K bytes an image.
// Order:   minima over integers have none.
constexpr int kFindThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kFindThreads)
    find_anchors_kernel(const AssignAnchorsParams<T> p) {
  STATIC_SHARED(int, first_slot);
  for (int64_t b = blockIdx.x; b < p.rows.B; b += gridDim.x) {
    int* own_slot = p.own_slot + b * p.rows.N;
    for (int n = threadIdx.x; n < p.rows.N; n += kFindThreads) {
      own_slot[n] = kNoSlot;
      p.group[b * p.rows.N + n] = -1;
    }
    if (threadIdx.x == 0) first_slot = kNoSlot;
    __syncthreads();  // there is something to take the minimum with
    for (int slot = threadIdx.x; slot < p.K; slot += kFindThreads) {
      const int rank = rank_of(p.rows, b, p.anchors[b * p.K + slot]);
      p.anchor_rank[b * p.K + slot] = rank;
      if (rank < 0) continue;
      atomicMin(&own_slot[rank], slot);
      atomicMin(&first_slot, slot);
    }
    __syncthreads();  // all slots are seen; and thread 0 reads before it begins anew
    if (threadIdx.x == 0) p.first_slot[b] = first_slot;
  }
}

// The columns of a tile: the anchors from slot `first` on.
struct AnchorLines {
  const int* rank;         // [K] of one image
  const int* token;        // [N]
  const UnitScale* scale;  // [N]
  int first, K;

  __device__ __forceinline__ TileLine operator()(int j) const {
    const int at = first + j < K ? rank[first + j] : -1;
    return at < 0 ? no_line() : TileLine{token[at], scale[at]};
  }
};

// Formula: group[b, i] = own_slot of token i if it is an anchor, else the lowest k that has
//          max over k of cos(x_i, x_anchors[b, k]); first_slot where none compares.
// Plan:    a block has kRows tokens and goes through all anchors, a tile of cosines at a time
//          (similarity.cuh); row maxima in registers, then in shared memory. No block needs
//          another.
// Grid:    (tiles of rows, images folded to 65535).
// Shared:  the tile's buffers; a key a row.
// Traffic: x once and the anchors once a block, from L2; 2 N K C flops an image: K = 64 is bound by
//          memory, K = 512 by the tensor cores.
// Order:   each cosine is one sum in a fixed order, and a maximum over keys has none.
template <class Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    assign_kernel(const AssignAnchorsParams<T> p) {
  DYNAMIC_SHARED(shared);
  Key* best = reinterpret_cast<Key*>(shared + Tile::kSharedBytes);  // [kRows]
  const TokenRows<T>& x = p.rows;
  const int first_row = blockIdx.x * Tile::kRows;

  for (int64_t b = blockIdx.y; b < x.B; b += gridDim.y) {
    const int count = x.count[b], first_slot = p.first_slot[b];
    if (first_row >= count || first_slot == kNoSlot) continue;
    for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) best[i] = kNoKey;

    const int* token = x.token + b * x.N;
    const UnitScale* scale = x.scale + b * x.N;
    for (int first = 0; first < p.K; first += Tile::kColumns) {
      Tile tile;
      tile.run(shared, x.x + b * x.stride_b, x.stride_n, x.C,
               RankLines{token, scale, first_row, 1, count},
               AnchorLines{p.anchor_rank + b * p.K, token, scale, first, p.K});
      tile.row_max(
          [&](int i, float cosine, int j) { atomicMax(&best[i], key_of(cosine, first + j)); });
    }
    __syncthreads();  // all warps have put their part of a row
    for (int i = threadIdx.x; i < min(Tile::kRows, count - first_row); i += Tile::kThreads) {
      const int own = p.own_slot[b * x.N + first_row + i];
      const int nearest = best[i] == kNoKey ? first_slot : key_index(best[i]);
      p.group[b * x.N + token[first_row + i]] = own == kNoSlot ? nearest : own;
    }
  }
}

template <class Tile, typename T>
cudaError_t assign(const AssignAnchorsParams<T>& p, int images, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.rows.N, Tile::kRows), images);
  return launch(assign_kernel<Tile, T>, grid, dim3(Tile::kThreads),
                Tile::kSharedBytes + Tile::kRows * sizeof(Key), stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_assign_anchors(const AssignAnchorsParams<T>& p, cudaStream_t stream) {
  const int images = min(p.rows.B, kMostBlocksAcross);
  const cudaError_t error =
      launch(find_anchors_kernel<T>, dim3(images), dim3(kFindThreads), 0, stream, p);
  if (error != cudaSuccess || p.K == 0) return error;
  const int64_t large_tiles = ceil_div(p.rows.N, LargeTile<T>::kRows) * p.rows.B;
  return large_tiles >= multiprocessors() ? assign<LargeTile<T>>(p, images, stream)
                                          : assign<SmallTile<T>>(p, images, stream);
}

template cudaError_t launch_assign_anchors(const AssignAnchorsParams<float>&, cudaStream_t);
template cudaError_t launch_assign_anchors(const AssignAnchorsParams<__half>&, cudaStream_t);
template cudaError_t launch_assign_anchors(const AssignAnchorsParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
