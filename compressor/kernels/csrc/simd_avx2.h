// Two 256-bit registers hold a vector of the layout: eight rows each. With HW_VNNI: AVX-VNNI's `vpdpbusd`.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace halfweight {
namespace {

struct Simd {
  static constexpr int kBytes = 32, kLanes = 8, kTokens = 4, kFloatTokens = 4;
#ifdef HW_VNNI
  static constexpr bool kUnsignedX = true, kShortInt4 = false;
  static constexpr int kChains = 4;
#else
  static constexpr bool kUnsignedX = false, kShortInt4 = true;
  static constexpr int kChains = 1;  // the last step of a product is an addition
#endif
  using Int = __m256i;
  using Float = __m256;

  static HW_INLINE Int zero() { return _mm256_setzero_si256(); }
  static HW_INLINE Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
  static HW_INLINE void store(void* p, Int v) { _mm256_storeu_si256(static_cast<Int*>(p), v); }
  static HW_INLINE Int load128(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static HW_INLINE Int load32(const void* p) { int v; __builtin_memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
  static HW_INLINE Int set1(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static HW_INLINE Int and_(Int a, Int b) { return _mm256_and_si256(a, b); }
  static HW_INLINE Int and_or(Int a, Int b, Int c) { return _mm256_or_si256(_mm256_and_si256(a, b), c); }
  static HW_INLINE Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static HW_INLINE Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  template <int n> static HW_INLINE Int shl(Int a) { if constexpr (n == 0) return a; else return _mm256_slli_epi32(a, n); }
  template <int n> static HW_INLINE Int shr(Int a) { if constexpr (n == 0) return a; else return _mm256_srli_epi32(a, n); }
  template <int n> static HW_INLINE Int sar(Int a) { return _mm256_srai_epi32(a, n); }
  static HW_INLINE Int shuffle(Int table, Int index) { return _mm256_shuffle_epi8(table, index); }
#ifdef HW_VNNI
  static HW_INLINE Int dot(Int acc, Int x, Int w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
  static HW_INLINE Int sum(Int acc, Int w) { return _mm256_dpbusd_avx_epi32(acc, _mm256_set1_epi8(1), w); }
#else
  // |w| * sign(x, w): a pair is at most 2 * 128 * 127 < 2^15, so vpmaddubsw does not saturate.
  static HW_INLINE Int dot(Int acc, Int x, Int w) {
    const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return add(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static HW_INLINE Int sum(Int acc, Int) { return acc; }
#endif
  // In a register, here and now: GCC would add up products pair by pair and run out of registers, or load a value again and
  // again where the loads are what takes the time.
  static HW_INLINE Int held(Int a) { __asm__("" : "+x"(a)); return a; }

  static HW_INLINE Float fzero() { return _mm256_setzero_ps(); }
  static HW_INLINE Float fset1(float v) { return _mm256_set1_ps(v); }
  static HW_INLINE Float fload(const float* p) { return _mm256_loadu_ps(p); }
  static HW_INLINE Float fload4(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
  static HW_INLINE void fstore(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static HW_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static HW_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static HW_INLINE Float fadd(Float a, Float b) { return _mm256_add_ps(a, b); }
  static HW_INLINE Float fsub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static HW_INLINE Float fdiv(Float a, Float b) { return _mm256_div_ps(a, b); }
  // Of a NaN and a number these may give either.
  static HW_INLINE Float fmax(Float a, Float b) { return _mm256_max_ps(a, b); }
  static HW_INLINE Float fmin(Float a, Float b) { return _mm256_min_ps(a, b); }
  static HW_INLINE Float nan_where_nan(Float a, Float x) { return _mm256_or_ps(a, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  static HW_INLINE float reduce_max(Float a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static HW_INLINE float reduce_add(Float a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // out[0 .. 3] = the sums of a, b, c and d.
  static HW_INLINE void reduce_add4(Float a, Float b, Float c, Float d, float* out) {
    const Float sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
  static HW_INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static HW_INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
  static HW_INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }
  // To the nearest integer, the even one of two.
  static HW_INLINE Int round(Float a) { return _mm256_cvtps_epi32(a); }
  static HW_INLINE Int max_signed(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static HW_INLINE int32_t reduce_max_signed(Int a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
  }
  // The low bytes of 32 lanes.
  static HW_INLINE void store_bytes(int8_t* p, const Int (&v)[4]) {
    const Int low = set1(0xff);
    const Int first = _mm256_packus_epi32(and_(v[0], low), and_(v[1], low)), second = _mm256_packus_epi32(and_(v[2], low), and_(v[3], low));
    store(p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
  static HW_INLINE Float permute4(Float x, Int index) { return _mm256_permutevar_ps(x, index); }
  static HW_INLINE Float load_bf16(const uint16_t* p) {
    return as_float(shl<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
  }
  static HW_INLINE void store_bf16(uint16_t* p, Float v) {
    const Int bits = as_int(v), odd = and_(shr<16>(bits), set1(1));
    const Int rounded = shr<16>(add(add(bits, set1(0x7fff)), odd));
    const Int halves = _mm256_blendv_epi8(rounded, set1(0x7fc0), as_int(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static HW_INLINE void store_fp16(uint16_t* p, Float v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
  static HW_INLINE void transpose(Float (&v)[8]) {
    Float a[8], b[8];
    for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
        b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
      }
    for (int i = 0; i < 4; ++i) v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20), v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
  static HW_INLINE Int load_bytes(const char* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static HW_INLINE Float load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static HW_INLINE Float low_fp16(Int a) {
    const Int low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
  static HW_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#ifndef HW_VNNI
// Products of int4 weights -8 to 7 with unsigned activations, of T tokens: eight of them are added up in 16 bits, for
// 8 * 2 * 255 * 8 < 2^15, and as many weights in 8. int4 weights count 16 times, as they do elsewhere.
template <int T> struct ShortDots {
  __m256i acc[T], pairs[T], sum, bytes;
  HW_INLINE void clear() {
    for (int t = 0; t < T; ++t) acc[t] = pairs[t] = Simd::zero();
    sum = bytes = Simd::zero();
  }
  template <int unit> HW_INLINE void weigh(__m256i w) { bytes = _mm256_add_epi8(bytes, w); }
  template <int unit> HW_INLINE void add(int t, __m256i x, __m256i w) {
    pairs[t] = Simd::held(_mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(x, w)));
  }
  static HW_INLINE __m256i wide(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(16)); }
  HW_INLINE __m256i wide_sum() const { return wide(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes)); }
  HW_INLINE void flush() {
    for (int t = 0; t < T; ++t) acc[t] = Simd::add(acc[t], wide(pairs[t])), pairs[t] = Simd::zero();
    sum = Simd::add(sum, wide_sum()), bytes = Simd::zero();
  }
  HW_INLINE void flush_once() {  // the only one after clear()
    for (int t = 0; t < T; ++t) acc[t] = wide(pairs[t]);
    sum = wide_sum();
  }
  HW_INLINE __m256i offset() const { return Simd::shl<7>(sum); }
  HW_INLINE __m256i total(int t) const { return acc[t]; }
};
#endif

}  // namespace
}  // namespace halfweight
