// Twins of the inline-PTX wrappers in csrc/cuda/ptx.cuh, with the PTX ISA's fragment layouts.
#pragma once
#include "cuemu.h"

#define DYNAMIC_SHARED(name) unsigned char* name = ::cuemu::dyn_smem()
#define STATIC_SHARED(T, name) \
  static char name##_key_;     \
  T& name = *(T*)::cuemu::shared_slot(&name##_key_, sizeof(T), alignof(T))

namespace restore_ext::cuda {
namespace emu {

struct LoadMatrix {  // of a lane
  const void* row;
  uint32_t* to;
  const char* file;
  int line;
};

template <bool kTransposed>
CUEMU_NOSAN inline void load_matrices(void** lanes, unsigned mask) {
  if (mask != 0xffffffffu) cuemu::fail("ldmatrix needs all 32 lanes");
  const auto lane = [&](int i) -> LoadMatrix& { return *(LoadMatrix*)lanes[i]; };
  for (int m = 0; m < 4; m++) {
    uint16_t tile[8][8];
    for (int i = 0; i < 8; i++) {
      const LoadMatrix& of = lane(m * 8 + i);
      if ((uintptr_t)of.row % 16)
        cuemu::fail("ldmatrix at %s:%d: row address of lane %d is not 16-byte aligned", of.file,
                    of.line, m * 8 + i);
      memcpy(tile[i], of.row, 16);
    }
    for (int l = 0; l < 32; l++) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = kTransposed ? tile[column][row] : tile[row][column];
      const uint32_t high = kTransposed ? tile[column + 1][row] : tile[row][column + 1];
      lane(l).to[m] = high << 16 | low;
    }
  }
}

struct Mma {  // of a lane
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float widened(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  else
    return cuemu_bits<float>(bits << 16);
}

template <class T>
CUEMU_NOSAN inline void mma(void** lanes, unsigned mask) {
  if (mask != 0xffffffffu) cuemu::fail("mma.sync needs all 32 lanes");
  float a[16][16], b[16][8], d[16][8];
  const auto each_sum = [&](auto visit) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        visit(((Mma*)lanes[l])->d[i], d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  };
  for (int l = 0; l < 32; l++) {
    const Mma& of = *(Mma*)lanes[l];
    const int group = l / 4, pair = l % 4 * 2;
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 2; e++)
        a[group + i % 2 * 8][pair + i / 2 * 8 + e] = widened<T>(of.a[i] >> 16 * e);
    for (int i = 0; i < 2; i++)
      for (int e = 0; e < 2; e++) b[pair + i * 8 + e][group] = widened<T>(of.b[i] >> 16 * e);
  }
  each_sum([](float& of_lane, float& sum) { sum = of_lane; });
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
  each_sum([](float& of_lane, float& sum) { of_lane = sum; });
}

}  // namespace emu

CUEMU_INL void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUEMU_LOC) {
  emu::LoadMatrix of{row, r, file_, line_};
  if (cuemu::hook_access) cuemu::hook_access(row, 16, false, false, cuemu::pc());
  cuemu::coll(0xffffffffu, emu::load_matrices<false>, &of, "ldmatrix.x4", file_, line_);
}

CUEMU_INL void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUEMU_LOC) {
  emu::LoadMatrix of{row, r, file_, line_};
  if (cuemu::hook_access) cuemu::hook_access(row, 16, false, false, cuemu::pc());
  cuemu::coll(0xffffffffu, emu::load_matrices<true>, &of, "ldmatrix.x4.trans", file_, line_);
}

template <class T>
CUEMU_INL void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                            CUEMU_LOC) {
  emu::Mma of{d, a, {b0, b1}};
  cuemu::coll(0xffffffffu, emu::mma<T>, &of, "mma.m16n8k16", file_, line_);
}

CUEMU_INL void cp_async_16(void* shared, const void* global, bool valid) {
  cuemu::cp_async(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_commit() { cuemu::cp_commit(); }
template <int N>
void cp_async_wait() {
  cuemu::cp_wait(N);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;  // .ftz
}

}  // namespace restore_ext::cuda
