// What the C++ written by ptx2cpp.py calls.
#pragma once
#include "cuemu_ptx.h"

namespace cuemu {

struct PtxKernel {
  void (*run)(const unsigned char* parameters);
  size_t parameter_bytes, shared_bytes;
  int threads;  // .maxntid
};
void ptx_register(const char* name, const PtxKernel& kernel);

namespace ptx {

struct Registered {
  Registered(const char* name, void (*run)(const unsigned char*), size_t parameter_bytes,
             size_t shared_bytes, int threads) {
    ptx_register(name, {run, parameter_bytes, shared_bytes, threads});
  }
};

// Registers are typed by size only: a read or write of the same size moves bits.
template <class To, class From>
To as(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To to;
    memcpy(&to, &value, sizeof to);
    return to;
  } else {
    return static_cast<To>(value);
  }
}

template <class To, class From>
void put(To& to, From value) {
  to = as<To>(value);
}

inline float float_of(uint32_t bits) { return cuemu_bits<float>(bits); }
inline double double_of(uint64_t bits) { return cuemu_bits<double>(bits); }

// ---- arithmetic --------------------------------------------------------------------------------

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

template <class T>
T quotient(T x, T y) {
  return y == 0 ? static_cast<T>(~T{0}) : static_cast<T>(x / y);
}
template <class T>
T remainder_of(T x, T y) {
  return y == 0 ? x : static_cast<T>(x % y);
}

template <class T>
T add_carry(T x, T y, bool in, bool keep, bool& carry) {
  const auto sum = static_cast<unsigned __int128>(std::make_unsigned_t<T>(x)) +
                   std::make_unsigned_t<T>(y) + (in && carry);
  if (keep) carry = sum >> (8 * sizeof(T)) & 1;
  return static_cast<T>(sum);
}
template <class T>
T sub_carry(T x, T y, bool in, bool keep, bool& carry) {
  const auto difference = static_cast<unsigned __int128>(std::make_unsigned_t<T>(x)) -
                          std::make_unsigned_t<T>(y) - (in && carry);
  if (keep) carry = difference >> (8 * sizeof(T)) & 1;
  return static_cast<T>(difference);
}

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
template <class T>
T low_product(T x, T y) {
  return static_cast<T>(static_cast<uint64_t>(x) * static_cast<uint64_t>(y));
}
template <class T>
T high_product(T x, T y) {
  return static_cast<T>((Wide<T>(x) * Wide<T>(y)) >> (8 * sizeof(T)));
}

template <bool NAN_WINS, class T>
T min_of(T x, T y) {
  if constexpr (std::is_floating_point_v<T>)
    return NAN_WINS && (std::isnan(x) || std::isnan(y)) ? T(NAN) : std::fmin(x, y);
  else
    return y < x ? y : x;
}
template <bool NAN_WINS, class T>
T max_of(T x, T y) {
  if constexpr (std::is_floating_point_v<T>)
    return NAN_WINS && (std::isnan(x) || std::isnan(y)) ? T(NAN) : std::fmax(x, y);
  else
    return y > x ? y : x;
}

template <class To, class From>
To clamped(From x) {  // conversions of floats, and .sat, stop at the ends
  if constexpr (std::is_floating_point_v<From>) {
    if (std::isnan(x)) return sizeof(To) == 8 ? To(uint64_t{1} << 63) : To(0);
    if (x >= std::ldexp(From(1), std::numeric_limits<To>::digits))
      return std::numeric_limits<To>::max();
    if (x <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    return static_cast<To>(x);
  } else {
    const auto wide = static_cast<__int128>(x);
    const auto least = static_cast<__int128>(std::numeric_limits<To>::min());
    const auto most = static_cast<__int128>(std::numeric_limits<To>::max());
    return static_cast<To>(wide < least ? least : wide > most ? most : wide);
  }
}

// 16-bit floats: computed in double, where sums of products are exact, and rounded once.
struct F16 {
  static double widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static uint16_t narrow(double x) { return __half_as_ushort(__double2half(x)); }
};
struct BF16 {
  static double widen(uint16_t x) { return cuemu_bits<float>(uint32_t{x} << 16); }
  static uint16_t narrow(double x) { return __bfloat16_as_ushort(__double2bfloat16(x)); }
};
inline constexpr auto op_add = [](double x, double y) { return x + y; };
inline constexpr auto op_sub = [](double x, double y) { return x - y; };
inline constexpr auto op_mul = [](double x, double y) { return x * y; };
inline constexpr auto op_fma = [](double x, double y, double z) { return std::fma(x, y, z); };
inline constexpr auto op_mad = op_fma;
inline constexpr auto op_min = [](double x, double y) { return std::fmin(x, y); };
inline constexpr auto op_max = [](double x, double y) { return std::fmax(x, y); };
inline constexpr auto op_min_nan = [](double x, double y) { return min_of<true>(x, y); };
inline constexpr auto op_max_nan = [](double x, double y) { return max_of<true>(x, y); };
inline constexpr auto op_neg = [](double x) { return -x; };
inline constexpr auto op_abs = [](double x) { return std::fabs(x); };
inline constexpr auto op_ex2 = [](double x) { return std::exp2(x); };
inline constexpr auto op_tanh = [](double x) { return std::tanh(x); };

template <class H, class Op, class... Bits>
uint16_t half(Op op, Bits... bits) {
  return H::narrow(op(H::widen(bits)...));
}
template <class H, class Op, class... Bits>
uint32_t halves(Op op, Bits... bits) {
  const uint32_t low = half<H>(op, static_cast<uint16_t>(bits)...);
  return low | uint32_t{half<H>(op, static_cast<uint16_t>(bits >> 16)...)} << 16;
}

// ---- comparison: the letter u behind it means "or unordered" ------------------------------------

template <class T>
bool unordered(T x, T y) {
  if constexpr (std::is_floating_point_v<T>) return std::isnan(x) || std::isnan(y);
  return false;
}
#define CUEMU_COMPARE(name, sign)       \
  template <class T>                    \
  bool compare_##name(T x, T y) {       \
    return x sign y;                    \
  }                                     \
  template <class T>                    \
  bool compare_##name##u(T x, T y) {    \
    return unordered(x, y) || x sign y; \
  }
CUEMU_COMPARE(lt, <)
CUEMU_COMPARE(le, <=)
CUEMU_COMPARE(gt, >)
CUEMU_COMPARE(ge, >=)
CUEMU_COMPARE(eq, ==)
CUEMU_COMPARE(lo, <)
CUEMU_COMPARE(ls, <=)
CUEMU_COMPARE(hi, >)
CUEMU_COMPARE(hs, >=)
CUEMU_COMPARE(neu, !=)
#undef CUEMU_COMPARE
template <class T>
bool compare_ne(T x, T y) {
  return !unordered(x, y) && x != y;
}
template <class T>
bool compare_num(T x, T y) {
  return !unordered(x, y);
}
template <class T>
bool compare_nan(T x, T y) {
  return unordered(x, y);
}

// ---- bits --------------------------------------------------------------------------------------

template <class T>
T shl(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(x << n);
}
template <class T>
T shr(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(x < 0 ? -1 : 0) : static_cast<T>(x >> n);
}
template <class T>
T bfi(T field, T into, uint32_t at, uint32_t bits) {
  at &= 255, bits &= 255;
  if (at >= 8 * sizeof(T)) return into;
  const T mask = shl(bits >= 8 * sizeof(T) ? ~T{0} : static_cast<T>((T{1} << bits) - 1), at);
  return (into & ~mask) | (shl(field, at) & mask);
}
template <class T>
T bfe(T x, uint32_t at, uint32_t bits) {
  at &= 255, bits &= 255;
  if (bits == 0) return 0;
  const T low = shr<T>(x, at);
  const uint32_t spare = bits >= 8 * sizeof(T) ? 0 : 8 * sizeof(T) - bits;
  return static_cast<T>(static_cast<T>(low << spare) >> spare);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <class T>
uint32_t bits_popc(T x) {
  return __builtin_popcountll(x);
}
template <class T>
uint32_t bits_clz(T x) {
  return x ? __builtin_clzll(x) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
}
template <class T>
T bits_brev(T x) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) result |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
template <class T>
uint32_t bits_bfind(T x) {  // the highest bit that is not the sign
  if (x < 0) x = ~x;
  return x ? 8 * sizeof(T) - 1 - bits_clz<std::make_unsigned_t<T>>(x) : ~0u;
}
template <class T>
uint32_t bits_bfind_shift(T x) {
  const uint32_t at = bits_bfind(x);
  return at == ~0u ? at : 8 * sizeof(T) - 1 - at;
}
template <class A, class B>
uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<A>(a >> i) * static_cast<B>(b >> i);
  return c;
}

// ---- memory ------------------------------------------------------------------------------------

inline unsigned char* shared_at(uint32_t offset) { return dyn_smem() + offset; }
inline unsigned char* global_at(uint64_t address) { return (unsigned char*)address; }
inline uint64_t shared_pointer(uint64_t offset) { return (uint64_t)(dyn_smem() + offset); }
inline uint64_t shared_offset(uint64_t pointer) { return pointer - (uint64_t)dyn_smem(); }
inline bool is_shared(uint64_t pointer) { return shared_offset(pointer) < dyn_smem_size(); }

// ORDER: 1 atomic, 2 a release before it, 4 an acquire after it (ptx_rules.py).
template <int ORDER, bool WRITE>
CUEMU_INL void access(const void* p, size_t bytes) {
  if ((uintptr_t)p % bytes) fail("misaligned %zu-byte %s", bytes, WRITE ? "store" : "load");
  if (ORDER & 2) __threadfence();
  if (hook_access) hook_access(p, bytes, WRITE, ORDER & 1, pc());
  if (ORDER & 4) __threadfence();
}
template <class T, int N, int ORDER>
CUEMU_INL const T* load(const unsigned char* p) {
  access<ORDER, false>(p, sizeof(T) * N);
  return (const T*)p;
}
template <class T, int N, int ORDER>
CUEMU_INL T* store(unsigned char* p) {
  access<ORDER, true>(p, sizeof(T) * N);
  return (T*)p;
}

#define CUEMU_ATOMIC(name, expression)                \
  template <class T, int ORDER>                       \
  CUEMU_INL T atomic_##name(unsigned char* at, T x) { \
    access<ORDER, true>(at, sizeof(T));               \
    T* const p = (T*)at;                              \
    const T old = *p;                                 \
    *p = (T)(expression);                             \
    return old;                                       \
  }
CUEMU_ATOMIC(add, old + x)
CUEMU_ATOMIC(exch, x)
CUEMU_ATOMIC(min, (min_of<false, T>(old, x)))
CUEMU_ATOMIC(max, (max_of<false, T>(old, x)))
CUEMU_ATOMIC(and, old& x)
CUEMU_ATOMIC(or, old | x)
CUEMU_ATOMIC(xor, old ^ x)
CUEMU_ATOMIC(inc, old >= x ? 0 : old + 1)
CUEMU_ATOMIC(dec, old == 0 || old > x ? x : old - 1)
#undef CUEMU_ATOMIC
template <class T, int ORDER, class H>
CUEMU_INL T atomic_add(unsigned char* at, T x) {
  access<ORDER, true>(at, sizeof(T));
  T* const p = (T*)at;
  const T old = *p;
  if constexpr (sizeof(T) == 2)
    *p = half<H>(op_add, old, x);
  else
    *p = halves<H>(op_add, old, x);
  return old;
}
template <class T, int ORDER>
CUEMU_INL T atomic_cas(unsigned char* at, T expected, T x) {
  access<ORDER, true>(at, sizeof(T));
  T* const p = (T*)at;
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}

// ---- warps -------------------------------------------------------------------------------------

template <char MODE>  // u(p), d(own), b(fly) or i(dx)
uint32_t shuffle(uint32_t value, uint32_t distance, uint32_t c, uint32_t mask, bool* inside,
                 CUEMU_LOC) {
  const int lane = self->lane, segment = c >> 8 & 31, clamp = c & 31;
  const int last = (lane & segment) | (clamp & ~segment), d = static_cast<int>(distance);
  int from;
  if (MODE == 'u') from = lane - d;
  if (MODE == 'd') from = lane + d;
  if (MODE == 'b') from = lane ^ d;
  if (MODE == 'i') from = (lane & segment) | (d & ~segment & 31);
  const bool ok = MODE == 'u' ? from >= last : from <= last;
  if (inside) *inside = ok;
  return shfl(mask, value, ok ? from : lane, file_, line_);
}

}  // namespace ptx
}  // namespace cuemu
