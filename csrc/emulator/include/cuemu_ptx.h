// Emulated twins of the inline-PTX wrappers in csrc/cuda/ptx.cuh (PTX ISA fragment layouts).
#pragma once
#include "cuemu.h"
#define DYNAMIC_SHARED(name) unsigned char* name = ::cuemu::dyn_smem()
#define STATIC_SHARED(T, name) static char name##_key_; T& name = *(T*)::cuemu::shared_slot(&name##_key_, sizeof(T), alignof(T))
namespace restore_ext::cuda {
namespace emu {
struct Ld { const void* row; uint32_t* r; const char* f; int l; };
template <bool TRANS>
CUEMU_NOSAN inline void ldm(void** p, unsigned m) {
  if (m != 0xffffffffu) cuemu::fail("ldmatrix needs all 32 lanes");
  for (int q = 0; q < 4; q++) {
    uint16_t t[8][8];
    for (int i = 0; i < 8; i++) {
      Ld& a = *(Ld*)p[q * 8 + i];
      if ((uintptr_t)a.row & 15) cuemu::fail("ldmatrix at %s:%d: row address of lane %d is not 16-byte aligned", a.f, a.l, q * 8 + i);
      memcpy(t[i], a.row, 16);
    }
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, c = (l & 3) * 2;
      uint16_t lo = TRANS ? t[c][g] : t[g][c], hi = TRANS ? t[c + 1][g] : t[g][c + 1];
      ((Ld*)p[l])->r[q] = (uint32_t)hi << 16 | lo;
    }
  }
}
struct Mma { float* d; const uint32_t* a; uint32_t b0, b1; };
template <class T> inline float elem16(uint16_t v) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(v));
  else return cuemu_bits<float>((uint32_t)v << 16); }
template <class T> inline float lo16(uint32_t v) { return elem16<T>((uint16_t)v); }
template <class T> inline float hi16(uint32_t v) { return elem16<T>((uint16_t)(v >> 16)); }
template <class T> CUEMU_NOSAN inline void mma(void** p, unsigned m) {
  if (m != 0xffffffffu) cuemu::fail("mma.sync needs all 32 lanes");
  float A[16][16], B[16][8], D[16][8];
  for (int l = 0; l < 32; l++) {
    Mma& x = *(Mma*)p[l];
    int g = l >> 2, t = (l & 3) * 2;
    for (int i = 0; i < 4; i++) {
      int r = g + (i & 1) * 8, c = t + (i >> 1) * 8;
      A[r][c] = lo16<T>(x.a[i]); A[r][c + 1] = hi16<T>(x.a[i]);
      D[g + (i >> 1) * 8][t + (i & 1)] = x.d[i];
    }
    B[t][g] = lo16<T>(x.b0); B[t + 1][g] = hi16<T>(x.b0); B[t + 8][g] = lo16<T>(x.b1); B[t + 9][g] = hi16<T>(x.b1);
  }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) D[r][n] += A[r][k] * B[k][n];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) ((Mma*)p[l])->d[i] = D[(l >> 2) + (i >> 1) * 8][(l & 3) * 2 + (i & 1)];
}
}  // namespace emu
CUEMU_INL void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUEMU_LOC) {
  emu::Ld a{row, r, file_, line_};
  if (cuemu::hook_access) cuemu::hook_access(row, 16, false, false, cuemu::pc());
  cuemu::coll(0xffffffffu, emu::ldm<false>, &a, "ldmatrix.x4", file_, line_); }
CUEMU_INL void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUEMU_LOC) {
  emu::Ld a{row, r, file_, line_};
  if (cuemu::hook_access) cuemu::hook_access(row, 16, false, false, cuemu::pc());
  cuemu::coll(0xffffffffu, emu::ldm<true>, &a, "ldmatrix.x4.trans", file_, line_); }
template <class T> CUEMU_INL void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUEMU_LOC) {
  emu::Mma x{d, a, b0, b1}; cuemu::coll(0xffffffffu, emu::mma<T>, &x, "mma.m16n8k16", file_, line_); }
CUEMU_INL void cp_async_16(void* s, const void* g, bool valid) { cuemu::cp_async(s, g, 16, valid ? 16 : 0); }
inline void cp_async_commit() { cuemu::cp_commit(); }
template <int N> inline void cp_async_wait() { cuemu::cp_wait(N); }
inline float exp2_approx(float x) { return exp2f(x); }
}  // namespace restore_ext::cuda
