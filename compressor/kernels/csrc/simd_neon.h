// Four 128-bit registers hold a vector of the layout: four rows each. ARMv8.2 with the dot product instructions.
#pragma once
#include <arm_neon.h>

#include "halves.h"

namespace halfweight {
namespace {

struct Simd {
  static constexpr int kBytes = 16, kLanes = 4, kTokens = 4, kFloatTokens = 4;
  static constexpr bool kUnsignedX = false, kShortInt4 = false;
  static constexpr int kChains = 4;
  using Int = uint32x4_t;
  using Float = float32x4_t;

  static HW_INLINE int8x16_t bytes(Int a) { return vreinterpretq_s8_u32(a); }
  static HW_INLINE Int zero() { return vdupq_n_u32(0); }
  static HW_INLINE Int load(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static HW_INLINE Int load128(const void* p) { return load(p); }
  static HW_INLINE Int load32(const void* p) { uint32_t v; std::memcpy(&v, p, 4); return set1(v); }
  static HW_INLINE Int set1(uint32_t v) { return vdupq_n_u32(v); }
  static HW_INLINE Int and_(Int a, Int b) { return vandq_u32(a, b); }
  static HW_INLINE Int and_or(Int a, Int b, Int c) { return vorrq_u32(vandq_u32(a, b), c); }
  static HW_INLINE Int add(Int a, Int b) { return vaddq_u32(a, b); }
  static HW_INLINE Int sub(Int a, Int b) { return vsubq_u32(a, b); }
  template <int n> static HW_INLINE Int shl(Int a) { if constexpr (n == 0) return a; else return vshlq_n_u32(a, n); }
  template <int n> static HW_INLINE Int shr(Int a) { if constexpr (n == 0) return a; else return vshrq_n_u32(a, n); }
  template <int n> static HW_INLINE Int sar(Int a) { return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), n)); }
  static HW_INLINE Int shuffle(Int table, Int index) {
    return vreinterpretq_u32_s8(vqtbl1q_s8(bytes(table), vreinterpretq_u8_u32(index)));
  }
  static HW_INLINE Int dot(Int acc, Int x, Int w) {
    return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc), bytes(x), bytes(w)));
  }
  static HW_INLINE Int sum(Int acc, Int) { return acc; }

  static HW_INLINE Float fzero() { return vdupq_n_f32(0); }
  static HW_INLINE Float fset1(float v) { return vdupq_n_f32(v); }
  static HW_INLINE Float fload(const float* p) { return vld1q_f32(p); }
  static HW_INLINE Float fload4(const float* p) { return vld1q_f32(p); }
  static HW_INLINE void fstore(float* p, Float v) { vst1q_f32(p, v); }
  static HW_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static HW_INLINE Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static HW_INLINE Float fadd(Float a, Float b) { return vaddq_f32(a, b); }
  static HW_INLINE Float fsub(Float a, Float b) { return vsubq_f32(a, b); }
  static HW_INLINE Float fdiv(Float a, Float b) { return vdivq_f32(a, b); }
  // Of a NaN and a number these may give either.
  static HW_INLINE Float fmax(Float a, Float b) { return vmaxq_f32(a, b); }
  static HW_INLINE Float fmin(Float a, Float b) { return vminq_f32(a, b); }
  static HW_INLINE Float nan_where_nan(Float a, Float x) { return vbslq_f32(vceqq_f32(x, x), a, x); }
  static HW_INLINE float reduce_max(Float a) { return vmaxvq_f32(a); }
  static HW_INLINE float reduce_add(Float a) { return vaddvq_f32(a); }
  // out[0 .. 3] = the sums of a, b, c and d.
  static HW_INLINE void reduce_add4(Float a, Float b, Float c, Float d, float* out) {
    out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
  }
  static HW_INLINE Float to_float(Int a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  static HW_INLINE Float as_float(Int a) { return vreinterpretq_f32_u32(a); }
  static HW_INLINE Int as_int(Float a) { return vreinterpretq_u32_f32(a); }
  // To the nearest integer, the even one of two.
  static HW_INLINE Int round(Float a) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(a)); }
  static HW_INLINE Int max_signed(Int a, Int b) {
    return vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
  }
  static HW_INLINE int32_t reduce_max_signed(Int a) { return vmaxvq_s32(vreinterpretq_s32_u32(a)); }
  // The low bytes of 32 lanes.
  static HW_INLINE void store_bytes(int8_t* p, const Int (&v)[8]) {
    for (int i = 0; i < 8; i += 4) {
      const uint16x8_t first = vcombine_u16(vmovn_u32(v[i]), vmovn_u32(v[i + 1])), second = vcombine_u16(vmovn_u32(v[i + 2]), vmovn_u32(v[i + 3]));
      vst1q_u8(reinterpret_cast<uint8_t*>(p + 4 * i), vcombine_u8(vmovn_u16(first), vmovn_u16(second)));
    }
  }
  static HW_INLINE Float permute4(Float x, Int index) {
    const Int at = vaddq_u32(vmulq_n_u32(and_(index, set1(3)), 0x04040404), set1(0x03020100));  // the four bytes of that float
    return vreinterpretq_f32_u32(shuffle(vreinterpretq_u32_f32(x), at));
  }
  static HW_INLINE Float load_bf16(const uint16_t* p) {
    uint16x4_t h;
    std::memcpy(&h, p, 8);
    return as_float(vshll_n_u16(h, 16));
  }
  static HW_INLINE void store_bf16(uint16_t* p, Float v) {
    const Int bits = as_int(v), odd = and_(shr<16>(bits), set1(1));
    const Int rounded = shr<16>(add(add(bits, set1(0x7fff)), odd));
    const uint16x4_t halves = vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, set1(0x7fc0)));
    std::memcpy(p, &halves, 8);
  }
  static HW_INLINE void store_fp16(uint16_t* p, Float v) {
    const float16x4_t halves = vcvt_f16_f32(v);
    std::memcpy(p, &halves, 8);
  }
  static HW_INLINE Int load_bytes(const char* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  static HW_INLINE Float load_fp16(const uint16_t* p) {
    uint16x4_t h;
    std::memcpy(&h, p, 8);
    return vcvt_f32_f16(vreinterpret_f16_u16(h));
  }
  static HW_INLINE Float low_fp16(Int a) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a))); }
  static HW_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace halfweight
