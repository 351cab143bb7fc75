#include <algorithm>

#include "device.h"
#include "launch.cuh"
#include "merge_tokens_kernel.h"

namespace restore_ext::cuda {
namespace {

constexpr int kListThreads = 1024, kListWarps = kListThreads / 32;

using WarpTotals = int[kListWarps];

// Calls body(token, group id or -1, lanes with the same id) for one warp's share of the tokens, in
// ascending order, 32 at a time.
template <typename Body>
__device__ __forceinline__ void walk(const MergeGroups& g, int64_t b, int begin, int end,
                                     Body body) {
  constexpr int kAhead = 4;  // loads in flight a lane
  const int lane = threadIdx.x % 32;
  for (int warp_token = begin; warp_token < end; warp_token += 32 * kAhead) {
    int ids[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int n = warp_token + 32 * a + lane;
      const int64_t id = n < end ? g.group[b * g.N + n] : -1;
      ids[a] = id >= 0 && id < g.M ? static_cast<int>(id) : -1;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      body(warp_token + 32 * a + lane, ids[a], __match_any_sync(0xffffffffu, ids[a]));
    }
  }
}

// Replaces each of count numbers by the sum of those before it; all threads of the block call.
__device__ __forceinline__ void exclusive_scan(int* numbers, int count, WarpTotals& totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int run = (count + kListThreads - 1) / kListThreads | 1;  // odd: no two lanes on one bank
  const int begin = min(static_cast<int>(threadIdx.x) * run, count);
  const int end = min(begin + run, count);
  int sum = 0;
  for (int i = begin; i < end; ++i) sum += numbers[i];
  int before = sum;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int lower = __shfl_up_sync(0xffffffffu, before, d);
    if (lane >= d) before += lower;
  }
  if (lane == 31) totals[warp] = before;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += totals[w];
  for (int i = begin; i < end; ++i) {
    const int number = numbers[i];
    numbers[i] = before;
    before += number;
  }
}

// first[m + 1] = first[m] + |{n : group[n] = m}|; member = the tokens, sorted by (group, token)
//
// Plan     one block an image, since it is a sort of one row. Worker warps own consecutive shares
//          of the tokens and count them by group; a scan over (group, worker) turns the counts into
//          cursors; then each worker places its tokens. Inside a warp the lanes of one id find
//          their rank by a match, so nothing depends on who comes first.
// Grid     x: image
// Shared   M * workers cursors; if even one worker's do not fit, they live in `first` itself
// Traffic  16 bytes read a token (the second time from L2), 4 written
// Order    the lists are what a stable sort gives: no choice is left
__global__ void __launch_bounds__(kListThreads)
    merge_tokens_list_kernel(const MergeGroups g, int workers, bool in_shared) {
  DYNAMIC_SHARED(shared);
  STATIC_SHARED(WarpTotals, totals);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x;
  int* first = g.first + b * (g.M + int64_t{1});
  // Of (m, worker): after the placement it stands where the next worker began, the last one's where
  // the next group began. That is first[m + 1], so in global memory it is already in place.
  int* cursor = in_shared ? reinterpret_cast<int*>(shared) : first + 1;
  const int cursors = g.M * workers;
  for (int i = threadIdx.x; i < cursors; i += kListThreads) cursor[i] = 0;
  __syncthreads();

  const int share = static_cast<int>(ceil_div(ceil_div(g.N, 32), workers) * 32);
  const int begin = warp * share;  // warps that are no workers begin at N or later
  const int end = warp < workers ? min(begin + share, g.N) : begin;
  walk(g, b, begin, end, [&](int, int id, unsigned same) {
    const bool leads = (same & ((1u << lane) - 1)) == 0;
    if (id >= 0 && leads) cursor[id * workers + warp] += __popc(same);
    __syncwarp();  // the next 32 tokens may have another leader for this id
  });
  __syncthreads();
  exclusive_scan(cursor, cursors, totals);
  __syncthreads();
  walk(g, b, begin, end, [&](int n, int id, unsigned same) {
    const int rank = __popc(same & ((1u << lane) - 1));
    const int at = id >= 0 ? cursor[id * workers + warp] : 0;
    __syncwarp();  // all have read it
    if (id >= 0 && rank == 0) cursor[id * workers + warp] = at + __popc(same);
    __syncwarp();
    if (id >= 0) g.member[b * g.N + at + rank] = n;
  });
  __syncthreads();
  if (threadIdx.x == 0) first[0] = 0;
  if (!in_shared) return;
  for (int m = threadIdx.x; m < g.M; m += kListThreads)
    first[m + 1] = cursor[(m + 1) * workers - 1];
}

}  // namespace

cudaError_t launch_list_members(const MergeGroups& g, cudaStream_t stream) {
  const int64_t room = (shared_memory_limit() - (4 << 10)) / sizeof(int);  // some is static
  const int64_t wanted = std::clamp<int64_t>(ceil_div(g.N, 32), 1, kListWarps);
  const int workers = static_cast<int>(std::clamp<int64_t>(room / g.M, 1, wanted));
  const bool in_shared = g.M <= room;
  const size_t shared = in_shared ? sizeof(int) * g.M * workers : 0;
  return launch(merge_tokens_list_kernel, dim3(g.B), dim3(kListThreads), shared, stream, g, workers,
                in_shared);
}

}  // namespace restore_ext::cuda
