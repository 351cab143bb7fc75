// The device wrappers of csrc/cuda/ptx.cuh and hopper.cuh, each as one warp or warpgroup that works
// on arrays in host memory. The emulator runs them in its tests; built by nvcc they run on a GPU
// (tools/golden.py), and both must say the same. What they return is a cudaError_t.
#pragma once

#include <cstdint>

extern "C" {

const char* wrapper_error(int error);

// Rows of 8 elements, lane by lane, and four registers a lane.
int wrapper_ldmatrix(const uint16_t* rows /* [32, 8] */, int transposed,
                     uint32_t* to /* [32, 4] */);

int wrapper_mma(int half, const uint32_t* a /* [32, 4] */, const uint32_t* b /* [32, 2] */,
                float* d /* [32, 4], added to */);

// Onto 0x55s; the first half of the lanes waits for an older group only.
int wrapper_cp_async(const uint8_t* from /* [2, 32, 16] */, const uint8_t* valid /* [2, 32] */,
                     uint8_t* to /* [2, 32, 16] */);

int wrapper_exp2(const float* x, float* y, int n);

// sm_90a. B is [N, K], or [K, N] where transposed, in boxes of `columns`; K = 16 steps.
int wrapper_wgmma(int half, int N, int transposed, int columns, int steps, int accumulate,
                  const uint16_t* a /* [64, K] */, const uint16_t* b,
                  const uint32_t* a_registers /* [steps, 128, 4] or nullptr */,
                  float* d /* [128, N / 2], in and out */, uint8_t* b_shared /* [N * K * 2] */);

// sm_90a. The 16 x columns box at c, l, h, b of a [4, 3, 20, 96] array of 16-bit elements.
int wrapper_tma(const uint16_t* data, int columns, int c, int l, int h, int b,
                uint8_t* out /* [16 * columns * 2] */);
}
