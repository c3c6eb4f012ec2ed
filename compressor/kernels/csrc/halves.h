// bf16 and fp16 in plain C++. Rounding is to nearest even; NaN stays NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace halfweight {
namespace {

HW_INLINE float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
HW_INLINE uint32_t as_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

HW_INLINE float bf16_to_float(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }
HW_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t bits = as_bits(f);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

HW_INLINE float fp16_to_float(uint16_t h) {
#ifdef __F16C__
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return as_float(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small: multiply by 2^112, which also normalises denormals.
  return as_float(as_bits(as_float(body << 13) * as_float(0x77800000)) | sign);
#endif
}
HW_INLINE uint16_t float_to_fp16(float f) {
#ifdef __F16C__
  return _cvtss_sh(f, 0);
#else
  const uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
  if (body > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (body >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (body < 0x38800000) return static_cast<uint16_t>(sign | (as_bits(as_float(body) + 0.5f) - as_bits(0.5f)));
  return static_cast<uint16_t>(sign | ((body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13));
#endif
}

}  // namespace
}  // namespace halfweight
