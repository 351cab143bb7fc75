// The scheduler: one OS thread, one CUDA block at a time, one fiber per CUDA thread. What threads
// do together - warp collectives, barriers - is done by the last of them to come.
#include <sys/mman.h>

#include <cstdarg>
#include <map>

#include "block.h"
#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

// Saves this fiber's stack pointer and takes the other's. Not ucontext, which asks the kernel for
// the signal mask at every switch.
extern "C" void cuemu_switch(void** save, void* load);
asm(R"(
.text
.globl cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuemu_switch,.-cuemu_switch
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuemu {

Thread* self;
int quiet;
unsigned long long n_switch, n_coll, n_blocks;
Thread threads[kMaxThreads];
int thread_count;
bool failed, random_order;
std::string error;
char* stacks;

namespace {

enum State { kRunnable, kInCollective, kAtBarrier, kDone };

struct Warp {
  unsigned waiting, live;  // lanes
} warps[32];
struct Barrier {
  int arrived;
  std::vector<int> waiting;
  const char* file;
  int line;
} barriers[16];
struct Group {  // threads that act together, more than a warp
  void* arguments[128];
  int arrived;
  std::vector<int> waiting;
} groups[8];

int queue[4096];  // of runnable threads, a ring
int queue_head, queue_tail;
int live_count;
int reduction[2];  // of __syncthreads_count and its kind: so far, at the last barrier
void* scheduler;   // the stack pointer of run_threads
const std::function<void()>* body;
uint64_t random_state = 1;

// ---- switching ---------------------------------------------------------------------------------

CUEMU_NOSAN void go(void** save, void* to, Thread* next) {  // next: nullptr for the scheduler
  n_switch++;
  if (next) {
    self = next;
    threadIdx = next->tid;
  }
  cuemu_switch(save, to);
}

void describe() {  // who waits where
  std::map<std::string, std::string> waiting;
  for (int i = 0; i < thread_count; i++) {
    const Thread& t = threads[i];
    if (t.st == kDone) continue;
    char place[256], mask[32] = "";
    if (t.st == kInCollective) snprintf(mask, sizeof mask, " mask %08x", t.mask);
    snprintf(place, sizeof place, "%s at %s:%d%s", t.what ? t.what : "running",
             t.file ? t.file : "?", t.line, mask);
    std::string& who = waiting[place];
    if (who.size() < 120) who += " " + std::to_string(i);
  }
  for (const auto& [place, who] : waiting) error += "\n    " + place + ": threads" + who;
}

CUEMU_NOSAN void leave(void** save) {
  if (failed) return go(save, scheduler, nullptr);
  if (queue_head == queue_tail) {
    if (live_count) {
      failed = true;
      error = "deadlock: no thread can run";
      describe();
    }
    return go(save, scheduler, nullptr);
  }
  if (random_order) {
    const int other = queue_head + random_number() % (queue_tail - queue_head);
    std::swap(queue[queue_head & 4095], queue[other & 4095]);
  }
  Thread* next = &threads[queue[queue_head++ & 4095]];
  if (save != &next->sp) go(save, next->sp, next);
}

bool strict() { return setting("CUEMU_STRICT", 1); }

void open_barrier(int id) {
  Barrier& b = barriers[id];
  if (id == 0) {
    reduction[1] = reduction[0];
    reduction[0] = 0;
    if (live_count < thread_count && strict())
      fail("%d threads of the block exited before the barrier at %s:%d", thread_count - live_count,
           b.file, b.line);
  }
  if (hook_bar) {
    std::vector<int> met = b.waiting;
    met.push_back(self->lin);
    hook_bar(id, met.data(), static_cast<int>(met.size()) == live_count ? -1 : met.size());
  }
  if (random_order) {
    for (size_t i = b.waiting.size(); i > 1; i--)
      std::swap(b.waiting[i - 1], b.waiting[random_number() % i]);
  }
  for (int i : b.waiting) wake(i);
  b = {};
}

CUEMU_NOSAN void run_thread() {  // where a fiber begins; nothing returns from it
  (*body)();
  Thread* t = self;
  if (copies_left(t->lin)) fail("thread exited with cp.async copies not waited for");
  t->st = kDone;
  live_count--;
  warps[t->warp].live &= ~(1u << t->lane);
  if (barriers[0].arrived && barriers[0].arrived == live_count) {
    if (strict())
      fail("threads exited while others wait at __syncthreads (%s:%d)", barriers[0].file,
           barriers[0].line);
    open_barrier(0);
  }
  leave(&t->sp);
  abort();
}

CUEMU_NOSAN void say_where(Thread& t, const char* what, const char* file, int line) {
  t.what = what;
  t.file = file;
  t.line = line;
}

}  // namespace

// ---- what the other parts call -----------------------------------------------------------------

void seed(int number) {
  random_order = number != 0;
  random_state = 0x9e3779b97f4a7c15ull * (number + 1) | 1;
}

uint64_t random_number() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

int setting(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text && *text ? atoi(text) : otherwise;
}

CUEMU_NOSAN void wake(int thread) {
  threads[thread].st = kRunnable;
  queue[queue_tail++ & 4095] = thread;
}

CUEMU_NOSAN void yield() {
  leave(&self->sp);
  self->what = nullptr;
}

void start_threads(dim3 block) {
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  queue_head = queue_tail = 0;
  live_count = thread_count;
  reduction[0] = 0;
  for (Barrier& b : barriers) b = {};
  for (Group& g : groups) g = {};
  for (Warp& w : warps) w = {};
  for (int i = 0; i < thread_count; i++) {
    Thread& t = threads[i] = Thread{};
    t.tid.x = i % block.x;
    t.tid.y = i / block.x % block.y;
    t.tid.z = i / block.x / block.y;
    t.lin = i;
    t.lane = i & 31;
    t.warp = i >> 5;
    warps[t.warp].live |= 1u << t.lane;
    // As cuemu_switch leaves a stack: six registers, then where to go on.
    void** top = reinterpret_cast<void**>(stacks + (i + 1) * kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(run_thread);
    t.sp = top - 6;
    std::fill_n(static_cast<void**>(t.sp), 6, nullptr);
    wake(i);
  }
}

void run_threads(const std::function<void()>& kernel) {
  body = &kernel;
  leave(&scheduler);
  self = nullptr;
}

// ---- what kernels call -------------------------------------------------------------------------

void fail(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!failed) {
    failed = true;
    error = text;
    if (self) {
      snprintf(text, sizeof text, "\n    block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x,
               blockIdx.y, blockIdx.z, self->tid.x, self->tid.y, self->tid.z);
      error += text;
    }
  }
  void* never;
  if (self) go(&never, scheduler, nullptr);
  abort();
}

CUEMU_NOSAN void coll(unsigned mask, CollFn fn, void* arg, const char* what, const char* file,
                      int line) {
  Thread& t = *self;
  Warp& w = warps[t.warp];
  say_where(t, what, file, line);
  t.mask = mask;
  t.fn = fn;
  t.arg = arg;
  if (!(mask >> t.lane & 1))
    fail("%s at %s:%d: the calling lane is not in its mask %08x", what, file, line, mask);
  if (mask & ~w.live)
    fail("%s at %s:%d: mask %08x names exited or absent lanes (live %08x)", what, file, line, mask,
         w.live);
  w.waiting |= 1u << t.lane;
  Thread* lanes = &threads[t.warp * 32];
  bool complete = (w.waiting & mask) == mask;
  void* arguments[32];
  for (int i = 0; i < 32 && complete; i++) {
    if (!(mask >> i & 1)) continue;
    complete = lanes[i].fn == fn && lanes[i].mask == mask;
    arguments[i] = lanes[i].arg;
  }
  if (!complete) {
    t.st = kInCollective;
    return yield();
  }
  n_coll++;
  {
    Quiet q;
    fn(arguments, mask);
  }
  w.waiting &= ~mask;
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && i != t.lane) wake(lanes[i].lin);
  t.what = nullptr;
}

CUEMU_NOSAN void bar_sync(int id, int expected, bool wait, const char* what, const char* file,
                          int line) {
  Thread& t = *self;
  Barrier& b = barriers[id];
  if (id == 0 && b.arrived && b.file && (b.line != line || strcmp(b.file, file)) && strict())
    fail("%s at %s:%d while other threads wait at %s:%d (divergent barrier)", what, file, line,
         b.file, b.line);
  b.file = file;
  b.line = line;
  say_where(t, what, file, line);
  t.bar = id;
  if (++b.arrived == (expected ? expected : live_count)) {
    open_barrier(id);
    if (random_order) {
      wake(t.lin);
      yield();
    }
  } else if (wait) {
    b.waiting.push_back(t.lin);
    t.st = kAtBarrier;
    yield();
  }
  t.what = nullptr;
}

CUEMU_NOSAN int* bar_red() { return reduction; }

CUEMU_NOSAN void poll_yield(const char* what, const char* file, int line) {
  static int alone;
  alone = queue_head == queue_tail ? alone + 1 : 0;
  if (alone > 100000)
    fail("livelock: %s at %s:%d polls and no other thread can run", what, file, line);
  say_where(*self, what, file, line);
  wake(self->lin);
  yield();
}

void group_coll(int group, int n, void (*fn)(void** args, int n), void* arg, const char* what,
                const char* file, int line) {
  Thread& t = *self;
  Group& g = groups[group];
  say_where(t, what, file, line);
  g.arguments[t.lin % n] = arg;
  if (++g.arrived < n) {
    g.waiting.push_back(t.lin);
    t.st = kAtBarrier;
    return yield();
  }
  g.arrived = 0;
  {
    Quiet q;
    fn(g.arguments, n);
  }
  for (int i : g.waiting) wake(i);
  g.waiting.clear();
  t.what = nullptr;
}

}  // namespace cuemu
