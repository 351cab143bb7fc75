#include "score_anchors_kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "anchor_scores.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kMostBlocksAcross = 65535;  // of a grid in y
constexpr int kThreads = 256;

// Formula: score[b, n] = density * (1 - nearest) for the valid token n, -inf for the others.
// Plan:    a thread has token n, which it marks if it is not valid, and rank n, whose score it
//          writes to wherever that token is: of the two one writes each place.
// Grid:    (N / 256, images folded to 65535).
// Shared:  none.
// Traffic: 13 N bytes in, 4 N out; latency-bound.
// Order:   no sums.
template <typename T>
__global__ void __launch_bounds__(kThreads) score_anchors_kernel(const ScoreAnchorsParams<T> p) {
  const TokenRows<T>& x = p.scores.rows;
  const int n = blockIdx.x * kThreads + threadIdx.x;
  for (int64_t b = blockIdx.y; b < x.B; b += gridDim.y) {
    const int64_t at = b * x.N + n;
    if (n < x.N && x.valid && !x.valid[at]) p.score[at] = -INFINITY;
    if (n >= x.count[b]) continue;
    p.score[b * x.N + x.token[at]] = anchor_score(p.scores.density[at], p.scores.nearest[at]);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_score_anchors(const ScoreAnchorsParams<T>& p, cudaStream_t stream) {
  const cudaError_t error = launch_anchor_scores(p.scores, stream);
  if (error != cudaSuccess) return error;
  const TokenRows<T>& x = p.scores.rows;
  const dim3 grid(ceil_div(x.N, kThreads), min(x.B, kMostBlocksAcross));
  return launch(score_anchors_kernel<T>, grid, dim3(kThreads), 0, stream, p);
}

template cudaError_t launch_score_anchors(const ScoreAnchorsParams<float>&, cudaStream_t);
template cudaError_t launch_score_anchors(const ScoreAnchorsParams<__half>&, cudaStream_t);
template cudaError_t launch_score_anchors(const ScoreAnchorsParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
