// Vectors of 64 bytes in GCC/Clang vector extensions; narrower instruction sets split them.
//
// Everything here lives in the namespace of one instruction set, and these files use no inline
// functions of the standard library: a copy compiled with wide instructions must never be the one
// the linker keeps for another instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "dtype.h"
#include "parallel.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define LRL_INLINE inline __attribute__((always_inline))

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

typedef float VecF __attribute__((vector_size(64)));
typedef double VecD __attribute__((vector_size(64)));
typedef int32_t VecI32 __attribute__((vector_size(64)));
typedef int64_t VecI64 __attribute__((vector_size(64)));
typedef uint64_t VecU64 __attribute__((vector_size(64)));
typedef double HalfD __attribute__((vector_size(32)));
typedef int64_t HalfI64 __attribute__((vector_size(32)));
typedef float HalfF __attribute__((vector_size(32)));
typedef uint32_t HalfU32 __attribute__((vector_size(32)));
typedef uint16_t QuarterU16 __attribute__((vector_size(16)));

constexpr int64_t kLanesD = 8;
constexpr double kInf = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <typename To, typename From>
LRL_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

LRL_INLINE VecD splat(double value) { return VecD{} + value; }
LRL_INLINE VecF splat_f(float value) { return VecF{} + value; }

// a > b ? a : b, which GCC makes of two instructions.
LRL_INLINE VecF max_f(VecF a, VecF b) {
#if defined(__AVX512F__)
  return bit_cast<VecF>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

// --- Loads: eight elements of any dtype as float64 (exact). ---

LRL_INLINE VecD widen(HalfF v) { return __builtin_convertvector(v, VecD); }

LRL_INLINE HalfF half_to_float(QuarterU16 h16) {
#if defined(__F16C__)
  return bit_cast<HalfF>(_mm256_cvtph_ps(bit_cast<__m128i>(h16)));
#else
  const HalfU32 h = __builtin_convertvector(h16, HalfU32);
  const HalfU32 sign = (h & 0x8000u) << 16;
  const HalfU32 magnitude = (h & 0x7fffu) << 13;
  // Rebias the exponent by multiplication, which also normalises subnormals.
  const HalfF scaled = bit_cast<HalfF>(magnitude) * 0x1p112f;
  const HalfU32 special = bit_cast<HalfU32>(magnitude >= (0x7c00u << 13));
  const HalfU32 bits =
      (special & (magnitude | 0x7f800000u)) | (~special & bit_cast<HalfU32>(scaled));
  return bit_cast<HalfF>(bits | sign);
#endif
}

LRL_INLINE HalfF load8f(const float* p) {
  HalfF v;
  memcpy(&v, p, sizeof(v));
  return v;
}
LRL_INLINE HalfF load8f(const BF16* p) {
  QuarterU16 h;
  memcpy(&h, p, sizeof(h));
  return bit_cast<HalfF>(__builtin_convertvector(h, HalfU32) << 16);
}
LRL_INLINE HalfF load8f(const F16* p) {
  QuarterU16 h;
  memcpy(&h, p, sizeof(h));
  return half_to_float(h);
}
template <typename T>
LRL_INLINE VecD load8(const T* p) {
  return widen(load8f(p));
}
template <>
LRL_INLINE VecD load8<double>(const double* p) {
  VecD v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// --- Scalars. ---

LRL_INLINE double to_double(double v) { return v; }
LRL_INLINE double to_double(float v) { return v; }
LRL_INLINE double to_double(BF16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
LRL_INLINE double to_double(F16 v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t bits = magnitude >= (0x7c00u << 13)
                            ? (magnitude | 0x7f800000u)
                            : bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(bits | sign);
}

LRL_INLINE void store(double* p, double v) { *p = v; }
LRL_INLINE void store(float* p, double v) { *p = static_cast<float>(v); }
LRL_INLINE void store(BF16* p, double v) {
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(v));
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    p->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  // Round to nearest, ties to even.
  p->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
LRL_INLINE void store(F16* p, double v) {
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(v));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal, rounded to even, in the low bits.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

// Stores eight float64 lanes, rounded once to the dtype (bfloat16 and float16 through float32).
template <typename T>
LRL_INLINE void store8(T* p, VecD v) {
  for (int lane = 0; lane < kLanesD; ++lane) store(p + lane, v[lane]);
}
template <>
LRL_INLINE void store8<double>(double* p, VecD v) {
  memcpy(p, &v, sizeof(v));
}
template <>
LRL_INLINE void store8<float>(float* p, VecD v) {
  const HalfF f = __builtin_convertvector(v, HalfF);
  memcpy(p, &f, sizeof(f));
}

// Up to eight elements; the missing ones are `fill`.
template <typename T>
LRL_INLINE VecD load_some(const T* p, int64_t count, double fill) {
  if (count >= kLanesD) return load8(p);
  VecD v = splat(fill);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = to_double(p[lane]);
  return v;
}
template <typename T>
LRL_INLINE void store_some(T* p, VecD v, int64_t count) {
  if (count >= kLanesD) {
    store8(p, v);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) store(p + lane, v[lane]);
}

// --- Reductions: one fixed order, so the result depends on the row alone. ---

// The two halves of a vector; joining halves pairwise needs a third of the work of reading lanes.
template <typename Half, typename Vec>
LRL_INLINE void split(const Vec& v, Half* low, Half* high) {
#if defined(__AVX512F__)
  // Read from memory, the vector would be kept there by GCC, also in the loop that adds to it.
  if constexpr (sizeof(Vec) == 64) {
    *low = bit_cast<Half>(_mm512_castsi512_si256(bit_cast<__m512i>(v)));
    *high = bit_cast<Half>(_mm512_maskz_extracti64x4_epi64(0xf, bit_cast<__m512i>(v), 1));
    return;
  }
#endif
  memcpy(low, &v, sizeof(Half));
  memcpy(high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
}

LRL_INLINE double sum_lanes(VecD v) {
  HalfD low, high;
  split(v, &low, &high);
  low += high;
  return (low[0] + low[2]) + (low[1] + low[3]);
}
LRL_INLINE VecD max(VecD a, VecD b) { return a > b ? a : b; }
LRL_INLINE double max_lanes(VecD v) {
  HalfD low, high;
  split(v, &low, &high);
  low = low > high ? low : high;
  const double even = low[0] > low[2] ? low[0] : low[2];
  const double odd = low[1] > low[3] ? low[1] : low[3];
  return even > odd ? even : odd;
}
LRL_INLINE int64_t max_lanes(VecI64 v) {
  HalfI64 low, high;
  split(v, &low, &high);
  low = low > high ? low : high;
  const int64_t even = low[0] > low[2] ? low[0] : low[2];
  const int64_t odd = low[1] > low[3] ? low[1] : low[3];
  return even > odd ? even : odd;
}
LRL_INLINE bool any_lane(VecI64 mask) {
  HalfI64 low, high;
  split(mask, &low, &high);
  low |= high;
  return ((low[0] | low[2]) | (low[1] | low[3])) != 0;
}

// One bit per lane of a comparison's result.
LRL_INLINE uint32_t lanes_of(VecI32 mask) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_movepi32_mask(bit_cast<__m512i>(mask)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < 16; ++lane) bits |= (mask[lane] != 0 ? 1u : 0u) << lane;
  return bits;
#endif
}

// The lanes of a vector joined by an operation that takes vectors and scalars: halves first.
template <typename Scalar, typename Vec, typename Op>
LRL_INLINE Scalar fold(const Vec& v, const Op& op) {
  typedef Scalar Half __attribute__((vector_size(32)));
  typedef Scalar Quarter __attribute__((vector_size(16)));
  Half low, high;
  split(v, &low, &high);
  const Half half = op(low, high);
  Quarter a, b;
  split(half, &a, &b);
  const Quarter quarter = op(a, b);
  Scalar joined = op(quarter[0], quarter[1]);
  for (int lane = 2; lane < static_cast<int>(16 / sizeof(Scalar)); ++lane) {
    joined = op(joined, quarter[lane]);
  }
  return joined;
}

// --- Elementary functions, within 2 ulp of the true value. ---

// exp for x <= 709; below -708 the result is 0 (true value under 4e-308). exp(NaN) is undefined.
LRL_INLINE VecD exp(VecD x) {
  const VecD shifter = splat(0x1.8p52);
  const VecD clamped = x < splat(-708.0) ? splat(-708.0) : x;
  const VecD shifted = clamped * 0x1.71547652b82fep0 + shifter;
  const VecD n = shifted - shifter;
  const VecD r = (clamped - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  // exp(r) = 1 + r + r^2 q(r) with q the degree-9 Chebyshev fit on |r| <= ln 2 / 2: its error is
  // below 1.7e-17.
  VecD p = splat(0x1.af38d53857513p-26);
  p = p * r + 0x1.2891a8c1d838dp-22;
  p = p * r + 0x1.71de0d9c145d0p-19;
  p = p * r + 0x1.a019b8ef67c6cp-16;
  p = p * r + 0x1.a01a01a7c8d47p-13;
  p = p * r + 0x1.6c16c17893833p-10;
  p = p * r + 0x1.11111111109adp-7;
  p = p * r + 0x1.5555555553d4fp-5;
  p = p * r + 0x1.5555555555556p-3;
  p = p * r + 0x1.0000000000001p-1;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The integer n sits in the low bits of `shifted`; added to the exponent it multiplies by 2^n.
  const VecD y = bit_cast<VecD>(bit_cast<VecI64>(p) + (bit_cast<VecI64>(shifted) << 52));
  return x < splat(-708.0) ? splat(0.0) : y;
}

// exp in float32 for x <= 88, within 2 ulp; below -86 the result is 0 (true value under 5e-38).
constexpr float kLeastExponent = -86.0f;
// exp(x) of x and of max(x, kLeastExponent), where the caller has both.
LRL_INLINE VecF exp(VecF x, VecF clamped) {
  const VecF shifter = VecF{} + 0x1.8p23f;
  const VecF shifted = clamped * 0x1.715476p+0f + shifter;
  const VecF n = shifted - shifter;
  const VecF r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  // As above with q of degree 4: its error is below 1.1e-8.
  VecF p = VecF{} + 0x1.6d117cp-10f;
  p = p * r + 0x1.120be2p-7f;
  p = p * r + 0x1.555518p-5f;
  p = p * r + 0x1.5554dcp-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecF y = bit_cast<VecF>(bit_cast<VecI32>(p) + (bit_cast<VecI32>(shifted) << 23));
  return x < splat_f(kLeastExponent) ? VecF{} : y;
}
LRL_INLINE VecF exp(VecF x) { return exp(x, max_f(splat_f(kLeastExponent), x)); }

// log of positive normal numbers. The reduction and the polynomial are FDLIBM's.
LRL_INLINE VecD log(VecD x) {
  const uint64_t sqrt_half = 0x3fe6a09e667f3bcdULL;
  const uint64_t bias = 1024ULL << 52;
  const VecU64 bits = bit_cast<VecU64>(x);
  const VecU64 k = (bits - sqrt_half + bias) >> 52;  // exponent + 1024
  const VecD f = bit_cast<VecD>(bits - ((k - 1024) << 52)) - 1.0;
  const VecD dk = bit_cast<VecD>(k | 0x4330000000000000ULL) - (0x1p52 + 1024.0);
  const VecD s = f / (f + 2.0);
  const VecD z = s * s;
  const VecD w = z * z;
  const VecD t1 = w * (w * (w * 1.531383769920937332e-01 + 2.222219843214978396e-01) +
                       3.999999999940941908e-01);
  const VecD t2 = z * (w * (w * (w * 1.479819860511658591e-01 + 1.818357216161805012e-01) +
                            2.857142874366239149e-01) +
                       6.666666666666735130e-01);
  const VecD half_square = f * f * 0.5;
  const VecD low = s * (half_square + (t1 + t2)) + dk * 1.90821492927058770002e-10;
  return dk * 6.93147180369123816490e-01 - ((half_square - low) - f);
}

LRL_INLINE double log1(double x) { return log(splat(x))[0]; }

// log(1 + x) for x >= 0, relatively good also near 0: what 1 + x lost in rounding is added back.
LRL_INLINE VecD log1p(VecD x) {
  const VecD u = x + 1.0;
  return log(u) + (x - (u - 1.0)) / u;
}

// --- Running a lambda over tasks. ---

template <typename Body>
void parallel(int64_t tasks, int threads, const Body& body) {
  parallel_for(
      tasks, threads,
      [](void* context, int64_t task, int thread) {
        (*static_cast<const Body*>(context))(task, thread);
      },
      const_cast<Body*>(&body));
}

// Rows a task should take so that waking a thread pays: about 20,000 elements of work.
LRL_INLINE int64_t rows_per_task(int64_t rows, int64_t width) {
  const int64_t wanted = 1 + 20000 / (width < 1 ? 1 : width);
  return wanted < rows ? wanted : (rows < 1 ? 1 : rows);
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls body with the Tag of the C++ type of a dtype.
template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      body(Tag<float>());
      break;
    case DType::kFloat64:
      body(Tag<double>());
      break;
    case DType::kBFloat16:
      body(Tag<BF16>());
      break;
    case DType::kFloat16:
      body(Tag<F16>());
      break;
  }
}

// Calls body(begin, end, thread) over [0, rows) in tasks of `step` rows.
template <typename Body>
void parallel_rows(int64_t rows, int64_t step, int threads, const Body& body) {
  parallel((rows + step - 1) / step, threads, [&](int64_t task, int thread) {
    const int64_t begin = task * step;
    body(begin, begin + step < rows ? begin + step : rows, thread);
  });
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
