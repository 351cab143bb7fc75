// The words an entry is written in: from tensors to a kernel's params, on the current stream of the
// tensors' device. Read by g++ alone; it needs the toolkit's types, not its runtime.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../contracts/require.h"
#include "../library.h"
#include "device.h"

namespace restore_ext::cuda {

using OptionalTensor = std::optional<Tensor>;

// Makes the device of `t` the current one while it lives, knows the current stream there, and is a
// range of the op's name on a profiler's timeline.
class Launch {
 public:
  Launch(const char* op, const Tensor& t);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaStream_t stream() const { return stream_; }
  // Throws what the launch of a kernel came back with, if that is an error.
  void check(cudaError_t error) const;

 private:
  const char* op_;
  cudaStream_t stream_;
  void* scope_;
};

// Calls body<T>() with T = float, __half or __nv_bfloat16. A contract let no other dtype through.
template <typename Body>
void dispatch_floating(const Tensor& t, Body&& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Half:
      return body.template operator()<__half>();
    default:
      return body.template operator()<__nv_bfloat16>();
  }
}

#ifdef RESTORE_EXT_EMULATED
// The emulator learns where a tensor begins and ends, and fills an output with NaN bits.
void note_input(const Tensor& t);
void note_output(const Tensor& t);
#else
inline void note_input(const Tensor&) {}
inline void note_output(const Tensor&) {}
#endif

template <typename T>
const T* in(const Tensor& t) {
  note_input(t);
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* in(const OptionalTensor& t) {
  return t ? in<T>(*t) : nullptr;
}

template <typename T>
T* out(const Tensor& t) {
  note_output(t);
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace restore_ext::cuda
