// log2(2 - decay) for a tile of 64 queries by 64 keys, from the positions of its lines. Where the
// pairs' distances lie in a window of a few thousand, and they do wherever tokens ascend with small
// gaps, that window of the bias is kept in shared memory by signed distance, a Toeplitz strip: what
// a pair needs is strip[query position - key position]. It lasts for many tiles.
#pragma once

#include "attention_keys.cuh"
#include "attention_tile.cuh"

namespace restore_ext::cuda {

constexpr int kAxes = 4;      // that are told apart; positions on more are looked up pair by pair
constexpr int kStrip = 2048;  // distances in a strip
constexpr int kPairs = 2;     // four pairs of every thread that wait in shared memory
constexpr int kAxisStrip = kStrip / 2 / kAxes;  // in one of several; the pairs have the other half
static_assert(kPairs * kTileThreads * 4 == kStrip / 2);

enum class DistanceClass {
  kNone,    // no distance term
  kRun,     // one strip, and the columns ascend by 1: a row is a piece of it, backwards
  kNear,    // one strip
  kByAxis,  // a strip of decays for every axis
  kFar,     // the table itself, pair by pair
};

// What is known of the positions of 64 lines, of those that count.
struct LineNote {
  int low[kAxes], high[kAxes];
  // Of position - line on axis 0, and of position - position on axis 0 on the others.
  int shift_low[kAxes], shift_high[kAxes];
  int counts;  // some do

  __device__ __forceinline__ bool same_shift(int g) const { return shift_low[g] == shift_high[g]; }
  __device__ __forceinline__ bool is_run() const {
    return same_shift(0) && low[0] >= INT32_MIN + kTileLines;  // below, the shift wrapped around
  }
};

// A warp's lane has lines lane and lane + 32.
struct TwoLines {
  int position[2][kAxes];
  bool counts[2];

  // Writes the positions, those that do not count as the lowest: in the strip they stay.
  __device__ __forceinline__ void store(int axes, LineNote& note, int (*to)[kTileLines]) const {
    const int lane = threadIdx.x % 32;
    const bool any = __any_sync(~0u, counts[0] || counts[1]);
#pragma unroll
    for (int g = 0; g < kAxes; ++g) {
      if (g >= axes) break;
      int low = INT32_MAX, high = INT32_MIN, shift_low = INT32_MAX, shift_high = INT32_MIN;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (!counts[n]) continue;
        const unsigned base = g == 0 ? lane + 32 * n : position[n][0];
        const int shift = static_cast<int>(static_cast<unsigned>(position[n][g]) - base);
        low = min(low, position[n][g]), high = max(high, position[n][g]);
        shift_low = min(shift_low, shift), shift_high = max(shift_high, shift);
      }
      low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
      shift_low = __reduce_min_sync(~0u, shift_low);
      shift_high = __reduce_max_sync(~0u, shift_high);
#pragma unroll
      for (int n = 0; n < 2; ++n) to[g][lane + 32 * n] = counts[n] ? position[n][g] : low;
      if (lane == 0) {
        note.low[g] = low, note.high[g] = high;
        note.shift_low[g] = shift_low, note.shift_high[g] = shift_high;
      }
    }
    if (lane == 0) note.counts = any;
  }
};

struct alignas(16) Lines {  // positions and what follows them are read in pairs
  int position[kAxes][kTileLines];
  LineNote note;
};

struct alignas(16) DistanceStrip {
  float value[kStrip];
  int axes;                  // 0: nothing in it; 1: log2(2 - decay); else decays
  int64_t low[kAxes], high;  // the distance that comes first; of axis 0 the last
  int shift[kAxes];          // with one strip for several axes: their distance less axis 0's

  __device__ __forceinline__ float4 (*pairs())
      [kTileThreads] { return reinterpret_cast<float4(*)[kTileThreads]>(value + kStrip / 2); }
};

// How many axes of positions the notes tell apart.
template <typename T>
__device__ __forceinline__ int noted_axes(const CalibratedAttentionParams<T>& p) {
  return p.decay != nullptr && p.Gp <= kAxes ? p.Gp : 0;
}

// Whether distances on all axes follow from the one on axis 0.
template <typename T>
__device__ __forceinline__ bool on_one_axis(const CalibratedAttentionParams<T>& p,
                                            const LineNote& rows, const LineNote& columns) {
  constexpr int kSmall = 1 << 28;  // what int32 adds up
  bool one = true;
  for (int g = 0; p.Gp > 1 && g < p.Gp; ++g) {
    one &= min(rows.low[g], columns.low[g]) > -kSmall;
    one &= max(rows.high[g], columns.high[g]) < kSmall;
    one &= g == 0 || (rows.same_shift(g) && columns.same_shift(g));
  }
  return one;
}

// Distances low to high, both included.
struct Window {
  int64_t low, high;

  __device__ __forceinline__ Window(const LineNote& rows, const LineNote& columns, int g) {
    const bool run = g == 0 && columns.is_run();  // as if all its columns counted
    const int64_t first = run ? columns.shift_low[0] : columns.low[g];
    low = rows.low[g] - (run ? first + kTileLines - 1 : columns.high[g]);
    high = rows.high[g] - first;
  }
  __device__ __forceinline__ bool fits(int size) const { return high - low < size; }
};

template <typename T>
__device__ __forceinline__ float decay_at(const CalibratedAttentionParams<T>& p, int g, int64_t d) {
  const int64_t beyond = d < 0 ? -d : d, last = p.P - 1;
  return __ldg(p.decay + g * static_cast<int64_t>(p.P) + (beyond < last ? beyond : last));
}

// Keys ascend, so distances fall from tile to tile: the strip begins where this tile does and goes
// on below, to `lowest` if that is known.
template <typename T>
__device__ __forceinline__ void fill_strip(const CalibratedAttentionParams<T>& p,
                                           DistanceStrip& strip, Window need, int64_t lowest,
                                           const LineNote& rows, const LineNote& columns) {
  const int64_t most = need.high - kStrip + 1;
  const int64_t low = max(most, min(need.low, lowest));
  const int count = static_cast<int>(need.high - low) + 1;
  for (int e = threadIdx.x; e < count; e += kTileThreads) {
    float rho = 0.f;
    for (int g = 0; g < p.G; ++g) {
      const bool shifted = g > 0 && p.Gp > 1;
      const int shift = shifted ? rows.shift_low[g] - columns.shift_low[g] : 0;
      rho += decay_at(p, g, low + e + shift);
    }
    strip.value[e] = log2f(2.f - rho);
  }
  if (threadIdx.x == 0) {
    strip.axes = 1, strip.low[0] = low, strip.high = need.high;
    for (int g = 1; g < p.Gp; ++g) strip.shift[g] = rows.shift_low[g] - columns.shift_low[g];
  }
}

template <typename T>
__device__ __forceinline__ void fill_axis_strips(const CalibratedAttentionParams<T>& p,
                                                 DistanceStrip& strip, const LineNote& rows,
                                                 const LineNote& columns) {
  for (int g = 0; g < p.Gp; ++g) {
    const int64_t low = Window(rows, columns, g).high - kAxisStrip + 1;
    for (int e = threadIdx.x; e < kAxisStrip; e += kTileThreads) {
      strip.value[g * kAxisStrip + e] = decay_at(p, g, low + e);
    }
    if (threadIdx.x == 0) strip.low[g] = low;
  }
  if (threadIdx.x == 0) strip.axes = p.Gp;
}

__device__ __forceinline__ void empty_strip(DistanceStrip& strip) {
  const bool full = strip.axes != 0;
  __syncthreads();  // all have looked
  if (full && threadIdx.x == 0) strip.axes = 0;
}

// Sees to it that the strip holds what the tile needs. All threads call it, after a barrier.
template <typename T>
__device__ __forceinline__ DistanceClass prepare_strip(const CalibratedAttentionParams<T>& p,
                                                       DistanceStrip& strip, const LineNote& rows,
                                                       const LineNote& columns, int last_key) {
  if (p.decay == nullptr) return DistanceClass::kNone;
  if (p.Gp > kAxes) return DistanceClass::kFar;
  const Window need(rows, columns, 0);
  if (need.fits(kStrip) && on_one_axis(p, rows, columns)) {
    bool there = strip.axes == 1 && strip.low[0] <= need.low && need.high <= strip.high;
    for (int g = 1; there && g < p.Gp; ++g) {
      there = strip.shift[g] == rows.shift_low[g] - columns.shift_low[g];
    }
    if (!there) {
      __syncthreads();  // all have looked
      fill_strip(p, strip, need, static_cast<int64_t>(rows.low[0]) - last_key, rows, columns);
      __syncthreads();
    }
    return columns.is_run() ? DistanceClass::kRun : DistanceClass::kNear;
  }
  bool fits = p.Gp > 1, there = strip.axes == p.Gp;
  for (int g = 0; fits && g < p.Gp; ++g) {
    const Window axis(rows, columns, g);
    fits = axis.fits(kAxisStrip);
    there = there && strip.low[g] <= axis.low && axis.high < strip.low[g] + kAxisStrip;
  }
  if (!fits) {
    empty_strip(strip);  // the pairs overwrite it
    return DistanceClass::kFar;
  }
  if (!there) {
    __syncthreads();
    fill_axis_strips(p, strip, rows, columns);
    __syncthreads();
  }
  return DistanceClass::kByAxis;
}

// Where in a strip that begins at distance `low` a pair is found, for positions of any sign.
__device__ __forceinline__ int strip_index(int at_query, int at_key, int64_t low) {
  return static_cast<int>(static_cast<uint32_t>(at_query) - static_cast<uint32_t>(at_key) -
                          static_cast<uint32_t>(low));
}

// The same for decays that take a calculation: rho(n, e) of x[n][e]. In loops that are unrolled
// once or kUnroll times, for the sake of registers; what they found waits in shared memory.
template <int kUnroll, class Rho>
__device__ __forceinline__ void add_pairs(float (&x)[kTileLines / 8][4], float factor,
                                          float4 (*pair)[kTileThreads], const Rho& rho) {
#pragma unroll
  for (int n = 0; n < kTileLines / 8; n += kPairs) {
#pragma unroll 1
    for (int k = 0; k < kPairs; ++k) {
      float* four = &pair[k][threadIdx.x].x;
#pragma unroll kUnroll
      for (int e = 0; e < 4; ++e) four[e] = __log2f(2.f - rho(n + k, e));
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const float4 four = pair[k][threadIdx.x];
      x[n + k][0] = fmaf(x[n + k][0], factor, four.x);
      x[n + k][1] = fmaf(x[n + k][1], factor, four.y);
      x[n + k][2] = fmaf(x[n + k][2], factor, four.z);
      x[n + k][3] = fmaf(x[n + k][3], factor, four.w);
    }
  }
}

// x = x * factor + log2(2 - decay) for the warp's part of a tile; row is the thread's first in it,
// the tile begins at query i0 and key j0.
template <typename T>
__device__ __forceinline__ void add_distance(const CalibratedAttentionParams<T>& p,
                                             float (&x)[kTileLines / 8][4], float factor,
                                             DistanceClass found, DistanceStrip& strip,
                                             const Lines& rows, const Lines& columns, int row,
                                             int64_t b, int i0, int j0) {
  const int column = threadIdx.x % 4 * 2;
  if (found == DistanceClass::kRun) {
    const float* at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      at[r] = strip.value - column +
              strip_index(rows.position[0][row + 8 * r], columns.note.shift_low[0], strip.low[0]);
    }
#pragma unroll
    for (int n = 0; n < kTileLines / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = fmaf(x[n][e], factor, at[e / 2][-8 * n - e % 2]);
    }
  } else if (found == DistanceClass::kNear) {
    const int first[2] = {strip_index(rows.position[0][row], 0, strip.low[0]),
                          strip_index(rows.position[0][row + 8], 0, strip.low[0])};
#pragma unroll
    for (int n = 0; n < kTileLines / 8; ++n) {
      const int2 at_key = *reinterpret_cast<const int2*>(&columns.position[0][8 * n + column]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int index = strip_index(first[e / 2], e % 2 ? at_key.y : at_key.x, 0);
        x[n][e] = fmaf(x[n][e], factor, strip.value[index]);
      }
    }
  } else if (found == DistanceClass::kByAxis) {
    add_pairs<4>(x, factor, strip.pairs(), [&](int n, int e) {
      float rho = 0.f;
      for (int g = 0; g < p.Gp; ++g) {
        const int at_query = rows.position[g][row + e / 2 * 8];
        const int at_key = columns.position[g][8 * n + column + e % 2];
        rho += strip.value[g * kAxisStrip + strip_index(at_query, at_key, strip.low[g])];
      }
      return rho;
    });
  } else if (found == DistanceClass::kFar) {
    add_pairs<1>(x, factor, strip.pairs(), [&](int n, int e) {
      const int i = min(i0 + row + e / 2 * 8, p.Lq - 1);
      const int j = min(j0 + 8 * n + column + e % 2, p.Lk - 1);
      return decay_between(p, b, i, j);
    });
  }
}

}  // namespace restore_ext::cuda
