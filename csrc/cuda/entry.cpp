#include "entry.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../nvtx.h"

namespace restore_ext::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Looked up where torch has loaded it already: the library links no libtorch_cuda, so that it loads
// under a CPU torch, too.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error("restore_ext: torch does not tell its current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

struct Scope {
  DeviceGuard device;
  nvtx::Range range;
};

}  // namespace

Launch::Launch(const char* op, const Tensor& t)
    : op_(op),
      stream_(current_stream(t.get_device_index())),
      scope_(new Scope{DeviceGuard(t.get_device_index()), nvtx::Range(op)}) {}

Launch::~Launch() { delete static_cast<Scope*>(scope_); }

void Launch::check(cudaError_t error) const {
  if (error != cudaSuccess) contract::refuse(op_, "the launch failed: ", error_text(error));
}

}  // namespace restore_ext::cuda
