// bf16, fp16 and fp8 (e4m3) in plain C++. Rounding is to nearest even; NaN stays NaN.
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

// e4m3 has no infinity: what is finite ends at 448, infinity becomes NaN.
HW_INLINE float e4m3_to_float(uint8_t b) {
  const uint32_t sign = static_cast<uint32_t>(b & 0x80) << 24, body = b & 0x7f;
  if (body == 0x7f) return as_float(sign | 0x7fc00000);
  // As an integer of 2^-9 where it is denormal; else the exponent is 120 too small.
  const float magnitude = body < 8 ? static_cast<float>(body) * 0x1p-9f : as_float((body << 20) + 0x3c000000);
  return as_float(as_bits(magnitude) | sign);
}
HW_INLINE uint8_t float_to_e4m3(float f) {
  const uint32_t bits = as_bits(f), sign = bits >> 24 & 0x80, body = bits & 0x7fffffff;
  if (body >= 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  if (body >= 0x43e00000) return static_cast<uint8_t>(sign | 0x7e);
  if (body < 0x3c800000) return static_cast<uint8_t>(sign | (as_bits(as_float(body) + 16384.0f) - as_bits(16384.0f)));
  return static_cast<uint8_t>(sign | ((body - 0x3c000000 + 0x7ffff + (body >> 20 & 1)) >> 20));
}

}  // namespace
}  // namespace halfweight
