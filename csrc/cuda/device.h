// What an entry asks of the device it stands on.
#pragma once

#include <driver_types.h>

namespace restore_ext::cuda {

const char* error_text(cudaError_t error);
int multiprocessors();      // of the current device
int compute_capability();   // of the current device: 80, 90, 100, ...
int shared_memory_limit();  // bytes a block may ask for on the current device

}  // namespace restore_ext::cuda
