// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
// for a few queries i of any dtype, head size and strides, whose caches lie in a row or in pages.
//
// Plan     A block has one query and a share of its keys. A warp takes 32 keys at a time with a
//          running maximum and sum: for the products a lane has a key, for the sums some columns.
// Grid     (units * splits): a unit is a query of a head.
// Shared   the query; of each warp the weights and places of its 32 keys, and its sums.
// Traffic  2 * Lk * D elements of the cache a query; queries of one key head meet in the cache L2.
// Order    As in the kernel on tensor cores: the same bits every run.

#include "calibrated_attention_decode.cuh"
#include "calibrated_attention_decode_kernel.h"

namespace restore_ext::cuda {
namespace {

constexpr int kLargestHead = 256;
constexpr int kColumns = kLargestHead / 32;  // of a lane
constexpr int kTerms = 8;                    // divides every head size

struct DecodeShared {
  float query[kLargestHead];
  float sums[kDecodeWarps * row_floats(kLargestHead)];
  float weight[kDecodeWarps][32];
  Place place[kDecodeWarps][32];
};

// kTerms neighbouring elements of a row; `dense`: they can be read in widest packs.
template <typename T>
__device__ __forceinline__ void read_terms(float (&to)[kTerms], const T* row, int column,
                                           int64_t stride_d, bool dense) {
  constexpr int kVec = kWidestPack<T> < kTerms ? kWidestPack<T> : kTerms;
  if (dense) {
#pragma unroll
    for (int x = 0; x < kTerms; x += kVec) {
      load<kVec>(*reinterpret_cast<float (*)[kVec]>(to + x), row + column + x);
    }
  } else {
#pragma unroll
    for (int x = 0; x < kTerms; ++x) to[x] = to_float(row[(column + x) * stride_d]);
  }
}

// Sums of sums round less than one long sum.
template <typename T>
__device__ __forceinline__ float dot(const float* query, const T* row, int D, int64_t stride_d,
                                     bool dense) {
  float sum[kTerms] = {};
#pragma unroll 2
  for (int column = 0; column < D; column += kTerms) {
    float key[kTerms];
    read_terms(key, row, column, stride_d, dense);
#pragma unroll
    for (int x = 0; x < kTerms; ++x) sum[x] += query[column + x] * key[x];
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// out += weight * value over 32 keys; places are those of the keys, page -1 where one is not seen.
template <typename T>
__device__ __forceinline__ void add_values(const CalibratedAttentionDecodeParams<T>& p, int head,
                                           const float* weight, const Place* place, int lane,
                                           float (&out)[kColumns]) {
  float part[kColumns] = {};
#pragma unroll 4
  for (int k = 0; k < 32; ++k) {
    if (place[k].page < 0) continue;
    const T* value = row_of(p.value, p.value_stride, head, place[k]);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      const int column = lane + 32 * x;
      if (column < p.D) part[x] += weight[k] * to_float(value[column * p.value_stride.d]);
    }
  }
#pragma unroll
  for (int x = 0; x < kColumns; ++x) out[x] += part[x];
}

template <typename T>
__global__ void __launch_bounds__(kDecodeThreads, 4)
    decode_plain_kernel(const CalibratedAttentionDecodeParams<T> p, const DecodePlan plan,
                        bool dense_keys) {
  STATIC_SHARED(DecodeShared, shared);
  const DecodeWork work = decode_work(p, plan);
  if (work.split >= work.splits) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i = work.query_of(0, p.Lq), head = work.head * (p.Hq / p.Hkv) + work.row / p.Lq;
  const T* query = row_of(p.query, p.query_stride, head, {work.b, i});
  for (int d = threadIdx.x; d < p.D; d += kDecodeThreads) {
    shared.query[d] = to_float(query[d * p.query_stride.d]);
  }
  __syncthreads();

  float* weight = shared.weight[warp];
  Place* place = shared.place[warp];
  float out[kColumns] = {}, most = kNever, sum = 0.f;
  for (int first = work.keys.first + warp * 32; first < work.keys.past; first += kDecodeThreads) {
    const int j = first + lane;
    Place at = j < work.keys.past ? place_of(p, work.b, j) : Place{-1, 0};
    const float bias = log2_size(p, at);
    if (bias == kNever) at.page = -1;
    float logit = kNever;
    if (at.page >= 0) {
      const T* key = row_of(p.key, p.key_stride, work.head, at);
      const float product = dot(shared.query, key, p.D, p.key_stride.d, dense_keys);
      logit = logit_of(p, work, i, j, product, bias);
    }
    const float before = most;
    most = warp_max(fmaxf(most, logit));
    const float shift = most == kNever ? 0.f : most;  // nothing seen yet
    const float keep = exp2_approx(before - shift);
    weight[lane] = exp2_approx(logit - shift);
    place[lane] = at;
    sum = sum * keep + weight[lane];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) out[x] *= keep;
    __syncwarp();  // a lane reads the weights of all
    add_values(p, work.head, weight, place, lane, out);
    __syncwarp();  // before they are written again
  }

  sum = warp_sum(sum);
  float* own = shared.sums + warp * row_floats(p.D);
#pragma unroll
  for (int x = 0; x < kColumns; ++x) {
    if (lane + 32 * x < p.D) own[lane + 32 * x] = out[x];
  }
  if (lane == 0) own[p.D] = most, own[p.D + 1] = sum;
  __syncthreads();
  finish(p, plan, work, shared.sums);
}

}  // namespace

template <typename T>
cudaError_t launch_calibrated_attention_decode_plain(const CalibratedAttentionDecodeParams<T>& p,
                                                     const DecodePlan& plan, cudaStream_t stream) {
  const CacheStrides& stride = p.key_stride;
  const bool dense_keys = stride.d == 1 && packs(p.key, stride.outer, stride.h, stride.l);
  return launch(decode_plain_kernel<T>, dim3(plan.units * plan.splits), dim3(kDecodeThreads), 0,
                stream, p, plan, dense_keys);
}

#define INSTANTIATE(T)                                           \
  template cudaError_t launch_calibrated_attention_decode_plain( \
      const CalibratedAttentionDecodeParams<T>&, const DecodePlan&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace restore_ext::cuda
