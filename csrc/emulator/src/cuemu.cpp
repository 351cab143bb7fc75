// Scheduler and runtime of cuemu. One OS thread; one CUDA block at a time; one fiber per CUDA thread.
#include "cuemu.h"
#include <cuda.h>
#include "cuemu_hopper.h"
#include "ptx_rt.h"
#include "symbols.h"
#include <dlfcn.h>
#include <cstdarg>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#define CUEMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUEMU_ASAN 1
#endif
#endif
#ifdef CUEMU_ASAN
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#error "cuemu's fiber switch is written for x86-64"
#endif
extern "C" void cuemu_switch(void** save, void* load);
asm(".text\n.globl cuemu_switch\n.type cuemu_switch,@function\ncuemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size cuemu_switch,.-cuemu_switch\n");
extern "C" __attribute__((weak)) char __start_cuemu_shared[], __stop_cuemu_shared[];

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
namespace cuemu {
Thread* self;
int quiet;
unsigned long long n_switch, n_coll, n_blocks;
char* stacks;
size_t stacks_bytes;
unsigned char *arena, *dyn;  // arena: STATIC_SHARED objects; dyn: dynamic shared memory, an exact allocation per launch
size_t arena_bytes = 256 << 10, dyn_bytes;
void hook_block(int nthreads) __attribute__((weak));
void hook_bar(int id, const int* who, int n) __attribute__((weak));  // n == all: everything before is ordered before everything after
void hook_launch() __attribute__((weak));
void hook_memset(const void* p, size_t n) __attribute__((weak));
void hook_thread_exit() __attribute__((weak));

namespace {
constexpr int MAXT = 1024;
#ifdef CUEMU_ASAN
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
#ifdef CUEMU_ASAN
const void* main_bottom; size_t main_size;
#endif
Thread T[MAXT];
struct Warp { unsigned waiting, live; } W[32];
struct Bar { int arrived; int expected; std::vector<int> wait; const char* file; int line; } B[16];
int runq[4096], qh, qt, nthreads, live, red[2];
void* main_sp;
const std::function<void()>* body;
bool failed;
std::string err;
int last_error;
uint64_t rng = 1;
int mode;  // 0 first-in-first-out, 1 random
std::unordered_map<const void*, int> smem_limit;
std::map<const void*, std::pair<size_t, size_t>> slots;
size_t slot_top;
std::mutex mu;
struct Cp { void* dst; const void* src; int bytes, valid; };
std::vector<std::vector<std::vector<Cp>>> cpq;  // per thread: committed groups, last one open

uint64_t rnd() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return rng; }
int env(const char* n, int d) { const char* s = getenv(n); return s && *s ? atoi(s) : d; }
CUEMU_NOSAN inline void push(int i) { runq[qt++ & 4095] = i; }

CUEMU_NOSAN void go(void** save, void* to, Thread* next) {
  n_switch++;
#ifdef CUEMU_ASAN
  void* fake = nullptr;
  if (next) __sanitizer_start_switch_fiber(&fake, stacks + (size_t)next->lin * STACK, STACK);
  else __sanitizer_start_switch_fiber(&fake, main_bottom, main_size);
#endif
  if (next) { self = next; threadIdx = next->tid; }
  cuemu_switch(save, to);
#ifdef CUEMU_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
CUEMU_NOSAN void describe() {  // who waits where
  std::map<std::string, std::string> at;
  for (int i = 0; i < nthreads; i++) if (T[i].st != 4) {
    char k[256], v[32];
    snprintf(k, sizeof k, "%s at %s:%d%s", T[i].what ? T[i].what : "running", T[i].file ? T[i].file : "?", T[i].line, "");
    if (T[i].st == 1) { char m[32]; snprintf(m, sizeof m, " mask %08x", T[i].mask); strncat(k, m, 40); }
    snprintf(v, sizeof v, " %d", i);
    if (at[k].size() < 120) at[k] += v;
  }
  for (auto& [k, v] : at) err += "\n    " + k + ": threads" + v;
}
CUEMU_NOSAN void next_thread(void** save) {  // leave the current fiber
  if (failed) { go(save, main_sp, nullptr); return; }
  while (qh != qt) {
    if (mode == 1) std::swap(runq[qh & 4095], runq[(qh + rnd() % (qt - qh)) & 4095]);
    Thread* t = &T[runq[qh++ & 4095]];
    if (save == &t->sp) return;
    go(save, t->sp, t);
    return;
  }
  if (live) { failed = true; err = "deadlock: no thread can run"; describe(); }
  go(save, main_sp, nullptr);
}
void finish_bar(int id) {
  Bar& b = B[id];
  if (id == 0) {
    red[1] = red[0]; red[0] = 0;
    if (live < nthreads && env("CUEMU_STRICT", 1)) fail("%d threads of the block exited before the barrier at %s:%d", nthreads - live, b.file, b.line);
  }
  if (hook_bar) { b.wait.push_back(self->lin); hook_bar(id, b.wait.data(), b.wait.size() == (size_t)live ? -1 : (int)b.wait.size()); b.wait.pop_back(); }
  if (mode == 1) for (size_t i = b.wait.size(); i > 1; i--) std::swap(b.wait[i - 1], b.wait[rnd() % i]);
  for (int i : b.wait) { T[i].st = 0; push(i); }
  b.wait.clear(); b.arrived = 0; b.file = nullptr;
}
CUEMU_NOSAN void entry() {
#ifdef CUEMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  (*body)();
  Thread* t = self;
  if (!cpq[t->lin].empty()) for (auto& g : cpq[t->lin]) if (!g.empty()) { fail("thread exited with cp.async copies not waited for"); }
  t->st = 4; live--; W[t->warp].live &= ~(1u << t->lane);
  if (hook_thread_exit) hook_thread_exit();
  if (B[0].arrived && B[0].arrived == live) {
    if (env("CUEMU_STRICT", 1)) fail("threads exited while others wait at __syncthreads (%s:%d)", B[0].file, B[0].line);
    finish_bar(0);
  }
  next_thread(&t->sp);
  abort();
}
}  // namespace

void fail(const char* fmt, ...) {
  char b[600]; va_list a; va_start(a, fmt); vsnprintf(b, sizeof b, fmt, a); va_end(a);
  if (!failed) {
    failed = true; err = b;
    if (self) { snprintf(b, sizeof b, "\n    block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, self->tid.x, self->tid.y, self->tid.z); err += b; }
  }
  if (self) { void* dummy; go(&dummy, main_sp, nullptr); }
  abort();
}
CUEMU_NOSAN void coll(unsigned mask, CollFn fn, void* arg, const char* what, const char* file, int line) {
  Thread& t = *self; Warp& w = W[t.warp];
  t.mask = mask; t.fn = fn; t.arg = arg; t.what = what; t.file = file; t.line = line;
  if (!(mask >> t.lane & 1)) fail("%s at %s:%d: the calling lane is not in its mask %08x", what, file, line, mask);
  if (mask & ~w.live) fail("%s at %s:%d: mask %08x names exited or absent lanes (live %08x)", what, file, line, mask, w.live);
  w.waiting |= 1u << t.lane;
  Thread* w0 = &T[t.warp * 32];
  if ((w.waiting & mask) == mask) {
    bool ok = true;
    void* args[32];
    for (int i = 0; i < 32; i++) if (mask >> i & 1) { if (w0[i].fn != fn || w0[i].mask != mask) { ok = false; break; } args[i] = w0[i].arg; }
    if (ok) {
      n_coll++;
      { Quiet q; fn(args, mask); }
      w.waiting &= ~mask;
      for (int i = 0; i < 32; i++) if ((mask >> i & 1) && i != t.lane) { w0[i].st = 0; push(w0[i].lin); }
      t.what = nullptr;
      return;
    }
  }
  t.st = 1;
  next_thread(&t.sp);
  t.what = nullptr;
}
CUEMU_NOSAN void bar_sync(int id, int expected, bool wait, const char* what, const char* file, int line) {
  Thread& t = *self; Bar& b = B[id];
  int need = expected ? expected : live;
  if (b.arrived && id == 0 && b.file && (b.line != line || strcmp(b.file, file)) && env("CUEMU_STRICT", 1))
    fail("%s at %s:%d while other threads wait at %s:%d (divergent barrier)", what, file, line, b.file, b.line);
  b.file = file; b.line = line;
  t.what = what; t.file = file; t.line = line; t.bar = id;
  if (++b.arrived == need) { finish_bar(id); if (mode == 1) { push(t.lin); next_thread(&t.sp); } t.what = nullptr; return; }
  if (!wait) return;
  b.wait.push_back(t.lin); t.st = 2;
  next_thread(&t.sp);
  t.what = nullptr;
}
CUEMU_NOSAN void poll_yield(const char* what, const char* file, int line) {
  Thread& t = *self; t.what = what; t.file = file; t.line = line;
  static int spins; if (qh == qt) { if (++spins > 100000) fail("livelock: %s at %s:%d polls and no other thread can run", what, file, line); } else spins = 0;
  push(t.lin); next_thread(&t.sp); t.what = nullptr;
}
// ---- asynchronous engines (TMA, wgmma) and 128-thread collectives ---------------------------------------------------
static std::vector<std::function<void()>> engine;
static struct { std::vector<std::function<void()>> open; std::vector<std::vector<std::function<void()>>> groups; } wgq[8];
static struct { void* args[128]; int n; std::vector<int> wait; } grp[8];
void async_push(std::function<void()> f) { engine.push_back(std::move(f)); }
void async_poll() {
  if (engine.empty()) return;
  size_t i = mode == 1 ? rnd() % engine.size() : 0;
  auto f = std::move(engine[i]); engine.erase(engine.begin() + i); Quiet q; f();
}
void wg_push(int g, std::function<void()> f) { wgq[g].open.push_back(std::move(f)); }
void wg_commit(int g) { wgq[g].groups.push_back(std::move(wgq[g].open)); wgq[g].open.clear(); }
void wg_wait(int g, int n) { auto& q = wgq[g].groups; while ((int)q.size() > n) { for (auto& f : q.front()) f(); q.erase(q.begin()); } }
void group_coll(int g, int n, void (*fn)(void**, int), void* arg, const char* what, const char* file, int line) {
  Thread& t = *self; auto& G = grp[g];
  t.what = what; t.file = file; t.line = line; G.args[t.lin % n] = arg;
  if (++G.n == n) { G.n = 0; { Quiet q; fn(G.args, n); } for (int i : G.wait) { T[i].st = 0; push(i); } G.wait.clear(); t.what = nullptr; return; }
  G.wait.push_back(t.lin); t.st = 2; next_thread(&t.sp); t.what = nullptr;
}
unsigned char* dyn_smem() { return dyn; }
size_t dyn_smem_size() { return dyn_bytes; }
int* bar_red() { return red; }
CUEMU_NOSAN void* shared_slot(const void* key, size_t bytes, size_t align) {
  auto it = slots.find(key);
  if (it == slots.end()) {
    slot_top = (slot_top + align - 1) / align * align;
    it = slots.emplace(key, std::make_pair(slot_top, bytes)).first;
    slot_top += bytes;
    if (slot_top > arena_bytes) fail("static shared memory arena is full");
  }
  return arena + it->second.first;
}
int set_smem_limit(const void* key, int bytes) {
  if (bytes > env("CUEMU_SMEM_MAX", 232448)) { err = "a block cannot have " + std::to_string(bytes) + " bytes of shared memory"; return last_error = cudaErrorInvalidValue; }
  smem_limit[key] = bytes; return 0;
}
CUEMU_NOSAN void cp_async(void* dst, const void* src, int bytes, int valid) {
  if (((uintptr_t)dst | (uintptr_t)(valid ? src : dst)) % bytes) fail("cp.async: %d-byte copy is misaligned (dst %p src %p)", bytes, dst, src);
  if (hook_access) { if (valid) hook_access(src, valid, false, false, __builtin_return_address(0)); hook_access(dst, bytes, true, false, __builtin_return_address(0)); }
  auto& q = cpq[self->lin];
  if (q.empty()) q.emplace_back();
  q.back().push_back({dst, src, bytes, valid});
  if (hook_cp) hook_cp(dst, bytes, false);
  memset(dst, 0xff, bytes);  // until the wait, readers see NaNs
}
CUEMU_NOSAN void cp_commit() { auto& q = cpq[self->lin]; if (q.empty()) q.emplace_back(); q.emplace_back(); }
CUEMU_NOSAN void cp_wait(int n) {  // all but the n latest committed groups land
  auto& q = cpq[self->lin];
  int done = (int)q.size() - 1 - n;
  if (n < 0) done = (int)q.size();
  for (int g = 0; g < done; g++) for (Cp& c : q[g]) { if (hook_cp) hook_cp(c.dst, c.bytes, true); memset(c.dst, 0, c.bytes); memcpy(c.dst, c.src, c.valid); }
  if (done > 0) q.erase(q.begin(), q.begin() + done);
}
int launch(const void* key, dim3 grid, dim3 block, size_t smem, const std::function<void()>& f) {
  std::lock_guard<std::mutex> lock(mu);
  nthreads = block.x * block.y * block.z;
  failed = false; err = "launch refused: " + std::to_string(nthreads) + " threads, grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(smem) + " bytes of dynamic shared memory";
  auto lim = smem_limit.find(key);
  if (nthreads < 1 || nthreads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.z > 64)
    return last_error = cudaErrorInvalidConfiguration;
  if (smem > (size_t)(lim == smem_limit.end() ? 49152 : lim->second)) return last_error = cudaErrorInvalidValue;
  if (!stacks) {
    stacks_bytes = STACK * MAXT;
    stacks = (char*)mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    arena = (unsigned char*)aligned_alloc(1024, arena_bytes);
    mode = env("CUEMU_SHUFFLE", 0) != 0; rng = 0x9e3779b97f4a7c15ull * (env("CUEMU_SHUFFLE", 0) + 1) | 1;
  }
#ifdef CUEMU_ASAN
  pthread_attr_t at; pthread_getattr_np(pthread_self(), &at);
  pthread_attr_getstack(&at, const_cast<void**>(&main_bottom), &main_size); pthread_attr_destroy(&at);
#endif
  blockDim = block; gridDim = grid; body = &f;
  dyn_bytes = smem; dyn = nullptr;
  if (smem) {
#ifdef CUEMU_ASAN
    dyn = (unsigned char*)aligned_alloc(1024, (smem + 3071) / 1024 * 1024);
    ASAN_POISON_MEMORY_REGION(dyn + smem, (smem + 3071) / 1024 * 1024 - smem);
#else
    dyn = (unsigned char*)aligned_alloc(1024, (smem + 3071) / 1024 * 1024);
#endif
  }
  cpq.assign(nthreads, {});
  failed = false; quiet = 0; err.clear();
  if (hook_launch) hook_launch();
  size_t nb = (size_t)grid.x * grid.y * grid.z;
  std::vector<size_t> order;
  if (mode == 1) { order.resize(nb); for (size_t i = 0; i < nb; i++) order[i] = i; for (size_t i = nb; i > 1; i--) std::swap(order[i - 1], order[rnd() % i]); }
  for (size_t bi = 0; bi < nb && !failed; bi++) {
    size_t b = mode == 1 ? order[bi] : bi;
    blockIdx.x = b % grid.x; blockIdx.y = b / grid.x % grid.y; blockIdx.z = b / grid.x / grid.y;
    n_blocks++;
    if (dyn) memset(dyn, 0xff, smem);
    memset(arena, 0xff, slot_top);
    if (__start_cuemu_shared) memset(__start_cuemu_shared, 0xff, __stop_cuemu_shared - __start_cuemu_shared);
    qh = qt = 0; live = nthreads; red[0] = 0;
    for (auto& x : B) { x.arrived = 0; x.wait.clear(); x.file = nullptr; }
    memset(W, 0, sizeof W);
    engine.clear(); for (auto& q : wgq) { q.open.clear(); q.groups.clear(); } for (auto& g : grp) { g.n = 0; g.wait.clear(); }
#ifdef CUEMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(stacks, (size_t)nthreads * STACK);  // frames of the previous block were never left
#endif
    for (int i = 0; i < nthreads; i++) {
      Thread& t = T[i];
      t = Thread{};
      t.tid.x = i % block.x; t.tid.y = i / block.x % block.y; t.tid.z = i / block.x / block.y;
      t.lin = i; t.lane = i & 31; t.warp = i >> 5;
      W[t.warp].live |= 1u << t.lane;
      void** sp = (void**)(stacks + (size_t)(i + 1) * STACK - 64);
      *--sp = nullptr;
      *--sp = (void*)entry;
      for (int k = 0; k < 6; k++) *--sp = nullptr;
      t.sp = sp;
      push(i);
      cpq[i].clear();
    }
    if (hook_block) hook_block(nthreads);
    next_thread(&main_sp);
    self = nullptr;
  }
#ifdef CUEMU_ASAN
  if (dyn) ASAN_UNPOISON_MEMORY_REGION(dyn, (smem + 3071) / 1024 * 1024);
#endif
  free(dyn); dyn = nullptr;
  if (failed) { fprintf(stderr, "cuemu: %s\n", err.c_str()); return last_error = cudaErrorLaunchFailure; }
  return 0;
}
// ---- kernels translated from PTX (ptx2cpp.py); used when CUEMU_PTX=1 -------------------------------------------------
static std::map<std::string, PtxKernel>& ptx_table() {
  static std::map<std::string, PtxKernel> table;
  return table;
}
void ptx_register(const char* name, const PtxKernel& kernel) {
  // Unnamed namespaces of two files look alike here: a name that stands for two kernels runs neither.
  const auto [at, fresh] = ptx_table().emplace(name, kernel);
  if (!fresh) at->second.run = nullptr;
}
unsigned long long n_ptx;

static int refused(const std::string& why) {
  err = why;
  fprintf(stderr, "cuemu: %s\n", why.c_str());
  return last_error = cudaErrorInvalidDeviceFunction;
}

int ptx_launch(const void* key, dim3 grid, dim3 block, size_t smem, const unsigned char* parameters,
               size_t bytes) {
  if (!env("CUEMU_PTX", 0) || ptx_table().empty()) return -1;
  const std::string name = symbol_name(key);
  const auto found = ptx_table().find(name);
  if (found == ptx_table().end()) return refused("no PTX of the kernel " + name);
  const PtxKernel& kernel = found->second;
  if (!kernel.run) return refused("two kernels are called " + name + "; rename one");
  if (kernel.parameter_bytes != bytes) return refused("PTX lays out the parameters of " + name + " differently");
  if (block.x * block.y * block.z > (unsigned)kernel.threads) return refused("more threads than __launch_bounds__ of " + name);
  const auto limit = smem_limit.find(key);
  const int allowed = limit == smem_limit.end() ? 49152 : limit->second;
  if (smem > (size_t)allowed || smem + kernel.shared_bytes > (size_t)env("CUEMU_SMEM_MAX", 232448))
    return last_error = cudaErrorInvalidValue;
  n_ptx++;
  smem_limit[key] = allowed + (int)kernel.shared_bytes;
  const int result = launch(key, grid, block, smem + kernel.shared_bytes, [&] { kernel.run(parameters); });
  smem_limit[key] = allowed;
  return result;
}
}  // namespace cuemu

extern "C" {
cudaError_t cudaGetLastError() { int e = cuemu::last_error; cuemu::last_error = 0; return (cudaError_t)e; }
cudaError_t cudaPeekAtLastError() { return (cudaError_t)cuemu::last_error; }
cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = cuemu::env("CUEMU_SMS", 4); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = cuemu::env("CUEMU_SMEM_MAX", 232448); break;
    case cudaDevAttrComputeCapabilityMajor: *v = cuemu::env("CUEMU_CC", 90) / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = cuemu::env("CUEMU_CC", 90) % 10; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { memset(p, v, n); if (cuemu::hook_memset) cuemu::hook_memset(p, n); return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t e) { return e ? (cuemu::err.empty() ? "cuemu: launch refused" : cuemu::err.c_str()) : "no error"; }
void cuemu_seed(int s) { cuemu::mode = s != 0; cuemu::rng = 0x9e3779b97f4a7c15ull * (s + 1) | 1; if (!cuemu::stacks) { char b[16]; snprintf(b, 16, "%d", s); setenv("CUEMU_SHUFFLE", b, 1); } }
void cuemu_stats(unsigned long long* o) { o[0] = cuemu::n_switch; o[1] = cuemu::n_coll; o[2] = cuemu::n_blocks; o[3] = cuemu::n_ptx; }
const char* cuemu_error() { return cuemu::err.c_str(); }
}
