#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace restore_ext::cpu {
namespace {

// What this processor runs, from the least to the most.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found{&kernels_generic};
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Of AVX and AVX-512 it also asks whether the system keeps the registers (XCR0).
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
#ifdef RESTORE_EXT_LOWERED
    const bool avx512 = true, bf16 = true;
#else
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = __builtin_cpu_supports("avx512bf16");
#endif
    if (avx2) found.push_back(&kernels_avx2);
    if (avx2 && avx512) found.push_back(&kernels_avx512);
    if (avx2 && avx512 && bf16) found.push_back(&kernels_avx512_bf16);
#endif
    return found;
  }();
  return all;
}

}  // namespace

const Kernels& kernels() {
  // Asked for at every call, so that a test may change it between two.
  const char* wanted = std::getenv("RESTORE_EXT_CPU");
  if (wanted == nullptr || *wanted == 0) return *available().back();
  for (const Kernels* level : available()) {
    if (level->name == std::string(wanted)) return *level;
  }
  throw std::runtime_error(std::string("RESTORE_EXT_CPU must be one of ") + levels() + ", got " +
                           wanted);
}

const char* levels() {
  static const std::string names = [] {
    std::string text;
    for (const Kernels* level : available())
      text += (text.empty() ? "" : " ") + std::string(level->name);
    return text;
  }();
  return names.c_str();
}

}  // namespace restore_ext::cpu
