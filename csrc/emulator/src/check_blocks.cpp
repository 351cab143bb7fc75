// What blocks of one launch know of each other.
//
// A thread that fences publishes what it knows of its own block. An atomic in global memory, by it
// or by a thread ordered after it, leaves that at the address. A thread that fences after an atomic
// there has taken it over. Both fences are needed: without the second a load may be served from a
// stale line of L1. Barriers pass all three on, which is right because __threadfence() is fence.sc.
#ifdef CUEMU_CHECK
#include <map>
#include <set>

#include "check.h"

namespace cuemu {
namespace {

struct Known {  // of one block
  uint32_t epoch = 0;
  std::vector<uint32_t> clock;  // by thread
};
using Places = std::set<const void*>;
struct Fenced {
  Known published;
  Places seen, taken;  // where it did atomics; and fenced after them
};

std::map<const void*, std::map<uint32_t, Known>> left_at;  // place, block
std::vector<Fenced> fenced;  // by thread; empty until one fences, or meets what another block left

void add(Known& to, const Known& more) {
  to.epoch = std::max(to.epoch, more.epoch);
  to.clock.resize(std::max(to.clock.size(), more.clock.size()));
  for (size_t i = 0; i < more.clock.size(); i++) to.clock[i] = std::max(to.clock[i], more.clock[i]);
}

bool covers(const Known& known, const Access& a) {
  return a.epoch < known.epoch ||
         (a.thread < known.clock.size() && known.clock[a.thread] >= a.clock);
}

}  // namespace

bool known_to_block(const Access& access) {
  if (fenced.empty()) return false;
  for (const void* place : fenced[self->lin].taken) {
    const auto& blocks = left_at[place];
    const auto block = blocks.find(access.block);
    if (block != blocks.end() && covers(block->second, access)) return true;
  }
  return false;
}

void atomic_on(const void* place) {
  const bool something_left = left_at.count(place) != 0;
  if (fenced.empty() && !something_left) return;
  fenced.resize(thread_count);
  Fenced& me = fenced[self->lin];
  if (!me.published.clock.empty()) {
    auto& blocks = left_at[place];
    add(blocks[now.block], me.published);
    for (const void* other : me.taken) {
      if (other == place) continue;
      for (const auto& [block, known] : left_at[other]) add(blocks[block], known);
    }
  }
  if (something_left) me.seen.insert(place);
}

void fences_meet(const int* who, int n) {  // n < 0: the whole block
  if (fenced.empty()) return;
  const int count = n < 0 ? thread_count : n;
  Fenced all;
  for (int i = 0; i < count; i++) {
    const Fenced& f = fenced[n < 0 ? i : who[i]];
    add(all.published, f.published);
    all.seen.insert(f.seen.begin(), f.seen.end());
    all.taken.insert(f.taken.begin(), f.taken.end());
  }
  for (int i = 0; i < count; i++) fenced[n < 0 ? i : who[i]] = all;
}

void forget_fences(bool of_the_launch) {
  fenced.clear();
  if (of_the_launch) left_at.clear();
}

void hook_fence() {
  if (!self) return;
  fenced.resize(thread_count);
  Fenced& me = fenced[self->lin];
  const uint32_t* clock = clocks_of(self->lin);
  add(me.published, {now.epoch, std::vector<uint32_t>(clock, clock + thread_count)});
  own_clock()++;  // what this thread does from here on is not published
  me.taken.insert(me.seen.begin(), me.seen.end());
}

}  // namespace cuemu
#endif
