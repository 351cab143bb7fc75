// What Hopper does behind a block's back, and how threads wait for it: the engines' doors and the
// twins of csrc/cuda/hopper.cuh's mbarriers, proxies and named barriers. Everything asynchronous is
// done as late as the program allows.
#pragma once
#include "cuemu.h"
#include "cuemu_ptx.h"

namespace cuemu {

struct Mbar {  // in shared memory
  int32_t tx;
  uint16_t pending;
  uint16_t count_phase;  // count << 1 | phase
};
static_assert(sizeof(Mbar) == 8);

extern unsigned long long n_blocks, n_coll;
void async_push(std::function<void()> f);  // the block's copy engine; runs when a thread polls
void async_poll();
void group_coll(int group, int n, void (*fn)(void** args, int n), void* arg, const char* what,
                const char* file, int line);
void wg_push(int group, std::function<void()> f);  // pending wgmma of a warpgroup
void wg_commit(int group);
void wg_wait(int group, int n);

// Of the checker; the async proxy is how TMA and wgmma see shared memory.
void hook_release(const void* sync) __attribute__((weak));
void hook_acquire(const void* sync) __attribute__((weak));
void hook_cp(const void* dst, size_t n, bool landed) __attribute__((weak));
void hook_proxy_fence() __attribute__((weak));  // fence.proxy.async by this thread
void hook_proxy_write(const void* p, size_t n) __attribute__((weak));  // by the copy engine
void hook_proxy_read(const void* p, size_t n, const void* pc) __attribute__((weak));

}  // namespace cuemu

namespace restore_ext::cuda {

inline uint32_t smem_u32(const void* p) {  // dynamic shared memory starts at address 0
  return (uint32_t)((const unsigned char*)p - cuemu::dyn_smem());
}

namespace emu {

// 16-byte chunks within 2^bits * 16 bytes change places with the 128-byte line they lie in.
inline uint32_t swizzled(uint32_t address, int bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

inline unsigned long long events, events_seen;  // of barriers: see poll
inline int idle_polls;

inline cuemu::Mbar& mb(uint64_t* b) {
  if ((uintptr_t)b & 7) cuemu::fail("mbarrier is not 8-byte aligned");
  return *(cuemu::Mbar*)b;
}

CUEMU_NOSAN inline void mb_check(cuemu::Mbar& m) {
  events++;
  if (m.pending == 0 && m.tx == 0) {
    m.count_phase ^= 1;
    m.pending = m.count_phase >> 1;
  }
}

}  // namespace emu

CUEMU_NOSAN inline void mbar_init(uint64_t* b, int count) {
  cuemu::Quiet q_;
  if (cuemu::hook_access) cuemu::hook_access(b, 8, true, true, cuemu::pc());
  auto& m = emu::mb(b);
  m.tx = 0;
  m.pending = count;
  m.count_phase = count << 1;
}

inline void fence_mbar_init() {}
CUEMU_NOSAN inline void mbar_expect_tx(uint64_t* b, int bytes) {
  cuemu::Quiet q_;
  if (cuemu::hook_release) cuemu::hook_release(b);
  auto& m = emu::mb(b);
  if (!m.pending) cuemu::fail("mbarrier: more arrivals than its count");
  m.tx += bytes;
  m.pending--;
  emu::mb_check(m);
}

CUEMU_NOSAN inline void mbar_arrive(uint64_t* b) {
  cuemu::Quiet q_;
  if (cuemu::hook_release) cuemu::hook_release(b);
  auto& m = emu::mb(b);
  if (!m.pending) cuemu::fail("mbarrier: more arrivals than its count");
  m.pending--;
  emu::mb_check(m);
}
namespace emu {

// Threads that poll keep each other running: a deadlock is many polls in which nothing else
// happened.
CUEMU_NOSAN inline void poll(const char* what, const char* file, int line) {
  const unsigned long long now = events + cuemu::n_coll + cuemu::n_blocks;
  if (now != events_seen) {
    events_seen = now;
    idle_polls = 0;
  }
  if (++idle_polls > 1000000) {
    idle_polls = 0;
    cuemu::fail("deadlock: %s at %s:%d, and nothing else happens", what, file, line);
  }
  cuemu::poll_yield(what, file, line);
}
}  // namespace emu

CUEMU_NOSAN inline void mbar_wait(uint64_t* b, int parity, CUEMU_LOC) {
  auto& m = emu::mb(b);
  while ((m.count_phase & 1) == parity) {
    cuemu::async_poll();
    if ((m.count_phase & 1) != parity) break;
    emu::poll("mbarrier wait", file_, line_);
  }
  emu::events++;
  if (cuemu::hook_acquire) cuemu::hook_acquire(b);
}

// mbarrier.try_wait, for what ptx2cpp.py writes.
CUEMU_NOSAN inline bool mbar_try(uint64_t* b, int parity, CUEMU_LOC) {
  auto& m = emu::mb(b);
  if ((m.count_phase & 1) == parity) cuemu::async_poll();
  bool ok = (m.count_phase & 1) != parity;
  if (ok) {
    if (cuemu::hook_acquire) cuemu::hook_acquire(b);
  } else
    emu::poll("mbarrier.try_wait", file_, line_);
  return ok;
}

CUEMU_NOSAN inline void fence_proxy_async() {
  if (cuemu::hook_proxy_fence) cuemu::hook_proxy_fence();
}

template <int N>
inline void more_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

template <int N>
inline void fewer_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

inline void named_barrier_sync(int id, int threads, CUEMU_LOC) {
  cuemu::bar_sync(id, threads, true, "bar.sync", file_, line_);
}

inline void named_barrier_arrive(int id, int threads, CUEMU_LOC) {
  cuemu::bar_sync(id, threads, false, "bar.arrive", file_, line_);
}

}  // namespace restore_ext::cuda
