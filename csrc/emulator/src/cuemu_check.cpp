// Checker: link this in and compile the kernels with -fsanitize=thread, but do NOT link libtsan: the compiler's
// instrumentation calls land here. Finds, per byte: races in shared and global memory (vector clocks: only barriers and
// __syncwarp order accesses; shuffles do not), reads of shared memory nothing wrote, reads of cp.async destinations
// before their wait, accesses outside registered buffers. Counts shared bank conflicts and global sectors per source line.
#ifdef CUEMU_CHECK
#include "cuemu.h"
#include <dlfcn.h>
#include <link.h>
#include <cxxabi.h>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>
extern "C" __attribute__((weak)) char __start_cuemu_shared[], __stop_cuemu_shared[];
namespace cuemu {
extern char* stacks; extern size_t stacks_bytes; extern unsigned char *arena, *dyn; extern size_t arena_bytes, dyn_bytes;
namespace {
struct Acc { const void* pc; uint32_t launch, block, epoch, clock; uint16_t t; bool atomic, by_copy_engine = false; };
struct Cell { Acc w, r[2]; bool written, pending; uint32_t life; };  // life: of the block whose memory it was
struct Buf { const char* lo; const char* hi; std::string name; std::vector<Cell> sh; };
std::vector<Cell> smem_sh;          // dyn, then arena, then the section
std::map<const char*, Buf> bufs;    // by end address
std::vector<uint32_t> vc;           // nt x nt
uint32_t epoch, launch_no, block_no, life;
int nt; bool vc_dirty; bool perf;
struct Inst { uint32_t mask = 0; const void* a[32]; };
struct Site { uint32_t cnt[32] = {}; std::map<uint32_t, Inst> open; int size; bool write, shared; };
std::unordered_map<uint64_t, Site> sites[32];
struct Stat { unsigned long long req = 0, ideal = 0, waves = 0; int size; bool write, shared; };
std::map<const void*, Stat> stats;

// What blocks know of each other. A thread that fences publishes what it knows of its own block; an
// atomic in global memory, by it or by a thread ordered after it, leaves that at the address; a thread
// that fences after an atomic there has taken it over. Both fences are needed: without the second a
// load may be served from a stale line of L1. Barriers pass all three on (fences are fence.sc).
struct Known { uint32_t epoch = 0; std::vector<uint32_t> clock; };  // of one block
using Places = std::set<const void*>;
struct Fenced { Known own; Places seen, taken; };  // published; read by atomics; read and fenced
std::map<const void*, std::map<uint32_t, Known>> published;  // place, block
std::vector<Fenced> fenced;  // by thread; empty until one fences or reads such a place

void add(Known& to, const Known& more) {
  to.epoch = std::max(to.epoch, more.epoch);
  if (to.clock.size() < more.clock.size()) to.clock.resize(more.clock.size());
  for (size_t i = 0; i < more.clock.size(); i++) to.clock[i] = std::max(to.clock[i], more.clock[i]);
}
bool covers(const Known& known, const Acc& a) {
  return a.epoch < known.epoch || (a.t < known.clock.size() && known.clock[a.t] >= a.clock);
}
bool taken_over(const Acc& a) {
  if (fenced.empty()) return false;
  for (const void* place : fenced[self->lin].taken) {
    const auto& blocks = published[place];
    const auto block = blocks.find(a.block);
    if (block != blocks.end() && covers(block->second, a)) return true;
  }
  return false;
}
void atomic_on(const void* place) {
  const bool left = published.count(place) != 0;
  if (fenced.empty() && !left) return;
  fenced.resize(nt);
  Fenced& me = fenced[self->lin];
  if (!me.own.clock.empty()) {
    auto& blocks = published[place];
    add(blocks[block_no], me.own);
    for (const void* other : Places(me.taken))
      if (other != place) for (auto& [block, known] : published[other]) add(blocks[block], known);
  }
  if (left) me.seen.insert(place);
}
void join_fenced(const int* who, int n) {  // n < 0: the whole block
  if (fenced.empty()) return;
  Fenced all;
  const int count = n < 0 ? nt : n;
  for (int i = 0; i < count; i++) {
    const Fenced& f = fenced[n < 0 ? i : who[i]];
    add(all.own, f.own);
    all.seen.insert(f.seen.begin(), f.seen.end());
    all.taken.insert(f.taken.begin(), f.taken.end());
  }
  for (int i = 0; i < count; i++) fenced[n < 0 ? i : who[i]] = all;
}

std::string where(const void* pc) {
  Dl_info d; char b[1024];
  if (!dladdr(pc, &d)) return "?";
  snprintf(b, sizeof b, "addr2line -i -e '%s' %p 2>/dev/null", d.dli_fname, (void*)((char*)pc - (char*)d.dli_fbase - 1));
  std::string best; FILE* f = popen(b, "r");
  while (f && fgets(b, sizeof b, f)) { std::string s(b); while (!s.empty() && (s.back() == '\n')) s.pop_back(); if (best.empty() || best.find("cuemu") != std::string::npos) best = s; }
  if (f) pclose(f);
  auto k = best.rfind('/'); return k == std::string::npos ? best : best.substr(k + 1);
}
bool ordered(const Acc& a) {
  if (a.launch != launch_no) return true;
  if (a.block != block_no) return taken_over(a);
  if (a.epoch < epoch || a.t == self->lin) return true;
  return vc[(size_t)self->lin * nt + a.t] >= a.clock;
}
void report(const char* kind, const char* space, size_t off, bool write, const void* pc, const Acc* o, bool owrite) {
  std::string m = std::string(kind) + ": " + (write ? "write" : "read") + " of " + space + " +" + std::to_string(off) + " at " + where(pc);
  if (o) { char b[96]; snprintf(b, sizeof b, " after %s by thread %d of block %u at ", owrite ? "write" : "read", o->t, o->block); m += b + where(o->pc); }
  if (o && o->block != block_no && o->launch == launch_no) m += " (blocks are ordered by __threadfence(), an atomic on one address in both, and a __threadfence() after the reader's)";
  fail("%s", m.c_str());
}
void touch(Cell& c, bool write, bool atomic, const void* pc, const char* space, size_t off) {
  Acc me{pc, launch_no, block_no, epoch, vc[(size_t)self->lin * nt + self->lin], (uint16_t)self->lin, atomic};
  if (c.pending && !write) report("cp.async destination used before its wait", space, off, write, pc, &c.w, true);
  if (!write && !c.written) report("uninitialised read", space, off, write, pc, nullptr, false);
  if (c.w.pc && !(atomic && c.w.atomic) && !ordered(c.w)) report("race", space, off, write, pc, &c.w, true);
  if (write) {
    for (auto& r : c.r) if (r.pc && !(atomic && r.atomic) && !ordered(r)) report("race", space, off, write, pc, &r, false);
    c.w = me; c.written = true;
  } else {
    int k = !c.r[0].pc || ordered(c.r[0]) ? 0 : !c.r[1].pc || ordered(c.r[1]) ? 1 : 2;
    if (k < 2) c.r[k] = me;
  }
}
void eval(const void* pc, Site& s, Inst& in) {
  Stat& st = stats[pc]; st.size = s.size; st.write = s.write; st.shared = s.shared; st.req++;
  if (s.shared) {
    int lanes = s.size <= 4 ? 32 : s.size == 8 ? 16 : 8;
    for (int g = 0; g < 32; g += lanes) {
      std::map<int, std::map<uintptr_t, int>> bank; int mx = 0; bool any = false;
      for (int l = g; l < g + lanes; l++) if (in.mask >> l & 1) { any = true;
        for (uintptr_t w = (uintptr_t)in.a[l] / 4; w <= ((uintptr_t)in.a[l] + s.size - 1) / 4; w++) bank[w & 31][w]++; }
      for (auto& b : bank) mx = std::max(mx, (int)b.second.size());
      if (any) { st.ideal++; st.waves += mx; }
    }
  } else {
    std::map<uintptr_t, int> sec; int n = 0;
    for (int l = 0; l < 32; l++) if (in.mask >> l & 1) { n++; for (uintptr_t w = (uintptr_t)in.a[l] / 32; w <= ((uintptr_t)in.a[l] + s.size - 1) / 32; w++) sec[w]++; }
    st.waves += sec.size(); st.ideal += (n * s.size + 31) / 32;
  }
}
void flush() {
  for (auto& w : sites) { for (auto& [k, s] : w) for (auto& [i, in] : s.open) eval((const void*)(k >> 1), s, in); w.clear(); }
}
}  // namespace

static std::map<const void*, std::vector<uint32_t>> sync_vc;  // mbarriers: release on arrive, acquire on wait
static const char* host_sp;  // kernel arguments live in the launching thread's stack frames
void hook_launch() { launch_no++; published.clear(); host_sp = (const char*)__builtin_frame_address(0); const char* p = getenv("CUEMU_PERF"); perf = p && *p == '1'; }
void hook_proxy_block();
void hook_block(int n) {
  if (perf) flush();
  block_no = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); nt = n; epoch = 0; vc_dirty = true; sync_vc.clear(); fenced.clear();
  const size_t bytes = dyn_bytes + arena_bytes + (__start_cuemu_shared ? __stop_cuemu_shared - __start_cuemu_shared : 0);
  if (smem_sh.size() < bytes) smem_sh.resize(bytes);
  life++;  // forgets the last block's cells
  vc.assign((size_t)n * n, 0); for (int i = 0; i < n; i++) vc[(size_t)i * n + i] = 1;
  hook_proxy_block();
}
static void join(const int* who, int n) {
  static std::vector<uint32_t> m; m.assign(nt, 0);
  for (int i = 0; i < n; i++) for (int k = 0; k < nt; k++) m[k] = std::max(m[k], vc[(size_t)who[i] * nt + k]);
  for (int i = 0; i < n; i++) { uint32_t* v = &vc[(size_t)who[i] * nt]; std::copy(m.begin(), m.end(), v); v[who[i]]++; }
}
void hook_bar(int, const int* who, int n) { join_fenced(who, n); if (n < 0) epoch++; else join(who, n); }
void hook_fence() {
  if (!self) return;
  fenced.resize(nt);
  Fenced& me = fenced[self->lin];
  uint32_t* clock = &vc[(size_t)self->lin * nt];
  add(me.own, {epoch, std::vector<uint32_t>(clock, clock + nt)});
  clock[self->lin]++;  // what this thread does from here on is not published
  me.taken.insert(me.seen.begin(), me.seen.end());
}
void hook_syncwarp(unsigned mask) { int who[32], n = 0; for (int i = 0; i < 32; i++) if (mask >> i & 1) who[n++] = self->warp * 32 + i; join_fenced(who, n); join(who, n); }
void hook_release(const void* b) { auto& v = sync_vc[b]; v.resize(nt); uint32_t* m = &vc[(size_t)self->lin * nt]; for (int k = 0; k < nt; k++) v[k] = std::max(v[k], m[k]); m[self->lin]++; }
void hook_acquire(const void* b) { auto& v = sync_vc[b]; v.resize(nt); uint32_t* m = &vc[(size_t)self->lin * nt]; for (int k = 0; k < nt; k++) if (k != self->lin) m[k] = std::max(m[k], v[k]); }
static Cell* alive(Cell* c, size_t n) {
  for (size_t i = 0; i < n; i++) if (c[i].life != life) { c[i] = Cell{}; c[i].life = life; }
  return c;
}
static Cell* smem_cell(const char* p, size_t n, size_t& off) {
  if (dyn && p >= (char*)dyn && p < (char*)dyn + dyn_bytes) { off = p - (char*)dyn; return off + n <= dyn_bytes ? alive(&smem_sh[off], n) : nullptr; }
  if (p >= (char*)arena && p < (char*)arena + arena_bytes) { off = p - (char*)arena; return alive(&smem_sh[dyn_bytes + off], n); }
  if (__start_cuemu_shared && p >= __start_cuemu_shared && p < __stop_cuemu_shared) { off = p - __start_cuemu_shared; return alive(&smem_sh[dyn_bytes + arena_bytes + off], n); }
  return nullptr;
}
void hook_cp(const void* dst, size_t n, bool landed) { size_t off; if (Cell* c = smem_cell((const char*)dst, n, off)) for (size_t i = 0; i < n; i++) { c[i].pending = !landed; if (landed) c[i].w.clock = vc[(size_t)self->lin * nt + self->lin], c[i].w.epoch = epoch; } }
// wgmma and TMA read through a proxy of their own: what a thread stored is theirs after its fence.proxy.async only.
static std::vector<uint32_t> proxy_fence;  // of each thread: its clock then
void hook_proxy_block() { proxy_fence.assign(nt, 0); }
void hook_proxy_fence() { proxy_fence.resize(nt); uint32_t& clock = vc[(size_t)self->lin * nt + self->lin]; proxy_fence[self->lin] = clock++; }
void hook_proxy_write(const void* p, size_t n) { size_t off; if (Cell* c = smem_cell((const char*)p, n, off)) for (size_t i = 0; i < n; i++) c[i].w.by_copy_engine = true; }
void hook_proxy_read(const void* p, size_t n, const void* pc) {
  proxy_fence.resize(nt); size_t off; Cell* c = smem_cell((const char*)p, n, off);
  for (size_t i = 0; c && i < n; i++) { const Acc& w = c[i].w;
    if (w.pc && !w.by_copy_engine && w.launch == launch_no && w.block == block_no && w.clock > proxy_fence[w.t]) report("no fence.proxy.async", "shared", off + i, false, pc, &w, true); }
}
void hook_memset(const void* q, size_t n) {
  const char* p = (const char*)q;
  auto it = bufs.upper_bound(p);
  if (it != bufs.end() && it->second.lo <= p) for (size_t i = 0; i < n && p + i < it->second.hi; i++) it->second.sh[p - it->second.lo + i].written = true;
}
void hook_access(const void* q, size_t n, bool write, bool atomic, const void* pc) {
  if (!self) return;
  const char* p = (const char*)q;
  if ((size_t)(p - stacks) < stacks_bytes || (size_t)(p - host_sp) < (1 << 20)) return;
  size_t off; bool shared = true;
  if (Cell* c = smem_cell(p, n, off)) { for (size_t i = 0; i < n; i++) touch(c[i], write, atomic, pc, "shared", off + i); }
  else {
    shared = false;
    if (atomic) atomic_on(p);
    const char* end = (char*)dyn + dyn_bytes;  // what follows is spare room of the emulator's own
    if (dyn && p >= end && p < end + 1024) report("out of bounds", "memory after the end of shared", p - end, write, pc, nullptr, false);
    auto it = bufs.upper_bound(p);
    if (it != bufs.end() && it->second.lo <= p) {
      Buf& b = it->second; off = p - b.lo;
      if (p + n > b.hi) report("out of bounds", b.name.c_str(), off, write, pc, nullptr, false);
      for (size_t i = 0; i < n; i++) touch(b.sh[off + i], write, atomic, pc, b.name.c_str(), off + i);
    } else {
      Dl_info d; 
      if (bufs.empty() || (!write && dladdr(q, &d))) return;
      if (it != bufs.end() && it->second.lo - p < 4096) report("out of bounds", ("memory before " + it->second.name).c_str(), it->second.lo - p, write, pc, nullptr, false);
      if (it != bufs.begin()) { --it; report("out of bounds", ("memory after the end of " + it->second.name).c_str(), p - it->second.hi, write, pc, nullptr, false); }
      report("out of bounds", "unknown memory", 0, write, pc, nullptr, false);
    }
  }
  if (perf && n <= 16) {
    Site& s = sites[self->warp][(uint64_t)pc << 1 | write]; s.size = n; s.write = write; s.shared = shared;
    uint32_t k = s.cnt[self->lane]++; Inst& in = s.open[k];
    in.mask |= 1u << self->lane; in.a[self->lane] = q;
    if (in.mask == 0xffffffffu) { eval(pc, s, in); s.open.erase(k); }
  }
}
}  // namespace cuemu
using namespace cuemu;
static inline void tsan_access(const void* p, size_t n, bool w, bool at, const void* pc) { if (!quiet) hook_access(p, n, w, at, pc); }
extern "C" {
void cuemu_register(const void* p, size_t n, int init, const char* name) {
  Buf b{(const char*)p, (const char*)p + n, name, std::vector<Cell>(n)}; for (auto& c : b.sh) c.written = init;
  bufs[b.hi] = std::move(b); }
void cuemu_unregister() { bufs.clear(); }
void cuemu_perf_report() {
  flush();
  std::map<std::string, Stat> by;
  for (auto& [pc, s] : stats) { char b[64]; snprintf(b, sizeof b, " %-6s %-5s %2dB", s.shared ? "shared" : "global", s.write ? "write" : "read", s.size); Stat& t = by[where(pc) + b]; t.shared = s.shared; t.req += s.req; t.ideal += s.ideal; t.waves += s.waves; }
  for (auto& [k, s] : by) printf("%-44s requests %8llu  %s per ideal %.2f\n", k.c_str(), s.req, s.shared ? "wavefronts" : "sectors   ", (double)s.waves / s.ideal);
  stats.clear(); fflush(stdout); }
#define RW(n) \
  void __tsan_read##n(void* p) { tsan_access(p, n, false, false, __builtin_return_address(0)); } \
  void __tsan_write##n(void* p) { tsan_access(p, n, true, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##n(void* p) { tsan_access(p, n, false, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { tsan_access(p, n, true, false, __builtin_return_address(0)); }
RW(1) RW(2) RW(4) RW(8) RW(16)
void __tsan_read_range(void* p, size_t n) { tsan_access(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { tsan_access(p, n, true, false, __builtin_return_address(0)); }
void* __tsan_memcpy(void* d, const void* s, size_t n) { tsan_access(s, n, false, false, __builtin_return_address(0)); tsan_access(d, n, true, false, __builtin_return_address(0)); return memcpy(d, s, n); }
void* __tsan_memset(void* d, int v, size_t n) { tsan_access(d, n, true, false, __builtin_return_address(0)); return memset(d, v, n); }
void __tsan_init() {}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }  // the guard of a local static
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
