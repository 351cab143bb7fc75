// What a block of calibrated_attention on Hopper prepares, and what its first warpgroup does from
// then on: bring tiles of keys and values, note what their columns add to the logits, clear
// padding.
#pragma once

#include "attention_hopper.cuh"

#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace restore_ext::cuda::hopper {

// In their order in shared memory.
template <typename S>
struct Barriers {
  uint64_t* first;
  __device__ explicit Barriers(const S& shared) : first(shared.barriers()) {}
  __device__ uint64_t* query() const { return first; }
  __device__ uint64_t* key(int stage) const { return first + 1 + stage; }
  __device__ uint64_t* value(int stage) const { return key(kStages + stage); }
  __device__ uint64_t* columns(int stage) const { return value(kStages + stage); }
  __device__ uint64_t* cleared(int stage) const { return columns(kStages + stage); }
  __device__ uint64_t* key_free(int stage) const { return cleared(kStages + stage); }
  __device__ uint64_t* value_free(int stage) const { return key_free(kStages + stage); }
};

__device__ __forceinline__ int parity(int t) { return t / kStages & 1; }
// Of what held the stage before.
__device__ __forceinline__ int freed(int t) { return parity(t) ^ 1; }

// The keys that some query of the block sees.
template <typename S, typename P>
__device__ __forceinline__ KeyRange block_range(const P& p, const S& shared, int64_t b, int row) {
  const int last = min(row + S::Sizes::kRows, p.Lq) - 1;
  if (p.key_range == nullptr) return visible(p, b, last);
  const int i = row + threadIdx.x;
  KeyRange range{p.Lk, 0};
  if (i <= last) {
    const KeyRange own = visible(p, b, i);
    if (own.first < own.past) range = own;
  }
  range = {__reduce_min_sync(~0u, range.first), __reduce_max_sync(~0u, range.past)};
  if (threadIdx.x % 32 == 0) {
    shared.hull()[threadIdx.x / 32 * 2] = range.first;
    shared.hull()[threadIdx.x / 32 * 2 + 1] = range.past;
  }
  __syncthreads();
  for (int w = 0; w < S::Sizes::kRows / 32; ++w) {
    range.first = min(range.first, shared.hull()[2 * w]);
    range.past = max(range.past, shared.hull()[2 * w + 1]);
  }
  return range;
}

template <typename S, typename P>
__device__ __forceinline__ void fill_table(const P& p, const S& shared) {
  if (p.decay == nullptr) return;
  if (p.Gp > 1) {
    for (int i = threadIdx.x; i < p.G * p.P; i += S::Sizes::kThreads)
      shared.table()[i] = p.decay[i];
    return;
  }
  const int past = p.P + S::Sizes::kKeys;
  for (int d = static_cast<int>(threadIdx.x) - shared.margin; d < past; d += S::Sizes::kThreads) {
    float rho = 0.f;
    for (int g = 0; g < p.G; ++g) {
      rho += p.decay[static_cast<int64_t>(g) * p.P + min(abs(d), p.P - 1)];
    }
    shared.table()[d] = bias_of_decay(rho);
  }
}

// One thread: everything TMA copies.
template <typename S>
__device__ void fetch_tiles(const S& shared, const Maps& maps, int64_t b, int head, int key_head,
                            int row, int first_key, int tiles) {
  using Sizes = typename S::Sizes;
  constexpr int kD = Sizes::kKeyBytes / 2 / Sizes::kKeys;
  const Barriers barriers(shared);
  const auto fetch = [&](unsigned char* to, const CUtensorMap* map, uint64_t* barrier, int rows,
                         int at_row, int at_head) {
    mbar_expect_tx(barrier, rows * kD * 2);
#pragma unroll
    for (int c = 0; c < kD; c += Sizes::kColumns) {
      tma_load(to + c * rows * 2, map, barrier, c, at_row, at_head, static_cast<int>(b));
    }
  };
  const auto fetch_key = [&](int t) {
    const int stage = t % kStages;
    if (t >= kStages) mbar_wait(barriers.key_free(stage), freed(t));
    fetch(shared.key(stage), &maps.key, barriers.key(stage), Sizes::kKeys,
          first_key + t * Sizes::kKeys, key_head);
  };
  const auto fetch_value = [&](int t) {
    const int stage = t % kStages;
    if (t >= kStages) mbar_wait(barriers.value_free(stage), freed(t));
    fetch(shared.value(stage), &maps.value, barriers.value(stage), Sizes::kKeys,
          first_key + t * Sizes::kKeys, key_head);
  };
  fetch(shared.query(), &maps.query, barriers.query(), Sizes::kRows, row, head);
  fetch_key(0);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) fetch_key(t + 1);  // its stage is free before that of the values
    fetch_value(t);
  }
}

// One warp: what the columns add to the logits. A stage is free when its values are.
template <typename S, typename P>
__device__ void note_columns(const P& p, const S& shared, int64_t b, KeyRange range, int tiles) {
  constexpr int kKeys = S::Sizes::kKeys;
  const Barriers barriers(shared);
  const int lane = threadIdx.x % 32;
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % kStages;
    if (t >= kStages) mbar_wait(barriers.value_free(stage), freed(t));
    int lowest = INT32_MAX, highest = INT32_MIN;
    bool contiguous = true, has_padding = false;
    for (int c = lane; c < kKeys; c += 32) {
      const int key = range.first + t * kKeys + c, j = min(key, p.Lk - 1);
      float log_size = p.log_size ? p.log_size[b * p.Lk + j] : 0.f;
      // Nobody's to see, so what lies there may be anything; past Lk it is TMA's zeros.
      if (key >= range.past && key < p.Lk) log_size = kNever;
      has_padding |= log_size == kNever;
      shared.log_size(stage)[c] = log_size * kLog2e;
      for (int g = 0; g < p.Gp; ++g)
        shared.key_position(stage)[g * kKeys + c] = key_position(p, b, g, j);
      const int own = key_position(p, b, 0, j);
      lowest = min(lowest, own), highest = max(highest, own);
      if (c + 1 < kKeys && j + 1 < p.Lk) {
        contiguous &=
            static_cast<uint32_t>(key_position(p, b, 0, j + 1)) - static_cast<uint32_t>(own) == 1u;
      }
    }
    const TileNote note{__reduce_min_sync(~0u, lowest), __reduce_max_sync(~0u, highest),
                        __all_sync(~0u, contiguous), __any_sync(~0u, has_padding)};
    if (lane == 0) *shared.note(stage) = note;
    __syncwarp();
    if (lane == 0) mbar_arrive(barriers.columns(stage));
  }
}

// One warp: zeros for the values under padding, since 0 * NaN is NaN.
template <typename S>
__device__ void clear_padding(const S& shared, int tiles) {
  using Sizes = typename S::Sizes;
  constexpr int kRowBytes = Sizes::kColumns * 2,
                kBoxes = Sizes::kKeyBytes / Sizes::kKeys / kRowBytes;
  const Barriers barriers(shared);
  const int lane = threadIdx.x % 32;
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % kStages;
    mbar_wait(barriers.columns(stage), parity(t));
    if (shared.note(stage)->has_padding) {
      mbar_wait(barriers.value(stage), parity(t));
      for (int c = 0; c < Sizes::kKeys; ++c) {
        if (shared.log_size(stage)[c] != kNever) continue;
        // Swizzling moves 16 bytes within their row of a box: a row is a row still.
        for (int i = lane; i < kBoxes * kRowBytes / 16; i += 32) {
          const int box = i / (kRowBytes / 16), chunk = i % (kRowBytes / 16);
          *reinterpret_cast<uint4*>(shared.value(stage) + (box * Sizes::kKeys + c) * kRowBytes +
                                    chunk * 16) = make_uint4(0, 0, 0, 0);
        }
      }
      fence_proxy_async();  // wgmma reads what was stored here
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(barriers.cleared(stage)), mbar_arrive(barriers.value_free(stage));
  }
}

}  // namespace restore_ext::cuda::hopper
#endif
