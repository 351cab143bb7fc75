// The face of the assign_anchors kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include "token_rows_kernel.h"

namespace restore_ext::cuda {

template <typename T>
struct AssignAnchorsParams {
  TokenRows<T> rows;       // filled by launch_token_rows
  const int64_t* anchors;  // [B, K] tokens; one that is not valid is no anchor
  int* anchor_rank;        // [B, K] workspace: the anchors' ranks, -1 for none
  int* own_slot;           // [B, N] workspace: by rank, the first slot that lists it, or kNoSlot
  int* first_slot;         // [B] workspace: the first slot with an anchor, or kNoSlot
  int64_t* group;          // [B, N]
  int K;
};

constexpr int kNoSlot = 0x7fffffff;  // above every slot: a minimum finds the first

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_assign_anchors(const AssignAnchorsParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
