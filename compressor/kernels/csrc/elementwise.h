// The steps around the linears: in registers where much time goes, else in plain loops that the compiler vectorises.
#pragma once
#include <cmath>
#include <cstring>

#include "linear.h"

namespace halfweight {
namespace {

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

void to_halves(const void* x, Dtype dtype, int in, int segment, uint16_t* out, int columns, float* memory) {
  if (segment == 0 && dtype == Dtype::bf16) {
    std::memcpy(out, x, static_cast<size_t>(in) * sizeof(uint16_t));
    std::memset(out + in, 0, static_cast<size_t>(columns - in) * sizeof(uint16_t));
    return;
  }
  to_float(x, dtype, in, segment, memory, columns);
  store_row(memory, Dtype::bf16, 0, columns, out);
}

void quantise(const float* x, int columns, int group, float factor, bool as_unsigned, int8_t* out, float* scales) {
  constexpr int registers = kChunk / Simd::kLanes;
  const uint32_t zero = as_unsigned ? 0x80 : 0;
  for (int g = 0; g * group < columns; ++g) {
    const int begin = g * group, end = begin + group < columns ? begin + group : columns;
    Int most = Simd::zero();  // the largest magnitude; as integers, so that NaN and infinity win
    for (int i = begin; i + Simd::kLanes <= end; i += Simd::kLanes)
      most = Simd::max_signed(most, Simd::and_(Simd::as_int(Simd::fload(x + i)), Simd::set1(0x7fffffff)));
    int32_t bits = Simd::reduce_max_signed(most);
    for (int i = end - (end - begin) % Simd::kLanes; i < end; ++i) {
      const int32_t b = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
      bits = b > bits ? b : bits;
    }
    const float largest = as_float(static_cast<uint32_t>(bits));
    const bool finite = bits < 0x7f800000, tiny = largest < 1e-35f;  // 127 / 1e-37 would overflow; such a group is 0
    const float inverse = !finite || tiny ? 0 : 127 / largest;
    scales[g] = !finite ? as_float(0x7fc00000) : tiny ? 0 : largest / 127 / factor;
    if (!finite || tiny) {
      std::memset(out + begin, static_cast<int>(zero), static_cast<size_t>(end - begin));
      continue;
    }
    int i = begin;
    for (; i + kChunk <= end; i += kChunk) {
      Int rounded[registers];
      for (int j = 0; j < registers; ++j)
        rounded[j] = Simd::add(Simd::round(Simd::mul(Simd::fload(x + i + j * Simd::kLanes), Simd::fset1(inverse))), Simd::set1(zero));
      Simd::store_bytes(out + i, rounded);
    }
    for (; i < end; ++i) out[i] = static_cast<int8_t>(static_cast<uint32_t>(std::lrintf(x[i] * inverse)) + zero);
  }
}

// e^x by a polynomial, right to 3e-7 relative; plain code, so that the compiler vectorises loops over it.
HW_INLINE float exp_fast(float x) {
  const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p = 1 + f * (1 + f * (0.5f + f * (0.16666667f + f * (0.041666396f + f * (0.0083334519f + f * 0.0013930436f)))));
  const float power = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return x != x ? x : power;
}

HW_INLINE Float exp_fast(Float x) {
  const Float magic = Simd::fset1(12582912.0f), clamped = Simd::fmin(Simd::fmax(x, Simd::fset1(-87.0f)), Simd::fset1(88.0f));
  const Float shifted = Simd::fma(clamped, Simd::fset1(1.44269504f), magic), n = Simd::fsub(shifted, magic);
  const Float f = Simd::fma(n, Simd::fset1(2.12194440e-4f), Simd::fma(n, Simd::fset1(-0.693359375f), clamped));
  constexpr float next[] = {0.0083334519f, 0.041666396f, 0.16666667f, 0.5f, 1, 1};
  Float p = Simd::fset1(0.0013930436f);
  for (const float c : next) p = Simd::fma(f, p, Simd::fset1(c));
  return Simd::nan_where_nan(Simd::as_float(Simd::add(Simd::as_int(p), Simd::shl<23>(Simd::as_int(shifted)))), x);
}

void copy_row(const void* x, Dtype from, void* out, Dtype to, int64_t count, float* memory) {
  if (from == to) {
    std::memcpy(out, x, static_cast<size_t>(count) * dtype_bytes(to));
    return;
  }
  load_row(x, from, 0, static_cast<int>(count), memory);
  store_row(memory, to, 0, static_cast<int>(count), out);
}

void rms_norm(const RowsOf& x, const RowsOf& residual, const RowsOf& weight, int columns, float eps, void* out, void* sum, int64_t row, float* memory) {
  float* v = memory;
  float* other = memory + columns;
  load_row(x.data, x.dtype, row * x.stride, columns, v);
  if (residual.data) {
    load_row(residual.data, residual.dtype, row * residual.stride, columns, other);
    for (int i = 0; i < columns; ++i) v[i] += other[i];
    store_row(v, x.dtype, row * columns, columns, sum);
    load_row(sum, x.dtype, row * columns, columns, v);  // the norm is of what the next layer will see
  }
  float squares[16] = {}, total = 0;
  int i = 0;
  for (; i + 16 <= columns; i += 16) for (int j = 0; j < 16; ++j) squares[j] += v[i + j] * v[i + j];
  for (; i < columns; ++i) total += v[i] * v[i];
  for (const float s : squares) total += s;
  const float scale = 1 / std::sqrt(total / static_cast<float>(columns) + eps);
  load_row(weight.data, weight.dtype, 0, columns, other);
  for (int j = 0; j < columns; ++j) v[j] *= scale * other[j];
  store_row(v, x.dtype, row * columns, columns, out);
}

void silu_and_mul(const RowsOf& x, int columns, void* out, int64_t row, float* memory) {
  float* gate = memory;
  float* up = memory + columns;
  load_row(x.data, x.dtype, row * x.stride, columns, gate);
  load_row(x.data, x.dtype, row * x.stride + columns, columns, up);
  int i = 0;
  for (; i + Simd::kLanes <= columns; i += Simd::kLanes) {
    const Float g = Simd::fload(gate + i), down = Simd::fadd(Simd::fset1(1), exp_fast(Simd::fsub(Simd::fzero(), g)));
    Simd::fstore(gate + i, Simd::mul(Simd::fdiv(g, down), Simd::fload(up + i)));
  }
  for (; i < columns; ++i) gate[i] = gate[i] / (1 + exp_fast(-gate[i])) * up[i];
  store_row(gate, x.dtype, row * columns, columns, out);
}

void rotary(const RowsOf& x, int heads, int dim, const float* cos_sin, void* out, int64_t row, float* memory) {
  const int half = dim / 2;
  float* rotated = memory + dim;
  for (int h = 0; h < heads; ++h) {
    load_row(x.data, x.dtype, row * x.stride + static_cast<int64_t>(h) * dim, dim, memory);
    for (int i = 0; i < half; ++i) {
      const float c = cos_sin[i], s = cos_sin[half + i], a = memory[i], b = memory[half + i];
      rotated[i] = a * c - b * s;
      rotated[half + i] = b * c + a * s;
    }
    store_row(rotated, x.dtype, (row * heads + h) * dim, dim, out);
  }
}

// The integer or float that a chunk's byte layout (layout.h) holds for column k of row r; 0 for a pruned one.
float chunk_value(Format format, Half half, const uint8_t* chunk, int r, int k) {
  const auto lane = [&](int vector) { return chunk + 64 * vector + 4 * r; };
  const auto nibble = [](int byte, int upper) { return static_cast<float>(static_cast<int8_t>((upper ? byte >> 4 : byte) << 4) >> 4); };
  const auto float16 = [&](int vector, int i) {
    uint16_t h;
    std::memcpy(&h, lane(vector) + 2 * i, 2);
    return half == Half::bf16 ? bf16_to_float(h) : fp16_to_float(h);
  };
  switch (format) {
    case Format::int4: return nibble(lane(k / 8)[k & 3], k / 4 & 1);
    case Format::int8: return static_cast<int8_t>(lane(k / 4)[k & 3]);
    case Format::dense: return float16(k / 2, k & 1);
    default: break;
  }
  const int quad = k / 4, c = quad & 3, positions = lane(0)[c] >> (4 * (quad >> 2)) & 15;
  float value = 0;
  for (int h = 0; h < 2; ++h) {
    if ((positions >> (2 * h) & 3) != (k & 3)) continue;
    value += format == Format::sparse24_int4 ? nibble(lane(1 + quad / 4)[c], h)
             : format == Format::sparse24_int8 ? static_cast<float>(static_cast<int8_t>(lane(1 + 2 * (quad / 4) + h)[c]))
                                               : float16(1 + quad, h);
  }
  return value;
}

void weight_row(const Weight& w, int64_t id, float* out) {
  const int block = static_cast<int>(id / kRows), r = static_cast<int>(id % kRows);
  const uint8_t* scales = w.data + block * w.block_bytes;
  for (int k = 0; k < w.in_features; ++k) {
    const float v = chunk_value(w.format, w.half, w.chunks(block) + chunk_bytes(w.format) * (k / kChunk), r, k % kChunk);
    uint16_t scale = 0;
    if (is_quantised(w.format)) std::memcpy(&scale, scales + 2 * (k / w.group * w.scale_stride + r), 2);
    out[k] = !is_quantised(w.format) ? v : v * (w.half == Half::bf16 ? bf16_to_float(scale) : fp16_to_float(scale));
  }
}

}  // namespace
}  // namespace halfweight
