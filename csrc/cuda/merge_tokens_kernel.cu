#include "merge_tokens_kernel.h"

#include <algorithm>
#include <climits>

#include "pack.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;                         // rows in flight a thread
constexpr int kLanes = 32, kTeams = 4;            // of the block that adds up chunks
constexpr uint64_t kSignBit = uint64_t{1} << 63;  // flipped, unsigned order is signed order

struct Members {  // member[begin] ... member[end - 1] of an image
  int begin, end;
  __device__ int count() const { return end - begin; }
};

__device__ __forceinline__ Members members_of(const MergeGroups& g, int64_t b, int m) {
  const int* first = g.first + b * (g.M + int64_t{1}) + m;
  return {first[0], first[1]};
}

// A group is cut into chunks of kMergeChunk members. The first one of every group is named by the
// group. Of the others at most one begins in each kMergeChunk places of the image's list (they are
// that far apart within a group, and a whole chunk of their own group lies before them), and its
// group also holds the first of these places. So the number of these places names it.
struct Chunk {
  int m;        // its group, -1 if there is no such chunk
  int at;       // which chunk of the group
  Members all;  // of the group

  __device__ Members members() const {
    const int begin = all.begin + at * kMergeChunk;
    return {begin, min(begin + kMergeChunk, all.end)};
  }
  __device__ bool is_whole_group() const { return all.count() <= kMergeChunk; }
};

__device__ __forceinline__ Chunk first_chunk(const MergeGroups& g, int64_t b, int m) {
  return {m, 0, members_of(g, b, m)};
}

__device__ __forceinline__ Chunk later_chunk(const MergeGroups& g, int64_t b, int place) {
  const int i = place * kMergeChunk;
  if (i >= g.first[b * (g.M + int64_t{1}) + g.M]) return {-1, 0, {0, 0}};
  const int m = static_cast<int>(g.group[b * g.N + g.member[b * g.N + i]]);
  const Members all = members_of(g, b, m);
  const int at = place - all.begin / kMergeChunk;
  return {at > 0 && all.begin + at * kMergeChunk < all.end ? m : -1, at, all};
}

// Where the sums of a chunk of a long group wait to be added up. [C]
template <typename T>
__device__ __forceinline__ float* partial_row(const MergeTokensParams<T>& p, int64_t b,
                                              const Chunk& chunk) {
  const int places = static_cast<int>(ceil_div(p.groups.N, kMergeChunk));
  const int place = chunk.all.begin / kMergeChunk + chunk.at;
  return p.partial + ((b * 2 + (chunk.at > 0)) * places + place) * p.C;
}

using ThreadSums = float[kThreads];

// The sum of the sizes of a group's members; every thread of the block calls, and gets it.
template <typename T>
__device__ float sum_of_sizes(const MergeTokensParams<T>& p, int64_t b, const Members& all) {
  if (p.size == nullptr) return static_cast<float>(all.count());
  STATIC_SHARED(ThreadSums, sums);
  const int* member = p.groups.member + b * p.groups.N;
  float sum = 0;
#pragma unroll 4
  for (int i = all.begin + threadIdx.x; i < all.end; i += kThreads) {
    sum += p.size[b * p.groups.N + member[i]];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int t = 0; t < min(kThreads, all.count()); ++t) sum += sums[t];
  return sum;
}

struct Selection {
  int bin[256];
  unsigned varying[2];  // the bits, low and high, in which the keys are not all the same
};

// The lower median of the positions of a group that has members; every thread gets it.
template <typename T>
__device__ int64_t lower_median(const MergeTokensParams<T>& p, int64_t b, const Members& all) {
  const int* member = p.groups.member + b * p.groups.N;
  int rank = (all.count() - 1) / 2;
  if (p.position == nullptr) return member[all.begin + rank];
  const auto key = [&](int i) {
    return static_cast<uint64_t>(p.position[b * p.groups.N + member[i]]) ^ kSignBit;
  };

  // Tokens ascend in the list, and with them positions mostly do.
  uint64_t median = key(all.begin), varying = 0;
  bool descends = false;
#pragma unroll 4
  for (int i = all.begin + 1 + threadIdx.x; i < all.end; i += kThreads) {
    varying |= key(i) ^ median;
    descends |= key(i) < key(i - 1);
  }
  if (!__syncthreads_or(descends)) return static_cast<int64_t>(key(all.begin + rank) ^ kSignBit);

  // Radix selection: digit by digit from the top, the one that holds the wanted rank.
  STATIC_SHARED(Selection, s);
  if (threadIdx.x < 2) s.varying[threadIdx.x] = 0;
  __syncthreads();
  atomicOr(&s.varying[0], static_cast<unsigned>(varying));
  atomicOr(&s.varying[1], static_cast<unsigned>(varying >> 32));
  __syncthreads();
  varying = uint64_t{s.varying[1]} << 32 | s.varying[0];
  for (int shift = 56; shift >= 0; shift -= 8) {
    const uint64_t digit_bits = uint64_t{0xff} << shift;
    if ((varying & digit_bits) == 0) continue;  // median has this digit, as all have
    for (int d = threadIdx.x; d < 256; d += kThreads) s.bin[d] = 0;
    __syncthreads();
    const uint64_t above = ~(digit_bits | (digit_bits - 1));
    for (int i = all.begin + threadIdx.x; i < all.end; i += kThreads) {
      if (((key(i) ^ median) & above) == 0) atomicAdd(&s.bin[key(i) >> shift & 0xff], 1);
    }
    __syncthreads();
    int digit = 0;
    while (rank >= s.bin[digit]) rank -= s.bin[digit++];
    median = (median & ~digit_bits) | static_cast<uint64_t>(digit) << shift;
    __syncthreads();  // all have read the bins
  }
  return static_cast<int64_t>(median ^ kSignBit);
}

template <typename T>
__device__ void write_size_and_position(const MergeTokensParams<T>& p, int64_t b, int m) {
  const Members all = members_of(p.groups, b, m);
  const float size = sum_of_sizes(p, b, all);
  const int64_t position = all.count() > 0 ? lower_median(p, b, all) : -1;
  if (threadIdx.x > 0) return;
  p.merged_size[b * p.groups.M + m] = size;
  p.merged_position[b * p.groups.M + m] = position;
}

template <int kVec, typename T>
__device__ __forceinline__ void write_mean(const MergeTokensParams<T>& p, int64_t b, int m, int c,
                                           float (&sum)[kVec], float weight) {
  // A group without members, or whose members weigh nothing, has no mean: it is zeros.
#pragma unroll
  for (int v = 0; v < kVec; ++v) sum[v] = weight > 0 ? sum[v] / weight : 0.f;
  store(p.merged + (b * p.groups.M + m) * p.C + c, sum);
}

struct Staged {
  int token[kMergeChunk];
  float weight[kMergeChunk];
};

// merged[m] = sum over n in group m of size[n] * x[n] / sum of size[n], and its size and position
//
// Plan     a block sums one chunk of a group over kThreads packs of channels; a thread owns a pack,
//          reads it row after row with kAhead rows in flight, and keeps float32 sums. A group of
//          one chunk is finished here, a longer one leaves its sums to merge_tokens_combine_kernel.
//          One more column of blocks finds sizes and positions while the others wait for memory.
// Grid     x: image and chunk (groups first, then places), y: packs, and the column just named
// Shared   the chunk's tokens and weights
// Traffic  N * C elements read, M * C written; a long group adds 4 / kMergeChunk bytes an element
// Order    members ascend and are added one after another, chunks likewise: the same bits every run
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    merge_tokens_sum_kernel(const MergeTokensParams<T> p, int chunks) {
  const MergeGroups& g = p.groups;
  const int64_t b = blockIdx.x / chunks;
  const int item = blockIdx.x % chunks;
  if (blockIdx.y == gridDim.y - 1) {
    if (item < g.M) write_size_and_position(p, b, item);
    return;
  }
  const Chunk chunk = item < g.M ? first_chunk(g, b, item) : later_chunk(g, b, item - g.M + 1);
  if (chunk.m < 0) return;

  STATIC_SHARED(Staged, staged);
  const Members members = chunk.members();
  const int count = members.count();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = g.member[b * g.N + members.begin + i];
    const float size = p.size ? p.size[b * g.N + token] : 1.f;
    staged.token[i] = token;
    staged.weight[i] = chunk.all.count() == 1 && size > 0 ? 1.f : size;  // alone: untouched
  }
  __syncthreads();
  const int c = (blockIdx.y * kThreads + threadIdx.x) * kVec;
  if (c >= p.C) return;

  const T* x = p.x + b * p.x_stride_b + c;
  float sum[kVec] = {}, weight = 0;
  for (int i = 0; i < count; i += kAhead) {
    Pack<T, kVec> row[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a < count) row[a] = pack_at<kVec>(x + staged.token[i + a] * p.x_stride_n);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a >= count) break;
      weight += staged.weight[i + a];
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        sum[v] = fmaf(staged.weight[i + a], to_float(row[a].at[v]), sum[v]);
    }
  }
  if (chunk.is_whole_group()) {
    write_mean(p, b, chunk.m, c, sum, weight);
  } else {
    store(partial_row(p, b, chunk) + c, sum);
  }
}

// merged[m] = sum over the chunks of a long group m of their sums / merged_size[m]
//
// Plan     a block owns kLanes packs of channels of one group; its kTeams warps add up consecutive
//          shares of the chunks, the first warp adds up theirs. Short groups were finished before.
// Grid     x: image and place of the list, where the second chunk of a group may begin; y: packs
// Shared   a sum of each pack for each team
// Traffic  4 / kMergeChunk bytes an element of the long groups
// Order    the shares depend on the number of chunks alone: the same bits every run
template <typename T, int kVec>
__global__ void __launch_bounds__(kLanes* kTeams)
    merge_tokens_combine_kernel(const MergeTokensParams<T> p, int places) {
  const MergeGroups& g = p.groups;
  const int64_t b = blockIdx.x / places;
  const Chunk second = later_chunk(g, b, blockIdx.x % places + 1);
  if (second.m < 0 || second.at != 1) return;

  DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kTeams, kLanes * kVec]
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes;
  const int c = (blockIdx.y * kLanes + lane) * kVec;
  const int chunks = static_cast<int>(ceil_div(second.all.count(), kMergeChunk));
  const int share = static_cast<int>(ceil_div(chunks, kTeams));
  const int end = min((team + 1) * share, chunks);
  float sum[kVec] = {};
#pragma unroll 4
  for (int at = team * share; at < end && c < p.C; ++at) {
    float part[kVec];
    load(part, partial_row(p, b, {second.m, at, second.all}) + c);
#pragma unroll
    for (int v = 0; v < kVec; ++v) sum[v] += part[v];
  }
  store(sums + threadIdx.x * kVec, sum);
  __syncthreads();
  if (team > 0 || c >= p.C) return;
  for (int t = 1; t < kTeams; ++t) {
    float part[kVec];
    load(part, sums + (t * kLanes + lane) * kVec);
#pragma unroll
    for (int v = 0; v < kVec; ++v) sum[v] += part[v];
  }
  write_mean(p, b, second.m, c, sum, p.merged_size[b * g.M + second.m]);
}

template <typename T, int kVec>
cudaError_t sum_members(const MergeTokensParams<T>& p, cudaStream_t stream) {
  const MergeGroups& g = p.groups;
  const int64_t places = std::max<int64_t>(ceil_div(g.N, kMergeChunk) - 1, 0);
  const int64_t chunks = g.M + places;
  if (g.B * chunks > INT_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(g.B * chunks, ceil_div(p.C, kThreads * kVec) + 1);
  const cudaError_t error =
      launch(merge_tokens_sum_kernel<T, kVec>, grid, dim3(kThreads), 0, stream, p, chunks);
  if (error != cudaSuccess || places == 0 || p.C == 0) return error;
  const dim3 combine_grid(g.B * places, ceil_div(p.C, kLanes * kVec));
  return launch(merge_tokens_combine_kernel<T, kVec>, combine_grid, dim3(kLanes * kTeams),
                sizeof(float) * kLanes * kTeams * kVec, stream, p, places);
}

}  // namespace

template <typename T>
cudaError_t launch_merge_tokens(const MergeTokensParams<T>& p, cudaStream_t stream) {
  const cudaError_t error = launch_list_members(p.groups, stream);
  if (error != cudaSuccess) return error;
  const bool in_packs = packs(p.x, p.x_stride_b, p.x_stride_n, p.C) && packs(p.merged, p.C);
  return in_packs ? sum_members<T, kWidestPack<T>>(p, stream) : sum_members<T, 1>(p, stream);
}

template cudaError_t launch_merge_tokens(const MergeTokensParams<float>&, cudaStream_t);
template cudaError_t launch_merge_tokens(const MergeTokensParams<__half>&, cudaStream_t);
template cudaError_t launch_merge_tokens(const MergeTokensParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
