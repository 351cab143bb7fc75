// What one block of calibrated_attention on Hopper is made of: its sizes, its shared memory, and
// how a tile of products becomes weights. The kernel that moves the tiles is in
// calibrated_attention_hopper_kernel.cu.
#pragma once

#include "attention_keys.cuh"
#include "hopper.cuh"
#include "pack.cuh"

namespace restore_ext::cuda::hopper {

constexpr int kStages = 2;
constexpr int kMirrored = 1024;  // distances below 0 that the table covers, where there are so many

struct Maps {
  CUtensorMap query, key, value;
};

// kGroups warpgroups of 64 queries each, and one that brings them keys and values.
template <int kD, int kGroups>
struct Tile {
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kGroups == 1 ? 64 : 128;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kColumns = kD % 64 == 0 ? 64 : 32;  // in a swizzled box; 96 is 3 of 32
  static constexpr int kQueryBytes = kRows * kD * 2, kKeyBytes = kKeys * kD * 2;
};

// What the consumers must know of a tile of keys beside the keys.
struct TileNote {
  int lowest, highest;          // position, if there is one axis
  int contiguous, has_padding;  // bool: positions ascend by 1; some log_size is -inf
};

// Dynamic shared memory. Tiles first, as swizzling needs them aligned to 1024 bytes.
template <typename P, int kD, int kGroups>
struct Shared {
  using Sizes = Tile<kD, kGroups>;
  unsigned char* base;
  int axes, P_, margin;

  __host__ __device__ Shared(unsigned char* base, const P& p)
      : base(base), axes(p.Gp), P_(p.decay ? p.P : 0), margin(P_ < kMirrored ? P_ : kMirrored) {
    margin += Sizes::kKeys;
  }

  __host__ __device__ unsigned char* query() const { return base; }
  __host__ __device__ unsigned char* key(int stage) const {
    return base + Sizes::kQueryBytes + stage * Sizes::kKeyBytes;
  }
  __host__ __device__ unsigned char* value(int stage) const { return key(kStages + stage); }
  __host__ __device__ uint64_t* barriers() const {  // room for 16
    return reinterpret_cast<uint64_t*>(key(2 * kStages));
  }
  __host__ __device__ TileNote* note(int stage) const {
    return reinterpret_cast<TileNote*>(barriers() + 16) + stage;
  }
  __host__ __device__ int* hull() const {  // [12 warps, 2]
    return reinterpret_cast<int*>(note(kStages));
  }
  __host__ __device__ float* log_size(int stage) const {  // [kKeys], base 2
    return reinterpret_cast<float*>(hull() + 24) + stage * Sizes::kKeys;
  }
  __host__ __device__ int* key_position(int stage) const {  // [axes, kKeys]
    return reinterpret_cast<int*>(log_size(kStages)) + stage * axes * Sizes::kKeys;
  }
  __host__ __device__ int* query_position() const {
    return key_position(kStages);
  }  // [axes, kRows]
  // One axis: log2(2 - decay) at distance d is table()[d], for d from -margin to P - 1 + kKeys.
  // More: decay as it is, [axes, P].
  __host__ __device__ float* table() const {
    float* first = reinterpret_cast<float*>(query_position() + axes * Sizes::kRows);
    return axes == 1 ? first + margin : first;
  }
  __host__ __device__ unsigned char* end() const {
    return reinterpret_cast<unsigned char*>(
        P_ == 0 ? table() : table() + (axes == 1 ? P_ + Sizes::kKeys : axes * P_));
  }
};

// The two rows of a thread.
struct Rows {
  KeyRange seen[2];
  int position[2];  // if there is one axis
  float max[2] = {kNever, kNever}, sum[2] = {0.f, 0.f};
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __floats2half2_rn(low, high);
    memcpy(&bits, &two, 4);
  } else {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &two, 4);
  }
  return bits;
}

// x, products q.k of a tile, becomes softcap(scale * x) + log_size, in base 2. Registers 4i to
// 4i + 3 are columns 8i + 2 lane % 4 [+ 1] of the thread's first row, then of its second.
template <int kCount, typename P>
__device__ __forceinline__ void scale_and_size(float (&x)[kCount], const P& p,
                                               const float* log_size) {
  float factor = p.scale * kLog2e;
  if (p.softcap > 0) {
    factor *= 2.f / p.softcap;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // tanh, to an absolute error of some 1e-7
      x[i] = 1.f - __fdividef(2.f, 1.f + exp2_approx(x[i] * factor));
    }
    factor = p.softcap * kLog2e;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float2 size = *reinterpret_cast<const float2*>(log_size + 2 * i);
    x[i] = fmaf(x[i], factor, size.x), x[i + 1] = fmaf(x[i + 1], factor, size.y);
    x[i + 2] = fmaf(x[i + 2], factor, size.x), x[i + 3] = fmaf(x[i + 3], factor, size.y);
  }
}

// What a sum of decays adds to a logit, in base 2.
__device__ __forceinline__ float bias_of_decay(float rho) { return __log2f(2.f - rho); }

// Adds log2(2 - decay) where that takes no clamp, which the whole warp must agree on; else false.
// Where columns ascend by 1 the table itself is the row of the bias matrix, read backwards; where
// all distances lie in the table, it takes one subtraction to find them.
template <int kCount>
__device__ __forceinline__ bool add_distance(float (&x)[kCount], const Rows& rows,
                                             const TileNote& note, const int* key_position,
                                             const float* table, int margin, int P) {
  constexpr int kKeys = 2 * kCount;
  const int64_t low = min(rows.position[0], rows.position[1]);
  const int64_t high = max(rows.position[0], rows.position[1]);
  const bool covered = low - note.highest >= -margin;
  const bool near = covered && high - note.lowest < P + kKeys;
  if (note.contiguous && __all_sync(~0u, covered)) {
    const float* at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // past the table it goes on with its last entry
      const int64_t distance = static_cast<int64_t>(rows.position[r]) - note.lowest;
      const int64_t most = P + kKeys - 1;
      at[r] = table + static_cast<int>(min(distance, most)) - threadIdx.x % 4 * 2;
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      x[i] += at[0][-2 * i], x[i + 1] += at[0][-2 * i - 1];
      x[i + 2] += at[1][-2 * i], x[i + 3] += at[1][-2 * i - 1];
    }
    return true;
  }
  if (!__all_sync(~0u, near)) return false;
  const float *first = table + rows.position[0], *second = table + rows.position[1];
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const int2 at = *reinterpret_cast<const int2*>(key_position + 2 * i);
    x[i] += first[-at.x], x[i + 1] += first[-at.y];
    x[i + 2] += second[-at.x], x[i + 3] += second[-at.y];
  }
  return true;
}

// The same for any distances and any number of axes.
template <int kKeys, int kRows, int kCount>
__device__ __forceinline__ void add_distances(float (&x)[kCount], int axes,
                                              const int* query_position, const int* key_position,
                                              const float* table, int P) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float rho[4] = {};
#pragma unroll 1
    for (int g = 0; g < axes; ++g) {
      const int2 at_key = *reinterpret_cast<const int2*>(key_position + g * kKeys + 2 * i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = query_position[g * kRows + (k >> 1) * 8], to = k & 1 ? at_key.y : at_key.x;
        rho[k] += table[g * P + min(distance(at, to), static_cast<uint32_t>(P - 1))];
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) x[i + k] += axes == 1 ? rho[k] : bias_of_decay(rho[k]);
  }
}

// -inf where a row does not see a column, and under padding, whatever was there.
template <int kCount>
__device__ __forceinline__ void mask(float (&x)[kCount], const Rows& rows, int first_key,
                                     const TileNote& note, const float* log_size) {
  const int column = first_key + threadIdx.x % 4 * 2;
  const bool all = rows.seen[0].first <= first_key && rows.seen[1].first <= first_key &&
                   rows.seen[0].past >= first_key + 2 * kCount &&
                   rows.seen[1].past >= first_key + 2 * kCount;
  if (!__all_sync(~0u, all)) {
    // Unsigned: one comparison for both ends.
    const uint32_t from[2] = {static_cast<uint32_t>(column - rows.seen[0].first),
                              static_cast<uint32_t>(column - rows.seen[1].first)};
    const uint32_t count[2] = {static_cast<uint32_t>(rows.seen[0].past - rows.seen[0].first),
                               static_cast<uint32_t>(rows.seen[1].past - rows.seen[1].first)};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = i >> 1 & 1;
      if (from[r] + 2 * (i & ~3) + (i & 1) >= count[r]) x[i] = kNever;
    }
  }
  if (note.has_padding) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (log_size[2 * (i & ~3) + (i & 1)] == kNever) x[i] = kNever;
    }
  }
}

// Logits in base 2 become exp2(logit - max), float32; `keep` is what the rows' sums so far shrink
// by. Every thread sums its own columns: the four of a row meet at the end.
template <int kCount>
__device__ __forceinline__ void weigh(float (&x)[kCount], Rows& rows, float (&keep)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = rows.max[r];
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) most = fmaxf(most, fmaxf(x[i], x[i + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float shift = most == kNever ? 0.f : most;  // nothing seen yet
    keep[r] = exp2_approx(rows.max[r] - shift);
    rows.max[r] = most;
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) {
      even += x[i] = exp2_approx(x[i] - shift);
      odd += x[i + 1] = exp2_approx(x[i + 1] - shift);
    }
    rows.sum[r] = rows.sum[r] * keep[r] + (even + odd);
  }
}

// Stores the thread's two rows. Four threads hold a row, two columns of every eight each: they swap
// until each has eight neighbours of a 32, one 16-byte store.
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(const float (&o)[kCount], const float (&factor)[2],
                                           T* const (&to)[2], const bool (&valid)[2]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < kCount; i += 16) {  // 32 columns
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = i + 4 * k + 2 * r;
        word[k] = pack<T>(o[at] * factor[r], o[at + 1] * factor[r]);
      }
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t got = __shfl_xor_sync(~0u, odd ? word[k] : word[k + 1], 1);
        (odd ? word[k] : word[k + 1]) = got;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t got = __shfl_xor_sync(~0u, upper ? word[k] : word[k + 2], 2);
        (upper ? word[k] : word[k + 2]) = got;
      }
      if (valid[r]) {
        const uint4 eight = make_uint4(word[0], word[1], word[2], word[3]);
        *reinterpret_cast<uint4*>(to[r] + 2 * i + threadIdx.x % 4 * 8) = eight;
      }
    }
  }
}

}  // namespace restore_ext::cuda::hopper
