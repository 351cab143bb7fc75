// Launches, shared memory, the host side of the CUDA runtime, and the emulator's own C functions.
#include <map>
#include <mutex>

#include "block.h"
#include "ptx_rt.h"
#include "symbols.h"

namespace cuemu {

unsigned char *static_shared, *dynamic_shared;
size_t dynamic_bytes;
unsigned long long n_ptx;

namespace {

struct Slot {  // of a STATIC_SHARED object
  size_t at, bytes;
};
std::map<const void*, Slot> slots;
size_t slots_end;

std::map<const void*, int> shared_limit;  // of kernels that asked for more than kFreeShared
constexpr int kFreeShared = 48 << 10;
constexpr size_t kAlign = 1024;  // as TMA's 128-byte swizzle wants it

int last_error, reports;
bool seeded;
std::mutex one_at_a_time;

int most_shared() { return setting("CUEMU_SMEM_MAX", 232448); }

int refuse(cudaError_t code, const std::string& why) {
  error = why;
  return last_error = code;
}

int limit_of(const void* kernel) {
  const auto found = shared_limit.find(kernel);
  return found == shared_limit.end() ? kFreeShared : found->second;
}

std::string words(dim3 grid, size_t shared) {
  return std::to_string(thread_count) + " threads, grid " + std::to_string(grid.x) + " x " +
         std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(shared) +
         " bytes of dynamic shared memory";
}

void poison_shared() {  // with NaNs, before each block
  if (dynamic_shared) memset(dynamic_shared, 0xff, dynamic_bytes);
  memset(static_shared, 0xff, slots_end);
  if (__start_cuemu_shared)
    memset(__start_cuemu_shared, 0xff, __stop_cuemu_shared - __start_cuemu_shared);
}

void run_block(size_t index, const std::function<void()>& kernel) {
  blockIdx.x = index % gridDim.x;
  blockIdx.y = index / gridDim.x % gridDim.y;
  blockIdx.z = index / gridDim.x / gridDim.y;
  n_blocks++;
  poison_shared();
  forget_copies();
  start_threads(blockDim);
  if (hook_block) hook_block(thread_count);
  run_threads(kernel);
}

std::vector<size_t> block_order(size_t blocks) {
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; i++) order[i] = i;
  if (random_order)
    for (size_t i = blocks; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

}  // namespace

int launch(const void* key, dim3 grid, dim3 block, size_t shared,
           const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  thread_count = block.x * block.y * block.z;
  if (thread_count < 1 || thread_count > kMaxThreads || block.z > 64 || !grid.x || !grid.y ||
      !grid.z || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "launch refused: " + words(grid, shared));
  if (shared > static_cast<size_t>(limit_of(key)))
    return refuse(cudaErrorInvalidValue, "launch refused: " + words(grid, shared));
  if (!static_shared)
    static_shared = static_cast<unsigned char*>(aligned_alloc(kAlign, kStaticShared));
  if (!seeded) cuemu::seed(setting("CUEMU_SHUFFLE", 0));
  seeded = true;

  blockDim = block;
  gridDim = grid;
  dynamic_bytes = shared;
  const size_t room = (shared + kSpare + kAlign - 1) / kAlign * kAlign;
  dynamic_shared = shared ? static_cast<unsigned char*>(aligned_alloc(kAlign, room)) : nullptr;
  failed = false;
  quiet = 0;
  error.clear();
  if (hook_launch) hook_launch();
  for (size_t index : block_order(size_t{grid.x} * grid.y * grid.z)) {
    run_block(index, kernel);
    if (failed) break;
  }
  free(dynamic_shared);
  dynamic_shared = nullptr;
  if (!failed) return cudaSuccess;
  reports++;
  fprintf(stderr, "cuemu: %s\n", error.c_str());
  return last_error = cudaErrorLaunchFailure;
}

// ---- shared memory -----------------------------------------------------------------------------

unsigned char* dyn_smem() { return dynamic_shared; }
size_t dyn_smem_size() { return dynamic_bytes; }

CUEMU_NOSAN void* shared_slot(const void* key, size_t bytes, size_t align) {
  auto found = slots.find(key);
  if (found == slots.end()) {
    slots_end = (slots_end + align - 1) / align * align;
    found = slots.emplace(key, Slot{slots_end, bytes}).first;
    slots_end += bytes;
    if (slots_end > kStaticShared) fail("no room for more static shared memory");
  }
  return static_shared + found->second.at;
}

int set_smem_limit(const void* key, int bytes) {
  if (bytes > most_shared())
    return refuse(cudaErrorInvalidValue,
                  "a block cannot have " + std::to_string(bytes) + " bytes of shared memory");
  shared_limit[key] = bytes;
  return cudaSuccess;
}

// ---- kernels translated from PTX (ptx2cpp.py), under CUEMU_PTX=1
// ---------------------------------

static std::map<std::string, PtxKernel>& ptx_kernels() {  // filled before main
  static std::map<std::string, PtxKernel> kernels;
  return kernels;
}

void ptx_register(const char* name, const PtxKernel& kernel) {
  // Unnamed namespaces of two files look alike here: a name that stands for two runs neither.
  const auto [at, fresh] = ptx_kernels().emplace(name, kernel);
  if (!fresh) at->second.run = nullptr;
}

int ptx_launch(const void* key, dim3 grid, dim3 block, size_t shared,
               const unsigned char* parameters, size_t bytes) {
  if (!setting("CUEMU_PTX", 0) || ptx_kernels().empty()) return -1;
  const auto no = [](const std::string& why) {
    return refuse(cudaErrorInvalidDeviceFunction, why);
  };
  const std::string name = symbol_name(key);
  const auto found = ptx_kernels().find(name);
  if (found == ptx_kernels().end()) return no("no PTX of the kernel " + name);
  const PtxKernel& kernel = found->second;
  if (!kernel.run) return no("two kernels are called " + name + "; rename one");
  if (kernel.parameter_bytes != bytes) return no("PTX has other parameters for " + name);
  const unsigned threads = block.x * block.y * block.z;
  if (threads > static_cast<unsigned>(kernel.threads) && threads <= kMaxThreads)
    return no("more threads than __launch_bounds__ of " + name);
  const int allowed = limit_of(key);
  const int with_static = static_cast<int>(shared + kernel.shared_bytes);
  if (shared > static_cast<size_t>(allowed) || with_static > most_shared()) {
    thread_count = threads;
    return refuse(cudaErrorInvalidValue, "launch refused: " + words(grid, with_static));
  }
  n_ptx++;
  shared_limit[key] = with_static;
  const int result = launch(key, grid, block, with_static, [&] { kernel.run(parameters); });
  shared_limit[key] = allowed;
  return result;
}

}  // namespace cuemu

// ---- the CUDA runtime --------------------------------------------------------------------------

using namespace cuemu;

extern "C" {

cudaError_t cudaGetLastError() {
  const int code = last_error;
  last_error = cudaSuccess;
  return static_cast<cudaError_t>(code);
}

cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error); }

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : error.empty() ? "unknown error" : error.c_str();
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = setting("CUEMU_SMS", 4);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = setting("CUEMU_CC", 90) / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = setting("CUEMU_CC", 90) % 10;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = aligned_alloc(256, bytes / 256 * 256 + 256);
  memset(*p, 0xff, bytes);
  if (cuemu_register) cuemu_register(*p, bytes, 0, "cudaMalloc");
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (cuemu_forget) cuemu_forget(p);
  free(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  if (hook_memset) hook_memset(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  if (hook_memset) hook_memset(p, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// ---- for tests ---------------------------------------------------------------------------------

void cuemu_seed(int number) {
  cuemu::seed(number);
  seeded = true;
}

void cuemu_stats(unsigned long long* stats) {
  stats[0] = n_switch;
  stats[1] = n_coll;
  stats[2] = n_blocks;
  stats[3] = n_ptx;
}

int cuemu_reports() { return reports; }  // launches that failed under way

const char* cuemu_error() { return error.c_str(); }
}
