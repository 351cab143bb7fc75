// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     A warp owns a query and walks the keys it sees, 32 at a time: a lane has one key for the
//          logits, and channels lane, lane + 32, ... for the values. All in float32, each term as
//          the reference has it: the kernel that the faster ones are held to, and that takes what
//          they do not.
// Grid     [B * Hq * ceil(Lq / 4)], a warp for each of 4 neighbouring queries.
// Shared   The query and 32 weights of every warp.
// Traffic  q, out, lse once; k, v and what belongs to a key once a query, from L1 and L2.
// Order    From the first key a query sees to its last, short sums into long ones: the same bits
//          every run, wherever the keys begin.

#include "attention_keys.cuh"
#include "pack.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kWarps = 4, kMaxD = 256, kLanes = 32;

struct PlainShared {
  float query[kWarps][kMaxD];
  float weight[kWarps][kLanes];
};

// In eight short sums: one long chain of additions would lose what short rows show.
template <typename T>
__device__ __forceinline__ float dot(const float* query, const T* key, int D) {
  constexpr int kVec = kWidestPack<T>;
  float sum[8] = {};
  for (int d = 0; d < D; d += 8) {
#pragma unroll
    for (int part = 0; part < 8; part += kVec) {
      float k[kVec];
      load(k, key + d + part);
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[part + v] = fmaf(query[d + part + v], k[v], sum[part + v]);
    }
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// The logit of key j, -inf where it is padding: then nothing else of it is read.
template <typename T>
__device__ __forceinline__ float logit(const CalibratedAttentionParams<T>& p, int64_t b, int i,
                                       int j, const float* query, const T* key) {
  float bias = p.log_size ? p.log_size[b * p.Lk + j] : 0.f;
  if (bias == kNever) return kNever;
  if (p.decay) bias += logf(2.f - decay_between(p, b, i, j));
  if (bias == kNever) return kNever;
  float x = dot(query, key, p.D) * p.scale;
  if (p.softcap > 0) x = p.softcap * tanhf(x / p.softcap);
  return x + bias;
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes)
    calibrated_attention_plain_kernel(const CalibratedAttentionParams<T> p) {
  STATIC_SHARED(PlainShared, shared);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tiles = ceil_div(p.Lq, kWarps);
  const int i = static_cast<int>(blockIdx.x % tiles) * kWarps + warp;
  const int head = blockIdx.x / tiles % p.Hq;
  const int64_t b = blockIdx.x / tiles / p.Hq;
  if (i >= p.Lq) return;
  const int64_t key_head = head / (p.Hq / p.Hkv);
  const T* q = p.query + b * p.query_stride.b + head * p.query_stride.h + i * p.query_stride.l;
  const T* k = p.key + b * p.key_stride.b + key_head * p.key_stride.h;
  const T* v = p.value + b * p.value_stride.b + key_head * p.value_stride.h;
  float* query = shared.query[warp];
  float* weights = shared.weight[warp];
  for (int d = lane; d < p.D; d += kLanes) query[d] = to_float(q[d]);
  __syncwarp();

  const KeyRange seen = visible(p, b, i);
  float most = kNever, sum = 0.f, o[kMaxD / kLanes] = {};
  for (int first = seen.first; first < seen.past; first += kLanes) {
    const int j = first + lane;
    const float x = j < seen.past ? logit(p, b, i, j, query, k + j * p.key_stride.l) : kNever;
    float larger = fmaxf(most, x);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, lanes));
    }
    const float shift = larger == kNever ? 0.f : larger;  // nothing seen yet
    const float weight = expf(x - shift), keep = expf(most - shift);
    sum = sum * keep + weight;
    most = larger;
    weights[lane] = weight;
    // Padding alone has a weight of -inf's: its value, which may be NaN, is passed over.
    const unsigned read = __ballot_sync(~0u, x != kNever);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kMaxD / kLanes; ++c) {
      const int d = c * kLanes + lane;
      if (d >= p.D) break;
      float part = 0.f;
      for (unsigned left = read; left != 0; left &= left - 1) {
        const int at = __ffs(left) - 1;
        part = fmaf(weights[at], to_float(v[(first + at) * p.value_stride.l + d]), part);
      }
      o[c] = fmaf(o[c], keep, part);
    }
    __syncwarp();  // before the weights are written again
  }

#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  const int64_t row = (b * p.Hq + head) * p.Lq + i;
#pragma unroll
  for (int c = 0; c < kMaxD / kLanes; ++c) {
    const int d = c * kLanes + lane;
    if (d < p.D) p.out[row * p.D + d] = from_float<T>(sum == 0.f ? 0.f : o[c] / sum);
  }
  if (lane == 0) p.lse[row] = sum == 0.f ? kNever : most + logf(sum);
}

}  // namespace

template <typename T>
cudaError_t launch_calibrated_attention_plain(const CalibratedAttentionParams<T>& p,
                                              cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.Lq, kWarps) * p.Hq * p.B;
  return launch(calibrated_attention_plain_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kWarps * kLanes), 0, stream, p);
}

template cudaError_t launch_calibrated_attention_plain(const CalibratedAttentionParams<float>&,
                                                       cudaStream_t);
template cudaError_t launch_calibrated_attention_plain(const CalibratedAttentionParams<__half>&,
                                                       cudaStream_t);
template cudaError_t launch_calibrated_attention_plain(
    const CalibratedAttentionParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
