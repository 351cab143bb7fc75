// What both passes of row_scores are written in: tiles of 16 rows and 64 keys (float32: 32) in
// shared memory, their products, and what becomes of a product. A block has four warps.
#pragma once

#include <type_traits>

#include "attention_keys.cuh"
#include "pack.cuh"
#include "ptx.cuh"
#include "row_scores_kernel.h"

namespace restore_ext::cuda {

constexpr int kThreads = 128, kWarps = 4, kLanes = 32;
constexpr int kRows = 16;                  // of a tile: queries of one key head, head by head
constexpr int kWarpRows = kRows / kWarps;  // of a warp, once the products are there

template <typename T>
constexpr bool kOnTensorCores = !std::is_same_v<T, float>;
template <typename T>
constexpr int kKeys = kOnTensorCores<T> ? 64 : 32;  // of a tile
template <typename T>
constexpr int kOwn = kKeys<T> / kLanes;           // of a lane, 32 apart
constexpr int kProductPitch = kKeys<__half> + 8;  // rows of an mma's result meet no bank twice

// A tile's lines: an odd number of 16-byte packs, so that neither ldmatrix nor lanes that read
// neighbouring lines meet a bank twice. The tensor cores take channels by 16.
template <typename T>
__host__ __device__ constexpr int channels_of(int D) {
  return kOnTensorCores<T> ? (D + 15) / 16 * 16 : D;
}
template <typename T>
__host__ __device__ constexpr int pitch_of(int D) {
  return channels_of<T>(D) + kWidestPack<T>;
}

struct Row {
  int head, r;
  KeyRange seen;
  float max, factor;  // a logit counts for factor * exp(logit - max)
};

template <typename T>
struct Tiles {
  T *query, *key;  // [kRows, pitch], [kKeys, pitch]
  float* product;  // [kRows, kProductPitch], of the tensor cores
  Row* row;        // [kRows]
  int pitch;

  static __host__ __device__ constexpr size_t elements(int D) {
    return static_cast<size_t>(kRows + kKeys<T>) * pitch_of<T>(D);
  }
  static __host__ __device__ constexpr int products() {
    return kOnTensorCores<T> ? kRows * kProductPitch : 0;
  }
  static size_t bytes(int D) {
    return elements(D) * sizeof(T) + products() * sizeof(float) + kRows * sizeof(Row);
  }
  __device__ __forceinline__ Tiles(unsigned char* bytes, int D)
      : query(reinterpret_cast<T*>(bytes)),
        key(query + kRows * pitch_of<T>(D)),
        product(reinterpret_cast<float*>(query + elements(D))),
        row(reinterpret_cast<Row*>(product + products())),
        pitch(pitch_of<T>(D)) {}
};

// Lines of D elements, from(line) on; zeros where that is nullptr, and behind D.
template <typename T, class From>
__device__ __forceinline__ void load_lines(T* to, int pitch, int lines, int D, const From& from) {
  constexpr int kVec = kWidestPack<T>;
  const int packs = channels_of<T>(D) / kVec;
#pragma unroll 4
  for (int i = threadIdx.x; i < lines * packs; i += kThreads) {
    const int line = i / packs, c = i % packs * kVec;
    const T* row = from(line);
    Pack<T, kVec> pack;
#pragma unroll
    for (int v = 0; v < kVec; ++v) pack.at[v] = from_float<T>(0.f);
    if (row != nullptr && c < D) pack = pack_at<kVec>(row + c);
    *reinterpret_cast<Pack<T, kVec>*>(to + line * pitch + c) = pack;
  }
}

template <typename T>
__device__ __forceinline__ float weight_of(const RowScoresParams<T>& p, int64_t b, int r) {
  return p.weight ? p.weight[b * p.attention.Lq + r] : 1.f / static_cast<float>(p.attention.Lq);
}

// Which query line `line` of a tile of rows is. Of weight 0, or past the last, it sees nothing.
template <typename T>
__device__ __forceinline__ Row row_of(const RowScoresParams<T>& p, int64_t b, int key_head,
                                      int tile, int line) {
  const CalibratedAttentionParams<T>& a = p.attention;
  const int repeat = a.Hq / a.Hkv, n = tile * kRows + line;
  Row row{key_head * repeat, 0, {0, 0}, 0.f, 0.f};
  if (n >= repeat * a.Lq) return row;
  row.head += n / a.Lq;
  row.r = n % a.Lq;
  if (weight_of(p, b, row.r) != 0.f) row.seen = visible(a, b, row.r);
  return row;
}

// What the tile's rows see of some keys, from the first to the last. The same in every thread.
__device__ __forceinline__ KeyRange hull_of(const Row* row, KeyRange keys) {
  KeyRange own = row[threadIdx.x % kRows].seen;
  own = {max(own.first, keys.first), min(own.past, keys.past)};
  const bool any = own.first < own.past;
  const int first = __reduce_min_sync(~0u, any ? own.first : INT32_MAX);
  const int past = __reduce_max_sync(~0u, any ? own.past : 0);
  return first < past ? KeyRange{first, past} : KeyRange{0, 0};
}

// The queries that see one of the keys; the others are not read.
template <typename T>
__device__ __forceinline__ void load_queries(const RowScoresParams<T>& p, const Tiles<T>& tiles,
                                             int64_t b, KeyRange keys) {
  const HeadStrides& stride = p.attention.query_stride;
  load_lines(tiles.query, tiles.pitch, kRows, p.attention.D, [&](int line) -> const T* {
    const Row& row = tiles.row[line];
    if (max(row.seen.first, keys.first) >= min(row.seen.past, keys.past)) return nullptr;
    return p.attention.query + b * stride.b + row.head * stride.h + row.r * stride.l;
  });
}

// Keys `first` to `past` of a tile; padding is not read.
template <typename T>
__device__ __forceinline__ void load_keys(const RowScoresParams<T>& p, const Tiles<T>& tiles,
                                          int64_t b, int key_head, int first, int past) {
  const CalibratedAttentionParams<T>& a = p.attention;
  load_lines(tiles.key, tiles.pitch, kKeys<T>, a.D, [&](int line) -> const T* {
    const int j = first + line;
    if (j >= past || (a.log_size && a.log_size[b * a.Lk + j] == kNever)) return nullptr;
    return a.key + b * a.key_stride.b + key_head * a.key_stride.h + j * a.key_stride.l;
  });
}

// The lane's own keys of a tile: log_size, -inf past the end.
template <typename T>
__device__ __forceinline__ void load_sizes(const RowScoresParams<T>& p, int64_t b, int first,
                                           int past, float (&size)[kOwn<T>]) {
  const CalibratedAttentionParams<T>& a = p.attention;
#pragma unroll
  for (int k = 0; k < kOwn<T>; ++k) {
    const int j = first + k * kLanes + static_cast<int>(threadIdx.x % kLanes);
    size[k] = j >= past ? kNever : a.log_size ? a.log_size[b * a.Lk + j] : 0.f;
  }
}

// The products of the warp's rows with the lane's keys, in short sums: one long chain of additions
// would lose what short rows show. All threads call it.
template <typename T>
__device__ __forceinline__ void multiply(const Tiles<T>& tiles, int D,
                                         float (&x)[kWarpRows][kOwn<T>]) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, pitch = tiles.pitch;
  if constexpr (kOnTensorCores<T>) {
    const int tile = lane / 8, tile_row = lane % 8;  // whose address this lane gives to ldmatrix
    const T* query = tiles.query + lane % 16 * pitch + lane / 16 * 8;
    const T* key =
        tiles.key + (warp * 16 + tile / 2 * 8 + tile_row) * pitch + tile % 2 * 8;  // 16 a warp
    float even[2][4] = {}, odd[2][4] = {};
    for (int c = 0; c < D; c += 32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (c + 16 * half >= D) break;
        uint32_t q[4], k[4];
        ldmatrix_x4(q, query + c + 16 * half);
        ldmatrix_x4(k, key + c + 16 * half);
        auto& sum = half ? odd : even;
        mma_m16n8k16<T>(sum[0], q, k[0], k[1]);
        mma_m16n8k16<T>(sum[1], q, k[2], k[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float two[2] = {even[n][e] + odd[n][e], even[n][e + 1] + odd[n][e + 1]};
        const int row = lane / 4 + 4 * e, column = warp * 16 + n * 8 + lane % 4 * 2;
        store<2>(tiles.product + row * kProductPitch + column, two);
      }
    }
    __syncthreads();  // a row's products come from all warps
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
      for (int k = 0; k < kOwn<T>; ++k) {
        x[r][k] = tiles.product[(warp * kWarpRows + r) * kProductPitch + k * kLanes + lane];
      }
    }
  } else {
    constexpr int kTerms = 8;  // divides every head size
    float sum[kWarpRows][kTerms] = {};
#pragma unroll 1  // for the sake of registers
    for (int c = 0; c < D; c += kTerms) {
      float key[kTerms], query[kTerms];
#pragma unroll
      for (int t = 0; t < kTerms; t += 4) {
        load<4>(*reinterpret_cast<float (*)[4]>(key + t), tiles.key + lane * pitch + c + t);
      }
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const float* own = tiles.query + (warp * kWarpRows + r) * pitch + c;
#pragma unroll
        for (int t = 0; t < kTerms; t += 4) {
          load<4>(*reinterpret_cast<float (*)[4]>(query + t), own + t);
        }
#pragma unroll
        for (int t = 0; t < kTerms; ++t) sum[r][t] = fmaf(query[t], key[t], sum[r][t]);
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const float (&s)[kTerms] = sum[r];
      x[r][0] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    }
  }
}

// A product becomes a logit; -inf where the row does not see the key. False there, too.
template <typename T>
__device__ __forceinline__ bool finish_logit(const RowScoresParams<T>& p, int64_t b, const Row& row,
                                             int j, float size, float& x) {
  const CalibratedAttentionParams<T>& a = p.attention;
  float bias = j >= row.seen.first && j < row.seen.past ? size : kNever;
  if (bias != kNever && a.decay) bias += logf(2.f - decay_between(a, b, row.r, j));
  x *= a.scale;
  if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
  x = bias == kNever ? kNever : x + bias;
  return bias != kNever;
}

}  // namespace restore_ext::cuda
