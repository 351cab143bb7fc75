// The twin of csrc/cuda/entry.cpp in the emulator: no device, no stream, and every tensor's extent
// made known to the checker.
#include "../cuda/entry.h"

#include <cstring>

extern "C" {
// Of the checker; absent where it is not built in.
void cuemu_register(const void* p, size_t bytes, int initialised, const char* name)
    __attribute__((weak));
void cuemu_unregister() __attribute__((weak));
}

namespace restore_ext::cuda {
namespace {

size_t extent(const Tensor& t) {  // bytes from the first element to the last, strides included
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * t.element_size();
}

}  // namespace

void note_input(const Tensor& t) {
  if (cuemu_register) cuemu_register(t.const_data_ptr(), extent(t), 1, "an input");
}

void note_output(const Tensor& t) {
  std::memset(t.mutable_data_ptr(), 0xff, extent(t));
  if (cuemu_register) cuemu_register(t.const_data_ptr(), extent(t), 0, "an output");
}

Launch::Launch(const char* op, const Tensor&) : op_(op), stream_(nullptr), scope_(nullptr) {
  if (cuemu_unregister) cuemu_unregister();
}

Launch::~Launch() {
  if (cuemu_unregister) cuemu_unregister();
}

void Launch::check(cudaError_t error) const {
  if (error != cudaSuccess) contract::refuse(op_, "the launch failed: ", error_text(error));
}

}  // namespace restore_ext::cuda
