// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     A block owns 64 or 128 queries of one head, a warpgroup 64 of them, and walks the keys
//          they see. One warpgroup fetches: a thread has TMA copy keys and values, a warp writes
//          what a tile's columns add to their logits, a warp clears values under padding, which may
//          be NaN. In the others both products are wgmma's, the weights stay in registers between
//          them, and the scores of a tile are under way while the tile before is summed.
// Grid     [query tiles * Hq * B], of a head the longest rows first.
// Shared   Queries, two stages of keys and values as TMA swizzles them, the decay table as
//          log2(2 - decay): where positions ascend by 1 a row of biases is a piece of it,
//          backwards.
// Traffic  q, out, lse once; k, v, log_size, positions once a block, from L2 but the first time.
// Order    Tiles from the first key to the last, nothing atomic: the same bits every run.

#include "attention_hopper_tiles.cuh"
#include "device.h"

namespace restore_ext::cuda {
namespace hopper {
namespace {

#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Divides by the sums and stores the rows `first` and first + 8 of the head whose rows begin at
// `head`.
template <typename T, int kCount>
__device__ __forceinline__ void finish(const CalibratedAttentionParams<T>& p,
                                       const float (&o)[kCount], const Rows& rows, int64_t head,
                                       int first) {
  float factor[2];
  T* to[2];
  bool valid[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first + 8 * r;
    const int64_t at = head + i;
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    factor[r] = sum == 0.f ? 0.f : 1.f / sum;  // sees nothing: its row is zeros
    valid[r] = i < p.Lq;
    to[r] = p.out + at * (2 * kCount);
    if (valid[r] && threadIdx.x % 4 == 0) {
      p.lse[at] = sum == 0.f ? kNever : (rows.max[r] + log2f(sum)) * kLn2;
    }
  }
  store_rows(o, factor, to, valid);
}

// A consumer: 64 queries through all tiles.
template <typename T, int kD, typename S, typename P>
__device__ __forceinline__ void attend(const P& p, const S& shared, int64_t b, int head, int row,
                                       int first_key, int tiles) {
  using Sizes = typename S::Sizes;
  constexpr int kKeys = Sizes::kKeys, kColumns = Sizes::kColumns;
  const Barriers barriers(shared);
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int own = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and 8 more
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = min(row + own + 8 * r, p.Lq - 1);  // past the last: computed, not stored
    rows.seen[r] = visible(p, b, i);
    rows.position[r] = query_position(p, b, 0, i);
  }

  float x[kKeys / 2], o[kD / 2], keep[2];
  uint32_t weight[kKeys / 16][4];
  const auto score = [&](int t) {  // x = q . k
    const int stage = t % kStages;
    mbar_wait(barriers.key(stage), parity(t));
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kD; d += 16) {
      const int box = d / kColumns, within = d % kColumns * 2;
      const unsigned char* q = shared.query() + (box * Sizes::kRows + group * 64) * kColumns * 2;
      const unsigned char* k = shared.key(stage) + box * kKeys * kColumns * 2;
      wgmma<T, 0>(x, wgmma_operand<kColumns>(q + within), wgmma_operand<kColumns>(k + within),
                  d > 0);
    }
    wgmma_commit();
  };
  bool has_padding = false;
  const auto become_weights = [&](int t) {
    const int stage = t % kStages, first = 2 * (lane % 4);
    mbar_wait(barriers.columns(stage), parity(t));
    const TileNote note = *shared.note(stage);
    const float* log_size = shared.log_size(stage) + first;
    const int* key_position = shared.key_position(stage) + first;
    scale_and_size(x, p, log_size);
    if (p.decay && !(p.Gp == 1 && add_distance(x, rows, note, key_position, shared.table(),
                                               shared.margin, p.P))) {
      add_distances<kKeys, Sizes::kRows>(x, p.Gp, shared.query_position() + own, key_position,
                                         shared.table(), p.P);
    }
    mask(x, rows, first_key + t * kKeys, note, log_size);
    weigh(x, rows, keep);
    has_padding = note.has_padding;
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weight[i / 4][i % 4] = pack<T>(x[2 * i], x[2 * i + 1]);
  };
  const auto add_values = [&](int t) {  // o += weight . v
    const int stage = t % kStages;
    mbar_wait(barriers.value(stage), parity(t));
    if (has_padding) mbar_wait(barriers.cleared(stage), parity(t));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      const unsigned char* v = shared.value(stage) + k * kColumns * 2;
      wgmma<T, 1>(o, weight[k / 16], wgmma_operand<kColumns>(v, kKeys * kColumns * 2),
                  t > 0 || k > 0);
    }
    wgmma_commit();
  };
  const auto free = [&](uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) mbar_arrive(barrier);
  };

  if (tiles > 0) {
    mbar_wait(barriers.query(), 0);
    score(0);
    wgmma_wait<0>();
    free(barriers.key_free(0));
    become_weights(0);
    pack_weights();
    for (int t = 1; t < tiles; ++t) {
      score(t);
      add_values(t - 1);
      wgmma_wait<1>();  // the scores, not yet the values
      free(barriers.key_free(t % kStages));
      become_weights(t);
      wgmma_wait<0>();
      free(barriers.value_free((t - 1) % kStages));
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) o[i] *= keep[i >> 1 & 1];
      pack_weights();
    }
    add_values(tiles - 1);
    wgmma_wait<0>();
  } else {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) o[i] = 0.f;
  }
  finish(p, o, rows, (b * p.Hq + head) * p.Lq, row + own);
}

#endif

template <typename T, int kD, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), kGroups == 1 ? 2 : 1)
    calibrated_attention_hopper_kernel(const CalibratedAttentionParams<T> p,
                                       const __grid_constant__ Maps maps) {
#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DYNAMIC_SHARED(base);
  using S = Shared<CalibratedAttentionParams<T>, kD, kGroups>;
  using Sizes = typename S::Sizes;
  const S shared(base, p);
  const Barriers barriers(shared);
  const int query_tiles = static_cast<int>(ceil_div(p.Lq, Sizes::kRows));
  const int row = (query_tiles - 1 - static_cast<int>(blockIdx.x % query_tiles)) * Sizes::kRows;
  const int head = blockIdx.x / query_tiles % p.Hq;
  const int64_t b = blockIdx.x / query_tiles / p.Hq;

  if (threadIdx.x == 0) {
    mbar_init(barriers.query(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbar_init(barriers.key(stage), 1);
      mbar_init(barriers.value(stage), 1);
      mbar_init(barriers.columns(stage), 1);
      mbar_init(barriers.cleared(stage), 1);
      mbar_init(barriers.key_free(stage), 4 * kGroups);
      mbar_init(barriers.value_free(stage), 4 * kGroups + 1);
    }
    fence_mbar_init();
  }
  const KeyRange range = block_range(p, shared, b, row);
  const int tiles = range.first < range.past
                        ? static_cast<int>(ceil_div(range.past - range.first, Sizes::kKeys))
                        : 0;
  fill_table(p, shared);
  if (p.decay) {
    for (int i = threadIdx.x; i < p.Gp * Sizes::kRows; i += Sizes::kThreads) {
      const int g = i / Sizes::kRows, at = min(row + i % Sizes::kRows, p.Lq - 1);
      shared.query_position()[i] = query_position(p, b, g, at);
    }
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    fewer_registers<40>();
    const int warp = threadIdx.x / 32;
    if (warp == 0 && threadIdx.x == 0 && tiles > 0) {
      fetch_tiles(shared, maps, b, head, head / (p.Hq / p.Hkv), row, range.first, tiles);
    }
    if (warp == 1) note_columns(p, shared, b, range, tiles);
    if (warp == 2) clear_padding(shared, tiles);
  } else {
    more_registers<kGroups == 1 ? 216 : 232>();
    attend<T, kD>(p, shared, b, head, row, range.first, tiles);
  }
#else
  __trap();  // launched by mistake, it must not leave its output as it was
#endif
}

// [B, H, L, D] in boxes of `rows` rows of one head.
template <int kColumns, typename T>
cudaError_t map_heads(CUtensorMap* map, const T* data, int B, int H, int L, int D,
                      const HeadStrides& stride, int rows) {
  const auto bytes = [&](int size, int64_t elements) {  // the stride of one element says nothing
    return static_cast<cuuint64_t>(size == 1 ? 16 : elements * 2);
  };
  const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
  return make_tensor_map<T, 4>(map, data, {size(D), size(L), size(H), size(B)},
                               {bytes(L, stride.l), bytes(H, stride.h), bytes(B, stride.b)},
                               {kColumns, static_cast<cuuint32_t>(rows), 1, 1});
}

template <typename T, int kD, int kGroups>
size_t shared_bytes(const CalibratedAttentionParams<T>& p) {
  const Shared<CalibratedAttentionParams<T>, kD, kGroups> shared(nullptr, p);
  return shared.end() - shared.base;
}

template <typename T, int kD, int kGroups>
cudaError_t launch_tiles(const CalibratedAttentionParams<T>& p, cudaStream_t stream) {
  using Sizes = Tile<kD, kGroups>;
  Maps maps;
  if (const auto error = map_heads<Sizes::kColumns>(&maps.query, p.query, p.B, p.Hq, p.Lq, kD,
                                                    p.query_stride, Sizes::kRows)) {
    return error;
  }
  if (const auto error = map_heads<Sizes::kColumns>(&maps.key, p.key, p.B, p.Hkv, p.Lk, kD,
                                                    p.key_stride, Sizes::kKeys)) {
    return error;
  }
  if (const auto error = map_heads<Sizes::kColumns>(&maps.value, p.value, p.B, p.Hkv, p.Lk, kD,
                                                    p.value_stride, Sizes::kKeys)) {
    return error;
  }
  const int64_t blocks = ceil_div(p.Lq, Sizes::kRows) * p.Hq * p.B;
  return launch(calibrated_attention_hopper_kernel<T, kD, kGroups>, dim3(blocks),
                dim3(Sizes::kThreads), shared_bytes<T, kD, kGroups>(p), stream, p, maps);
}

template <typename T, int kD>
cudaError_t launch_size(const CalibratedAttentionParams<T>& p, cudaStream_t stream) {
  // Half a tile a block, two blocks a multiprocessor, where whole tiles leave some without work.
  const bool few = ceil_div(p.Lq, 128) * p.Hq * p.B < multiprocessors();
  return few ? launch_tiles<T, kD, 1>(p, stream) : launch_tiles<T, kD, 2>(p, stream);
}

}  // namespace
}  // namespace hopper

template <typename T>
bool calibrated_attention_hopper_takes(const CalibratedAttentionParams<T>& p) {
  const auto in_place = [](const T* data, const HeadStrides& stride) {
    return packs(data, stride.b, stride.h, stride.l) && stride.b > 0 && stride.h > 0 &&
           stride.l > 0;
  };
  return (p.D == 64 || p.D == 96 || p.D == 128) && p.Lq > 0 && p.Lk > 0 && p.B > 0 && p.Hq > 0 &&
         in_place(p.query, p.query_stride) && in_place(p.key, p.key_stride) &&
         in_place(p.value, p.value_stride) &&
         hopper::shared_bytes<T, 128, 2>(p) <= static_cast<size_t>(shared_memory_limit());
}

template <typename T>
cudaError_t launch_calibrated_attention_hopper(const CalibratedAttentionParams<T>& p,
                                               cudaStream_t stream) {
  switch (p.D) {
    case 64:
      return hopper::launch_size<T, 64>(p, stream);
    case 96:
      return hopper::launch_size<T, 96>(p, stream);
    case 128:
      return hopper::launch_size<T, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template bool calibrated_attention_hopper_takes(const CalibratedAttentionParams<__half>&);
template bool calibrated_attention_hopper_takes(const CalibratedAttentionParams<__nv_bfloat16>&);
template cudaError_t launch_calibrated_attention_hopper(const CalibratedAttentionParams<__half>&,
                                                        cudaStream_t);
template cudaError_t launch_calibrated_attention_hopper(
    const CalibratedAttentionParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
