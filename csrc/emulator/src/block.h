// The block that runs, as the parts of the emulator know it.
#pragma once

#include <string>
#include <vector>

#include "cuemu.h"

// Plain __shared__ objects, gathered in a section by cuemu.h; absent where there are none.
extern "C" __attribute__((weak)) char __start_cuemu_shared[], __stop_cuemu_shared[];

namespace cuemu {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;
constexpr size_t kStaticShared = 256 << 10;

// fibers.cpp
extern Thread threads[kMaxThreads];
extern int thread_count;
extern bool failed;
extern std::string error;  // why the last launch failed or was refused
extern bool random_order;  // of threads and blocks; otherwise first come, first served
extern char* stacks;       // kStack bytes a thread
void seed(int number);
uint64_t random_number();
int setting(const char* variable, int otherwise);
void start_threads(dim3 block);
void run_threads(const std::function<void()>& body);  // until all have returned, or one failed
void yield();                                         // to another thread; back when made runnable
void wake(int thread);

// async.cpp
void forget_copies();  // of the block before
bool copies_left(int thread);

// launch.cpp: shared memory. Dynamic memory is an exact allocation a launch, and some spare room.
extern unsigned char *static_shared, *dynamic_shared;
extern size_t dynamic_bytes;
constexpr size_t kSpare = 1024;

// Of the checker, where it is linked in.
void hook_launch() __attribute__((weak));
void hook_block(int thread_count) __attribute__((weak));
// The threads that met; n < 0: the whole block.
void hook_bar(int barrier, const int* who, int n) __attribute__((weak));
void hook_memset(const void* p, size_t n) __attribute__((weak));

void hook_cp(const void* to, size_t bytes, bool landed) __attribute__((weak));

// What a launch counts, for cuemu_stats.
extern unsigned long long n_switch, n_coll, n_blocks, n_ptx;

}  // namespace cuemu

extern "C" {
void cuemu_register(const void* p, size_t bytes, int initialised, const char* name)
    __attribute__((weak));
void cuemu_forget(const void* p) __attribute__((weak));
}
