// Which keys a query sees and how far they are, by index: the words of calibrated_attention that
// all its kernels may use.
#pragma once

#include "calibrated_attention_kernel.h"
#include "launch.cuh"

namespace restore_ext::cuda {

constexpr float kNever = -INFINITY;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

struct KeyRange {
  int first, past;
};

template <typename T>
__device__ __forceinline__ KeyRange visible(const CalibratedAttentionParams<T>& p, int64_t b,
                                            int i) {
  KeyRange range{0, p.Lk};
  if (p.causal) range.past = min(range.past, i + p.Lk - p.Lq + 1);
  if (p.key_range != nullptr) {
    const int32_t* own = p.key_range + (b * p.Lq + i) * 2;
    range = {max(range.first, own[0]), min(range.past, own[1])};
  }
  return range.first < range.past ? range : KeyRange{0, 0};
}

template <typename T>
__device__ __forceinline__ int query_position(const CalibratedAttentionParams<T>& p, int64_t b,
                                              int g, int i) {
  return p.query_position ? p.query_position[(b * p.Gp + g) * p.Lq + i] : i + p.Lk - p.Lq;
}

template <typename T>
__device__ __forceinline__ int key_position(const CalibratedAttentionParams<T>& p, int64_t b, int g,
                                            int j) {
  return p.key_position ? p.key_position[(b * p.Gp + g) * p.Lk + j] : j;
}

// Unsigned: two int32 may be 2^31 and more apart.
__device__ __forceinline__ uint32_t distance(int a, int b) {
  return static_cast<uint32_t>(max(a, b)) - static_cast<uint32_t>(min(a, b));
}

// The sum of decay over the axes, for a query and a key by index.
template <typename T>
__device__ __forceinline__ float decay_between(const CalibratedAttentionParams<T>& p, int64_t b,
                                               int i, int j) {
  float rho = 0.f;
  for (int g = 0; g < p.G; ++g) {
    const int axis = g < p.Gp ? g : 0;
    const uint32_t d = distance(query_position(p, b, axis, i), key_position(p, b, axis, j));
    rho += p.decay[static_cast<int64_t>(g) * p.P + min(d, static_cast<uint32_t>(p.P - 1))];
  }
  return rho;
}

}  // namespace restore_ext::cuda
