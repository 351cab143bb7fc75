// Twins of the wgmma wrappers in csrc/cuda/hopper.cuh. A product is computed at its wait; until
// then the accumulators are poisoned, and they and the registers of A are watched.
#pragma once
#include <map>
#include <vector>

#include "cuemu_async.h"

namespace restore_ext::cuda {
namespace emu {

constexpr uint32_t kInFlight = 0x7fc0beef;  // what accumulators hold while a product is under way
struct Product {                            // one thread's view of one wgmma
  float* d;
  const uint32_t* a;  // a: registers of A, or nullptr: descriptor
  uint64_t a_desc, b_desc;
  int n;
  bool half, accumulate, a_trans, b_trans;
};

struct Accumulator {
  std::array<float*, 128> at;
  std::vector<float> value;
  int pending = 0;
};  // value[thread][n / 2]
struct Warpgroup {
  unsigned long long block = 0;
  bool fenced = false;
  std::map<float*, Accumulator> live;
};

inline Warpgroup warpgroups[8];
inline int wgi() { return cuemu::self->lin / 128; }
CUEMU_NOSAN inline Warpgroup& warpgroup() {
  auto& w = warpgroups[wgi()];
  if (w.block != cuemu::n_blocks) {
    w.block = cuemu::n_blocks;
    w.fenced = false;
    w.live.clear();
  }
  return w;
}

CUEMU_NOSAN inline float element(uint16_t v, bool half) {
  return half ? __half2float(__ushort_as_half(v)) : cuemu_bits<float>((uint32_t)v << 16);
}

// Calls take(i, k, value) for all i < rows (M or N) and k < 16 of an operand that lies in shared
// memory.
template <class Take>
CUEMU_NOSAN inline void operand(uint64_t desc, bool trans, int rows, bool half, Take take) {
  const int mode = desc >> 62, bits = 4 - mode;
  if (mode == 0) cuemu::fail("wgmma descriptor: without a swizzle is not emulated");
  if (desc >> 49 & 7) cuemu::fail("wgmma descriptor: a base offset is not emulated");
  const uint32_t start = (desc & 0x3fff) << 4, lead = (desc >> 16 & 0x3fff) << 4,
                 stride = (desc >> 32 & 0x3fff) << 4, span = 16u << bits;
  if (start % (8 * span) >= span)
    cuemu::fail("wgmma descriptor: starts inside a swizzle pattern (address %u)", start);
  auto chunk = [&](uint32_t address, auto put) {
    const uint32_t at = swizzled(address, bits);
    if (at + 16 > cuemu::dyn_smem_size()) cuemu::fail("wgmma reads past shared memory");
    const unsigned char* p = cuemu::dyn_smem() + at;
    if (cuemu::hook_access) cuemu::hook_access(p, 16, false, false, cuemu::pc());
    if (cuemu::hook_proxy_read) cuemu::hook_proxy_read(p, 16, cuemu::pc());
    uint16_t v[8];
    memcpy(v, p, 16);
    for (int e = 0; e < 8; e++) put(e, element(v[e], half));
  };
  if (!trans) {  // K-major: a row of the pattern holds one i
    if ((start & (span - 1)) + 32 > span)
      cuemu::fail("wgmma descriptor: 16 of K run past the swizzle's span");
    for (int i = 0; i < rows; i++)
      for (int c = 0; c < 2; c++)
        chunk(start + i / 8 * stride + i % 8 * span + c * 16,
              [&](int e, float v) { take(i, c * 8 + e, v); });
  } else {  // M- or N-major: a row of the pattern holds one k
    const int per = span / 2;
    for (int i = 0; i < rows; i += 8)
      for (int k = 0; k < 16; k++)
        chunk(start + i / per * lead + i % per * 2 + k / 8 * stride + k % 8 * span,
              [&](int e, float v) { take(i + e, k, v); });
  }
}

inline void fragment(int thread, int i, int& row, int& column) {  // of an accumulator
  row = thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8;
  column = i / 4 * 8 + thread % 4 * 2 + (i & 1);
}

CUEMU_NOSAN inline void check_in_flight(const Accumulator& acc, int count) {
  for (float* d : acc.at)
    for (int i = 0; i < count; i++)
      if (__float_as_uint(d[i]) != kInFlight)
        cuemu::fail("wgmma: accumulators were touched before the wait");
}

struct Pending {
  Product p;
  Accumulator* acc;
  std::array<std::array<uint32_t, 4>, 128> a;
  std::array<const uint32_t*, 128> a_at;
};
CUEMU_NOSAN inline void product(Pending& x) {
  static float A[64][16], B[16][256], D[64][256];
  const Product& p = x.p;
  const int n = p.n, count = n / 2;
  if (p.a) {
    for (int t = 0; t < 128; t++)
      for (int i = 0; i < 4; i++) {
        if (x.a[t][i] != x.a_at[t][i])
          cuemu::fail("wgmma: registers of A were overwritten before the wait");
        const int r = t / 32 * 16 + t % 32 / 4 + (i & 1) * 8, c = t % 4 * 2 + (i >> 1) * 8;
        A[r][c] = element((uint16_t)x.a[t][i], p.half);
        A[r][c + 1] = element((uint16_t)(x.a[t][i] >> 16), p.half);
      }
  } else
    operand(p.a_desc, p.a_trans, 64, p.half, [](int i, int k, float v) { A[i][k] = v; });
  operand(p.b_desc, p.b_trans, n, p.half, [](int i, int k, float v) { B[k][i] = v; });
  auto& value = x.acc->value;
  for (int r = 0; r < 64; r++) {
    for (int c = 0; c < n; c++) D[r][c] = 0;
    for (int k = 0; k < 16; k++)
      for (int c = 0; c < n; c++) D[r][c] += A[r][k] * B[k][c];
  }
  for (int t = 0; t < 128; t++)
    for (int i = 0; i < count; i++) {
      int r, c;
      fragment(t, i, r, c);
      float& v = value[t * count + i];
      v = p.accumulate ? v + D[r][c] : D[r][c];
    }
  if (--x.acc->pending) return;
  check_in_flight(*x.acc, count);
  for (int t = 0; t < 128; t++) memcpy(x.acc->at[t], &value[t * count], count * 4);
  warpgroup().live.erase(x.acc->at[0]);
}

CUEMU_NOSAN inline void issue(void** args, int) {
  Product* p[128];
  for (int t = 0; t < 128; t++) p[t] = (Product*)args[t];
  const Product& p0 = *p[0];
  const int count = p0.n / 2;
  for (auto* q : p)
    if (q->a_desc != p0.a_desc || q->b_desc != p0.b_desc || q->accumulate != p0.accumulate ||
        q->n != p0.n || !q->a != !p0.a)
      cuemu::fail("wgmma: descriptors or shapes differ within the warpgroup");
  Warpgroup& w = warpgroup();
  if (!w.fenced) cuemu::fail("wgmma without a wgmma.fence since the last commit");
  Accumulator* slot = &w.live[p0.d];
  if (!slot->pending) {
    slot->value.resize(128 * count);
    for (int t = 0; t < 128; t++) {
      slot->at[t] = p[t]->d;
      memcpy(&slot->value[t * count], p[t]->d, count * 4);
      for (int i = 0; i < count; i++) memcpy(p[t]->d + i, &kInFlight, 4);
    }
  } else
    check_in_flight(*slot, count);
  slot->pending++;
  Pending x{p0, slot, {}, {}};
  if (p0.a)
    for (int t = 0; t < 128; t++) {
      x.a_at[t] = p[t]->a;
      memcpy(x.a[t].data(), p[t]->a, 16);
    }
  cuemu::wg_push(wgi(), [x]() mutable { product(x); });
}

CUEMU_NOSAN inline void wgmma(Product p, const char* file, int line) {
  if (p.n % 8 || p.n > 256) cuemu::fail("wgmma: N is %d", p.n);
  cuemu::group_coll(wgi(), 128, issue, &p, "wgmma", file, line);
}

}  // namespace emu

CUEMU_NOSAN inline void wgmma_fence() {
  cuemu::Quiet q_;
  if (cuemu::self->lin % 128 == 0) emu::warpgroup().fenced = true;
}

template <typename T, int kTransposeB, int kCount>
CUEMU_NOSAN inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate,
                              CUEMU_LOC) {
  emu::wgmma({d, nullptr, a, b, 2 * kCount, std::is_same_v<T, __half>, accumulate, false,
              kTransposeB != 0},
             file_, line_);
}

template <typename T, int kTransposeB, int kCount>
CUEMU_NOSAN inline void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b,
                              bool accumulate, CUEMU_LOC) {
  emu::wgmma(
      {d, a, 0, b, 2 * kCount, std::is_same_v<T, __half>, accumulate, false, kTransposeB != 0},
      file_, line_);
}

CUEMU_NOSAN inline void wgmma_commit(CUEMU_LOC) {
  cuemu::group_coll(
      emu::wgi(), 128,
      [](void**, int) {
        emu::warpgroup().fenced = false;
        cuemu::wg_commit(emu::wgi());
      },
      nullptr, "wgmma.commit", file_, line_);
}

template <int N>
CUEMU_NOSAN inline void wgmma_wait(CUEMU_LOC) {
  cuemu::group_coll(
      emu::wgi(), 128, [](void**, int) { cuemu::wg_wait(emu::wgi(), N); }, nullptr, "wgmma.wait",
      file_, line_);
}
}  // namespace restore_ext::cuda
