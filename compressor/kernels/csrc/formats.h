// How each format's chunk (16 rows x 32 columns, see layout.h) becomes products, in the vocabulary of `Simd`.
//   dot()    int8 activations: acc[t][*] += products, sums[*] += weights (where activations are unsigned)
//   madd()   float activations: likewise, without an offset
// `p` points at the part of the chunk's first vector that belongs to this register's rows; vectors are 64 bytes apart.
// kFactor: the integer weights seen by dot() are this many times the real ones.
// kShort: products of int4 weights are added up in 16 bits, eight of them before flush(); activations are unsigned.
#pragma once
#include <type_traits>

#include "layout.h"

namespace halfweight {
namespace {

using Int = Simd::Int;
using Float = Simd::Float;

HW_INLINE constexpr bool is_short(Format f) { return Simd::kShortInt4 && is_int4(f); }
bool unsigned_x(Format f) { return Simd::kUnsignedX || is_short(f); }  // whether activations come with 128 added

// A dot product takes 4 to 5 cycles: with few tokens, independent accumulators keep the unit busy.
template <int T> constexpr int kAccumulators = Simd::kChains > T ? Simd::kChains / T : 1;
template <int T> constexpr int kSums = T <= 2 ? 4 : 2;

template <int T> struct Dots {
  Int acc[T][kAccumulators<T>];
  Int sums[kSums<T>];
  HW_INLINE void clear() {
    for (auto& a : acc) for (Int& v : a) v = Simd::zero();
    for (Int& v : sums) v = Simd::zero();
  }
  template <int unit> HW_INLINE void weigh(Int w) {
    if constexpr (Simd::kUnsignedX) sums[unit % kSums<T>] = Simd::sum(sums[unit % kSums<T>], w);
  }
  template <int unit> HW_INLINE void add(int t, Int x, Int w) {
    Int& a = acc[t][unit % kAccumulators<T>];
    a = Simd::dot(a, x, w);
  }
  HW_INLINE Int offset() const {  // what the + 128 of unsigned activations has added
    if constexpr (!Simd::kUnsignedX) return Simd::zero();
    Int s = sums[0];
    for (int i = 1; i < kSums<T>; ++i) s = Simd::add(s, sums[i]);
    return Simd::shl<7>(s);
  }
  HW_INLINE Int total(int t) const {
    Int s = acc[t][0];
    for (int i = 1; i < kAccumulators<T>; ++i) s = Simd::add(s, acc[t][i]);
    return s;
  }
};

template <int T> struct ShortDots;  // where Simd has them
template <int T, bool kShort> using Products = std::conditional_t<kShort, ShortDots<T>, Dots<T>>;

template <int T> struct Sums {
  static constexpr int kAccumulators = 2;  // whatever the batch: then a token's result does not depend on its neighbours
  Float acc[T][kAccumulators];
  HW_INLINE void clear() {
    for (auto& a : acc) for (Float& v : a) v = Simd::fzero();
  }
  template <int unit> HW_INLINE void add(int t, Float x, Float w) {
    Float& a = acc[t][unit % kAccumulators];
    a = Simd::fma(x, w, a);
  }
  HW_INLINE Float total(int t) const { return Simd::fadd(acc[t][0], acc[t][1]); }
};

// Activations of token t at the chunk's first column.
template <class X> struct Rows {
  const X* x;
  int64_t stride;
  HW_INLINE const X* operator[](int t) const { return x + t * stride; }
};

// 2:4: each lane picks its activations by the positions; one vector of weights serves 8 columns.
template <class Values> struct Sparse {
  static constexpr int kBytes = static_cast<int>(chunk_bytes(Values::kFormat));
  static constexpr Format kFormat = Values::kFormat;
  static constexpr float kFactor = Values::kFactor;
  static constexpr bool kShort = is_short(kFormat);
  static constexpr int kUnits = 4;  // products in a chunk

  template <int half, int T> static HW_INLINE void dot_half(const uint8_t* p, Int meta, Rows<int8_t> x, Products<T, kShort>& d) {
    const Int three = Simd::set1(0x03030303), quads = Simd::set1(0x0c080400);
    const Int first = Values::template slot<half, 0>(p), second = Values::template slot<half, 1>(p);
    const Int at_first = Simd::and_or(Simd::shr<4 * half>(meta), three, quads);
    const Int at_second = Simd::and_or(Simd::shr<4 * half + 2>(meta), three, quads);
    d.template weigh<2 * half>(first);
    d.template weigh<2 * half + 1>(second);
    for (int t = 0; t < T; ++t) {
      const Int row = Simd::load128(x[t] + 16 * half);
      d.template add<2 * half>(t, Simd::shuffle(row, at_first), first);
      d.template add<2 * half + 1>(t, Simd::shuffle(row, at_second), second);
    }
  }
  template <int T> static HW_INLINE void dot(const uint8_t* p, Rows<int8_t> x, Products<T, kShort>& d) {
    const Int meta = Simd::load(p);
    dot_half<0, T>(p, meta, x, d);
    dot_half<1, T>(p, meta, x, d);
  }

  template <int quad, int T> static HW_INLINE void madd_quad(const uint8_t* p, Half half, Int meta, Rows<float> x, Sums<T>& s) {
    constexpr int shift = 8 * (quad & 3) + 4 * (quad >> 2);
    const Float first = Values::template value<quad, 0>(p, half), second = Values::template value<quad, 1>(p, half);
    for (int t = 0; t < T; ++t) {
      const Float four = Simd::fload4(x[t] + 4 * quad);
      s.template add<2 * quad>(t, Simd::permute4(four, Simd::shr<shift>(meta)), first);
      s.template add<2 * quad + 1>(t, Simd::permute4(four, Simd::shr<shift + 2>(meta)), second);
    }
  }
  template <int T> static HW_INLINE void madd(const uint8_t* p, Half half, Rows<float> x, Sums<T>& s) {
    const Int meta = Simd::load(p);
    madd_quad<0, T>(p, half, meta, x, s), madd_quad<1, T>(p, half, meta, x, s);
    madd_quad<2, T>(p, half, meta, x, s), madd_quad<3, T>(p, half, meta, x, s);
    madd_quad<4, T>(p, half, meta, x, s), madd_quad<5, T>(p, half, meta, x, s);
    madd_quad<6, T>(p, half, meta, x, s), madd_quad<7, T>(p, half, meta, x, s);
  }
};

// Every column: a lane's 4 bytes meet 4 broadcast activations; one vector of weights serves 4 columns.
template <class Values> struct Dense {
  static constexpr int kBytes = static_cast<int>(chunk_bytes(Values::kFormat));
  static constexpr Format kFormat = Values::kFormat;
  static constexpr float kFactor = Values::kFactor;
  static constexpr bool kShort = is_short(kFormat);
  static constexpr int kUnits = 8;

  template <int unit, int T> static HW_INLINE void dot_unit(const uint8_t* p, Rows<int8_t> x, Products<T, kShort>& d) {
    const Int w = Values::template unit<unit>(p);
    d.template weigh<unit>(w);
    for (int t = 0; t < T; ++t) d.template add<unit>(t, Simd::load32(x[t] + 4 * unit), w);
  }
  template <int T> static HW_INLINE void dot(const uint8_t* p, Rows<int8_t> x, Products<T, kShort>& d) {
    dot_unit<0, T>(p, x, d), dot_unit<1, T>(p, x, d), dot_unit<2, T>(p, x, d), dot_unit<3, T>(p, x, d);
    dot_unit<4, T>(p, x, d), dot_unit<5, T>(p, x, d), dot_unit<6, T>(p, x, d), dot_unit<7, T>(p, x, d);
  }

  template <int k, int T> static HW_INLINE void madd_column(const uint8_t* p, Half half, Rows<float> x, Sums<T>& s) {
    const Float w = Values::template value<k>(p, half);
    for (int t = 0; t < T; ++t) s.template add<k>(t, Simd::fset1(x[t][k]), w);
    if constexpr (k + 1 < kChunk) madd_column<k + 1, T>(p, half, x, s);
  }
  template <int T> static HW_INLINE void madd(const uint8_t* p, Half half, Rows<float> x, Sums<T>& s) {
    madd_column<0, T>(p, half, x, s);
  }
};

template <int bit, int bits> HW_INLINE Float signed_field(Int v) {  // `bits` bits from `bit` up, as a signed number
  return Simd::to_float(Simd::sar<32 - bits>(Simd::shl<32 - bits - bit>(v)));
}
template <int h> HW_INLINE Float half_field(Int v, Half half) {
  if (half == Half::bf16) return Simd::as_float(h == 0 ? Simd::shl<16>(v) : Simd::and_(v, Simd::set1(0xffff0000)));
  return Simd::low_fp16(Simd::shr<16 * h>(v));
}

// The upper (h = 1) or lower half of each byte: in the byte's upper half, where its sign is the byte's, or small, to be added up.
template <int h> HW_INLINE Int nibbles(Int w) {
  static constexpr int8_t small[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  if constexpr (Simd::kShortInt4) return Simd::shuffle(Simd::load128(small), Simd::and_(Simd::shr<4 * h>(w), Simd::set1(0x0f0f0f0f)));
  else return Simd::and_(h == 0 ? Simd::shl<4>(w) : w, Simd::set1(0xf0f0f0f0));
}

struct SparseInt4Values {
  static constexpr Format kFormat = Format::sparse24_int4;
  static constexpr float kFactor = 16;
  template <int half, int h> static HW_INLINE Int slot(const uint8_t* p) { return nibbles<h>(Simd::load(p + 64 * (1 + half))); }
  template <int quad, int h> static HW_INLINE Float value(const uint8_t* p, Half) {
    return signed_field<8 * (quad & 3) + 4 * h, 4>(Simd::load(p + 64 * (1 + quad / 4)));
  }
};
struct SparseInt8Values {
  static constexpr Format kFormat = Format::sparse24_int8;
  static constexpr float kFactor = 1;
  template <int half, int h> static HW_INLINE Int slot(const uint8_t* p) { return Simd::load(p + 64 * (1 + 2 * half + h)); }
  template <int quad, int h> static HW_INLINE Float value(const uint8_t* p, Half) {
    return signed_field<8 * (quad & 3), 8>(Simd::load(p + 64 * (1 + 2 * (quad / 4) + h)));
  }
};
struct SparseHalfValues {
  static constexpr Format kFormat = Format::sparse24;
  static constexpr float kFactor = 1;
  template <int quad, int h> static HW_INLINE Float value(const uint8_t* p, Half half) {
    return half_field<h>(Simd::load(p + 64 * (1 + quad)), half);
  }
};
struct Int4Values {
  static constexpr Format kFormat = Format::int4;
  static constexpr float kFactor = 16;
  template <int i> static HW_INLINE Int unit(const uint8_t* p) { return nibbles<i % 2>(Simd::load(p + 64 * (i / 2))); }
  template <int k> static HW_INLINE Float value(const uint8_t* p, Half) {
    return signed_field<8 * (k & 3) + 4 * (k / 4 & 1), 4>(Simd::load(p + 64 * (k / 8)));
  }
};
struct Int8Values {
  static constexpr Format kFormat = Format::int8;
  static constexpr float kFactor = 1;
  template <int i> static HW_INLINE Int unit(const uint8_t* p) { return Simd::load(p + 64 * i); }
  template <int k> static HW_INLINE Float value(const uint8_t* p, Half) { return signed_field<8 * (k & 3), 8>(Simd::load(p + 64 * (k / 4))); }
};
struct DenseHalfValues {
  static constexpr Format kFormat = Format::dense;
  static constexpr float kFactor = 1;
  template <int k> static HW_INLINE Float value(const uint8_t* p, Half half) { return half_field<(k & 1)>(Simd::load(p + 64 * (k / 2)), half); }
};

}  // namespace
}  // namespace halfweight
