// What the parts of the checker share. It stands on vector clocks: a thread's row of `clocks` says
// how far it knows every thread of the block to be.
#pragma once

#include "block.h"

namespace cuemu {

struct Access {
  const void* pc;
  uint32_t launch, block, epoch, clock;
  uint16_t thread;
  bool atomic, by_copy_engine;
};

struct Cell {  // a byte
  Access write, reads[2];
  bool written, pending;  // pending: a copy to it is under way
  uint32_t life;          // of the block whose memory it was
};

struct Now {
  uint32_t launch, block;
  uint32_t epoch;  // barriers of the whole block: what was before one is before all after it
};
extern Now now;
extern std::vector<uint32_t> clocks;  // [thread_count, thread_count]

inline uint32_t* clocks_of(int thread) { return &clocks[size_t(thread) * thread_count]; }
inline uint32_t& own_clock() { return clocks_of(self->lin)[self->lin]; }

Cell* shared_cells(const void* p, size_t bytes, size_t& offset);  // nullptr: not shared memory
[[noreturn]] void report(const char* kind, const std::string& space, size_t offset, bool write,
                         const void* pc, const Access* other = nullptr, bool other_wrote = false);
std::string source_line(const void* pc);

// check_blocks.cpp
bool known_to_block(const Access& access);  // of another block
void atomic_on(const void* place);
void fences_meet(const int* who, int n);
void forget_fences(bool of_the_launch);

// check_perf.cpp
void count_access(const void* p, size_t bytes, bool write, bool shared, const void* pc);
void perf_launch();
void perf_block();

}  // namespace cuemu
