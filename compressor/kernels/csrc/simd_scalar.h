// The same vocabulary in plain C++ with the compilers' portable vectors, for any machine: a 128-bit register.
#pragma once
#include "halves.h"

namespace halfweight {
namespace {

struct Simd {
  static constexpr int kBytes = 16, kLanes = 4, kTokens = 4, kFloatTokens = 4;
  static constexpr bool kUnsignedX = false, kShortInt4 = false;
  static constexpr int kChains = 4;
  typedef uint32_t Int __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  typedef float Float __attribute__((vector_size(16)));

  static HW_INLINE Int zero() { return set1(0); }
  static HW_INLINE Int load(const void* p) { Int v; std::memcpy(&v, p, 16); return v; }
  static HW_INLINE Int load128(const void* p) { return load(p); }
  static HW_INLINE Int load32(const void* p) { uint32_t v; std::memcpy(&v, p, 4); return set1(v); }
  static HW_INLINE Int set1(uint32_t v) { return Int{v, v, v, v}; }
  static HW_INLINE Int and_(Int a, Int b) { return a & b; }
  static HW_INLINE Int and_or(Int a, Int b, Int c) { return (a & b) | c; }
  static HW_INLINE Int add(Int a, Int b) { return a + b; }
  static HW_INLINE Int sub(Int a, Int b) { return a - b; }
  template <int n> static HW_INLINE Int shl(Int a) { return a << n; }
  template <int n> static HW_INLINE Int shr(Int a) { return a >> n; }
  template <int n> static HW_INLINE Int sar(Int a) { return (Int)((Signed)a >> n); }
  static __attribute__((noinline)) Int shuffle(Int table, Int index) {
    uint8_t from[16], at[16], out[16];
    std::memcpy(from, &table, 16);
    std::memcpy(at, &index, 16);
    for (int i = 0; i < 16; ++i) out[i] = from[at[i] & 15];
    return load(out);
  }
  static __attribute__((noinline)) Int dot(Int acc, Int x, Int w) {
    Signed sum = (Signed)acc;
    for (int bit = 24; bit >= 0; bit -= 8) sum += ((Signed)(x << bit) >> 24) * ((Signed)(w << bit) >> 24);
    return (Int)sum;
  }
  static HW_INLINE Int sum(Int acc, Int) { return acc; }

  static HW_INLINE Float fzero() { return fset1(0); }
  static HW_INLINE Float fset1(float v) { return Float{v, v, v, v}; }
  static HW_INLINE Float fload(const float* p) { Float v; std::memcpy(&v, p, 16); return v; }
  static HW_INLINE Float fload4(const float* p) { return fload(p); }
  static HW_INLINE void fstore(float* p, Float v) { std::memcpy(p, &v, 16); }
  static HW_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
  static HW_INLINE Float mul(Float a, Float b) { return a * b; }
  static HW_INLINE Float fadd(Float a, Float b) { return a + b; }
  static HW_INLINE Float fsub(Float a, Float b) { return a - b; }
  static HW_INLINE Float fdiv(Float a, Float b) { return a / b; }
  // Of a NaN and a number these may give either.
  static HW_INLINE Float fmax(Float a, Float b) { return a > b ? a : b; }
  static HW_INLINE Float fmin(Float a, Float b) { return a < b ? a : b; }
  static HW_INLINE Float nan_where_nan(Float a, Float x) { return x == x ? a : x; }
  static HW_INLINE float reduce_max(Float a) {
    const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }
  static HW_INLINE float reduce_add(Float a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  // out[0 .. 3] = the sums of a, b, c and d.
  static HW_INLINE void reduce_add4(Float a, Float b, Float c, Float d, float* out) {
    out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
  }
  static HW_INLINE Float to_float(Int a) { return __builtin_convertvector((Signed)a, Float); }
  static HW_INLINE Float as_float(Int a) { return (Float)a; }
  static HW_INLINE Int as_int(Float a) { return (Int)a; }
  // To the nearest integer, the even one of two; of less than 2^22.
  static HW_INLINE Int round(Float a) {
    __asm__("" : "+m"(a));  // a product is rounded first, as everywhere else, not fused with this sum
    return (Int)(a + fset1(12582912.0f)) - set1(0x4b400000);
  }
  static HW_INLINE Int max_signed(Int a, Int b) { return (Signed)a > (Signed)b ? a : b; }
  static HW_INLINE int32_t reduce_max_signed(Int a) {
    const Signed s = (Signed)a;
    const int32_t low = s[0] > s[1] ? s[0] : s[1], high = s[2] > s[3] ? s[2] : s[3];
    return low > high ? low : high;
  }
  // The low bytes of 32 lanes.
  static HW_INLINE void store_bytes(int8_t* p, const Int (&v)[8]) {
    for (int i = 0; i < 32; ++i) p[i] = static_cast<int8_t>(v[i / 4][i % 4]);
  }
  static __attribute__((noinline)) Float permute4(Float x, Int index) {
    return Float{x[index[0] & 3], x[index[1] & 3], x[index[2] & 3], x[index[3] & 3]};
  }
  static HW_INLINE Float load_bf16(const uint16_t* at) {
    uint16_t p[4];
    std::memcpy(p, at, 8);  // the weights need no alignment
    return Float{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
  }
  static HW_INLINE void store_bf16(uint16_t* p, Float v) {
    const uint16_t halves[4] = {float_to_bf16(v[0]), float_to_bf16(v[1]), float_to_bf16(v[2]), float_to_bf16(v[3])};
    std::memcpy(p, halves, 8);
  }
  static HW_INLINE void store_fp16(uint16_t* p, Float v) {
    const uint16_t halves[4] = {float_to_fp16(v[0]), float_to_fp16(v[1]), float_to_fp16(v[2]), float_to_fp16(v[3])};
    std::memcpy(p, halves, 8);
  }
  static HW_INLINE Int load_bytes(const char* at) {
    int8_t p[4];
    std::memcpy(p, at, 4);
    return (Int)Signed{p[0], p[1], p[2], p[3]};
  }
  static HW_INLINE Float load_fp16(const uint16_t* at) {
    uint16_t p[4];
    std::memcpy(p, at, 8);
    return Float{fp16_to_float(p[0]), fp16_to_float(p[1]), fp16_to_float(p[2]), fp16_to_float(p[3])};
  }
  static __attribute__((noinline)) Float low_fp16(Int a) {
    const uint16_t h[4] = {static_cast<uint16_t>(a[0]), static_cast<uint16_t>(a[1]), static_cast<uint16_t>(a[2]), static_cast<uint16_t>(a[3])};
    return load_fp16(h);
  }
  static HW_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace halfweight
