// Twins of the TMA wrappers in csrc/cuda/hopper.cuh. A tile lands when somebody polls; until then
// its place is poisoned, and for the checker pending.
#pragma once
#include <cuda.h>  // CUtensorMap

#include "cuemu_async.h"

namespace cuemu {

struct TensorMap {
  uint32_t magic, rank, element, swizzle;  // swizzle: how many address bits it mixes
  const unsigned char* base;
  uint64_t stride[4];  // of dimensions 1.., in bytes
  uint32_t dim[5];
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint32_t kTensorMap = 0x7e3a17;

}  // namespace cuemu

namespace restore_ext::cuda {
namespace emu {

CUEMU_NOSAN inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar,
                                 std::array<int, 5> at, uint32_t rank) {
  cuemu::Quiet q_;
  auto* t = (const cuemu::TensorMap*)map;
  if (t->magic != cuemu::kTensorMap) cuemu::fail("TMA: not a tensor map");
  if (t->rank != rank) cuemu::fail("TMA: %u coordinates for a map of rank %u", rank, t->rank);
  const uint32_t alignment = t->swizzle ? 128u << t->swizzle : 128u;
  if (smem_u32(dst) % alignment)
    cuemu::fail("TMA: destination is not %u-byte aligned (its swizzle needs it)", alignment);
  size_t bytes = t->element;
  for (uint32_t d = 0; d < rank; d++) bytes *= t->box[d];
  if (smem_u32(dst) + bytes > cuemu::dyn_smem_size())
    cuemu::fail("TMA: box ends past shared memory");
  if (cuemu::hook_access) cuemu::hook_access(dst, bytes, true, false, cuemu::pc());
  if (cuemu::hook_cp) cuemu::hook_cp(dst, bytes, false);
  memset(dst, 0xff, bytes);
  cuemu::Thread* who = cuemu::self;
  cuemu::async_push([=, m = *t] {
    const size_t line = (size_t)m.box[0] * m.element;  // what lies together
    for (size_t o = 0; o < bytes; o += line) {
      size_t rest = o / line;
      const unsigned char* from = m.base;
      bool inside = true;
      for (uint32_t d = 1; d < rank; d++) {
        const int64_t i = at[d] + (int64_t)(rest % m.box[d]);
        rest /= m.box[d];
        inside &= i >= 0 && i < (int64_t)m.dim[d];
        from += i * (int64_t)m.stride[d - 1];
      }
      for (size_t c = 0; c < line; c += m.element) {
        const int64_t i = at[0] + (int64_t)(c / m.element);
        unsigned char* to =
            cuemu::dyn_smem() + swizzled(smem_u32(dst) + (uint32_t)(o + c), m.swizzle);
        if (inside && i >= 0 && i < (int64_t)m.dim[0])
          memcpy(to, from + i * m.element, m.element);
        else
          memset(to, 0, m.element);
      }
    }
    auto* s = cuemu::self;
    cuemu::self = who;
    if (cuemu::hook_cp) cuemu::hook_cp(dst, bytes, true);
    if (cuemu::hook_proxy_write) cuemu::hook_proxy_write(dst, bytes);
    if (cuemu::hook_release) cuemu::hook_release(bar);
    cuemu::self = s;
    auto& b = mb(bar);
    b.tx -= (int)bytes;
    mb_check(b);
  });
}
}  // namespace emu

inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1) {
  emu::tma_load(dst, map, bar, {c0, c1}, 2);
}
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2) {
  emu::tma_load(dst, map, bar, {c0, c1, c2}, 3);
}
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                     int c3) {
  emu::tma_load(dst, map, bar, {c0, c1, c2, c3}, 4);
}

}  // namespace restore_ext::cuda

// ---- the driver's door to tensor maps -----------------------------------------------------------
inline CUresult cuemu_encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                   void* base, const cuuint64_t* dims, const cuuint64_t* strides,
                                   const cuuint32_t* box, const cuuint32_t* steps,
                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int bits[] = {0, 1, 2, 3};
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return CUDA_ERROR_NOT_SUPPORTED;
  if ((uintptr_t)map % 64 || (uintptr_t)base % 16 || rank < 1 || rank > 5)
    return CUDA_ERROR_INVALID_VALUE;
  cuemu::TensorMap t{cuemu::kTensorMap,          rank, 2,  (uint32_t)bits[swizzle],
                     (const unsigned char*)base, {},   {}, {}};
  for (cuuint32_t d = 0; d < rank; d++) {
    if (!dims[d] || dims[d] > 1ull << 32 || !box[d] || box[d] > 256 || steps[d] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (d && (strides[d - 1] % 16 || !strides[d - 1] || strides[d - 1] >= 1ull << 40))
      return CUDA_ERROR_INVALID_VALUE;
    t.dim[d] = (uint32_t)dims[d];
    t.box[d] = (uint16_t)box[d];
    if (d) t.stride[d - 1] = strides[d - 1];
  }
  if (box[0] * 2 % 16 || (t.swizzle && box[0] * 2 != 16u << t.swizzle))
    return CUDA_ERROR_INVALID_VALUE;  // a narrower box is legal, and not emulated
  memcpy((void*)map, &t, sizeof t);
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? (void*)cuemu_encode_tiled : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorSymbolNotFound;
}
