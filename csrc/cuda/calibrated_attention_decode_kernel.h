// The face of decode attention: a few queries over a long cache, in a row or in pages. Known to g++
// and nvcc.
#pragma once

#include <driver_types.h>

#include <cstdint>

namespace restore_ext::cuda {

// How many queries of one key head the decode kernels are made for; more are done, 16 at a time.
constexpr int kDecodeRows = 16;

struct CacheStrides {  // in elements
  int64_t outer, h, l, d;
};

struct AxisStrides {  // of a position; g 0: the same on every axis
  int64_t outer, g;
};

template <typename T>
struct CalibratedAttentionDecodeParams {
  const T* query;                 // [B, Hq, Lq, D]
  const T* key;                   // [pages, Hkv, page, D]; a cache in a row has page b for row b
  const T* value;                 // [pages, Hkv, page, D]
  const int32_t* block_table;     // [B, max_pages] or nullptr: a cache in a row, max_pages is 1
  const int32_t* seqlens;         // [B] or nullptr: every row has all tokens of its pages
  const float* log_size;          // [pages, page] or nullptr: zeros
  const int32_t* query_position;  // [B, G, Lq] or nullptr: the index, the last is the row's last
  const int32_t* key_position;    // [pages, G, page] or nullptr with it
  const float* decay;             // [G, P] or nullptr: no distance term
  const int32_t* key_range;       // [B, Lq, 2] or nullptr: all
  T* out;                         // [B, Hq, Lq, D]
  float* lse;                     // [B, Hq, Lq], natural logarithm
  CacheStrides query_stride, key_stride, value_stride;
  AxisStrides query_axis, key_axis;
  int B, Hq, Hkv, Lq, D;
  int pages, page, max_pages;
  int G, P;  // axes of the table, distances
  bool causal;
  float softcap, scale;
  float* parts;  // DecodePlan::parts floats
  int* arrived;  // DecodePlan::units counters
};

// Follows from what the host knows, never from a length: the same in every replay of a graph.
struct DecodePlan {
  bool tensor_cores;
  int rows;       // of one unit of work: queries of one key head of one row of the batch
  int64_t units;  // of them all
  int splits;     // of the keys of a unit; one block each
  int64_t parts;  // floats in which the splits of a unit meet; 0 where there is but one split
};

template <typename T>  // float, __half or __nv_bfloat16; all of params but the workspaces
DecodePlan plan_calibrated_attention_decode(const CalibratedAttentionDecodeParams<T>& params);

// Any head size, dtype, strides and number of queries.
template <typename T>
cudaError_t launch_calibrated_attention_decode(const CalibratedAttentionDecodeParams<T>& params,
                                               const DecodePlan& plan, cudaStream_t stream);

}  // namespace restore_ext::cuda
