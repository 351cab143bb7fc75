// Twins of csrc/cuda/hopper.cuh: mbarriers, TMA tiles, wgmma. What is asynchronous there is done here as
// late as the program allows: a tile lands when somebody polls, a product is computed at its wait, and
// until then the destination, the accumulators and the A registers are poisoned or watched.
#pragma once
#include <cuda.h>  // CUtensorMap
#include <map>
#include <vector>
#include "cuemu.h"
#include "cuemu_ptx.h"
namespace cuemu {
struct Mbar { int32_t tx; uint16_t pending; uint16_t count_phase; };  // 8 bytes, lives in shared memory; count_phase: count << 1 | phase
static_assert(sizeof(Mbar) == 8);
struct TensorMap {
  uint32_t magic, rank, element, swizzle;  // swizzle: how many address bits it mixes
  const unsigned char* base;
  uint64_t stride[4];  // of dimensions 1.., in bytes
  uint32_t dim[5];
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint32_t kTensorMap = 0x7e3a17;
extern unsigned long long n_blocks, n_coll;
void async_push(std::function<void()> f);          // the block's copy engine; runs when a thread polls
void async_poll();
void group_coll(int group, int n, void (*fn)(void** args, int n), void* arg, const char* what, const char* file, int line);
void wg_push(int group, std::function<void()> f);  // pending wgmma of a warpgroup
void wg_commit(int group);
void wg_wait(int group, int n);
void hook_release(const void* sync) __attribute__((weak));
void hook_acquire(const void* sync) __attribute__((weak));
void hook_cp(const void* dst, size_t n, bool landed) __attribute__((weak));
void hook_proxy_fence() __attribute__((weak));                          // fence.proxy.async by this thread
void hook_proxy_write(const void* p, size_t n) __attribute__((weak));   // by the copy engine
void hook_proxy_read(const void* p, size_t n, const void* pc) __attribute__((weak));  // by the async proxy
}  // namespace cuemu
namespace restore_ext::cuda {
inline uint32_t smem_u32(const void* p) { return (uint32_t)((const unsigned char*)p - cuemu::dyn_smem()); }  // dynamic shared memory starts at address 0
namespace emu {
// 16-byte chunks within 2^bits * 16 bytes change places with the 128-byte line they lie in.
inline uint32_t swizzled(uint32_t address, int bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }

inline unsigned long long events, events_seen;  // of barriers: see poll
inline int idle_polls;
// ---- mbarrier -------------------------------------------------------------------------------------------------------
inline cuemu::Mbar& mb(uint64_t* b) { if ((uintptr_t)b & 7) cuemu::fail("mbarrier is not 8-byte aligned"); return *(cuemu::Mbar*)b; }
CUEMU_NOSAN inline void mb_check(cuemu::Mbar& m) {
  events++;
  if (m.pending == 0 && m.tx == 0) { m.count_phase ^= 1; m.pending = m.count_phase >> 1; } }

// ---- wgmma ----------------------------------------------------------------------------------------------------------
constexpr uint32_t kInFlight = 0x7fc0beef;  // what accumulators hold while a product is under way
struct Product {  // one thread's view of one wgmma
  float* d; const uint32_t* a;  // a: registers of A, or nullptr: descriptor
  uint64_t a_desc, b_desc;
  int n; bool half, accumulate, a_trans, b_trans;
};
struct Accumulator { std::array<float*, 128> at; std::vector<float> value; int pending = 0; };  // value[thread][n / 2]
struct Warpgroup { unsigned long long block = 0; bool fenced = false; std::map<float*, Accumulator> live; };
inline Warpgroup warpgroups[8];
inline int wgi() { return cuemu::self->lin / 128; }
CUEMU_NOSAN inline Warpgroup& warpgroup() {
  auto& w = warpgroups[wgi()];
  if (w.block != cuemu::n_blocks) { w.block = cuemu::n_blocks; w.fenced = false; w.live.clear(); }
  return w;
}
CUEMU_NOSAN inline float element(uint16_t v, bool half) { return half ? __half2float(__ushort_as_half(v)) : cuemu_bits<float>((uint32_t)v << 16); }
// Calls take(i, k, value) for all i < rows (M or N) and k < 16 of an operand that lies in shared memory.
template <class Take> CUEMU_NOSAN inline void operand(uint64_t desc, bool trans, int rows, bool half, Take take) {
  const int mode = desc >> 62, bits = 4 - mode;
  if (mode == 0) cuemu::fail("wgmma descriptor: without a swizzle is not emulated");
  if (desc >> 49 & 7) cuemu::fail("wgmma descriptor: a base offset is not emulated");
  const uint32_t start = (desc & 0x3fff) << 4, lead = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4, span = 16u << bits;
  if (start % (8 * span) >= span) cuemu::fail("wgmma descriptor: starts inside a swizzle pattern (address %u)", start);
  auto chunk = [&](uint32_t address, auto put) {
    const uint32_t at = swizzled(address, bits);
    if (at + 16 > cuemu::dyn_smem_size()) cuemu::fail("wgmma reads past shared memory");
    const unsigned char* p = cuemu::dyn_smem() + at;
    if (cuemu::hook_access) cuemu::hook_access(p, 16, false, false, cuemu::pc());
    if (cuemu::hook_proxy_read) cuemu::hook_proxy_read(p, 16, cuemu::pc());
    uint16_t v[8]; memcpy(v, p, 16);
    for (int e = 0; e < 8; e++) put(e, element(v[e], half));
  };
  if (!trans) {  // K-major: a row of the pattern holds one i
    if ((start & (span - 1)) + 32 > span) cuemu::fail("wgmma descriptor: 16 of K run past the swizzle's span");
    for (int i = 0; i < rows; i++) for (int c = 0; c < 2; c++)
      chunk(start + i / 8 * stride + i % 8 * span + c * 16, [&](int e, float v) { take(i, c * 8 + e, v); });
  } else {  // M- or N-major: a row of the pattern holds one k
    const int per = span / 2;
    for (int i = 0; i < rows; i += 8) for (int k = 0; k < 16; k++)
      chunk(start + i / per * lead + i % per * 2 + k / 8 * stride + k % 8 * span, [&](int e, float v) { take(i + e, k, v); });
  }
}
inline void fragment(int thread, int i, int& row, int& column) {  // of an accumulator
  row = thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8; column = i / 4 * 8 + thread % 4 * 2 + (i & 1); }
CUEMU_NOSAN inline void check_in_flight(const Accumulator& acc, int count) {
  for (float* d : acc.at) for (int i = 0; i < count; i++) if (__float_as_uint(d[i]) != kInFlight) cuemu::fail("wgmma: accumulators were touched before the wait"); }
struct Pending { Product p; Accumulator* acc; std::array<std::array<uint32_t, 4>, 128> a; std::array<const uint32_t*, 128> a_at; };
CUEMU_NOSAN inline void product(Pending& x) {
  static float A[64][16], B[16][256], D[64][256];
  const Product& p = x.p; const int n = p.n, count = n / 2;
  if (p.a) {
    for (int t = 0; t < 128; t++) for (int i = 0; i < 4; i++) {
      if (x.a[t][i] != x.a_at[t][i]) cuemu::fail("wgmma: registers of A were overwritten before the wait");
      const int r = t / 32 * 16 + t % 32 / 4 + (i & 1) * 8, c = t % 4 * 2 + (i >> 1) * 8;
      A[r][c] = element((uint16_t)x.a[t][i], p.half); A[r][c + 1] = element((uint16_t)(x.a[t][i] >> 16), p.half); }
  } else operand(p.a_desc, p.a_trans, 64, p.half, [](int i, int k, float v) { A[i][k] = v; });
  operand(p.b_desc, p.b_trans, n, p.half, [](int i, int k, float v) { B[k][i] = v; });
  auto& value = x.acc->value;
  for (int r = 0; r < 64; r++) {
    for (int c = 0; c < n; c++) D[r][c] = 0;
    for (int k = 0; k < 16; k++) for (int c = 0; c < n; c++) D[r][c] += A[r][k] * B[k][c]; }
  for (int t = 0; t < 128; t++) for (int i = 0; i < count; i++) {
    int r, c; fragment(t, i, r, c); float& v = value[t * count + i]; v = p.accumulate ? v + D[r][c] : D[r][c]; }
  if (--x.acc->pending) return;
  check_in_flight(*x.acc, count);
  for (int t = 0; t < 128; t++) memcpy(x.acc->at[t], &value[t * count], count * 4);
  warpgroup().live.erase(x.acc->at[0]);
}
CUEMU_NOSAN inline void issue(void** args, int) {
  Product* p[128]; for (int t = 0; t < 128; t++) p[t] = (Product*)args[t];
  const Product& p0 = *p[0]; const int count = p0.n / 2;
  for (auto* q : p) if (q->a_desc != p0.a_desc || q->b_desc != p0.b_desc || q->accumulate != p0.accumulate || q->n != p0.n || !q->a != !p0.a)
    cuemu::fail("wgmma: descriptors or shapes differ within the warpgroup");
  Warpgroup& w = warpgroup();
  if (!w.fenced) cuemu::fail("wgmma without a wgmma.fence since the last commit");
  Accumulator* slot = &w.live[p0.d];
  if (!slot->pending) {
    slot->value.resize(128 * count);
    for (int t = 0; t < 128; t++) { slot->at[t] = p[t]->d; memcpy(&slot->value[t * count], p[t]->d, count * 4); for (int i = 0; i < count; i++) memcpy(p[t]->d + i, &kInFlight, 4); }
  } else check_in_flight(*slot, count);
  slot->pending++;
  Pending x{p0, slot, {}, {}};
  if (p0.a) for (int t = 0; t < 128; t++) { x.a_at[t] = p[t]->a; memcpy(x.a[t].data(), p[t]->a, 16); }
  cuemu::wg_push(wgi(), [x]() mutable { product(x); });
}
CUEMU_NOSAN inline void wgmma(Product p, const char* file, int line) {
  if (p.n % 8 || p.n > 256) cuemu::fail("wgmma: N is %d", p.n);
  cuemu::group_coll(wgi(), 128, issue, &p, "wgmma", file, line); }
}  // namespace emu

CUEMU_NOSAN inline void mbar_init(uint64_t* b, int count) { cuemu::Quiet q_; if (cuemu::hook_access) cuemu::hook_access(b, 8, true, true, cuemu::pc()); auto& m = emu::mb(b); m.tx = 0; m.pending = count; m.count_phase = count << 1; }
inline void fence_mbar_init() {}
CUEMU_NOSAN inline void mbar_expect_tx(uint64_t* b, int bytes) { cuemu::Quiet q_; if (cuemu::hook_release) cuemu::hook_release(b); auto& m = emu::mb(b); if (!m.pending) cuemu::fail("mbarrier: more arrivals than its count"); m.tx += bytes; m.pending--; emu::mb_check(m); }
CUEMU_NOSAN inline void mbar_arrive(uint64_t* b) { cuemu::Quiet q_; if (cuemu::hook_release) cuemu::hook_release(b); auto& m = emu::mb(b); if (!m.pending) cuemu::fail("mbarrier: more arrivals than its count"); m.pending--; emu::mb_check(m); }
namespace emu {
// Threads that poll keep each other running: a deadlock is many polls in which nothing else happened.
CUEMU_NOSAN inline void poll(const char* what, const char* file, int line) {
  const unsigned long long now = events + cuemu::n_coll + cuemu::n_blocks;
  if (now != events_seen) { events_seen = now; idle_polls = 0; }
  if (++idle_polls > 1000000) { idle_polls = 0; cuemu::fail("deadlock: %s at %s:%d, and nothing else happens", what, file, line); }
  cuemu::poll_yield(what, file, line);
}
}  // namespace emu
CUEMU_NOSAN inline void mbar_wait(uint64_t* b, int parity, CUEMU_LOC) {
  auto& m = emu::mb(b);
  while ((m.count_phase & 1) == parity) { cuemu::async_poll(); if ((m.count_phase & 1) != parity) break; emu::poll("mbarrier wait", file_, line_); }
  emu::events++;
  if (cuemu::hook_acquire) cuemu::hook_acquire(b);
}
CUEMU_NOSAN inline bool mbar_try(uint64_t* b, int parity) {  // mbarrier.try_wait for code translated from PTX
  auto& m = emu::mb(b); if ((m.count_phase & 1) == parity) cuemu::async_poll();
  bool ok = (m.count_phase & 1) != parity; if (ok) { if (cuemu::hook_acquire) cuemu::hook_acquire(b); } else emu::poll("mbarrier.try_wait", "ptx", 0);
  return ok;
}
CUEMU_NOSAN inline void fence_proxy_async() { if (cuemu::hook_proxy_fence) cuemu::hook_proxy_fence(); }
template <int N> inline void more_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
template <int N> inline void fewer_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
inline void named_barrier_sync(int id, int threads, CUEMU_LOC) { cuemu::bar_sync(id, threads, true, "bar.sync", file_, line_); }
inline void named_barrier_arrive(int id, int threads, CUEMU_LOC) { cuemu::bar_sync(id, threads, false, "bar.arrive", file_, line_); }

// ---- TMA ------------------------------------------------------------------------------------------------------------
namespace emu {
CUEMU_NOSAN inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, std::array<int, 5> at, uint32_t rank) {
  cuemu::Quiet q_;
  auto* t = (const cuemu::TensorMap*)map;
  if (t->magic != cuemu::kTensorMap) cuemu::fail("TMA: not a tensor map");
  if (t->rank != rank) cuemu::fail("TMA: %u coordinates for a map of rank %u", rank, t->rank);
  const uint32_t alignment = t->swizzle ? 128u << t->swizzle : 128u;
  if (smem_u32(dst) % alignment) cuemu::fail("TMA: destination is not %u-byte aligned (its swizzle needs it)", alignment);
  size_t bytes = t->element; for (uint32_t d = 0; d < rank; d++) bytes *= t->box[d];
  if (smem_u32(dst) + bytes > cuemu::dyn_smem_size()) cuemu::fail("TMA: box ends past shared memory");
  if (cuemu::hook_access) cuemu::hook_access(dst, bytes, true, false, cuemu::pc());
  if (cuemu::hook_cp) cuemu::hook_cp(dst, bytes, false);
  memset(dst, 0xff, bytes);
  cuemu::Thread* who = cuemu::self;
  cuemu::async_push([=, m = *t] {
    const size_t line = (size_t)m.box[0] * m.element;  // what lies together
    for (size_t o = 0; o < bytes; o += line) {
      size_t rest = o / line; const unsigned char* from = m.base; bool inside = true;
      for (uint32_t d = 1; d < rank; d++) {
        const int64_t i = at[d] + (int64_t)(rest % m.box[d]); rest /= m.box[d];
        inside &= i >= 0 && i < (int64_t)m.dim[d]; from += i * (int64_t)m.stride[d - 1]; }
      for (size_t c = 0; c < line; c += m.element) {
        const int64_t i = at[0] + (int64_t)(c / m.element);
        unsigned char* to = cuemu::dyn_smem() + swizzled(smem_u32(dst) + (uint32_t)(o + c), m.swizzle);
        if (inside && i >= 0 && i < (int64_t)m.dim[0]) memcpy(to, from + i * m.element, m.element); else memset(to, 0, m.element); } }
    auto* s = cuemu::self; cuemu::self = who;
    if (cuemu::hook_cp) cuemu::hook_cp(dst, bytes, true);
    if (cuemu::hook_proxy_write) cuemu::hook_proxy_write(dst, bytes);
    if (cuemu::hook_release) cuemu::hook_release(bar);
    cuemu::self = s;
    auto& b = mb(bar); b.tx -= (int)bytes; mb_check(b);
  });
}
}  // namespace emu
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1) { emu::tma_load(dst, map, bar, {c0, c1}, 2); }
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2) { emu::tma_load(dst, map, bar, {c0, c1, c2}, 3); }
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) { emu::tma_load(dst, map, bar, {c0, c1, c2, c3}, 4); }

// ---- wgmma, as hopper.cuh has it ------------------------------------------------------------------------------------
CUEMU_NOSAN inline void wgmma_fence() { cuemu::Quiet q_; if (cuemu::self->lin % 128 == 0) emu::warpgroup().fenced = true; }
template <typename T, int kTransposeB, int kCount> CUEMU_NOSAN inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, CUEMU_LOC) {
  emu::wgmma({d, nullptr, a, b, 2 * kCount, std::is_same_v<T, __half>, accumulate, false, kTransposeB != 0}, file_, line_); }
template <typename T, int kTransposeB, int kCount> CUEMU_NOSAN inline void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate, CUEMU_LOC) {
  emu::wgmma({d, a, 0, b, 2 * kCount, std::is_same_v<T, __half>, accumulate, false, kTransposeB != 0}, file_, line_); }
CUEMU_NOSAN inline void wgmma_commit(CUEMU_LOC) { cuemu::group_coll(emu::wgi(), 128, [](void**, int) { emu::warpgroup().fenced = false; cuemu::wg_commit(emu::wgi()); }, nullptr, "wgmma.commit", file_, line_); }
template <int N> CUEMU_NOSAN inline void wgmma_wait(CUEMU_LOC) { cuemu::group_coll(emu::wgi(), 128, [](void**, int) { cuemu::wg_wait(emu::wgi(), N); }, nullptr, "wgmma.wait", file_, line_); }
}  // namespace restore_ext::cuda

// ---- the driver's door to tensor maps -------------------------------------------------------------------------------
inline CUresult cuemu_encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                   const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int bits[] = {0, 1, 2, 3};
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16) return CUDA_ERROR_NOT_SUPPORTED;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_NOT_SUPPORTED;
  if ((uintptr_t)map % 64 || (uintptr_t)base % 16 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  cuemu::TensorMap t{cuemu::kTensorMap, rank, 2, (uint32_t)bits[swizzle], (const unsigned char*)base, {}, {}, {}};
  for (cuuint32_t d = 0; d < rank; d++) {
    if (!dims[d] || dims[d] > 1ull << 32 || !box[d] || box[d] > 256 || steps[d] != 1) return CUDA_ERROR_INVALID_VALUE;
    if (d && (strides[d - 1] % 16 || !strides[d - 1] || strides[d - 1] >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
    t.dim[d] = (uint32_t)dims[d]; t.box[d] = (uint16_t)box[d]; if (d) t.stride[d - 1] = strides[d - 1]; }
  if (box[0] * 2 % 16 || (t.swizzle && box[0] * 2 != 16u << t.swizzle)) return CUDA_ERROR_INVALID_VALUE;  // a narrower box is legal, and not emulated
  memcpy((void*)map, &t, sizeof t);
  return CUDA_SUCCESS;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? (void*)cuemu_encode_tiled : nullptr; *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorSymbolNotFound;
}
