// out[i] = sum over j of softmax_j(softcap(scale * q_i.k_j) + log_size_j + log(2 - decay_ij)) * v_j
//
// Plan     A block owns 64 queries of one head, a warp 16 of them, and walks the keys they see, 64
//          at a time, with a running maximum and sum. Queries, weights and sums stay in registers;
//          both products are mma.sync's. While a tile is worked on, cp.async brings the next. What
//          a tile does not need it does not pay for: sizes, distances, masks are asked tile by
//          tile.
// Grid     [ceil(Lq / 64) * B * Hq], the longest rows first, the heads of a key head side by side.
// Shared   Two stages of keys and values, the first of which brings the queries; what belongs to
//          the columns of three tiles; a strip of distances (attention_distance.cuh).
// Traffic  q, out, lse once; k, v and what belongs to a key once a block, from L2 but the first
//          time. Padding is not read.
// Order    Tiles begin at the first key that a query of the block sees; nothing is atomic: the same
//          bits every run.

#include "attention_distance.cuh"

namespace restore_ext::cuda {
namespace {

constexpr int kWarpRows = 16, kRing = 3;

struct Columns : Lines {
  alignas(16) float log2_size[kTileLines];
  int has_size;  // some are not 0
};

template <typename T, int kD>
struct PrefillShared {
  AttentionTile<T, kD> key[2], value[2];
  Columns columns[kRing];
  Lines rows;
  KeyRange seen[kTileLines];
  DistanceStrip strip;
  int hull[2];
};

// What a lane of the first warp knows of two keys of a tile to come.
struct TwoColumns : TwoLines {
  float log_size[2];

  template <typename T>
  __device__ __forceinline__ void load(const CalibratedAttentionParams<T>& p, int64_t b, int j0,
                                       int past) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int j = j0 + static_cast<int>(threadIdx.x % 32) + 32 * n;
      log_size[n] = j >= past ? kNever : p.log_size ? __ldg(p.log_size + b * p.Lk + j) : 0.f;
      position[n][0] = j < past && noted_axes(p) > 0 ? key_position(p, b, 0, j) : 0;
    }
  }

  // The other axes, which few have, are loaded now: they would take registers while they wait.
  template <typename T>
  __device__ __forceinline__ void store(const CalibratedAttentionParams<T>& p, int64_t b, int j0,
                                        Columns& to) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      counts[n] = log_size[n] != kNever;
#pragma unroll
      for (int g = 1; g < kAxes; ++g) {
        if (g >= noted_axes(p)) break;
        const int j = j0 + static_cast<int>(threadIdx.x % 32) + 32 * n;
        position[n][g] = counts[n] ? key_position(p, b, g, j) : 0;
      }
    }
    TwoLines::store(noted_axes(p), to.note, to.position);
    const int lane = threadIdx.x % 32;
    to.log2_size[lane] = log_size[0] * kLog2e;
    to.log2_size[lane + 32] = log_size[1] * kLog2e;
    const bool any = __any_sync(~0u, log_size[0] != 0.f || log_size[1] != 0.f);
    if (lane == 0) to.has_size = any;
  }
};

// By the first warp: what the block's queries see, and where they stand.
template <typename T, int kD>
__device__ __forceinline__ void note_rows(const CalibratedAttentionParams<T>& p,
                                          PrefillShared<T, kD>& shared, int64_t b, int i0) {
  const int lane = threadIdx.x % 32;
  TwoLines lines;
  KeyRange hull{p.Lk, 0};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int line = lane + 32 * n, i = i0 + line;
    const KeyRange own = i < p.Lq ? visible(p, b, i) : KeyRange{0, p.Lk};  // past the end: no mask
    shared.seen[line] = own;
    lines.counts[n] = i < p.Lq && own.first < own.past;
    if (lines.counts[n]) hull = {min(hull.first, own.first), max(hull.past, own.past)};
#pragma unroll
    for (int g = 0; g < kAxes; ++g) {
      if (g < noted_axes(p)) lines.position[n][g] = i < p.Lq ? query_position(p, b, g, i) : 0;
    }
  }
  lines.store(noted_axes(p), shared.rows.note, shared.rows.position);
  hull = {__reduce_min_sync(~0u, hull.first), __reduce_max_sync(~0u, hull.past)};
  if (lane == 0) {
    shared.hull[0] = hull.first, shared.hull[1] = hull.past;
    shared.strip.axes = 0;
  }
}

// A thread's two rows of its warp's 16.
struct Softmax {
  float most[2] = {kNever, kNever}, sum[2] = {0.f, 0.f};

  // x * factor, whose exponentials base 2 are the weights, becomes the weights; o is scaled to the
  // new maximum. Four lanes share a row and its maximum; each sums its own columns.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&x)[kTileLines / 8][4], float factor,
                                        float (&o)[kCount][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float larger = kNever;
#pragma unroll
      for (int n = 0; n < kTileLines / 8; ++n) {
        larger = fmaxf(larger, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
      }
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 2));
      larger = fmaxf(most[r], larger * factor);
      const float shift = larger == kNever ? 0.f : larger;  // nothing seen yet
      const float keep = exp2_approx(most[r] - shift);
      most[r] = larger;
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int n = 0; n < kTileLines / 8; ++n) {
        even += x[n][2 * r] = exp2_approx(fmaf(x[n][2 * r], factor, -shift));
        odd += x[n][2 * r + 1] = exp2_approx(fmaf(x[n][2 * r + 1], factor, -shift));
      }
      sum[r] = fmaf(sum[r], keep, even + odd);
#pragma unroll
      for (int d = 0; d < kCount; ++d) o[d][2 * r] *= keep, o[d][2 * r + 1] *= keep;
    }
  }
};

// -inf where a row does not see a column, and under padding, whatever is there.
__device__ __forceinline__ void mask(float (&x)[kTileLines / 8][4], const Columns& columns,
                                     KeyRange upper, KeyRange lower, int first) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTileLines / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = 8 * n + column + e % 2, j = first + at;
      const KeyRange own = e < 2 ? upper : lower;
      if (j < own.first || j >= own.past || columns.log2_size[at] == kNever) x[n][e] = kNever;
    }
  }
}

// Products become logits in base 2, less the returned factor.
template <typename T, int kD>
__device__ __forceinline__ float logits(const CalibratedAttentionParams<T>& p,
                                        PrefillShared<T, kD>& shared, const Columns& columns,
                                        DistanceClass found, float (&x)[kTileLines / 8][4], int row,
                                        int64_t b, int i0, int j0) {
  float factor = p.scale * kLog2e;
  if (p.softcap > 0) {
    const float inner = p.scale / p.softcap;
#pragma unroll
    for (int n = 0; n < kTileLines / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = tanhf(x[n][e] * inner);
    }
    factor = p.softcap * kLog2e;
  }
  if (columns.has_size || factor <= 0) {
#pragma unroll
    for (int n = 0; n < kTileLines / 8; ++n) {
      const float2 size =
          *reinterpret_cast<const float2*>(&columns.log2_size[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = fmaf(x[n][e], factor, e % 2 ? size.y : size.x);
    }
    factor = 1.f;
  }
  if (found == DistanceClass::kNone) return factor;
  add_distance(p, x, factor, found, shared.strip, shared.rows, columns, row, b, i0, j0);
  return 1.f;
}

// The warp's rows through shared memory, to be written in whole pieces.
template <typename T, int kD>
__device__ __forceinline__ void store_rows(const CalibratedAttentionParams<T>& p,
                                           AttentionTile<T, kD>& tile, const Softmax& softmax,
                                           const float (&o)[kD / 8][4], int row, int64_t head_row,
                                           int i0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // sees nothing: its row is zeros
    const int line = row + lane / 4 + 8 * r;
#pragma unroll
    for (int d = 0; d < kD / 8; ++d) {
      *reinterpret_cast<uint32_t*>(tile.at(line, d) + lane % 4 * 2) =
          pack_two<T>(o[d][2 * r] * inverse, o[d][2 * r + 1] * inverse);
    }
    if (lane % 4 == 0 && i0 + line < p.Lq) {
      p.lse[head_row + i0 + line] = (softmax.most[r] + log2f(sum)) * kLn2;
    }
  }
  __syncwarp();
  constexpr int kPieces = kD / 8;
#pragma unroll
  for (int i = lane; i < kWarpRows * kPieces; i += 32) {
    const int line = row + i / kPieces, piece = i % kPieces;
    if (i0 + line >= p.Lq) continue;
    *reinterpret_cast<uint4*>(p.out + (head_row + i0 + line) * kD + piece * 8) =
        *reinterpret_cast<const uint4*>(tile.at(line, piece));
  }
}

template <typename T, int kD>
__global__ void __launch_bounds__(kTileThreads, kD == 64 ? 3 : 2)
    calibrated_attention_prefill_kernel(const CalibratedAttentionParams<T> p) {
  DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<PrefillShared<T, kD>*>(bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t heads = static_cast<int64_t>(p.B) * p.Hq, tiles_of_queries = gridDim.x / heads;
  const int i0 = static_cast<int>(tiles_of_queries - 1 - blockIdx.x / heads) * kTileLines;
  const int head = static_cast<int>(blockIdx.x % heads % p.Hq);
  const int64_t b = blockIdx.x % heads / p.Hq, key_head = head / (p.Hq / p.Hkv);
  const T* query = p.query + b * p.query_stride.b + head * p.query_stride.h;
  const T* key = p.key + b * p.key_stride.b + key_head * p.key_stride.h;
  const T* value = p.value + b * p.value_stride.b + key_head * p.value_stride.h;

  shared.key[1].fetch(query + i0 * p.query_stride.l, p.query_stride.l,
                      [&](int line) { return i0 + line < p.Lq; });
  cp_async_commit();
  if (warp == 0) note_rows(p, shared, b, i0);
  __syncthreads();
  const int first = shared.hull[0], past = shared.hull[1];
  const int tiles = first < past ? static_cast<int>(ceil_div(past - first, kTileLines)) : 0;
  const auto columns_of = [&](int t) -> Columns& { return shared.columns[t % kRing]; };
  TwoColumns next;
  if (warp == 0) {
    for (int t = 0; t < min(tiles, 2); ++t) {
      next.load(p, b, first + t * kTileLines, past);
      next.store(p, b, first + t * kTileLines, columns_of(t));
    }
  }
  __syncthreads();
  const auto fetch = [&](int t) {
    const int j0 = first + t * kTileLines;
    const auto wanted = [&](int line) { return columns_of(t).log2_size[line] != kNever; };
    shared.key[t % 2].fetch(key + j0 * p.key_stride.l, p.key_stride.l, wanted);
    shared.value[t % 2].fetch(value + j0 * p.value_stride.l, p.value_stride.l, wanted);
    cp_async_commit();
  };

  const int row = warp * kWarpRows, own = row + lane / 4;
  Softmax softmax;
  // Between which keys all of the warp's rows see everything.
  const KeyRange all{__reduce_max_sync(~0u, shared.seen[row + lane % 16].first),
                     __reduce_min_sync(~0u, shared.seen[row + lane % 16].past)};
  const int last_key = p.decay && tiles > 0 ? key_position(p, b, 0, past - 1) : 0;
  uint32_t q[kD / 16][4];
  float o[kD / 8][4] = {};
  if (tiles > 0) fetch(0);
  cp_async_wait<0>();
  __syncthreads();
  load_queries<T, kD>(q, shared.key[1], row);

  for (int t = 0; t < tiles; ++t) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and all are done with the one before
    if (t + 1 < tiles) fetch(t + 1);
    const bool notes = warp == 0 && t + 2 < tiles;
    const int j0 = first + t * kTileLines;
    if (notes) next.load(p, b, j0 + 2 * kTileLines, past);
    const Columns& columns = columns_of(t);
    if (columns.note.counts) {
      const DistanceClass found =
          prepare_strip(p, shared.strip, shared.rows.note, columns.note, last_key);
      float x[kTileLines / 8][4];
      score<T, kD>(x, q, shared.key[t % 2]);
      const float factor = logits(p, shared, columns, found, x, own, b, i0, j0);
      if (all.first > j0 || all.past < j0 + kTileLines) {
        mask(x, columns, shared.seen[own], shared.seen[own + 8], j0);
      }
      softmax.weigh(x, factor, o);
      add_values<T, kD>(o, x, shared.value[t % 2]);
    }
    if (notes) next.store(p, b, j0 + 2 * kTileLines, columns_of(t + 2));
  }
  __syncthreads();  // the first stage is free
  store_rows(p, shared.key[0], softmax, o, row, (b * p.Hq + head) * p.Lq, i0);
}

template <typename T, int kD>
cudaError_t launch_prefill(const CalibratedAttentionParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.Lq, kTileLines) * p.Hq * p.B;
  return launch(calibrated_attention_prefill_kernel<T, kD>, dim3(static_cast<unsigned>(blocks)),
                dim3(kTileThreads), sizeof(PrefillShared<T, kD>), stream, p);
}

}  // namespace

template <typename T>
cudaError_t launch_calibrated_attention_prefill(const CalibratedAttentionParams<T>& p,
                                                cudaStream_t stream) {
  switch (p.D) {
    case 64:
      return launch_prefill<T, 64>(p, stream);
    case 96:
      return launch_prefill<T, 96>(p, stream);
    case 128:
      return launch_prefill<T, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_calibrated_attention_prefill(const CalibratedAttentionParams<__half>&,
                                                         cudaStream_t);
template cudaError_t launch_calibrated_attention_prefill(
    const CalibratedAttentionParams<__nv_bfloat16>&, cudaStream_t);

}  // namespace restore_ext::cuda
