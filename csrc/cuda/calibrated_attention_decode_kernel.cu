// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
// for a few queries i, whose key heads' caches lie in a row or in pages.
//
// Plan     Decoding reads the cache once and has no time for anything else. The queries of all the
//          heads that share a key head are the 16 rows of one tensor core tile, so that a key is
//          read once for all. A warp takes 16 keys at a time by a pipeline of its own, with a
//          running maximum and sum; warps meet at the end, in shared memory, blocks in a workspace.
// Grid     (units * splits): a unit is a key head of a row of the batch and 16 of its queries.
// Shared   of each warp two stages of 16 keys and values; then the sums of the four warps.
// Traffic  2 * Lk * Hkv * D elements of the cache a row, and splits * rows * D floats, twice.
// Order    A split's keys follow from the sizes, the length and the ranges, splits are added in
//          their order by the last block to arrive: the same bits every run.

#include "calibrated_attention_decode_kernel.h"

#include <algorithm>
#include <type_traits>

#include "calibrated_attention_decode.cuh"
#include "device.h"

namespace restore_ext::cuda {
namespace {

constexpr int kKeys = 16;   // of a warp's step
constexpr int kStages = 2;  // of a warp's pipeline
constexpr int kStride = kKeys * kDecodeWarps;
constexpr int kMostSplits = 64;

// [kKeys, kPitch]: an odd number of 16-byte packs a row, so that ldmatrix meets no bank twice.
template <typename T, int D>
struct Stage {
  static constexpr int kPitch = D + 8;
  T key[kKeys * kPitch], value[kKeys * kPitch];
  float log2_size[kKeys];
  float pad[16];  // to a multiple of 128 bytes
};
static_assert(sizeof(Stage<__half, 96>) % 128 == 0);

// A lane copies a quarter of the packs of two keys, lane / 4 and 8 more.
struct Ahead {
  Place at[2];
  float log2_size[2];
};

template <typename T>
__device__ Ahead look_ahead(const CalibratedAttentionDecodeParams<T>& p, const DecodeWork& work,
                            int first, int lane) {
  Ahead ahead;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int j = first + lane / 4 + 8 * x;
    ahead.at[x] = j < work.keys.past ? place_of(p, work.b, j) : Place{-1, 0};
    ahead.log2_size[x] = log2_size(p, ahead.at[x]);
  }
  return ahead;
}

// What is not seen becomes zeros: its weight is 0, and 0 * NaN is not.
template <typename T, int D>
__device__ void copy_keys(const CalibratedAttentionDecodeParams<T>& p, int head, const Ahead& ahead,
                          int lane, Stage<T, D>& stage) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const bool seen = ahead.log2_size[x] != kNever;
    const Place at = seen ? ahead.at[x] : Place{0, 0};
    const T* key = row_of(p.key, p.key_stride, head, at);
    const T* value = row_of(p.value, p.value_stride, head, at);
    const int row = (lane / 4 + 8 * x) * Stage<T, D>::kPitch;
#pragma unroll
    for (int column = lane % 4 * 8; column < D; column += 32) {
      cp_async_16(stage.key + row + column, key + column, seen);
      cp_async_16(stage.value + row + column, value + column, seen);
    }
    if (lane % 4 == 0) stage.log2_size[lane / 4 + 8 * x] = ahead.log2_size[x];
  }
  cp_async_commit();
}

__device__ __forceinline__ uint32_t pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ __forceinline__ uint32_t pair(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// What a lane holds of the rows lane / 4 and 8 more, in the layout of the tensor core's operands.
template <int D>
struct Rows {
  uint32_t query[D / 16][4];
  float out[D / 8][4] = {};
  float most[2] = {kNever, kNever}, sum[2] = {0.f, 0.f};
  Range seen[2];
  int query_index[2];
};

template <typename T, int D>
__device__ void load_queries(const CalibratedAttentionDecodeParams<T>& p, const DecodeWork& work,
                             int lane, Rows<D>& rows) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int r = lane / 4 + 8 * x;
    const bool any = r < work.rows;
    const int i = rows.query_index[x] = any ? work.query_of(r, p.Lq) : 0;
    rows.seen[x] = any ? visible(p, work.b, i, work.length) : Range{0, 0};
    const int head = work.head * (p.Hq / p.Hkv) + (work.row + r) / p.Lq;
    const T* query = row_of(p.query, p.query_stride, any ? head : 0, {any ? work.b : 0, i});
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* two =
            reinterpret_cast<const uint32_t*>(query + k * 16 + half * 8 + lane % 4 * 2);
        rows.query[k][x + 2 * half] = any ? *two : 0;
      }
    }
  }
}

// Adds the 16 keys of a stage, the first of which is `first`.
template <typename T, int D>
__device__ void add_keys(const CalibratedAttentionDecodeParams<T>& p, const DecodeWork& work,
                         const Stage<T, D>& stage, int first, int lane, Rows<D>& rows) {
  constexpr int kPitch = Stage<T, D>::kPitch;
  const int tile = lane / 8, tile_row = lane % 8;  // whose address this lane gives to ldmatrix
  float logit[2][4] = {}, other[2][4] = {};        // [8 keys each][row, pair of keys]
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t key[4];
    ldmatrix_x4(key, stage.key + (tile / 2 * 8 + tile_row) * kPitch + k * 16 + tile % 2 * 8);
    auto& sums = k % 2 ? other : logit;  // two short sums: less to wait for, less to round
    mma_m16n8k16<T>(sums[0], rows.query[k], key[0], key[1]);
    mma_m16n8k16<T>(sums[1], rows.query[k], key[2], key[3]);
  }

  float most[2] = {rows.most[0], rows.most[1]};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int x = e / 2, column = n * 8 + lane % 4 * 2 + e % 2, j = first + column;
      const bool seen = j >= rows.seen[x].first && j < rows.seen[x].past;
      const float bias = seen ? stage.log2_size[column] : kNever;
      const float product = logit[n][e] + other[n][e];
      logit[n][e] = logit_of(p, work, rows.query_index[x], j, product, bias);
      most[x] = fmaxf(most[x], logit[n][e]);
    }
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {  // four lanes share a row
    most[x] = fmaxf(most[x], __shfl_xor_sync(0xffffffffu, most[x], 1));
    most[x] = fmaxf(most[x], __shfl_xor_sync(0xffffffffu, most[x], 2));
    const float shift = most[x] == kNever ? 0.f : most[x];  // nothing seen yet
    const float keep = exp2_approx(rows.most[x] - shift);
    rows.most[x] = most[x];
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 2 * x; e < 2 * x + 2; ++e) sum += logit[n][e] = exp2_approx(logit[n][e] - shift);
    }
    rows.sum[x] = rows.sum[x] * keep + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) rows.out[n][2 * x] *= keep, rows.out[n][2 * x + 1] *= keep;
  }

  const uint32_t weight[4] = {
      pair(logit[0][0], logit[0][1], T{}), pair(logit[0][2], logit[0][3], T{}),
      pair(logit[1][0], logit[1][1], T{}), pair(logit[1][2], logit[1][3], T{})};
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t value[4];
    ldmatrix_x4_trans(value,
                      stage.value + (tile % 2 * 8 + tile_row) * kPitch + k * 16 + tile / 2 * 8);
    mma_m16n8k16<T>(rows.out[2 * k], weight, value[0], value[1]);
    mma_m16n8k16<T>(rows.out[2 * k + 1], weight, value[2], value[3]);
  }
}

template <int D>
__device__ void leave_sums(const DecodeWork& work, const Rows<D>& rows, int lane, float* tile) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    float sum = rows.sum[x];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int r = lane / 4 + 8 * x;
    if (r >= work.rows) continue;
    float* own = tile + r * row_floats(D);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float two[2] = {rows.out[n][2 * x], rows.out[n][2 * x + 1]};
      store<2>(own + n * 8 + lane % 4 * 2, two);
    }
    if (lane % 4 == 0) own[D] = rows.most[x], own[D + 1] = sum;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const CalibratedAttentionDecodeParams<T> p, const DecodePlan plan) {
  DYNAMIC_SHARED(shared);
  const DecodeWork work = decode_work(p, plan);
  if (work.split >= work.splits) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* stages = reinterpret_cast<Stage<T, D>*>(shared) + warp * kStages;
  Rows<D> rows;
  load_queries(p, work, lane, rows);

  int first = work.keys.first + warp * kKeys;
  copy_keys(p, work.head, look_ahead(p, work, first, lane), lane, stages[0]);
  // Read a step before they are needed: a copy cannot start before its place is known.
  Ahead ahead = look_ahead(p, work, first + kStride, lane);
  for (int step = 0; first < work.keys.past; ++step, first += kStride) {
    copy_keys(p, work.head, ahead, lane, stages[(step + 1) % kStages]);
    ahead = look_ahead(p, work, first + 2 * kStride, lane);
    cp_async_wait<1>();
    __syncwarp();  // the copies of the other lanes
    add_keys(p, work, stages[step % kStages], first, lane, rows);
    __syncwarp();  // before the stage is written again
  }

  cp_async_wait<0>();
  __syncthreads();  // the sums lie where the stages were
  auto* warps = reinterpret_cast<float*>(shared);
  leave_sums(work, rows, lane, warps + warp * kDecodeRows * row_floats(D));
  __syncthreads();
  finish(p, plan, work, warps);
}

template <typename T, int D>
cudaError_t run(const CalibratedAttentionDecodeParams<T>& p, const DecodePlan& plan,
                cudaStream_t stream) {
  constexpr size_t kPipeline = sizeof(Stage<T, D>) * kStages * kDecodeWarps;
  constexpr size_t kSums = sizeof(float) * kDecodeWarps * kDecodeRows * row_floats(D);
  return launch(decode_kernel<T, D>, dim3(plan.units * plan.splits), dim3(kDecodeThreads),
                kPipeline > kSums ? kPipeline : kSums, stream, p, plan);
}

template <typename T>
bool by_tensor_cores(const CalibratedAttentionDecodeParams<T>& p) {
  if (std::is_same_v<T, float> || (p.D != 64 && p.D != 96 && p.D != 128)) return false;
  const auto in_packs = [](const T* data, const CacheStrides& stride) {
    return stride.d == 1 && packs(data, stride.outer, stride.h, stride.l);
  };
  return in_packs(p.query, p.query_stride) && in_packs(p.key, p.key_stride) &&
         in_packs(p.value, p.value_stride);
}

}  // namespace

template <typename T>
DecodePlan plan_calibrated_attention_decode(const CalibratedAttentionDecodeParams<T>& p) {
  DecodePlan plan{};
  plan.tensor_cores = by_tensor_cores(p);
  plan.rows = plan.tensor_cores ? kDecodeRows : 1;
  plan.units = static_cast<int64_t>(p.B) * p.Hkv * ceil_div(p.Hq / p.Hkv * p.Lq, plan.rows);
  if (plan.units == 0) return plan;
  // Two blocks for every multiprocessor, if there are keys for so many.
  const int64_t wanted = 2 * multiprocessors() / plan.units;
  const int64_t most = ceil_div(static_cast<int64_t>(p.max_pages) * p.page, kDecodeLeastKeys);
  plan.splits = std::max<int64_t>(std::min({wanted, most, int64_t{kMostSplits}}), 1);
  if (plan.splits > 1) plan.parts = plan.units * plan.splits * plan.rows * row_floats(p.D);
  return plan;
}

template <typename T>
cudaError_t launch_calibrated_attention_decode(const CalibratedAttentionDecodeParams<T>& p,
                                               const DecodePlan& plan, cudaStream_t stream) {
  if (plan.units == 0) return cudaSuccess;
  if (plan.splits > 1) {
    const cudaError_t error = cudaMemsetAsync(p.arrived, 0, plan.units * sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (plan.tensor_cores) {
      return p.D == 64   ? run<T, 64>(p, plan, stream)
             : p.D == 96 ? run<T, 96>(p, plan, stream)
                         : run<T, 128>(p, plan, stream);
    }
  }
  return launch_calibrated_attention_decode_plain(p, plan, stream);
}

#define INSTANTIATE(T)                                                                             \
  template DecodePlan plan_calibrated_attention_decode(const CalibratedAttentionDecodeParams<T>&); \
  template cudaError_t launch_calibrated_attention_decode(                                         \
      const CalibratedAttentionDecodeParams<T>&, const DecodePlan&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace restore_ext::cuda
