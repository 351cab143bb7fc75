#include "wrappers.h"

#include "../cuda/ptx.cuh"

// Of selftest/hopper.cu, where it is linked in; their pointers are the device's, but for strides.
extern "C" __attribute__((weak)) int test_wgmma(int half, int N, int transpose_b, int columns,
                                                const void* a, const void* b,
                                                const uint32_t* a_registers, float* d,
                                                unsigned char* b_shared, int steps, int accumulate);
extern "C" __attribute__((weak)) int test_tma(const void* data, const uint64_t* strides,
                                              int columns, unsigned char* out, int c, int l, int h,
                                              int b);

namespace restore_ext::cuda {
namespace {

__global__ void ldmatrix_kernel(const uint4* rows, bool transposed, uint32_t* to) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  uint4* row = reinterpret_cast<uint4*>(shared) + lane;
  *row = rows[lane];
  __syncwarp();
  uint32_t r[4];
  if (transposed)
    ldmatrix_x4_trans(r, row);
  else
    ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) to[lane * 4 + i] = r[i];
}

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    sum[i] = d[lane * 4 + i];
  }
  mma_m16n8k16<T>(sum, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

__global__ void cp_async_kernel(const uint4* from, const uint8_t* valid, uint4* to) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  uint4* row = reinterpret_cast<uint4*>(shared) + lane;
  row[0] = row[32] = make_uint4(0x55555555, 0x55555555, 0x55555555, 0x55555555);
  for (int group = 0; group < 2; ++group) {
    cp_async_16(row + 32 * group, from + 32 * group + lane, valid[32 * group + lane]);
    cp_async_commit();
  }
  cp_async_wait<1>();
  to[lane] = row[0];
  cp_async_wait<0>();
  to[32 + lane] = row[32];
}

__global__ void exp2_kernel(const float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += 32) y[i] = exp2_approx(x[i]);
}

// An array on the device while it lives: filled from the host's, and copied back if it is an out.
class OnDevice {
 public:
  OnDevice(const void* in, size_t bytes) : OnDevice(const_cast<void*>(in), bytes, false) {}
  OnDevice(void* host, size_t bytes, bool out) : host_(host), bytes_(bytes), out_(out) {
    if (host == nullptr) return;
    cudaMalloc(&device_, bytes);
    cudaMemcpy(device_, host, bytes, cudaMemcpyHostToDevice);
  }
  ~OnDevice() {
    if (out_) cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost);
    if (device_) cudaFree(device_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  template <typename T>
  operator T*() const {
    return static_cast<T*>(device_);
  }

 private:
  void *host_, *device_ = nullptr;
  size_t bytes_;
  bool out_;
};

int done(int launched) {
  const int ran = cudaDeviceSynchronize();
  return launched != cudaSuccess ? launched : ran;
}

}  // namespace
}  // namespace restore_ext::cuda

using namespace restore_ext::cuda;

const char* wrapper_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int wrapper_ldmatrix(const uint16_t* rows, int transposed, uint32_t* to) {
  const OnDevice in(rows, 32 * 16), out(to, 32 * 16, true);
  return done(launch(ldmatrix_kernel, dim3(1), dim3(32), 512, nullptr, in, transposed != 0, out));
}

int wrapper_mma(int half, const uint32_t* a, const uint32_t* b, float* d) {
  const OnDevice left(a, 32 * 16), right(b, 32 * 8), sum(d, 32 * 16, true);
  const auto kernel = half ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>;
  return done(launch(kernel, dim3(1), dim3(32), 0, nullptr, left, right, sum));
}

int wrapper_cp_async(const uint8_t* from, const uint8_t* valid, uint8_t* to) {
  const OnDevice in(from, 1024), flags(valid, 64), out(to, 1024, true);
  return done(launch(cp_async_kernel, dim3(1), dim3(32), 1024, nullptr, in, flags, out));
}

int wrapper_exp2(const float* x, float* y, int n) {
  const OnDevice in(x, n * sizeof(float)), out(y, n * sizeof(float), true);
  return done(launch(exp2_kernel, dim3(1), dim3(32), 0, nullptr, in, out, n));
}

int wrapper_wgmma(int half, int N, int transposed, int columns, int steps, int accumulate,
                  const uint16_t* a, const uint16_t* b, const uint32_t* a_registers, float* d,
                  uint8_t* b_shared) {
  if (!test_wgmma) return cudaErrorNotSupported;
  const size_t K = 16 * steps;
  const OnDevice left(a, 64 * K * 2), right(b, N * K * 2), sum(d, 64 * N * sizeof(float), true);
  const OnDevice registers(a_registers, 64 * K * 2), seen(b_shared, N * K * 2, true);
  return done(test_wgmma(half, N, transposed, columns, left, right, registers, sum, seen, steps,
                         accumulate));
}

int wrapper_tma(const uint16_t* data, int columns, int c, int l, int h, int b, uint8_t* out) {
  if (!test_tma) return cudaErrorNotSupported;
  const uint64_t strides[3] = {96 * 2, 20 * 96 * 2, 3 * 20 * 96 * 2};
  const OnDevice in(data, 4 * 3 * 20 * 96 * 2), box(out, 16 * columns * 2, true);
  return done(test_tma(in, strides, columns, box, c, l, h, b));
}
