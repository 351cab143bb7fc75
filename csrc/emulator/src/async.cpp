// What runs behind a block's back - cp.async, TMA, wgmma - done as late as the program allows, so
// that a missing wait is seen.
#include "block.h"

namespace cuemu {
namespace {

using Work = std::function<void()>;

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};
using CopyGroup = std::vector<Copy>;
std::vector<CopyGroup> copies[kMaxThreads];  // closed groups, the open one last

std::vector<Work> engine;  // TMA

struct Warpgroup {
  std::vector<Work> open;
  std::vector<std::vector<Work>> closed;
} warpgroups[8];

CUEMU_NOSAN std::vector<CopyGroup>& own_copies() {
  auto& groups = copies[self->lin];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

CUEMU_NOSAN void land(const Copy& copy) {
  if (hook_cp) hook_cp(copy.to, copy.bytes, true);
  memset(copy.to, 0, copy.bytes);
  memcpy(copy.to, copy.from, copy.valid);
}

}  // namespace

void forget_copies() {
  for (int i = 0; i < thread_count; i++) copies[i].clear();
  engine.clear();
  for (Warpgroup& w : warpgroups) w = {};
}

bool copies_left(int thread) {
  for (const CopyGroup& group : copies[thread])
    if (!group.empty()) return true;
  return false;
}

CUEMU_NOSAN void cp_async(void* to, const void* from, int bytes, int valid) {
  const auto places =
      reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(valid ? from : to);
  if (places % bytes) fail("cp.async: %d-byte copy is misaligned (to %p from %p)", bytes, to, from);
  const void* line = __builtin_return_address(0);
  if (hook_access) {
    if (valid) hook_access(from, valid, false, false, line);
    hook_access(to, bytes, true, false, line);
  }
  own_copies().back().push_back({to, from, bytes, valid});
  if (hook_cp) hook_cp(to, bytes, false);
  memset(to, 0xff, bytes);  // until the wait, readers see NaNs
}

CUEMU_NOSAN void cp_commit() { own_copies().emplace_back(); }

CUEMU_NOSAN void cp_wait(
    int n) {  // all but the n latest closed groups land; n < 0: all, the open one too
  auto& groups = own_copies();
  const int landed = static_cast<int>(groups.size()) - (n < 0 ? 0 : 1 + n);
  if (landed <= 0) return;
  for (int g = 0; g < landed; g++)
    for (const Copy& copy : groups[g]) land(copy);
  groups.erase(groups.begin(), groups.begin() + landed);
}

void async_push(Work work) { engine.push_back(std::move(work)); }

void async_poll() {
  if (engine.empty()) return;
  const size_t i = random_order ? random_number() % engine.size() : 0;
  const Work work = std::move(engine[i]);
  engine.erase(engine.begin() + i);
  Quiet q;
  work();
}

void wg_push(int group, Work work) { warpgroups[group].open.push_back(std::move(work)); }

void wg_commit(int group) {
  Warpgroup& w = warpgroups[group];
  w.closed.push_back(std::move(w.open));
  w.open.clear();
}

void wg_wait(int group, int n) {
  auto& closed = warpgroups[group].closed;
  while (static_cast<int>(closed.size()) > n) {
    for (const Work& work : closed.front()) work();
    closed.erase(closed.begin());
  }
}

}  // namespace cuemu
