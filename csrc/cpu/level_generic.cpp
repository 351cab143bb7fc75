// Four lanes, which every processor has.
#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace restore_ext::cpu {
namespace {

constexpr int kLanes = 4, kVectors = 2;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
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

template <typename T>
void from_16(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T x;
    std::memcpy(&x, from + i, sizeof x);
    to[i] = static_cast<float>(x);
  }
}

}  // namespace

const Kernels kernels_generic =
    level("generic", from_16<torch::headeronly::Half>, from_16<torch::headeronly::BFloat16>);

}  // namespace restore_ext::cpu
