// Sixteen lanes: Intel's servers since 2017, AMD since 2022. Knights Landing, which lacks two of
// the four extensions, is left to AVX2.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstring>
#include <utility>

// From here on, and not before: what the headers above define may be shared with other levels.
#ifdef RESTORE_EXT_LOWERED
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace restore_ext::cpu {
namespace {

#include "vectors_avx512.h"

#include "kernels_body.h"

}  // namespace

const Kernels kernels_avx512 = level("avx512");

}  // namespace restore_ext::cpu
#endif
