// Four lanes, which every processor has.
#include "kernels.h"

#include <torch/headeronly/util/Half.h>

#include <bit>

namespace restore_ext::cpu {
namespace {

constexpr int kLanes = 4, kVectors = 2;
constexpr auto kFromBits = torch::headeronly::Half::from_bits();
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

inline float scalar(const float* p) { return *p; }
inline float scalar(const Half* p) { return torch::headeronly::Half(p->bits, kFromBits); }
inline float scalar(const Bfloat16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }
inline Floats load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline Floats load(const Half* p) {
  return Floats{scalar(p), scalar(p + 1), scalar(p + 2), scalar(p + 3)};
}
inline Floats load(const Bfloat16* p) {
  return reinterpret_cast<Floats>(Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
inline void store(float* p, Floats x) { *reinterpret_cast<Unaligned*>(p) = x; }
inline Floats broadcast(float x) { return Floats{x, x, x, x}; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }

inline void transpose(Floats (&x)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      const float upper = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = upper;
    }
  }
}

#include "kernels_body.h"

}  // namespace

const Kernels kernels_generic = level("generic");

}  // namespace restore_ext::cpu
