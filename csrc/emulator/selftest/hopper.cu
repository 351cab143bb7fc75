// Raw views of what Hopper's instructions do, for python_tests/emulator/test_wgmma.py: registers
// and shared memory go out as they lie, and numpy, which knows the layouts on its own, makes sense
// of them.
#include "../../cuda/hopper.cuh"

namespace restore_ext::cuda {
namespace {

struct WgmmaTest {
  const uint32_t* a_registers;  // [steps, 128, 4] or nullptr: A by the tensor map
  float* d;                     // [128, N / 2]: in and out
  unsigned char* b_shared;      // the tile of B as it lies in shared memory
  int steps, accumulate;        // products of 16 along K
};

// B is [N, K] (K-major) or [K, N] in boxes of kColumns columns.
template <typename T, int kN, int kTransposeB, int kColumns>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const __grid_constant__ CUtensorMap a_map,
                 const __grid_constant__ CUtensorMap b_map, const WgmmaTest p) {
#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DYNAMIC_SHARED(shared);
  const int K = 16 * p.steps, t = threadIdx.x;
  const int b_rows = kTransposeB ? K : kN, b_columns = kTransposeB ? kN : K;
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  unsigned char* a = shared + 1024;
  unsigned char* b = a + 64 * K * 2;
  if (t == 0) {
    mbar_init(full, 1);
    fence_mbar_init();
    mbar_expect_tx(full, (64 * K + kN * K) * 2);
    for (int c = 0; c < K; c += kColumns) tma_load(a + c * 64 * 2, &a_map, full, c, 0);
    for (int c = 0; c < b_columns; c += kColumns) tma_load(b + c * b_rows * 2, &b_map, full, c, 0);
  }
  __syncthreads();
  mbar_wait(full, 0);

  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = p.d[t * (kN / 2) + i];
  uint32_t registers[8][4] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (p.a_registers && i / 4 < p.steps) {
      registers[i / 4][i % 4] = p.a_registers[(i / 4 * 128 + t) * 4 + i % 4];
    }
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    if (step == p.steps) break;
    const int column = step * 16 / kColumns * kColumns, within = step * 16 % kColumns;
    const uint64_t of_b =
        kTransposeB ? wgmma_operand<kColumns>(b + step * 16 * kColumns * 2, K * kColumns * 2)
                    : wgmma_operand<kColumns>(b + column * kN * 2 + within * 2);
    if (p.a_registers) {
      wgmma<T, kTransposeB>(d, registers[step], of_b, p.accumulate || step);
    } else {
      const uint64_t of_a = wgmma_operand<kColumns>(a + column * 64 * 2 + within * 2);
      wgmma<T, kTransposeB>(d, of_a, of_b, p.accumulate || step);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) p.d[t * (kN / 2) + i] = d[i];
  for (int i = t; i < kN * K * 2; i += 128) p.b_shared[i] = b[i];
#endif
}

template <typename T, int kN, int kTransposeB, int kColumns>
int run(const T* a, const T* b, const WgmmaTest& test) {
  const uint64_t K = 16 * test.steps;
  const uint64_t b_rows = kTransposeB ? K : kN, b_columns = kTransposeB ? kN : K;
  CUtensorMap a_map, b_map;
  if (const auto error = make_tensor_map<T, 2>(&a_map, a, {K, 64}, {K * 2}, {kColumns, 64}))
    return error;
  if (const auto error = make_tensor_map<T, 2>(&b_map, b, {b_columns, b_rows}, {b_columns * 2},
                                               {kColumns, static_cast<cuuint32_t>(b_rows)}))
    return error;
  return launch(wgmma_kernel<T, kN, kTransposeB, kColumns>, dim3(1), dim3(128),
                1024 + (64 + kN) * K * 2, nullptr, a_map, b_map, test);
}

template <typename T, int kN>
int choose(int transpose_b, int columns, const void* a, const void* b, const WgmmaTest& test) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
  if (transpose_b)
    return columns == 64 ? run<T, kN, 1, 64>(x, y, test) : run<T, kN, 1, 32>(x, y, test);
  return columns == 64 ? run<T, kN, 0, 64>(x, y, test) : run<T, kN, 0, 32>(x, y, test);
}

// A box of a [4, 3, 20, 96] view with these strides, 32 or 64 columns wide, as it lands.
template <int kColumns>
__global__ void tma_kernel(const __grid_constant__ CUtensorMap map, unsigned char* out, int4 at) {
#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DYNAMIC_SHARED(shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  if (threadIdx.x == 0) {
    mbar_init(full, 1);
    fence_mbar_init();
    mbar_expect_tx(full, 16 * kColumns * 2);
    tma_load(shared + 1024, &map, full, at.x, at.y, at.z, at.w);
  }
  __syncthreads();
  mbar_wait(full, 0);
  for (int i = threadIdx.x; i < 16 * kColumns * 2; i += 32) out[i] = shared[1024 + i];
#endif
}

}  // namespace
}  // namespace restore_ext::cuda

using namespace restore_ext::cuda;

extern "C" __attribute__((visibility("default"))) int test_wgmma(
    int half, int N, int transpose_b, int columns, const void* a, const void* b,
    const uint32_t* a_registers, float* d, unsigned char* b_shared, int steps, int accumulate) {
  const WgmmaTest test{a_registers, d, b_shared, steps, accumulate};
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    if (N == 64) return choose<T, 64>(transpose_b, columns, a, b, test);
    if (N == 96) return choose<T, 96>(transpose_b, columns, a, b, test);
    return choose<T, 128>(transpose_b, columns, a, b, test);
  };
  return half ? of(__half{}) : of(__nv_bfloat16{});
}

extern "C" __attribute__((visibility("default"))) int test_tma(const void* data,
                                                               const uint64_t* strides, int columns,
                                                               unsigned char* out, int c, int l,
                                                               int h, int b) {
  CUtensorMap map;
  const auto* x = static_cast<const __half*>(data);
  const cuuint32_t width = columns;
  if (const auto error = make_tensor_map<__half, 4>(
          &map, x, {96, 20, 3, 4}, {strides[0], strides[1], strides[2]}, {width, 16, 1, 1}))
    return error;
  const auto kernel = columns == 64 ? tma_kernel<64> : tma_kernel<32>;
  return launch(kernel, dim3(1), dim3(32), 1024 + 16 * columns * 2, nullptr, map, out,
                make_int4(c, l, h, b));
}
