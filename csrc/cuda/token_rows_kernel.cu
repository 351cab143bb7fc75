#include "token_rows_kernel.h"

#include "pack.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Formula: token[b, r] = the r-th n with valid[b, n]; count[b] = how many there are.
// Plan:    one block an image; it walks its mask kThreads at a time, each thread finds its place
// from
//          a ballot in its warp and the counts of the warps before.
// Grid:    images, folded to 65535.
// Shared:  one count a warp.
// Traffic: B N bytes in, 4 B N out; latency-bound, a few microseconds at N = 32768.
// Order:   integers only.
constexpr int kCompactThreads = 1024;
constexpr int kCompactWarps = kCompactThreads / kWarp;
using WarpCounts = int[kCompactWarps];

__global__ void __launch_bounds__(kCompactThreads)
    compact_tokens_kernel(const bool* valid_of, int* token_of, int* count, int B, int N) {
  STATIC_SHARED(WarpCounts, counts);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    int* token = token_of + b * N;
    int found = 0;
    for (int first = 0; first < N; first += kCompactThreads) {
      const int n = first + threadIdx.x;
      const bool valid = n < N && valid_of[b * N + n];
      const unsigned ballot = __ballot_sync(kAllLanes, valid);
      if (lane == 0) counts[warp] = __popc(ballot);
      __syncthreads();
      int before = 0, all = 0;
      for (int w = 0; w < kCompactWarps; ++w) {
        before += w < warp ? counts[w] : 0;
        all += counts[w];
      }
      if (valid) token[found + before + __popc(ballot & ((1u << lane) - 1))] = n;
      found += all;
      __syncthreads();  // the counts are read before the next are written
    }
    for (int rank = found + threadIdx.x; rank < N; rank += kCompactThreads) token[rank] = -1;
    if (threadIdx.x == 0) count[b] = found;
  }
}

// Formula: scale[b, r] = (power, 1 / |power * x|) of row x = x[b, token[b, r]];
// token_rows_kernel.h. Plan:    one warp a row, 16 bytes a lane, a sum a vector element. Ordinary
// rows are summed as they
//          are; only where squares may leave float32's range the row is read again and scaled.
//          Without a mask the warp writes the identity for token, and no other kernel runs.
// Grid:    (rows of an image / 8, images folded to 65535).
// Shared:  none.
// Traffic: x once, 12 B N out.
// Order:   fixed, and the same whether rows are aligned or not: copies of a row get the same bits.
constexpr int kScaleThreads = 256;
constexpr int kScaleRows = kScaleThreads / kWarp;
constexpr int kOrdinary = 40;  // products of rows within 2^-40..2^40 neither overflow nor vanish

struct RowSum {
  float square;      // of power * x
  unsigned largest;  // the bits of the largest |x|; NaN and Inf are larger than all
};

template <typename T>
__device__ RowSum sum_row(const T* row, int C, float power) {
  constexpr int kVec = kWidestPack<T>;
  const bool aligned = reinterpret_cast<std::uintptr_t>(row) % 16 == 0;
  float square[kVec] = {};
  unsigned largest = 0;
  for (int c = (threadIdx.x % kWarp) * kVec; c < C; c += kWarp * kVec) {
    float x[kVec];
    if (aligned && c + kVec <= C) {
      load(x, row + c);
    } else {
#pragma unroll
      for (int v = 0; v < kVec; ++v) x[v] = c + v < C ? to_float(row[c + v]) : 0.f;
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      largest = max(largest, __float_as_uint(x[v]) & 0x7fffffffu);
      const float scaled = x[v] * power;
      square[v] = fmaf(scaled, scaled, square[v]);
    }
  }
#pragma unroll
  for (int width = kVec / 2; width > 0; width /= 2) {
#pragma unroll
    for (int v = 0; v < width; ++v) square[v] += square[v + width];
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    square[0] += __shfl_xor_sync(kAllLanes, square[0], lanes);
  }
  return {square[0], __reduce_max_sync(kAllLanes, largest)};
}

template <typename T>
__device__ UnitScale scale_of(const T* row, int C) {
  RowSum sum = sum_row(row, C, 1.f);
  if (sum.largest >= 0x7f800000u) return {1.f, __uint_as_float(0x7fc00000u)};
  if (sum.largest == 0) return {1.f, 0.f};
  float power = 1.f;
  const int exponent = static_cast<int>(sum.largest >> 23) - 127;
  if (exponent < -kOrdinary || exponent > kOrdinary) {
    // 2^-exponent, kept among the normal numbers: what is subnormal then is still above 2^-23.
    power = __uint_as_float(static_cast<unsigned>(127 - max(min(exponent, 126), -126)) << 23);
    sum = sum_row(row, C, power);
  }
  return {power, 1.f / sqrtf(sum.square)};
}

template <typename T>
__global__ void __launch_bounds__(kScaleThreads) token_rows_kernel(const TokenRows<T> p) {
  const int rank = blockIdx.x * kScaleRows + threadIdx.x / kWarp;
  const bool first_lane = threadIdx.x % kWarp == 0;
  for (int64_t b = blockIdx.y; b < p.B; b += gridDim.y) {
    if (p.valid == nullptr && rank == 0 && first_lane) p.count[b] = p.N;
    if (rank >= (p.valid ? p.count[b] : p.N)) continue;
    const int token = p.valid ? p.token[b * p.N + rank] : rank;
    const UnitScale scale = scale_of(p.x + b * p.stride_b + token * p.stride_n, p.C);
    if (first_lane) {
      p.scale[b * p.N + rank] = scale;
      if (p.valid == nullptr) p.token[b * p.N + rank] = token;
    }
  }
}

}  // namespace

template <typename T>
cudaError_t launch_token_rows(const TokenRows<T>& p, cudaStream_t stream) {
  const int images = static_cast<int>(p.B < 65535 ? p.B : 65535);
  if (p.valid) {
    const cudaError_t error = launch(compact_tokens_kernel, dim3(images), dim3(kCompactThreads), 0,
                                     stream, p.valid, p.token, p.count, p.B, p.N);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(ceil_div(p.N, kScaleRows), images);
  return launch(token_rows_kernel<T>, grid, dim3(kScaleThreads), 0, stream, p);
}

template cudaError_t launch_token_rows(const TokenRows<float>&, cudaStream_t);
template cudaError_t launch_token_rows(const TokenRows<__half>&, cudaStream_t);
template cudaError_t launch_token_rows(const TokenRows<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
