// The linears of one instruction set, over row blocks [begin, end): formats.h in loops over groups, tokens and blocks.
// A row's sum is always formed in the same order, so results depend neither on the number of threads nor on the batch's split.
#pragma once
#include "formats.h"
#include "halves.h"
#include "kernels.h"

namespace halfweight {
namespace {

constexpr int kParts = kRows / Simd::kLanes;  // registers per vector of the layout
// Bytes ahead, as measured on processors of either kind; half as fast from memory without it.
constexpr int kPrefetch = Simd::kBytes == 32 ? 2048 : 4096;

HW_INLINE Float load_halves(const uint16_t* p, Half half) {
  return half == Half::bf16 ? Simd::load_bf16(p) : Simd::load_fp16(p);
}

HW_INLINE void fetch_first(const Weight& w, int block) {  // tiles fetch what follows
  for (int i = 0; i < kPrefetch; i += 64) Simd::prefetch(w.data + block * w.block_bytes + i);
}
template <int bytes> HW_INLINE void prefetch_chunk(const uint8_t* p) {
  for (int i = 0; i < bytes; i += 64) Simd::prefetch(p + kPrefetch + i);
}

// A group's chunks; short products stay in 16 bits for `most` of them.
template <class F, int T, int parts> HW_INLINE void int8_group(const uint8_t* p, int chunks, Rows<int8_t> x, Products<T, F::kShort> (&dots)[parts], bool fetch) {
  constexpr int most = 8 / F::kUnits;
  const auto chunk = [&] {
    if (fetch) prefetch_chunk<F::kBytes>(p);
    for (int i = 0; i < parts; ++i) F::template dot<T>(p + i * Simd::kBytes, x, dots[i]);
    p += F::kBytes, x.x += kChunk;
  };
  if constexpr (!F::kShort) {
    for (; chunks > 0; --chunks) chunk();
  } else if (chunks == most) {
    for (int c = 0; c < most; ++c) chunk();
    for (auto& d : dots) d.flush_once();
  } else {
    for (; chunks > 0; chunks -= most) {
      for (int c = 0; c < (chunks < most ? chunks : most); ++c) chunk();
      for (auto& d : dots) d.flush();
    }
  }
}

// out[i][t][row] = sum over groups of scale(row) * scale(t) * (integer dot product), for `blocks` row blocks `stride` apart.
template <class F, int T, int blocks> void int8_tile(const Weight& w, const Activations& a, int block, int stride, int token, float* out) {
  constexpr int together = T == 1 && Simd::kBytes == 32 ? kParts : 1;  // registers that share what is read of activations
  const float* token_scales = a.scales + static_cast<int64_t>(token) * a.groups;
  const int8_t* x = a.quantised + static_cast<int64_t>(token) * a.columns;
  const uint8_t* chunks[blocks];
  const uint16_t* scales[blocks];
  for (int i = 0; i < blocks; ++i) chunks[i] = w.chunks(block + i * stride), scales[i] = w.scales(block + i * stride);
  Float total[blocks][kParts][T];
  for (auto& of_block : total) for (auto& part : of_block) for (Float& v : part) v = Simd::fzero();
  for (int g = 0, begin = 0; g < w.groups; ++g) {
    const int end = w.group_end(g);
    for (int i = 0; i < blocks; ++i) {
      for (int part = 0; part < kParts; part += together) {
        Products<T, F::kShort> dots[together];
        for (auto& d : dots) d.clear();
        int8_group<F, T>(chunks[i] + part * Simd::kBytes, end - begin, {x + begin * kChunk, a.columns}, dots, part == 0);
        for (int j = 0; j < together; ++j) {
          const Float scale = load_halves(scales[i] + (part + j) * Simd::kLanes, w.half);
          const Int offset = dots[j].offset();
          for (int t = 0; t < T; ++t) {
            Float& sum = total[i][part + j][t];
            sum = Simd::fma(Simd::to_float(Simd::sub(dots[j].total(t), offset)), Simd::mul(scale, Simd::fset1(token_scales[t * a.groups + g])), sum);
          }
        }
      }
      chunks[i] += static_cast<int64_t>(end - begin) * F::kBytes, scales[i] += w.scale_stride;
    }
    begin = end;
  }
  for (int i = 0; i < blocks; ++i)
    for (int t = 0; t < T; ++t)
      for (int part = 0; part < kParts; ++part) {
        float* o = out + (i * T + t) * kRows + part * Simd::kLanes;
        Simd::fstore(o, Simd::fadd(Simd::fload(o), total[i][part][t]));
      }
}

// The same from float activations and exact weights.
template <class F, int T> void float_tile(const Weight& w, const Activations& a, int block, int, int token, float* out) {
  const uint8_t* chunks = w.chunks(block);
  const uint16_t* scales = w.scales(block);
  Float total[kParts][T];
  for (auto& part : total) for (Float& v : part) v = Simd::fzero();
  for (int g = 0, begin = 0; g < w.groups; ++g, scales += w.scale_stride) {
    const int end = w.group_end(g);
    for (int part = 0; part < kParts; ++part) {
      Sums<T> sums;
      sums.clear();
      for (int c = begin; c < end; ++c) {
        const uint8_t* p = chunks + static_cast<int64_t>(c) * F::kBytes;
        if (part == 0) prefetch_chunk<F::kBytes>(p);
        F::template madd<T>(p + part * Simd::kBytes, w.half, {a.floats + static_cast<int64_t>(token) * a.columns + c * kChunk, a.columns}, sums);
      }
      const Float scale = is_quantised(F::kFormat) ? load_halves(scales + part * Simd::kLanes, w.half) : Simd::fset1(1);
      for (int t = 0; t < T; ++t) total[part][t] = Simd::fma(sums.total(t), scale, total[part][t]);
    }
    begin = end;
  }
  for (int t = 0; t < T; ++t) {
    // 2:4 skips pruned weights, but 0 * inf is NaN: a non-finite activation reaches every output.
    const Float poison = Simd::fset1(a.scales[static_cast<int64_t>(token + t) * a.groups]);
    for (int part = 0; part < kParts; ++part) {
      float* o = out + t * kRows + part * Simd::kLanes;
      Simd::fstore(o, Simd::fadd(Simd::fadd(Simd::fload(o), total[part][t]), poison));
    }
  }
}

using Tile = void (*)(const Weight&, const Activations&, int block, int stride, int token, float*);
struct Tiles { Tile pair, one, two, four, eight; };  // pair: of row blocks, with one token

template <class F> constexpr Tiles int8_tiles() {
  return {Simd::kBytes == 32 ? int8_tile<F, 1, 2> : nullptr, int8_tile<F, 1, 1>, int8_tile<F, 2, 1>, int8_tile<F, 4, 1>, Simd::kTokens == 8 ? int8_tile<F, Simd::kTokens, 1> : nullptr};
}
template <class F> constexpr Tiles float_tiles() {
  return {nullptr, float_tile<F, 1>, float_tile<F, 2>, float_tile<F, 4>, Simd::kTokens == 8 ? float_tile<F, Simd::kTokens> : nullptr};
}

Tiles tiles_for(Format format, bool int8) {
  switch (format) {
    case Format::sparse24_int4: return int8 ? int8_tiles<Sparse<SparseInt4Values>>() : float_tiles<Sparse<SparseInt4Values>>();
    case Format::sparse24_int8: return int8 ? int8_tiles<Sparse<SparseInt8Values>>() : float_tiles<Sparse<SparseInt8Values>>();
    case Format::int4: return int8 ? int8_tiles<Dense<Int4Values>>() : float_tiles<Dense<Int4Values>>();
    case Format::int8: return int8 ? int8_tiles<Dense<Int8Values>>() : float_tiles<Dense<Int8Values>>();
    case Format::sparse24: return float_tiles<Sparse<SparseHalfValues>>();
    case Format::dense: return float_tiles<Dense<DenseHalfValues>>();
  }
  return {};
}

HW_INLINE float load_one(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == Dtype::bf16 ? bf16_to_float(h) : fp16_to_float(h);
}
HW_INLINE void store_one(void* p, Dtype dtype, int64_t i, float v) {
  if (dtype == Dtype::f32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = dtype == Dtype::bf16 ? float_to_bf16(v) : float_to_fp16(v);
}

HW_INLINE void load_row(const void* x, Dtype dtype, int64_t at, int n, float* __restrict out) {
  if (dtype == Dtype::f32) {
    const float* p = static_cast<const float*>(x) + at;
    for (int i = 0; i < n; ++i) out[i] = p[i];
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x) + at;
    int i = 0;
    if (dtype == Dtype::bf16) for (; i < n; ++i) out[i] = bf16_to_float(p[i]);  // the compiler vectorises this, and unrolls it
    else for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::fstore(out + i, Simd::load_fp16(p + i));
    for (; i < n; ++i) out[i] = fp16_to_float(p[i]);
  }
}
HW_INLINE void store_row(const float* __restrict v, Dtype dtype, int64_t at, int n, void* out) {
  if (dtype == Dtype::f32) {
    float* p = static_cast<float*>(out) + at;
    for (int i = 0; i < n; ++i) p[i] = v[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(out) + at;
    int i = 0;
    if (dtype == Dtype::bf16) for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store_bf16(p + i, Simd::fload(v + i));
    else for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store_fp16(p + i, Simd::fload(v + i));
    for (; i < n; ++i) store_one(p, dtype, i, v[i]);
  }
}

void finish_some(const Linear& call, int first, int rows, int token, float* sums) {
  const int out_features = call.weight->out_features;
  rows = out_features - first < rows ? out_features - first : rows;  // rows behind out_features are padding
  if (call.bias) {
    float bias[128];
    load_row(call.bias, call.bias_dtype, first, rows, bias);
    for (int r = 0; r < rows; ++r) sums[r] += bias[r];
  }
  store_row(sums, call.out_dtype, static_cast<int64_t>(token) * out_features + first, rows, call.out);
}
// Adds the bias to `rows` sums of one token, from row `first` on, and rounds them into the output; at most 128 rows.
HW_INLINE void finish(const Linear& call, int first, int rows, int token, float* sums) {
  const int out_features = call.weight->out_features;
  if (call.bias || first + rows > out_features) return finish_some(call, first, rows, token, sums);
  store_row(sums, call.out_dtype, static_cast<int64_t>(token) * out_features + first, rows, call.out);  // unrolled where rows are known
}

HW_INLINE void clear(float* out, int n) {
  for (int i = 0; i < n; i += Simd::kLanes) Simd::fstore(out + i, Simd::fzero());
}

// One token, two row blocks at a time from the halves of the range: a core reads two streams faster than one.
int linear_pairs(const Linear& call, const Tiles& tiles, const Tiles& low_rank, int begin, int end) {
  const int stride = (end - begin) / 2;
  fetch_first(*call.weight, begin + stride);
  for (int block = begin; block < begin + stride; ++block) {
    alignas(64) float out[2 * kRows];
    clear(out, 2 * kRows);
    tiles.pair(*call.weight, call.x, block, stride, 0, out);
    for (int i = 0; i < 2; ++i) {
      const int at = block + i * stride;
      if (call.low_rank) low_rank.one(*call.low_rank, call.sums, at, 0, 0, out + i * kRows);
      finish(call, at * kRows, kRows, 0, out + i * kRows);
    }
  }
  return begin + 2 * stride;
}

void linear_blocks(const Linear& call, const Tiles& tiles, const Tiles& low_rank, int begin, int end) {
  fetch_first(*call.weight, begin);
  if (call.x.tokens == 1 && tiles.pair) begin = linear_pairs(call, tiles, low_rank, begin, end);
  for (int block = begin; block < end; ++block)
    for (int t = 0; t < call.x.tokens;) {
      const int left = call.x.tokens - t;
      const int n = left >= 8 && tiles.eight ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      alignas(64) float out[8 * kRows];
      clear(out, n * kRows);
      const auto run = [&](const Tiles& k, const Weight& w, const Activations& a) {
        (n == 8 ? k.eight : n == 4 ? k.four : n == 2 ? k.two : k.one)(w, a, block, 0, t, out);
      };
      run(tiles, *call.weight, call.x);
      if (call.low_rank) run(low_rank, *call.low_rank, call.sums);
      for (int i = 0; i < n; ++i) finish(call, block * kRows, kRows, t + i, out + i * kRows);
      t += n;
    }
}

Tiles low_rank_tiles(const Linear& call, bool exact) {
  return call.low_rank ? tiles_for(call.low_rank->format, !exact && is_quantised(call.low_rank->format)) : Tiles{};
}
void linear_int8(const Linear& call, int begin, int end) {
  linear_blocks(call, tiles_for(call.weight->format, true), low_rank_tiles(call, false), begin, end);
}
void linear_float(const Linear& call, int begin, int end) {
  linear_blocks(call, tiles_for(call.weight->format, false), low_rank_tiles(call, true), begin, end);
}

}  // namespace
}  // namespace halfweight
