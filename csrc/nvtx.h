// Named ranges on the timeline of a profiler: NVTX, domain "restore_ext", one category a stage of
// the method (docs/profiling.md). Without a profiler they cost a branch; built without the CUDA
// toolkit's headers they are nothing.
#pragma once

namespace restore_ext::nvtx {

bool built_in();

void push(const char* name);  // an operator, or a stage: its verb gives the category
void pop();

struct Range {
  explicit Range(const char* name) { push(name); }
  ~Range() { pop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace restore_ext::nvtx
