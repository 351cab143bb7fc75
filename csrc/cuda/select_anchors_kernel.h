// The face of the select_anchors kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include "anchor_scores_kernel.h"

namespace restore_ext::cuda {

template <typename T>
struct SelectAnchorsParams {
  AnchorScoresParams<T> scores;  // nearest is overwritten
  const int* budget;             // [B] or nullptr: K
  int64_t* anchors;              // [B, K]
  int K;
};

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_select_anchors(const SelectAnchorsParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
