// Under which name the operators are registered. The emulator's build (tools/emulator.py) gives the
// CUDA bodies a namespace of their own on the CPU; everything else takes what stands here.
#pragma once

#include <torch/csrc/stable/library.h>

#include "nvtx.h"

#ifndef RESTORE_EXT_NAMESPACE
#define RESTORE_EXT_NAMESPACE restore_ext
#define RESTORE_EXT_CUDA_KEY CUDA
#endif

// One more hop, so that the names above are expanded before torch pastes them.
#define RESTORE_EXT_LIBRARY_NAMED(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define RESTORE_EXT_LIBRARY_IMPL_NAMED(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define RESTORE_EXT_LIBRARY(m) RESTORE_EXT_LIBRARY_NAMED(RESTORE_EXT_NAMESPACE, m)
#define RESTORE_EXT_CUDA_LIBRARY(m) \
  RESTORE_EXT_LIBRARY_IMPL_NAMED(RESTORE_EXT_NAMESPACE, RESTORE_EXT_CUDA_KEY, m)

// Registers <op>_cpu; each call is a range on a profiler's timeline. (On CUDA, Launch is.)
#define RESTORE_EXT_CPU_BODY(op)                                     \
  STABLE_TORCH_LIBRARY_IMPL(restore_ext, CPU, m) {                   \
    m.impl(#op, [](StableIValue* stack, uint64_t in, uint64_t out) { \
      const nvtx::Range range(#op);                                  \
      TORCH_BOX (&op##_cpu)(stack, in, out);                         \
    });                                                              \
  }
