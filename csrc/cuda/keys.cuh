// A value and an index in 64 bits that compare as one: the larger value is the larger key, of equal
// values (-0 and 0 are) the lower index. A maximum over keys is the same in any order, so atomicMax
// gives the same bits every run.
#pragma once

#include "launch.cuh"

namespace restore_ext::cuda {

using Key = unsigned long long;  // what atomicMax takes

// Below every key of a value: nothing was found.
constexpr Key kNoKey = 0;

// Unsigned integers in the order of the floats; NaN is 0, below -inf.
__device__ __forceinline__ uint32_t ordered(float value) {
  if (value != value) return 0;
  const uint32_t bits = __float_as_uint(value + 0.f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What was ordered; of 0 a NaN.
__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ Key key_of(uint32_t ordered_value, int index) {
  return static_cast<Key>(ordered_value) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ Key key_of(float value, int index) {
  return key_of(ordered(value), index);
}

__device__ __forceinline__ uint32_t key_ordered(Key key) {
  return static_cast<uint32_t>(key >> 32);
}

__device__ __forceinline__ float key_value(Key key) { return from_ordered(key_ordered(key)); }

__device__ __forceinline__ int key_index(Key key) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}

__device__ __forceinline__ Key larger(Key a, Key b) { return a > b ? a : b; }

}  // namespace restore_ext::cuda
