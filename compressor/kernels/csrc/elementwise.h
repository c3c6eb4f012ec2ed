// The steps around the linears, in plain loops that the compiler vectorises for each instruction set.
#pragma once
#include <cmath>

#include "linear.h"

namespace halfweight {
namespace {

HW_INLINE void load_row(const void* x, Dtype dtype, int64_t at, int n, float* __restrict out) {
  if (dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(x) + at;
    for (int i = 0; i < n; ++i) out[i] = p[i];
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    if (dtype == Dtype::bf16) for (int i = 0; i < n; ++i) out[i] = bf16_to_float(p[i]);
    else for (int i = 0; i < n; ++i) out[i] = fp16_to_float(p[i]);
  }
}
HW_INLINE void store_row(const float* __restrict v, Dtype dtype, int64_t at, int n, void* out) {
  if (dtype == Dtype::f32) {
    float* p = static_cast<float*>(out) + at;
    for (int i = 0; i < n; ++i) p[i] = v[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(out) + at;
    if (dtype == Dtype::bf16) for (int i = 0; i < n; ++i) p[i] = float_to_bf16(v[i]);
    else for (int i = 0; i < n; ++i) p[i] = float_to_fp16(v[i]);
  }
}

void to_float(const void* x, Dtype dtype, int in, int segment, float* out, int columns) {
  if (segment == 0) {
    load_row(x, dtype, 0, in, out);
  } else {
    for (int s = 0; s < in / segment; ++s) {
      float sum = 0;
      for (int i = 0; i < segment; ++i) sum += load_one(x, dtype, static_cast<int64_t>(s) * segment + i);
      out[s] = sum;
    }
    in /= segment;
  }
  for (int i = in; i < columns; ++i) out[i] = 0;
}

void quantise(const float* x, int columns, int group, float factor, bool as_unsigned, int8_t* out, float* scales) {
  const uint32_t flip = as_unsigned ? 0x80 : 0;
  for (int g = 0; g * group < columns; ++g) {
    const int begin = g * group, end = begin + group < columns ? begin + group : columns;
    int32_t bits = 0;  // the largest magnitude; as integers, so that NaN and infinity win
    for (int i = begin; i < end; ++i) {
      const int32_t b = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
      bits = b > bits ? b : bits;
    }
    const float largest = as_float(static_cast<uint32_t>(bits));
    const bool finite = bits < 0x7f800000, tiny = largest < 1e-35f;  // 127 / 1e-37 would overflow; such a group is 0
    const float inverse = !finite || tiny ? 0 : 127 / largest;
    scales[g] = !finite ? as_float(0x7fc00000) : tiny ? 0 : largest / 127 / factor;
    if (inverse == 0) {
      for (int i = begin; i < end; ++i) out[i] = static_cast<int8_t>(flip);
      continue;
    }
    for (int i = begin; i < end; ++i) {
      const float rounded = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the integer, rounded to even, is in the low bits
      out[i] = static_cast<int8_t>(as_bits(rounded) ^ flip);
    }
  }
}

}  // namespace
}  // namespace halfweight
