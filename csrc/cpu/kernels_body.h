// Compiled once a level, after its vectors: Floats, Bits, Integers, kLanes, kVectors (of a register
// tile), fma, broadcast, load and scalar (of float, Half and Bfloat16), store, transpose; where a
// level has PairKernels, fma, broadcast and load of Pair and round_vector. No include guard: every
// level_<name>.cpp takes it into its own namespace.

constexpr int kPanel = kLanes * kVectors;

// exp(x) for x <= 0, to about an ulp; NaN stays NaN.
inline Floats exp_of_negative(Floats x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Floats shifted = fma(x, broadcast(1.44269504f), broadcast(kRound));
  const Floats n = shifted - kRound;
  // x - n log 2, in two exact steps.
  const Floats r = fma(n, broadcast(-1.42860682e-6f), fma(n, broadcast(-0x1.62e4p-1f), x));
  Floats y = fma(r, broadcast(1.f / 5040), broadcast(1.f / 720));  // exp's series, |r| <= 0.35
  y = fma(y, r, broadcast(1.f / 120));
  y = fma(y, r, broadcast(1.f / 24));
  y = fma(y, r, broadcast(1.f / 6));
  y = fma(y, r, broadcast(1.f / 2));
  y = fma(fma(y, r, broadcast(1.f)), r, broadcast(1.f));
  const Floats power = reinterpret_cast<Floats>((reinterpret_cast<Bits>(shifted) + 127) << 23);
  return x < -87.f ? Floats{} : y * power;  // power is 2^n
}

// log(x), to about an ulp, for x that is no subnormal; where it has no value, as std::log.
inline Floats log_of(Floats x) {
  constexpr uint32_t kOne = 0x3f800000, kRootOfHalf = 0x3f3504f3;
  const Bits bits = reinterpret_cast<Bits>(x) + (kOne - kRootOfHalf);
  // x = 2^n (1 + f) with 1 + f from sqrt(1/2) to sqrt(2).
  const Floats n = __builtin_convertvector(reinterpret_cast<Integers>(bits) >> 23, Floats) - 127.f;
  const Floats f = reinterpret_cast<Floats>((bits & 0x7fffff) + kRootOfHalf) - 1.f;
  // log(1 + f) = 2 s + 2/3 s^3 + 2/5 s^5 + ..., where 2 s = f - s f: what is added to f is small.
  const Floats s = f / (f + 2.f), z = s * s, half = f * f * 0.5f;
  Floats y = fma(z, broadcast(2.f / 9), broadcast(2.f / 7));
  y = fma(y, z, broadcast(2.f / 5));
  y = fma(y, z, broadcast(2.f / 3));
  y = s * fma(y, z, half);
  y = fma(n, broadcast(1.42860682e-6f), y);  // n log 2, in two steps, the larger one exact
  y = fma(n, broadcast(0x1.62e4p-1f), f - (half - y));
  const Floats none =
      x == 0.f ? broadcast(kNever) : broadcast(std::numeric_limits<float>::quiet_NaN());
  return x < -kNever ? (x > 0.f ? y : none) : x;
}

// Lane i + width at i.
template <int width, int... lane>
inline Floats moved(Floats x, std::integer_sequence<int, lane...>) {
  return Floats{x[(lane + width) % kLanes]...};
}

template <int width = kLanes / 2>
inline float largest(Floats x) {
  if constexpr (width == 0) {
    return x[0];
  } else {
    const Floats other = moved<width>(x, std::make_integer_sequence<int, kLanes>());
    return largest<width / 2>(other > x ? other : x);
  }
}

template <int width = kLanes / 2>
inline float total(Floats x) {
  if constexpr (width == 0) {
    return x[0];
  } else {
    return total<width / 2>(x + moved<width>(x, std::make_integer_sequence<int, kLanes>()));
  }
}

// c[rows, vectors] (+)= a[kRows, inner] . b[inner, vectors]. Short sums of sums: the rounding error
// grows with the longer of the two, not with their product.
template <int rows, int vectors, typename A, typename B>
inline void tile(const A* a, int64_t a_stride, const B* b, int64_t b_stride, float* c,
                 int64_t c_stride, int64_t inner, bool add) {
  constexpr int64_t kTerms = 64 / kTermsOf<A>;
  for (int64_t first = 0; first == 0 || first < inner; first += kTerms) {
    // Every loop over rows and vectors is unrolled: only then are the sums registers.
    Floats sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = Floats{};
    }
    const int64_t past = std::min(first + kTerms, inner);
    for (int64_t i = first; i < past; ++i) {
      decltype(load(b)) row[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) row[v] = load(b + i * b_stride + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto x = broadcast(a[r * a_stride + i]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        float* at = c + r * c_stride + v * kLanes;
        store(at, add || first > 0 ? load(at) + sum[r][v] : sum[r][v]);
      }
    }
  }
}

// The same for any number of columns in whole vectors, added to what c holds.
template <int rows, int vectors, typename A, typename B>
inline void tiles(const A* a, int64_t a_stride, const B* b, int64_t b_stride, float* c,
                  int64_t c_stride, int64_t inner, int64_t columns) {
  int64_t column = 0;
  for (; column + vectors * kLanes <= columns; column += vectors * kLanes) {
    tile<rows, vectors>(a, a_stride, b + column, b_stride, c + column, c_stride, inner, true);
  }
  for (; column < columns; column += kLanes) {
    tile<rows, 1>(a, a_stride, b + column, b_stride, c + column, c_stride, inner, true);
  }
}

void pack_panel(const float* row, int64_t stride, int64_t rows, int64_t D, float* packed) {
  for (int64_t first = 0; first < kPanel; first += kLanes) {
    float* to = packed + first;
    int64_t d = 0;
    for (; first + kLanes <= rows && d + kLanes <= D; d += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(row + (first + i) * stride + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kPanel, square[i]);
    }
    for (; d < D; ++d) {
      for (int64_t j = 0; j < kLanes; ++j) {
        to[d * kPanel + j] = first + j < rows ? row[(first + j) * stride + d] : 0.f;
      }
    }
  }
}

void pack(const float* row, int64_t stride, int64_t rows, int64_t D, float* packed) {
  for (int64_t first = 0; first < kKeys; first += kPanel) {
    pack_panel(row + first * stride, stride, std::clamp<int64_t>(rows - first, 0, kPanel), D,
               packed + first * D);
  }
}

void multiply(const float* a, int64_t a_stride, const float* b, int64_t inner, float* c,
              int64_t c_stride, bool add) {
  tile<kRows, kVectors>(a, a_stride, b, kPanel, c, c_stride, inner, add);
}

// Products that a softcap bends; returns the scale that is left to apply.
inline float bend(float* product, Range columns, float scale, float softcap) {
  if (softcap <= 0) return scale;
  for (int64_t j = columns.first; j < columns.past; ++j) {
    product[j] = softcap * std::tanh(product[j] * scale / softcap);
  }
  return 1.f;
}

// Turns `columns` (whole vectors) of a row of products into weights exp(logit - max), and rescales
// to the new maximum what the row has summed so far; returns the factor.
inline float weigh(float* logit, const float* bias, Range columns, float scale, float softcap,
                   float& max, float& sum, float* out, int64_t Dp) {
  const Floats never = broadcast(kNever), factor = broadcast(bend(logit, columns, scale, softcap));
  Floats most = broadcast(max);
  for (int64_t j = columns.first; j < columns.past; j += kLanes) {
    const Floats gain = load(bias + j);
    const Floats x = gain == never ? never : fma(load(logit + j), factor, gain);
    most = x > most ? x : most;
    store(logit + j, x);
  }
  const float new_max = largest(most);
  const float shift = new_max == kNever ? 0.f : new_max;  // nothing seen yet
  Floats weights = {};
  for (int64_t j = columns.first; j < columns.past; j += kLanes) {
    const Floats weight = exp_of_negative(load(logit + j) - shift);
    weights += weight;
    store(logit + j, weight);
  }
  float keep = 1;
  if (new_max > max) {
    keep = std::exp(max - shift);
    sum *= keep;
    const Floats factors = broadcast(keep);
    for (int64_t d = 0; d < Dp; d += kLanes) store(out + d, load(out + d) * factors);
    max = new_max;
  }
  sum += total(weights);
  return keep;
}

void sum_weights(float* product, const float* bias, int64_t count, float scale, float softcap,
                 float& max, float& sum) {
  weigh(product, bias, {0, count}, scale, softcap, max, sum, nullptr, 0);
}

void share_weights(float* product, const float* bias, int64_t count, float scale, float softcap,
                   float max, float factor) {
  const Floats slope = broadcast(bend(product, {0, count}, scale, softcap));
  for (int64_t j = 0; j < count; j += kLanes) {
    const Floats gain = load(bias + j);
    const Floats weight = exp_of_negative(fma(load(product + j), slope, gain) - max) * factor;
    // What is not seen gets nothing from a row of NaN either.
    store(product + j, gain == broadcast(kNever) ? Floats{} : weight);
  }
}

#include "kernels_attend_body.h"

// rows x keys dot products of vectors of D floats, read where they lie.
template <int rows, int keys, typename T>
inline void dots(const float* query, int64_t D, const T* key, int64_t key_stride, float* logit,
                 int64_t logit_stride) {
  Floats sum[rows][keys];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < keys; ++k) sum[r][k] = Floats{};
  }
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    Floats column[keys];
#pragma GCC unroll 8
    for (int k = 0; k < keys; ++k) column[k] = load(key + k * key_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats x = load(query + r * D + d);
#pragma GCC unroll 8
      for (int k = 0; k < keys; ++k) sum[r][k] = fma(x, column[k], sum[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < keys; ++k) {
      float rest = 0;
      for (int64_t i = d; i < D; ++i) rest += query[r * D + i] * scalar(key + k * key_stride + i);
      logit[r * logit_stride + k] = total(sum[r][k]) + rest;
    }
  }
}

// Asks for a row from memory while something else is worked on.
template <typename T>
inline void prefetch_row(const T* row, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(row + d);
}

// Some rows of a task, whose few keys stay near the core between the two products.
template <int rows, typename T>
inline void decode_rows(const DecodeTask& t, int64_t row) {
  constexpr int kWide = 8 / rows;  // eight sums at a time hide the latency of one
  const float* query = t.query + row * t.D;
  float logit[rows * kKeys] = {};
  for (const Piece* p = t.pieces; p < t.pieces + t.count; ++p) {
    const T* key = static_cast<const T*>(p->key);
    float* to = logit + p->column;
    int64_t j = 0;
    for (; j + kWide <= p->count; j += kWide) {
      if (row == 0) {  // the next group of rows finds them near
        const T* value = static_cast<const T*>(p->value) + j * t.value_stride;
        for (int k = 0; k < kWide; ++k) prefetch_row(value + k * t.value_stride, t.D);
      }
      dots<rows, kWide>(query, t.D, key + j * t.key_stride, t.key_stride, to + j, kKeys);
    }
    for (; j < p->count; ++j) {
      dots<rows, 1>(query, t.D, key + j * t.key_stride, t.key_stride, to + j, kKeys);
    }
  }
  for (int r = 0; r < rows; ++r) {
    weigh(logit + r * kKeys, t.bias + (row + r) * t.bias_stride, {0, round_up(t.keys, kLanes)},
          t.scale, t.softcap, t.max[row + r], t.sum[row + r], t.out + (row + r) * t.Dp, t.Dp);
  }
  const int64_t whole = t.D / kLanes * kLanes;
  float* out = t.out + row * t.Dp;
  for (const Piece* p = t.pieces; p < t.pieces + t.count; ++p) {
    const T* value = static_cast<const T*>(p->value);
    const float* weight = logit + p->column;
    tiles<rows, kWide>(weight, kKeys, value, t.value_stride, out, t.Dp, p->count, whole);
    for (int64_t d = whole; d < t.D; ++d) {
      for (int r = 0; r < rows; ++r) {
        float sum = 0;
        for (int64_t i = 0; i < p->count; ++i) {
          sum += weight[r * kKeys + i] * scalar(value + i * t.value_stride + d);
        }
        out[r * t.Dp + d] += sum;
      }
    }
  }
}

template <typename T>
inline void decode_as(const DecodeTask& t) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) decode_rows<4, T>(t, row);
  for (; row + 2 <= t.rows; row += 2) decode_rows<2, T>(t, row);
  for (; row < t.rows; ++row) decode_rows<1, T>(t, row);
}

void decode(const DecodeTask& t) {
  switch (t.element) {
    case Element::kFloat:
      return decode_as<float>(t);
    case Element::kHalf:
      return decode_as<Half>(t);
    case Element::kBfloat16:
      return decode_as<Bfloat16>(t);
  }
}

// Rows of 16-bit floats, as float32.
template <typename T>
void widen(const uint16_t* from, float* to, int64_t count) {
  const T* x = reinterpret_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(x + i));
  for (; i < count; ++i) to[i] = scalar(x + i);
}

#include "kernels_rows_body.h"

// What a level is made of.
constexpr Kernels level(const char* name, const PairKernels* pairs = nullptr) {
  return {
      .name = name,
      .lanes = kLanes,
      .panel = kPanel,
      .pack = pack,
      .from_half = widen<Half>,
      .from_bfloat16 = widen<Bfloat16>,
      .pack_panel = pack_panel,
      .multiply = multiply,
      .dot_rows = dot_rows,
      .square = square,
      .scale = scale,
      .largest = largest,
      .largest_of_pairs = largest_of_pairs,
      .add_by_distance = add_by_distance,
      .add_log = add_log,
      .sum_weights = sum_weights,
      .share_weights = share_weights,
      .attend = attend<float>,
      .decode = decode,
      .pairs = pairs,
  };
}
