// Twins of csrc/cuda/hopper.cuh.
#pragma once
#include "cuemu_async.h"
#include "cuemu_tma.h"
#include "cuemu_wgmma.h"
