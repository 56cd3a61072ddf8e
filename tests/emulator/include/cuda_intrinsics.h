// Device functions of one thread: bits, rounding, fast maths (at full precision here), cached
// loads.
#pragma once

#define LRL_EMULATED_MIN_MAX(type)                          \
  inline type min(type a, type b) { return a < b ? a : b; } \
  inline type max(type a, type b) { return a > b ? a : b; }
LRL_EMULATED_MIN_MAX(int)
LRL_EMULATED_MIN_MAX(unsigned)
LRL_EMULATED_MIN_MAX(long)
LRL_EMULATED_MIN_MAX(long long)
LRL_EMULATED_MIN_MAX(unsigned long)
LRL_EMULATED_MIN_MAX(unsigned long long)
#undef LRL_EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

namespace emulator {
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace emulator
inline unsigned __float_as_uint(float v) { return emulator::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return emulator::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return emulator::bits_as<float>(v); }
inline float __int_as_float(int v) { return emulator::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return emulator::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return emulator::bits_as<double>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline float __double2float_rn(double v) { return static_cast<float>(v); }
inline float __double2float_ru(double v) {
  const float near = static_cast<float>(v);
  return static_cast<double>(near) < v ? nextafterf(near, INFINITY) : near;
}
inline float __double2float_rd(double v) {
  const float near = static_cast<float>(v);
  return static_cast<double>(near) > v ? nextafterf(near, -INFINITY) : near;
}
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) { return static_cast<int>(nearbyintf(v)); }
inline double __hiloint2double(int high, int low) {
  return __longlong_as_double(static_cast<long long>(
      (static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32) | static_cast<uint32_t>(low)));
}

// Compiled without contraction, so that each of these rounds once, as its name says.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, T v) {
  *at = v;
}
template <typename T>
void __stcg(T* at, T v) {
  *at = v;
}
