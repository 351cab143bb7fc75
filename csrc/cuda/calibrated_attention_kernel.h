// The faces of the attention kernels: what they take and how to launch them. Known to g++ and nvcc.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace restore_ext::cuda {

// Distances between neighbours, in elements; the last dimension is dense.
struct HeadStrides {
  int64_t b, h, l;
};

template <typename T>
struct CalibratedAttentionParams {
  const T* query;                 // [B, Hq, Lq, D]
  const T* key;                   // [B, Hkv, Lk, D]
  const T* value;                 // [B, Hkv, Lk, D]
  const float* log_size;          // [B, Lk] or nullptr: zeros
  const int32_t* query_position;  // [B, Gp, Lq] or nullptr: the index, bottom-right aligned
  const int32_t* key_position;    // [B, Gp, Lk] or nullptr with it
  const float* decay;             // [G, P] or nullptr: no distance term
  const int32_t* key_range;       // [B, Lq, 2] or nullptr: all
  T* out;                         // [B, Hq, Lq, D]
  float* lse;                     // [B, Hq, Lq], natural logarithm
  HeadStrides query_stride, key_stride, value_stride;
  int B, Hq, Hkv, Lq, Lk, D;
  int G, Gp, P;  // axes of the table, axes of a position (1: the same on every axis), distances
  bool causal;
  float softcap, scale;
};

// Any head size and dtype, one warp a query: what the others are held to, and where they end.
template <typename T>  // float, __half or __nv_bfloat16
cudaError_t launch_calibrated_attention_plain(const CalibratedAttentionParams<T>& params,
                                              cudaStream_t stream);

// Tensor cores, sm_80 and later; D is 64, 96 or 128, pointers and strides in packs of 16 bytes.
template <typename T>  // __half or __nv_bfloat16
cudaError_t launch_calibrated_attention_prefill(const CalibratedAttentionParams<T>& params,
                                                cudaStream_t stream);

// Hopper's tensor cores, compute capability 9.0 and what this says yes to: as above, nothing empty,
// no stride of 0 or below, a table that fits into shared memory.
template <typename T>  // __half or __nv_bfloat16
bool calibrated_attention_hopper_takes(const CalibratedAttentionParams<T>& params);
template <typename T>
cudaError_t launch_calibrated_attention_hopper(const CalibratedAttentionParams<T>& params,
                                               cudaStream_t stream);

}  // namespace restore_ext::cuda
