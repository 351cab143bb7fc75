// The emulator's own tests: kernels run on host memory by python_tests/emulator.
#pragma once
#include "../../cuda/launch.cuh"

#define SELFTEST_EXPORT __attribute__((visibility("default")))
