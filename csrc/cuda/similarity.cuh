// A block's tile of cosines: every row of some tokens with every row of others of the same image.
#pragma once

#include "keys.cuh"
#include "pack.cuh"
#include "ptx.cuh"
#include "token_rows_kernel.h"

namespace restore_ext::cuda {

// A row or a column of a tile: a token of the image and what makes it a unit vector.
struct TileLine {
  int token;
  UnitScale scale;
};

// Where a tile reaches over the edge: its cosines are NaN.
__device__ __forceinline__ TileLine no_line() { return {-1, {1.f, __uint_as_float(0x7fc00000u)}}; }

// Lines that are valid tokens by rank: first, first + step, ... below count.
struct RankLines {
  const int* token;        // [N] of one image
  const UnitScale* scale;  // [N]
  int first, step, count;

  __device__ __forceinline__ TileLine operator()(int i) const {
    const int rank = first + step * i;
    return rank < count ? TileLine{token[rank], scale[rank]} : no_line();
  }
};

// Which tile of a matrix of tiles a block has. Bands of 8 rows of tiles, so that the blocks at work
// at one time share their lines in L2.
struct TilePlace {
  int row, column;
};

__device__ __forceinline__ TilePlace tile_place(int block, int tile_rows, int tile_columns) {
  constexpr int kBand = 8;
  const int band = block / (kBand * tile_columns), place = block % (kBand * tile_columns);
  const int height = min(kBand, tile_rows - band * kBand);
  return {band * kBand + place % height, place / height};
}

// Plan: the lines come in chunks of 128 bytes through kStages buffers by cp.async. Where their ends
// do not meet 16 bytes, or a line's power is not 1, the tile is copied by element and scaled on the
// way. 16-bit types: mma.sync, a warp has kRows / kWarpsDown by
// kColumns / kWarpsAcross. float32: a warp's lanes stand 4 down and 8 across and FMA. In both each
// cosine is a sum over ascending channels: it has the same bits in any tile, place and size, and
// for (i, j) as for (j, i).
//
// Shared: kStages * (kRows + kColumns) chunks, their 16-byte pieces in the place piece ^ line % 8,
// so that 8 lines are read at one piece without bank conflicts; then token and inverse of every
// line.
template <typename T, int kRowsOf, int kColumnsOf, int kWarpsDown, int kWarpsAcross>
class CosineTile {
 public:
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf, kLines = kRows + kColumns;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kBlocks = 512 / kThreads;  // at least, on a multiprocessor: 128 registers
  static constexpr int kStages = 3, kChunkBytes = 128, kStageBytes = kLines * kChunkBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 8 * kLines;

  // Adds up the tile's dots over all C channels of tokens x[token, :]. rows and columns are
  // functors from a place in the tile to its TileLine. All threads call it; shared is 128-byte
  // aligned.
  template <class Rows, class Columns>
  __device__ __forceinline__ void run(unsigned char* shared, const T* x, int64_t stride_n, int C,
                                      const Rows& rows, const Columns& columns) {
    token_ = reinterpret_cast<int*>(shared + kStages * kStageBytes);
    inverse_ = reinterpret_cast<float*>(token_ + kLines);
    const auto line = [&](int i) { return i < kRows ? rows(i) : columns(i - kRows); };
    __syncthreads();  // whoever calls twice: the cosines before are read
    bool by_element = !packs(x, stride_n, C);
    for (int i = threadIdx.x; i < kLines; i += kThreads) {
      const TileLine found = line(i);
      token_[i] = found.token;
      inverse_[i] = found.scale.inverse;
      by_element |= found.scale.power != 1.f;
    }
    by_element = __syncthreads_or(by_element);
    const auto stage = [&](int chunk) { return shared + chunk % kStages * kStageBytes; };
    const auto fetch = [&](int chunk) {
      const int first = chunk * kChunk;
      if (first < C && by_element) fetch_elements(stage(chunk), x, stride_n, C, first, line);
      if (first < C && !by_element) fetch_whole(stage(chunk), x, stride_n, C, first);
      cp_async_commit();  // an empty group, too, so that waiting counts chunks
    };
#pragma unroll
    for (int i = 0; i < kOwnRows * kOwnColumns; ++i) dot_[i / 4][i % 4] = 0.f;
    for (int chunk = 0; chunk < kStages - 1; ++chunk) fetch(chunk);
    for (int chunk = 0; chunk * kChunk < C; ++chunk) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this chunk is there for all; all are done with the one before
      fetch(chunk + kStages - 1);
      add_chunk(stage(chunk));
    }
    cp_async_wait<0>();
  }

  // The part of the tile this thread has: kOwnRows rows by kOwnColumns columns, each ascending.
  static constexpr bool kMma = sizeof(T) == 2;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpColumns = kColumns / kWarpsAcross;
  static constexpr int kOwnRows = kMma ? kWarpRows / 8 : kWarpRows / 4;
  static constexpr int kOwnColumns = kMma ? kWarpColumns / 4 : kWarpColumns / 8;
  // So many neighbouring lanes have the same rows; the lanes so far apart have the same columns.
  static constexpr int kRowLanes = kMma ? 4 : 8;

  __device__ __forceinline__ int row(int r) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 / kWarpsAcross * kWarpRows;
    return kMma ? warp + 8 * r + lane / 4 : warp + 4 * r + lane / 8;
  }
  __device__ __forceinline__ int column(int c) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarpsAcross * kWarpColumns;
    return kMma ? warp + c / 2 * 8 + lane % 4 * 2 + c % 2 : warp + 8 * c + lane % 8;
  }
  // NaN over the edge, and where one of the two cannot be compared.
  __device__ __forceinline__ float cosine(int r, int c) const {
    return dot(r, c) * (inverse_[row(r)] * inverse_[kRows + column(c)]);
  }

  // Of every row i the largest cosine, NaN excepted, and of equal ones the lowest column j:
  // put(i, largest, j), once for every warp that has a part of the row and found one. All threads
  // call it.
  template <class Put>
  __device__ __forceinline__ void row_max(const Put& put) const {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      float best = -INFINITY;
      int at = -1;
#pragma unroll
      for (int c = 0; c < kOwnColumns; ++c) {
        const float candidate = cosine(r, c);
        if (candidate > best) best = candidate, at = column(c);
      }
      Key key = at < 0 ? kNoKey : key_of(best, at);
#pragma unroll
      for (int lanes = 1; lanes < kRowLanes; lanes *= 2) {
        key = larger(key, __shfl_xor_sync(0xffffffffu, key, lanes));
      }
      if (threadIdx.x % kRowLanes == 0 && key != kNoKey) {
        put(row(r), key_value(key), key_index(key));
      }
    }
  }

 private:
  static constexpr int kVec = kWidestPack<T>, kPieces = kChunkBytes / 16, kChunk = kPieces * kVec;
  static_assert(kOwnRows % 2 == 0 && kOwnColumns % 2 == 0 && kLines * kPieces % kThreads == 0);
  static_assert(!kMma || (kWarpRows % 16 == 0 && kWarpColumns % 16 == 0));

  static __device__ __forceinline__ int offset(int line, int piece) {
    return line * kChunkBytes + ((piece ^ (line & 7)) << 4);
  }
  // Groups of 2 x 2, as mma wants them.
  __device__ __forceinline__ const float& dot(int r, int c) const {
    return dot_[r / 2 * (kOwnColumns / 2) + c / 2][r % 2 * 2 + c % 2];
  }

  __device__ __forceinline__ void fetch_whole(unsigned char* stage, const T* x, int64_t stride_n,
                                              int C, int first) const {
    const int piece = threadIdx.x % kPieces, c = first + piece * kVec;
#pragma unroll
    for (int i = 0; i < kLines * kPieces / kThreads; ++i) {
      const int at = (i * kThreads + threadIdx.x) / kPieces, token = token_[at];
      const bool any = token >= 0 && c < C;
      cp_async_16(stage + offset(at, piece), any ? x + token * stride_n + c : x, any);
    }
  }

  template <class Line>
  __device__ __forceinline__ void fetch_elements(unsigned char* stage, const T* x, int64_t stride_n,
                                                 int C, int first, const Line& line) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < kLines * kPieces; i += kThreads) {
      const int at = i / kPieces, piece = i % kPieces, c = first + piece * kVec;
      const int some = token_[at] < 0 ? 0 : C - c;
      const T* from = x + token_[at] * stride_n + c;
      const float power = line(at).scale.power;
      T* to = reinterpret_cast<T*>(stage + offset(at, piece));
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        to[v] = from_float<T>(v < some ? to_float(from[v]) * power : 0.f);
    }
  }

  __device__ __forceinline__ void add_chunk(const unsigned char* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row0 = warp / kWarpsAcross * kWarpRows;
    const int column0 = kRows + warp % kWarpsAcross * kWarpColumns;
    if constexpr (kMma) {
#pragma unroll 2  // wholly, the swizzled addresses would cost 30 registers
      for (int piece = 0; piece < kPieces; piece += 2) {
        uint32_t a[kWarpRows / 16][4];
#pragma unroll
        for (int m = 0; m < kWarpRows / 16; ++m) {
          ldmatrix_x4(a[m], stage + offset(row0 + 16 * m + lane % 16, piece + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; n += 2) {
          uint32_t b[4];  // 16 columns by 16 channels
          const int line = column0 + 8 * n + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(b, stage + offset(line, piece + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kWarpRows / 16; ++m) {
            mma_m16n8k16<T>(dot_[m * (kWarpColumns / 8) + n], a[m], b[0], b[1]);
            mma_m16n8k16<T>(dot_[m * (kWarpColumns / 8) + n + 1], a[m], b[2], b[3]);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        const auto four = [&](int at) {
          return *reinterpret_cast<const float4*>(stage + offset(at, piece));
        };
        float4 b[kOwnColumns];
#pragma unroll
        for (int c = 0; c < kOwnColumns; ++c) b[c] = four(column0 + 8 * c + lane % 8);
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const float4 a = four(row0 + 4 * r + lane / 8);
#pragma unroll
          for (int c = 0; c < kOwnColumns; ++c) {
            float& sum = dot_[r / 2 * (kOwnColumns / 2) + c / 2][r % 2 * 2 + c % 2];
            sum = fmaf(a.x, b[c].x, sum);
            sum = fmaf(a.y, b[c].y, sum);
            sum = fmaf(a.z, b[c].z, sum);
            sum = fmaf(a.w, b[c].w, sum);
          }
        }
      }
    }
  }

  float dot_[kOwnRows * kOwnColumns / 4][4];
  int* token_;
  float* inverse_;
};

// For what fills the device with few tiles, and for what does not.
template <typename T>
using LargeTile = CosineTile<T, 128, 128, 2, 4>;
template <typename T>
using SmallTile = CosineTile<T, 32, 64, 2, 2>;

}  // namespace restore_ext::cuda
