#include "select_anchors_kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "anchor_scores.cuh"
#include "top_k.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

using WarpCounts = int[2][kWarps];

// Formula: anchors[b, :] = the tokens of the `take` highest scores, ascending, then -1; of equal
//          scores the lowest tokens.
// Plan:    one block an image. Scores become integers that order alike; top_k finds the last one
//          taken; then a walk in ascending order places every token that is taken behind those
//          before it, counted by ballots. So no sort is needed.
// Grid:    images.
// Shared:  counts. The keys take the place of `nearest`, and the block reads them from L1.
// Traffic: 12 N bytes in, 8 K out; latency-bound.
// Order:   counts of integers alone: the same for any number of threads.
template <typename T>
__global__ void __launch_bounds__(kThreads) select_anchors_kernel(const SelectAnchorsParams<T> p) {
  STATIC_SHARED(WarpCounts, counts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x, first_rank = b * p.scores.rows.N;
  const int count = p.scores.rows.count[b], wanted = p.budget ? p.budget[b] : p.K;
  const int take = max(min(wanted, min(p.K, count)), 0);
  int64_t* anchors = p.anchors + b * p.K;
  for (int i = take + threadIdx.x; i < p.K; i += kThreads) anchors[i] = -1;
  if (take == 0) return;

  uint32_t* keys = p.scores.nearest + first_rank;
  for (int r = threadIdx.x; r < count; r += kThreads) {
    keys[r] = ordered(anchor_score(p.scores.density[first_rank + r], keys[r]));
  }
  __syncthreads();
  const TopK top = top_k(keys, count, take);

  int placed = 0, equal_seen = 0, buffer = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int r = first + threadIdx.x;
    const bool above = r < count && keys[r] > top.least, equal = r < count && keys[r] == top.least;
    const unsigned lower = (1u << lane) - 1;
    const unsigned aboves = __ballot_sync(kAllLanes, above);
    const unsigned equals = __ballot_sync(kAllLanes, equal);
    // Two counts in one number; and two buffers, so that one barrier is enough.
    if (lane == 0) counts[buffer][warp] = __popc(aboves) | __popc(equals) << 16;
    __syncthreads();
    const int of_warp = counts[buffer][lane];
    const int all = __reduce_add_sync(kAllLanes, of_warp);
    const int before = __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
    buffer ^= 1;

    const int equal_before = equal_seen + (before >> 16) + __popc(equals & lower);
    if (above || (equal && equal_before < top.equal)) {
      const int above_before = placed + (before & 0xffff) + __popc(aboves & lower);
      anchors[above_before + min(equal_before, top.equal)] = p.scores.rows.token[first_rank + r];
    }
    placed += all & 0xffff;
    equal_seen += all >> 16;
  }
}

}  // namespace

template <typename T>
cudaError_t launch_select_anchors(const SelectAnchorsParams<T>& p, cudaStream_t stream) {
  const cudaError_t error = launch_anchor_scores(p.scores, stream);
  if (error != cudaSuccess) return error;
  return launch(select_anchors_kernel<T>, dim3(p.scores.rows.B), dim3(kThreads), 0, stream, p);
}

template cudaError_t launch_select_anchors(const SelectAnchorsParams<float>&, cudaStream_t);
template cudaError_t launch_select_anchors(const SelectAnchorsParams<__half>&, cudaStream_t);
template cudaError_t launch_select_anchors(const SelectAnchorsParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
