// The face of the merge_tokens kernels: what they take and how to launch them. Known to g++ and
// nvcc.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace restore_ext::cuda {

constexpr int kMergeChunk = 64;  // members that one block sums; a longer group has several chunks

struct MergeGroups {
  const int64_t* group;  // [B, N], an id outside [0, M) leaves its token out
  int* first;   // [B, M + 1], workspace: group m is member[first[m]] ... [first[m + 1] - 1]
  int* member;  // [B, N], workspace: tokens, group after group, ascending in each
  int B, N, M;
};

template <typename T>
struct MergeTokensParams {
  const T* x;                      // [B, N, C], the last dimension dense
  int64_t x_stride_b, x_stride_n;  // in elements
  const float* size;               // [B, N] or nullptr: ones
  const int64_t* position;         // [B, N] or nullptr: the index
  float* partial;                  // [B, 2, ceil(N / kMergeChunk), C], workspace: sums of chunks
  T* merged;                       // [B, M, C]
  float* merged_size;              // [B, M]
  int64_t* merged_position;        // [B, M]
  int C;
  MergeGroups groups;
};

// Fills the workspaces of `groups`.
cudaError_t launch_list_members(const MergeGroups& groups, cudaStream_t stream);

template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_merge_tokens(const MergeTokensParams<T>& params, cudaStream_t stream);

}  // namespace restore_ext::cuda
