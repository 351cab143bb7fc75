// What the decode kernels share: which keys a block has, where they lie, what their logits gain,
// and how the sums of warps and of blocks become one. Logits are in base 2 here.
#pragma once

#include "calibrated_attention_decode_kernel.h"
#include "pack.cuh"
#include "ptx.cuh"

namespace restore_ext::cuda {

// The kernel on the plain cores, for what the tensor cores do not take: its plan has rows of 1.
template <typename T>
cudaError_t launch_calibrated_attention_decode_plain(
    const CalibratedAttentionDecodeParams<T>& params, const DecodePlan& plan, cudaStream_t stream);

constexpr int kDecodeThreads = 128, kDecodeWarps = 4;
constexpr int kDecodeLeastKeys = 128;  // of a split: what is worth a block
constexpr float kNever = -INFINITY;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

struct Range {
  int first, past;
};

// The keys that query i of row b sees, of `length`.
template <typename T>
__device__ __forceinline__ Range visible(const CalibratedAttentionDecodeParams<T>& p, int b, int i,
                                         int length) {
  Range range{0, length};
  if (p.causal) range.past = min(length, length - p.Lq + i + 1);
  if (p.key_range) {
    const int32_t* own = p.key_range + (static_cast<int64_t>(b) * p.Lq + i) * 2;
    range = {max(range.first, own[0]), min(range.past, own[1])};
  }
  return range;
}

// In 32 bits, which a GPU divides in line.
__device__ __forceinline__ int parts_of(int n, int size) { return (n + size - 1) / size; }

// A block's share: some rows, that is queries of one key head, h * Lq + i each; and some keys.
struct DecodeWork {
  int unit;     // of B * Hkv * tiles
  int b, head;  // head: of the keys
  int row, rows;
  int length;         // keys of row b of the batch
  int split, splits;  // of those splits that have keys; at least one
  Range keys;

  __device__ __forceinline__ int query_of(int r, int Lq) const { return (row + r) % Lq; }
};

template <typename T>
__device__ __forceinline__ DecodeWork decode_work(const CalibratedAttentionDecodeParams<T>& p,
                                                  const DecodePlan& plan) {
  DecodeWork work;
  work.unit = blockIdx.x / plan.splits;
  work.split = blockIdx.x % plan.splits;
  const int all = p.Hq / p.Hkv * p.Lq, tiles = parts_of(all, plan.rows);
  work.row = work.unit % tiles * plan.rows;
  work.rows = min(plan.rows, all - work.row);
  work.head = work.unit / tiles % p.Hkv;
  work.b = work.unit / tiles / p.Hkv;
  work.length = p.max_pages * p.page;
  if (p.seqlens) work.length = min(max(p.seqlens[work.b], 0), work.length);

  Range hull{work.length, 0};
  for (int r = 0; r < min(work.rows, p.Lq); ++r) {  // the others are the same queries again
    const Range range = visible(p, work.b, work.query_of(r, p.Lq), work.length);
    if (range.first >= range.past) continue;
    hull = {min(hull.first, range.first), max(hull.past, range.past)};
  }
  const int keys = max(hull.past - hull.first, 0);
  // Equal shares of what is there, in whole steps of all warps.
  const int share = max(parts_of(parts_of(keys, plan.splits), 64) * 64, kDecodeLeastKeys);
  work.splits = max(parts_of(keys, share), 1);
  if (work.split < work.splits) {
    work.keys.first = hull.first + work.split * share;
    work.keys.past = min(work.keys.first + share, hull.past);
  }
  return work;
}

// Where a token lies; page -1: nowhere.
struct Place {
  int page, token;
};

template <typename T>
__device__ __forceinline__ Place place_of(const CalibratedAttentionDecodeParams<T>& p, int b,
                                          int j) {
  if (!p.block_table) return {b, j};
  const int page = p.block_table[static_cast<int64_t>(b) * p.max_pages + j / p.page];
  return {static_cast<unsigned>(page) < static_cast<unsigned>(p.pages) ? page : -1, j % p.page};
}

// -inf for what is padding or nowhere: nothing else of it may be read.
template <typename T>
__device__ __forceinline__ float log2_size(const CalibratedAttentionDecodeParams<T>& p, Place at) {
  if (at.page < 0) return kNever;
  if (!p.log_size) return 0.f;
  return p.log_size[static_cast<int64_t>(at.page) * p.page + at.token] * kLog2e;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const T* data, const CacheStrides& stride, int head,
                                           Place at) {
  return data + at.page * stride.outer + head * stride.h + at.token * stride.l;
}

// log2(2 - decay) of query i and the key at j. A cache is long and its rows are few: one by one.
template <typename T>
__device__ __forceinline__ float log2_distance(const CalibratedAttentionDecodeParams<T>& p,
                                               const DecodeWork& work, int i, int j) {
  const Place at = place_of(p, work.b, j);
  float rho = 0.f;
  for (int g = 0; g < p.G; ++g) {
    const int at_query =
        p.query_position ? p.query_position[work.b * p.query_axis.outer + g * p.query_axis.g + i]
                         : work.length - p.Lq + i;
    const int at_key =
        p.key_position ? p.key_position[at.page * p.key_axis.outer + g * p.key_axis.g + at.token]
                       : j;
    // Unsigned: the distance of two int32 may pass 2^31.
    const unsigned distance =
        static_cast<unsigned>(max(at_query, at_key)) - static_cast<unsigned>(min(at_query, at_key));
    rho += p.decay[static_cast<int64_t>(g) * p.P + min(distance, static_cast<unsigned>(p.P - 1))];
  }
  return log2f(2.f - rho);
}

// What a product of query i and key j becomes; -inf where `bias`, the key's size, says so, even if
// the product is NaN.
template <typename T>
__device__ __forceinline__ float logit_of(const CalibratedAttentionDecodeParams<T>& p,
                                          const DecodeWork& work, int i, int j, float product,
                                          float bias) {
  if (p.decay && bias != kNever) bias += log2_distance(p, work, i, j);
  if (bias == kNever) return kNever;
  if (p.softcap > 0.f) return p.softcap * kLog2e * tanhf(product * p.scale / p.softcap) + bias;
  return product * (p.scale * kLog2e) + bias;
}

// Sums of a row are D sums of weighted values, the maximum they are relative to, the sum of the
// weights, and two of padding that keep the next row in packs of 16 bytes.
__host__ __device__ constexpr int row_floats(int D) { return D + 4; }

// Of `count` such tiles of rows, each `tile` floats after the one before, the sum in their order;
// emit(row, column, sums of 4 columns, maximum, sum of the weights).
template <typename Emit>
__device__ __forceinline__ void add_tiles(const float* tiles, int count, int64_t tile, int rows,
                                          int D, Emit emit) {
  const int quads = D / 4;
  for (int item = threadIdx.x; item < rows * quads; item += kDecodeThreads) {
    const int row = item / quads, column = item % quads * 4;
    const float* own = tiles + row * row_floats(D);
    float most = kNever;
    for (int n = 0; n < count; ++n) most = fmaxf(most, own[n * tile + D]);
    const float shift = most == kNever ? 0.f : most;  // nothing seen
    float sum = 0.f, out[4] = {};
    for (int n = 0; n < count; ++n) {
      const float weight = exp2_approx(own[n * tile + D] - shift);
      sum += weight * own[n * tile + D + 1];
      float part[4];
      load<4>(part, own + n * tile + column);
#pragma unroll
      for (int x = 0; x < 4; ++x) out[x] += weight * part[x];
    }
    emit(row, column, out, most, sum);
  }
}

// From the sums of the block's warps, [kDecodeWarps, plan.rows, row_floats(D)] in shared memory, to
// the output. Where a unit has several blocks the last one to arrive adds what all have left.
template <typename T>
__device__ __forceinline__ void finish(const CalibratedAttentionDecodeParams<T>& p,
                                       const DecodePlan& plan, const DecodeWork& work,
                                       const float* warps) {
  const int D = p.D;
  const int64_t tile = plan.rows * row_floats(D);
  const int64_t row =
      (static_cast<int64_t>(work.b) * p.Hkv + work.head) * (p.Hq / p.Hkv) * p.Lq + work.row;
  const auto to_output = [&](int r, int column, const float (&sums)[4], float most, float sum) {
    const float all = sum == 0.f ? 1.f : sum;  // sees nothing: its row is zeros
    const float out[4] = {sums[0] / all, sums[1] / all, sums[2] / all, sums[3] / all};
    store<4>(p.out + (row + r) * D + column, out);
    if (column == 0) p.lse[row + r] = sum == 0.f ? kNever : (most + log2f(sum)) * kLn2;
  };
  if (work.splits == 1) {
    add_tiles(warps, kDecodeWarps, tile, work.rows, D, to_output);
    return;
  }

  float* parts = p.parts + static_cast<int64_t>(work.unit) * plan.splits * tile;
  add_tiles(warps, kDecodeWarps, tile, work.rows, D,
            [&](int r, int column, const float (&sums)[4], float most, float sum) {
              float* own = parts + work.split * tile + r * row_floats(D);
              store<4>(own + column, sums);
              if (column == 0) own[D] = most, own[D + 1] = sum;
            });
  STATIC_SHARED(int, before);
  __threadfence();  // what this block leaves is seen by whoever sees its arrival
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(p.arrived + work.unit, 1);
  __syncthreads();
  if (before != work.splits - 1) return;
  __threadfence();
  add_tiles(parts, work.splits, tile, work.rows, D, to_output);
}

}  // namespace restore_ext::cuda
