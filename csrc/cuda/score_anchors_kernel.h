// The face of the score_anchors kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include "anchor_scores_kernel.h"

namespace restore_ext::cuda {

template <typename T>
struct ScoreAnchorsParams {
  AnchorScoresParams<T> scores;
  float* score;  // [B, N]
};

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_score_anchors(const ScoreAnchorsParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
