// The checker. Kernels are compiled with -fsanitize=thread but NOT linked with its runtime: the
// compiler's calls land here. For every byte it knows the last write, two reads (a third at the
// same time may escape) and whether anything was written at all.
#ifdef CUEMU_CHECK
#include "check.h"

#include <dlfcn.h>

#include <map>

namespace cuemu {

Now now;
std::vector<uint32_t> clocks;

namespace {

struct Buffer {
  const char *begin, *end;
  std::string name;
  std::vector<Cell> cells;
};
std::map<const char*, Buffer> buffers;  // by end
std::vector<Cell> shared;               // dynamic, STATIC_SHARED, plain __shared__
uint32_t life;                          // counts blocks: shared memory forgets with each
std::map<const void*, std::vector<uint32_t>> released;  // at mbarriers
std::vector<uint32_t> proxy_fence;  // of each thread: its clock at its last fence.proxy.async
const char* host_stack;             // kernel parameters live there

bool ordered(const Access& a) {  // before what this thread does now
  if (a.launch != now.launch) return true;
  if (a.block != now.block) return known_to_block(a);
  if (a.epoch < now.epoch || a.thread == self->lin) return true;
  return clocks_of(self->lin)[a.thread] >= a.clock;
}

void touch(Cell& cell, bool write, bool atomic, const void* pc, const std::string& space,
           size_t offset) {
  const auto races = [&](const Access& a) { return a.pc && !(atomic && a.atomic) && !ordered(a); };
  if (cell.pending && !write)
    report("cp.async destination used before its wait", space, offset, write, pc, &cell.write,
           true);
  if (!write && !cell.written) report("uninitialised read", space, offset, write, pc);
  if (races(cell.write)) report("race", space, offset, write, pc, &cell.write, true);
  const Access me{pc,        now.launch,  now.block,
                  now.epoch, own_clock(), static_cast<uint16_t>(self->lin),
                  atomic,    false};
  if (!write) {
    for (Access& read : cell.reads) {
      if (read.pc && !ordered(read)) continue;
      read = me;
      return;
    }
    return;
  }
  for (const Access& read : cell.reads)
    if (races(read)) report("race", space, offset, write, pc, &read, false);
  cell.write = me;
  cell.written = true;
}

Cell* alive(size_t first, size_t count) {
  for (size_t i = first; i < first + count; i++) {
    if (shared[i].life == life) continue;
    shared[i] = Cell{};
    shared[i].life = life;
  }
  return &shared[first];
}

size_t plain_shared_bytes() {
  return __start_cuemu_shared ? __stop_cuemu_shared - __start_cuemu_shared : 0;
}

void touch_memory(const char* p, size_t bytes, bool write, bool atomic, const void* pc) {
  const char* end = reinterpret_cast<char*>(dynamic_shared) + dynamic_bytes;
  if (dynamic_shared && p >= end && p < end + kSpare)
    report("out of bounds", "memory after the end of shared", p - end, write, pc);
  auto found = buffers.upper_bound(p);
  if (found != buffers.end() && found->second.begin <= p) {
    Buffer& b = found->second;
    const size_t offset = p - b.begin;
    if (p + bytes > b.end) report("out of bounds", b.name, offset, write, pc);
    for (size_t i = 0; i < bytes; i++)
      touch(b.cells[offset + i], write, atomic, pc, b.name, offset + i);
    return;
  }
  Dl_info library;  // constants of the program may be read
  if (buffers.empty() || (!write && dladdr(p, &library))) return;
  // Named after the nearer neighbour.
  const bool none_before = found == buffers.begin();
  const char* end_before = none_before ? nullptr : std::prev(found)->second.end;
  if (found != buffers.end() && found->second.begin - p < 4096 &&
      (none_before || found->second.begin - p <= p - end_before))
    report("out of bounds", "memory before " + found->second.name, found->second.begin - p, write,
           pc);
  if (none_before) report("out of bounds", "unknown memory", 0, write, pc);
  report("out of bounds", "memory after the end of " + std::prev(found)->second.name,
         p - end_before, write, pc);
}

void join(const int* who, int n) {
  std::vector<uint32_t> all(thread_count);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < thread_count; k++) all[k] = std::max(all[k], clocks_of(who[i])[k]);
  for (int i = 0; i < n; i++) {
    std::copy(all.begin(), all.end(), clocks_of(who[i]));
    clocks_of(who[i])[who[i]]++;
  }
}

}  // namespace

Cell* shared_cells(const void* q, size_t bytes, size_t& offset) {
  const auto within = [&](const void* begin, size_t size) {
    offset = static_cast<const char*>(q) - static_cast<const char*>(begin);
    return begin && offset < size;
  };
  if (within(dynamic_shared, dynamic_bytes))
    return offset + bytes <= dynamic_bytes ? alive(offset, bytes) : nullptr;
  if (within(static_shared, kStaticShared)) return alive(dynamic_bytes + offset, bytes);
  if (within(__start_cuemu_shared, plain_shared_bytes()))
    return alive(dynamic_bytes + kStaticShared + offset, bytes);
  return nullptr;
}

std::string source_line(
    const void* pc) {  // of the kernel: the innermost that is not the emulator's
  Dl_info library;
  if (!dladdr(pc, &library)) return "?";
  const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(library.dli_fbase);
  char line[1024];
  snprintf(line, sizeof line, "addr2line -i -e '%s' %p 2>/dev/null", library.dli_fname,
           reinterpret_cast<void*>(offset - 1));
  FILE* pipe = popen(line, "r");
  std::string best;
  while (pipe && fgets(line, sizeof line, pipe)) {
    if (!best.empty() && best.find("cuemu") == std::string::npos) continue;
    best = line;
    best.resize(strcspn(line, "\n"));
  }
  if (pipe) pclose(pipe);
  return best.substr(best.rfind('/') + 1);
}

void report(const char* kind, const std::string& space, size_t offset, bool write, const void* pc,
            const Access* other, bool other_wrote) {
  const auto verb = [](bool wrote) { return std::string(wrote ? "write" : "read"); };
  std::string text = std::string(kind) + ": " + verb(write) + " of " + space + " +" +
                     std::to_string(offset) + " at " + source_line(pc);
  if (other) {
    text += " after " + verb(other_wrote) + " by thread " + std::to_string(other->thread) +
            " of block " + std::to_string(other->block) + " at " + source_line(other->pc);
    if (other->launch == now.launch && other->block != now.block)
      text +=
          " (blocks are ordered by __threadfence(), an atomic on one address in both, and a "
          "__threadfence() after the reader's)";
  }
  fail("%s", text.c_str());
}

// ---- hooks of the emulator ---------------------------------------------------------------------

void hook_launch() {
  now.launch++;
  forget_fences(true);
  host_stack = static_cast<const char*>(__builtin_frame_address(0));
  perf_launch();
}

void hook_block(int n) {
  perf_block();
  now.block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  now.epoch = 0;
  released.clear();
  forget_fences(false);
  const size_t bytes = dynamic_bytes + kStaticShared + plain_shared_bytes();
  if (shared.size() < bytes) shared.resize(bytes);
  life++;
  clocks.assign(static_cast<size_t>(n) * n, 0);
  for (int i = 0; i < n; i++) clocks_of(i)[i] = 1;
  proxy_fence.assign(n, 0);
}

void hook_bar(int, const int* who, int n) {
  fences_meet(who, n);
  if (n < 0)
    now.epoch++;
  else
    join(who, n);
}

void hook_syncwarp(unsigned mask) {
  int who[32], n = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) who[n++] = self->warp * 32 + i;
  fences_meet(who, n);
  join(who, n);
}

void hook_release(const void* barrier) {
  auto& known = released[barrier];
  known.resize(thread_count);
  for (int k = 0; k < thread_count; k++) known[k] = std::max(known[k], clocks_of(self->lin)[k]);
  own_clock()++;
}

void hook_acquire(const void* barrier) {
  auto& known = released[barrier];
  known.resize(thread_count);
  uint32_t* mine = clocks_of(self->lin);
  for (int k = 0; k < thread_count; k++)
    if (k != self->lin) mine[k] = std::max(mine[k], known[k]);
}

void hook_cp(const void* to, size_t bytes, bool landed) {
  size_t offset;
  Cell* cells = shared_cells(to, bytes, offset);
  for (size_t i = 0; cells && i < bytes; i++) {
    cells[i].pending = !landed;
    if (!landed) continue;
    cells[i].write.clock = own_clock();
    cells[i].write.epoch = now.epoch;
  }
}

// wgmma and TMA read through a proxy of their own: what a thread has stored is theirs after its
// fence.proxy.async only.
void hook_proxy_fence() { proxy_fence[self->lin] = own_clock()++; }

void hook_proxy_write(const void* p, size_t bytes) {
  size_t offset;
  Cell* cells = shared_cells(p, bytes, offset);
  for (size_t i = 0; cells && i < bytes; i++) cells[i].write.by_copy_engine = true;
}

void hook_proxy_read(const void* p, size_t bytes, const void* pc) {
  size_t offset;
  const Cell* cells = shared_cells(p, bytes, offset);
  for (size_t i = 0; cells && i < bytes; i++) {
    const Access& w = cells[i].write;
    if (w.pc && !w.by_copy_engine && w.launch == now.launch && w.block == now.block &&
        w.clock > proxy_fence[w.thread])
      report("no fence.proxy.async", "shared", offset + i, false, pc, &w, true);
  }
}

void hook_memset(const void* q, size_t bytes) {
  const char* p = static_cast<const char*>(q);
  const auto found = buffers.upper_bound(p);
  if (found == buffers.end() || found->second.begin > p) return;
  Buffer& b = found->second;
  for (size_t i = 0; i < bytes && p + i < b.end; i++) b.cells[p - b.begin + i].written = true;
}

void hook_access(const void* q, size_t bytes, bool write, bool atomic, const void* pc) {
  if (!self) return;
  const char* p = static_cast<const char*>(q);
  const auto after = [p](const char* begin) { return static_cast<size_t>(p - begin); };
  if (after(stacks) < kStack * kMaxThreads || after(host_stack) < 1 << 20) return;
  size_t offset;
  Cell* cells = shared_cells(p, bytes, offset);
  for (size_t i = 0; cells && i < bytes; i++)
    touch(cells[i], write, atomic, pc, "shared", offset + i);
  if (!cells) {
    if (atomic) atomic_on(p);
    touch_memory(p, bytes, write, atomic, pc);
  }
  count_access(p, bytes, write, cells != nullptr, pc);
}

}  // namespace cuemu

// ---- what the compiler calls, and the emulator's own C functions
// ---------------------------------

using namespace cuemu;

extern "C" {

void cuemu_register(const void* p, size_t bytes, int initialised, const char* name) {
  const char* begin = static_cast<const char*>(p);
  Buffer b{begin, begin + bytes, name, std::vector<Cell>(bytes)};
  for (Cell& cell : b.cells) cell.written = initialised;
  // Two tensors may be views of one storage: what overlaps is one buffer from here on.
  auto other = buffers.upper_bound(b.begin);
  while (other != buffers.end() && other->second.begin < b.end) {
    const Buffer old = std::move(other->second);
    other = buffers.erase(other);
    const auto first = std::min(b.begin, old.begin), past = std::max(b.end, old.end);
    std::vector<Cell> cells(past - first);
    std::copy(b.cells.begin(), b.cells.end(), cells.begin() + (b.begin - first));
    std::copy(old.cells.begin(), old.cells.end(), cells.begin() + (old.begin - first));
    b = {first, past, old.name, std::move(cells)};
  }
  buffers[b.end] = std::move(b);
}

void cuemu_unregister() { buffers.clear(); }

void cuemu_forget(const void* p) {
  const auto found = buffers.upper_bound(static_cast<const char*>(p));
  if (found != buffers.end() && found->second.begin == p) buffers.erase(found);
}

#define SEEN(p, bytes, write) \
  if (!quiet) hook_access(p, bytes, write, false, __builtin_return_address(0))
#define SEEN_BYTES(n)                                           \
  void __tsan_read##n(void* p) { SEEN(p, n, false); }           \
  void __tsan_write##n(void* p) { SEEN(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { SEEN(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { SEEN(p, n, true); }
SEEN_BYTES(1)
SEEN_BYTES(2)
SEEN_BYTES(4)
SEEN_BYTES(8)
SEEN_BYTES(16)
void __tsan_read_range(void* p, size_t bytes) { SEEN(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { SEEN(p, bytes, true); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  SEEN(from, bytes, false);
  SEEN(to, bytes, true);
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  SEEN(to, bytes, true);
  return memset(to, value, bytes);
}
// The guard of a local static.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
