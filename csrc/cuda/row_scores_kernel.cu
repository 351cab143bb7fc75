#include "row_scores_kernel.h"

#include <algorithm>
#include <type_traits>

#include "attention_keys.cuh"
#include "device.h"
#include "pack.cuh"
#include "ptx.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kThreads = 128, kWarps = 4, kLanes = 32;
constexpr int kRows = 16;                  // of a tile: queries of one key head, head by head
constexpr int kWarpRows = kRows / kWarps;  // of a warp, once the products are there
constexpr int kMostSplits = 64, kBlocksPerMultiprocessor = 4;
constexpr int kLeastKeys = 128;  // of a row split: what is worth a block

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

// Formula: sums[b, h, r] = max_k logit[k], sum_k exp(logit[k] - max), of a share of the keys.
// Plan:    a block has 16 rows of a key head, those of all heads that share it one after the other,
//          and walks their keys 64 (float32: 32) at a time. The four warps multiply by mma.sync (16
//          bits) or fmaf, then a warp has 4 rows, a lane a key of each 32, with sums of its own
//          that meet at the end.
// Grid:    (tiles of rows * row_splits). Where rows are few their keys are split.
// Shared:  a tile of queries, one of keys, their products.
// Traffic: queries once; the keys of a head once for each 16 of its rows, from L2 but the first
//          time; 8 bytes a row and split out.
// Order:   keys in order, lanes by a tree: the same bits every run.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    row_sums_kernel(const RowScoresParams<T> p, const RowScoresPlan plan) {
  DYNAMIC_SHARED(bytes);
  const CalibratedAttentionParams<T>& a = p.attention;
  const Tiles<T> tiles(bytes, a.D);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int heads = static_cast<int>(plan.row_tiles / a.B), per_head = heads / a.Hkv;
  const int unit = blockIdx.x / plan.row_splits, split = blockIdx.x % plan.row_splits;
  const int b = unit / heads, key_head = unit % heads / per_head, tile = unit % per_head;

  // The counters of the next kernel, which starts when all of this one is over.
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       plan.key_splits > 1 && i < plan.key_tiles; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    p.arrived[i] = 0;
  }
  if (threadIdx.x < kRows) tiles.row[threadIdx.x] = row_of(p, b, key_head, tile, threadIdx.x);
  __syncthreads();
  const KeyRange hull = hull_of(tiles.row, {0, a.Lk});
  const int share =
      static_cast<int>(ceil_div(ceil_div(hull.past - hull.first, plan.row_splits), kKeys<T>)) *
      kKeys<T>;
  const int begin = min(hull.first + split * share, hull.past);
  const int end = min(begin + share, hull.past);
  load_queries(p, tiles, b, {begin, end});

  float most[kWarpRows], sum[kWarpRows] = {};
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) most[r] = kNever;
  for (int first = begin; first < end; first += kKeys<T>) {
    __syncthreads();  // all are done with the tile before
    load_keys(p, tiles, b, key_head, first, end);
    float size[kOwn<T>], x[kWarpRows][kOwn<T>];
    load_sizes(p, b, first, end, size);
    __syncthreads();
    multiply(tiles, a.D, x);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Row& row = tiles.row[warp * kWarpRows + r];
      float larger = most[r];
#pragma unroll
      for (int k = 0; k < kOwn<T>; ++k) {
        finish_logit(p, b, row, first + k * kLanes + lane, size[k], x[r][k]);
        larger = fmaxf(larger, x[r][k]);
      }
      const float shift = larger == kNever ? 0.f : larger;  // nothing seen yet
      sum[r] *= expf(most[r] - shift);
      most[r] = larger;
#pragma unroll
      for (int k = 0; k < kOwn<T>; ++k) sum[r] += expf(x[r][k] - shift);
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    float larger = most[r];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, lanes));
    }
    float all = sum[r] * expf(most[r] - (larger == kNever ? 0.f : larger));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(~0u, all, lanes);
    const int line = warp * kWarpRows + r;
    if (lane != 0 || tile * kRows + line >= a.Hq / a.Hkv * a.Lq) continue;
    const Row& row = tiles.row[line];
    const int64_t at = (static_cast<int64_t>(b) * a.Hq + row.head) * a.Lq + row.r;
    p.sums[at * plan.row_splits + split] = {larger, all};
  }
}

// What a logit of the row counts for, from the sums of its splits in their order.
template <typename T>
__device__ __forceinline__ void share_row(const RowScoresParams<T>& p, int splits, int64_t b,
                                          Row& row) {
  const CalibratedAttentionParams<T>& a = p.attention;
  if (row.seen.first >= row.seen.past) return;
  const RowSums* own = p.sums + ((b * a.Hq + row.head) * a.Lq + row.r) * splits;
  float most = kNever, sum = 0.f;
  for (int n = 0; n < splits; ++n) most = fmaxf(most, own[n].max);
  row.max = most == kNever ? 0.f : most;
  for (int n = 0; n < splits; ++n) sum += own[n].sum * expf(own[n].max - row.max);
  row.factor = sum == 0.f ? 0.f : weight_of(p, b, row.r) / (sum * static_cast<float>(a.Hq));
}

// Formula: score[b, k] = sum over h, r of factor[h, r] * exp(logit[h, r, k] - max[h, r]).
// Plan:    a block has a tile of keys and walks a share of the tiles of rows, as above: the warps
//          multiply, then a lane adds up its keys over 4 rows of the tile. Tiles of rows that see
//          none of the keys are passed over. The last of the blocks that share a tile of keys adds
//          what all have left.
// Grid:    (tiles of keys * key_splits).
// Shared:  as above, and at the end the sums of the four warps.
// Traffic: keys once a split; the queries once for each 64 (float32: 32) keys, from L2.
// Order:   tiles in order, then warps, then splits; long sums carry what they round away: the same
//          bits every run.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    column_scores_kernel(const RowScoresParams<T> p, const RowScoresPlan plan) {
  DYNAMIC_SHARED(bytes);
  STATIC_SHARED(bool, is_last);
  const CalibratedAttentionParams<T>& a = p.attention;
  const Tiles<T> tiles(bytes, a.D);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int unit = blockIdx.x / plan.key_splits, split = blockIdx.x % plan.key_splits;
  const int per_image = static_cast<int>(plan.key_tiles / a.B);
  const int b = unit / per_image, first = unit % per_image * kKeys<T>;
  const KeyRange keys{first, min(first + kKeys<T>, a.Lk)};
  const int steps = static_cast<int>(plan.row_tiles / a.B), per_head = steps / a.Hkv;
  const int share = static_cast<int>(ceil_div(steps, plan.key_splits));

  float size[kOwn<T>], total[kOwn<T>] = {}, lost[kOwn<T>] = {};
  load_sizes(p, b, first, keys.past, size);
  int loaded = -1;  // of which head the keys are there
  for (int step = split * share; step < min((split + 1) * share, steps); ++step) {
    const int key_head = step / per_head;
    __syncthreads();  // all are done with the tile before
    if (threadIdx.x < kRows) {
      Row row = row_of(p, b, key_head, step % per_head, threadIdx.x);
      share_row(p, plan.row_splits, b, row);
      if (row.factor == 0.f) row.seen = {0, 0};
      tiles.row[threadIdx.x] = row;
    }
    __syncthreads();
    const KeyRange hull = hull_of(tiles.row, keys);
    if (hull.first >= hull.past) continue;
    if (loaded != key_head) load_keys(p, tiles, b, key_head, first, keys.past);
    loaded = key_head;
    load_queries(p, tiles, b, keys);
    __syncthreads();
    float x[kWarpRows][kOwn<T>];
    multiply(tiles, a.D, x);
#pragma unroll
    for (int k = 0; k < kOwn<T>; ++k) {
      float part = -lost[k];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const Row& row = tiles.row[warp * kWarpRows + r];
        const bool seen = finish_logit(p, b, row, first + k * kLanes + lane, size[k], x[r][k]);
        // A row of NaN gives nothing to what it does not see.
        part += seen ? row.factor * expf(x[r][k] - row.max) : 0.f;
      }
      const float sum = total[k] + part;
      lost[k] = (sum - total[k]) - part;
      total[k] = sum;
    }
  }

  __syncthreads();
  float* warps = reinterpret_cast<float*>(bytes);  // [kWarps, kKeys], where the queries were
#pragma unroll
  for (int k = 0; k < kOwn<T>; ++k) warps[warp * kKeys<T> + k * kLanes + lane] = total[k];
  __syncthreads();
  const bool has_key = threadIdx.x < kKeys<T> && first + static_cast<int>(threadIdx.x) < a.Lk;
  const int64_t j = first + threadIdx.x, image = static_cast<int64_t>(b) * a.Lk;
  if (has_key) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warps[w * kKeys<T> + threadIdx.x];
    if (plan.key_splits == 1) {
      p.score[image + j] = sum;
    } else {
      p.parts[image * plan.key_splits + static_cast<int64_t>(split) * a.Lk + j] = sum;
    }
  }
  if (plan.key_splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block leaves is seen by whoever sees its arrival
    is_last = atomicAdd(p.arrived + unit, 1) == plan.key_splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || !has_key) return;
  float sum = 0.f;
  for (int n = 0; n < plan.key_splits; ++n) {
    sum += p.parts[image * plan.key_splits + static_cast<int64_t>(n) * a.Lk + j];
  }
  p.score[image + j] = sum;
}

}  // namespace

template <typename T>
RowScoresPlan plan_row_scores(const RowScoresParams<T>& p) {
  const CalibratedAttentionParams<T>& a = p.attention;
  const int64_t heads = a.Hkv * ceil_div(a.Hq / a.Hkv * static_cast<int64_t>(a.Lq), kRows);
  RowScoresPlan plan{};
  plan.row_tiles = a.B * heads;
  plan.key_tiles = a.B * ceil_div(a.Lk, kKeys<T>);
  if (plan.row_tiles == 0 || plan.key_tiles == 0) return plan;
  // A few blocks for every multiprocessor, if there is work for so many.
  const int64_t blocks = static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessors();
  const auto splits = [&](int64_t units, int64_t most) {
    const int64_t wanted = std::min(blocks / units, int64_t{kMostSplits});
    return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
  };
  plan.row_splits = splits(plan.row_tiles, ceil_div(a.Lk, kLeastKeys));
  plan.key_splits = splits(plan.key_tiles, heads);
  plan.sums = static_cast<int64_t>(a.B) * a.Hq * a.Lq * plan.row_splits;
  plan.parts = plan.key_splits > 1 ? static_cast<int64_t>(a.B) * a.Lk * plan.key_splits : 0;
  return plan;
}

template <typename T>
cudaError_t launch_row_scores(const RowScoresParams<T>& p, const RowScoresPlan& plan,
                              cudaStream_t stream) {
  const CalibratedAttentionParams<T>& a = p.attention;
  if (plan.row_tiles == 0) {  // no rows: nobody sees anything
    return cudaMemsetAsync(p.score, 0, sizeof(float) * a.B * a.Lk, stream);
  }
  const size_t shared = Tiles<T>::bytes(a.D);
  const dim3 rows(static_cast<unsigned>(plan.row_tiles * plan.row_splits));
  const cudaError_t error =
      launch(row_sums_kernel<T>, rows, dim3(kThreads), shared, stream, p, plan);
  if (error != cudaSuccess) return error;
  const dim3 columns(static_cast<unsigned>(plan.key_tiles * plan.key_splits));
  return launch(column_scores_kernel<T>, columns, dim3(kThreads), shared, stream, p, plan);
}

#define INSTANTIATE(T)                                                                    \
  template RowScoresPlan plan_row_scores(const RowScoresParams<T>&);                      \
  template cudaError_t launch_row_scores(const RowScoresParams<T>&, const RowScoresPlan&, \
                                         cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace restore_ext::cuda
