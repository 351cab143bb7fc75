// The inner loops of the CPU operators, once for every level of instructions a processor may have.
// Each level is a translation unit (level_<name>.cpp) that compiles kernels_body.h with its own
// vectors; the best one the processor runs is picked when the library is loaded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace restore_ext::cpu {

inline constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Range {
  int64_t first, past;

  bool empty() const { return first >= past; }
  Range hull(Range other) const {
    if (other.empty()) return *this;
    if (empty()) return other;
    return {std::min(first, other.first), std::max(past, other.past)};
  }
  Range within(Range other) const {
    return {std::max(first, other.first), std::min(past, other.past)};
  }
};

inline constexpr int kRows = 6;      // of a register tile, at every level
inline constexpr int kQueries = 48;  // of one attention task
inline constexpr int kKeys = 64;     // of one attention block

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// Two bfloat16 that follow each other in a sum of products.
struct Pair {
  uint16_t even, odd;
};
template <typename T>
inline constexpr int64_t kTermsOf = 1;
template <>
inline constexpr int64_t kTermsOf<Pair> = 2;

// One head's queries of one task against a stretch of keys. T is float; or Pair: two channels of a
// query or a key, and one channel of two values.
template <typename T>
struct AttendTask {
  int64_t D, Dp;      // head size in T, and in floats, rounded up to whole vectors
  const T* query;     // [kQueries, D]
  const T* key;       // [blocks, kKeys / panel, D, panel]
  const T* value;     // [blocks * kKeys / kTermsOf<T>, Dp]
  const float* bias;  // [kQueries, bias_stride]; -inf: unseen
  int64_t bias_stride;
  const Range* seen;  // [kQueries]
  Range hull;         // of `seen`
  float scale, softcap;
  float* out;        // [kQueries, Dp]
  float *max, *sum;  // [kQueries]
  float* rounded;    // [kQueries] of Pair: the sum of weights as they multiplied values
};

enum class Element { kFloat, kHalf, kBfloat16 };

// Keys and values [count, D] in one piece each, and the first one's column among those of a task.
struct Piece {
  const void *key, *value;
  int64_t column, count;
};

// Some queries of one key head against at most kKeys keys, read where they lie. What is in none of
// the pieces has a bias of -inf.
struct DecodeTask {
  int64_t rows, keys, D, Dp;
  const float* query;  // [rows, D]
  const Piece* pieces;
  int64_t count;  // of pieces
  Element element;
  int64_t key_stride, value_stride;  // in elements
  const float* bias;                 // [rows, bias_stride]
  int64_t bias_stride;
  float scale, softcap;
  float* out;        // [rows, Dp]
  float *max, *sum;  // [rows]
};

// Of a processor that multiplies bfloat16 in pairs. What is below 2^-126 is zero to it.
struct PairKernels {
  // to[i] = (even[i], odd[i]), rounded to nearest; whole vectors.
  void (*interleave)(const float* even, const float* odd, int64_t count, Pair* to);
  // A row of floats, an even number, rounded to nearest.
  void (*round)(const float* from, int64_t count, Pair* to);
  void (*attend)(const AttendTask<Pair>& task);
};

struct Kernels {
  const char* name;
  int lanes, panel;

  // Transposes up to kKeys rows of D floats into panels; what is beyond `rows` becomes zeros.
  void (*pack)(const float* row, int64_t stride, int64_t rows, int64_t D, float* packed);
  // Rows of 16-bit floats, as float32.
  void (*from_half)(const uint16_t* from, float* to, int64_t count);
  void (*from_bfloat16)(const uint16_t* from, float* to, int64_t count);
  // Transposes up to `panel` rows of D floats into one panel, zeros beyond them.
  void (*pack_panel)(const float* row, int64_t stride, int64_t rows, int64_t D, float* packed);
  // c[kRows, panel] = a[kRows, inner] . b[inner, panel], or added to what c holds.
  void (*multiply)(const float* a, int64_t a_stride, const float* b, int64_t inner, float* c,
                   int64_t c_stride, bool add);
  // The dot products of one vector with each of some rows of D floats.
  void (*dot_rows)(const float* x, const float* row, int64_t stride, int64_t rows, int64_t D,
                   float* out);
  // The sum of squares; double, so that no finite row overflows it, and none but zeros vanishes.
  double (*square)(const float* row, int64_t C);
  void (*scale)(float* row, int64_t C, double factor);
  // The largest x[j] + penalty[j], and -inf of none.
  float (*largest)(const float* x, const float* penalty, int64_t count);
  // The largest x[j] where key[j] >= low, and each of_column[j] raised to x[j] where key[j] <=
  // high. A key of NaN is neither.
  float (*largest_of_pairs)(const float* x, const float* key, int64_t count, float low, float high,
                            float* of_column);
  // to[j] += decay[min(|query - key[j]|, last)]
  void (*add_by_distance)(const float* decay, uint32_t last, int32_t query, const int32_t* key,
                          int64_t count, float* to);
  // to[j] += log(2 - rho[j])
  void (*add_log)(const float* rho, int64_t count, float* to);
  // A row of products, in whole vectors, and what they gain (-inf: unseen), become the weights
  // exp(logit - max); the row's running maximum and sum of weights take them up.
  void (*sum_weights)(float* product, const float* bias, int64_t count, float scale, float softcap,
                      float& max, float& sum);
  // Or, once these are known, factor * exp(logit - max), and 0 where unseen.
  void (*share_weights)(float* product, const float* bias, int64_t count, float scale,
                        float softcap, float max, float factor);
  void (*attend)(const AttendTask<float>& task);
  void (*decode)(const DecodeTask& task);
  const PairKernels* pairs;  // nullptr: bfloat16 is multiplied as float32
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif

// The level in use: the best there is, or the one that RESTORE_EXT_CPU names.
const Kernels& kernels();

// The names of all levels this processor runs, the best one last.
const char* levels();

}  // namespace restore_ext::cpu
