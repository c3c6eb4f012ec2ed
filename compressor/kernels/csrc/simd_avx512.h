// One 512-bit register holds the 16 rows of a vector of the layout. With HW_VNNI: `vpdpbusd`, so activations are unsigned.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace halfweight {
namespace {

struct Simd {
  static constexpr int kBytes = 64, kLanes = 16, kTokens = 8, kFloatTokens = 8;
#ifdef HW_VNNI
  static constexpr bool kUnsignedX = true;
#else
  static constexpr bool kUnsignedX = false;
#endif
  static constexpr bool kShortInt4 = false;
  static constexpr int kChains = 4;
  using Int = __m512i;
  using Float = __m512;

  static HW_INLINE Int zero() { return _mm512_setzero_si512(); }
  static HW_INLINE Int load(const void* p) { return _mm512_loadu_si512(p); }
  static HW_INLINE Int load128(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static HW_INLINE Int load32(const void* p) { int v; __builtin_memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
  static HW_INLINE Int set1(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static HW_INLINE Int and_(Int a, Int b) { return _mm512_and_si512(a, b); }
  static HW_INLINE Int and_or(Int a, Int b, Int c) { return _mm512_ternarylogic_epi32(a, b, c, 0xea); }  // (a & b) | c
  static HW_INLINE Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static HW_INLINE Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  template <int n> static HW_INLINE Int shl(Int a) { if constexpr (n == 0) return a; else return _mm512_slli_epi32(a, n); }
  template <int n> static HW_INLINE Int shr(Int a) { if constexpr (n == 0) return a; else return _mm512_srli_epi32(a, n); }
  template <int n> static HW_INLINE Int sar(Int a) { return _mm512_srai_epi32(a, n); }
  // Bytes picked within each 128-bit lane.
  static HW_INLINE Int shuffle(Int table, Int index) { return _mm512_shuffle_epi8(table, index); }
#ifdef HW_VNNI
  static HW_INLINE Int dot(Int acc, Int x, Int w) { return _mm512_dpbusd_epi32(acc, x, w); }
  static HW_INLINE Int sum(Int acc, Int w) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), w); }
#else
  // |w| * sign(x, w): a pair is at most 2 * 128 * 127 < 2^15, so vpmaddubsw does not saturate.
  static HW_INLINE Int dot(Int acc, Int x, Int w) {
    const Int signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), zero(), x);
    const Int pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
    return add(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static HW_INLINE Int sum(Int acc, Int) { return acc; }
#endif

  static HW_INLINE Float fzero() { return _mm512_setzero_ps(); }
  static HW_INLINE Float fset1(float v) { return _mm512_set1_ps(v); }
  static HW_INLINE Float fload(const float* p) { return _mm512_loadu_ps(p); }
  static HW_INLINE Float fload4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static HW_INLINE void fstore(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static HW_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static HW_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static HW_INLINE Float fadd(Float a, Float b) { return _mm512_add_ps(a, b); }
  static HW_INLINE Float fsub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static HW_INLINE Float fdiv(Float a, Float b) { return _mm512_div_ps(a, b); }
  // Of a NaN and a number these may give either.
  static HW_INLINE Float fmax(Float a, Float b) { return _mm512_max_ps(a, b); }
  static HW_INLINE Float fmin(Float a, Float b) { return _mm512_min_ps(a, b); }
  static HW_INLINE Float nan_where_nan(Float a, Float x) { return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x); }
  static HW_INLINE float reduce_max(Float a) { return _mm512_reduce_max_ps(a); }
  static HW_INLINE float reduce_add(Float a) { return _mm512_reduce_add_ps(a); }
  // out[0 .. 3] = the sums of a, b, c and d.
  static HW_INLINE void reduce_add4(Float a, Float b, Float c, Float d, float* out) {
    const __m512d ab = _mm512_castps_pd(fadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(fadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const Float sums = fadd(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static HW_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static HW_INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
  static HW_INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }
  // To the nearest integer, the even one of two.
  static HW_INLINE Int round(Float a) { return _mm512_cvtps_epi32(a); }
  static HW_INLINE Int max_signed(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static HW_INLINE int32_t reduce_max_signed(Int a) { return _mm512_reduce_max_epi32(a); }
  // The low bytes of 32 lanes.
  static HW_INLINE void store_bytes(int8_t* p, const Int (&v)[2]) {
    for (int i = 0; i < 2; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i), _mm512_cvtepi32_epi8(v[i]));
  }
  // One of the four floats of each 128-bit lane by the low two bits of the index.
  static HW_INLINE Float permute4(Float x, Int index) { return _mm512_permutevar_ps(x, index); }
  static HW_INLINE Float load_bf16(const uint16_t* p) {
    return as_float(shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
  }
  static HW_INLINE void store_bf16(uint16_t* p, Float v) {
    const Int bits = as_int(v), odd = and_(shr<16>(bits), set1(1));
    const Int rounded = shr<16>(add(add(bits, set1(0x7fff)), odd));
    const Int halves = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set1(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
  }
  static HW_INLINE void store_fp16(uint16_t* p, Float v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
  // A signed byte in every lane.
  static HW_INLINE Int load_bytes(const char* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static HW_INLINE Float load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The low 16 bits of every lane, as fp16.
  static HW_INLINE Float low_fp16(Int a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
  static HW_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace halfweight
