// Linears of many tokens with AMX: a panel of row blocks is unpacked once and meets all tokens, 32 x 32 outputs at a time.
// Two ways: to int8, where after every group the int32 tiles are scaled into fp32 sums by AVX-512, one step behind the tiles,
// so that both units work at the same time; and to bf16 with the scales multiplied in, where a tile's sums stay in it to the
// end. A bf16 tile takes half as many columns, and unpacking costs three times as much, but scaling costs more than either:
// with many tokens bf16 is nearly twice as fast, and activations stay as they are.
#pragma once
#include <cstdlib>
#include <cstring>

#include "linear.h"

namespace halfweight {
namespace {

constexpr int kTile = kTileTokens;     // tokens, or rows, of a tile
constexpr int kStepTokens = 2 * kTile;
constexpr int kHalfPanel = 32;              // row blocks of a panel of bf16, at most
constexpr size_t kPanelBytes = 768 * 1024;  // stays in the second-level cache beside the activations of a step

// ---- unpacking: a chunk becomes 8 vectors; vector q holds columns 4q to 4q + 3 of the 16 rows ----

struct Positions {
  __m512i table;    // by a quad's nibble: for each column, which byte of the pair's lane it takes; 0x80: none
  __m512i base[2];  // of even and odd quads: where the row's lane starts within its 128 bits
};
HW_INLINE Positions make_positions() {
  alignas(64) uint8_t table[64], base[2][64];
  for (int code = 0; code < 16; ++code)
    for (int j = 0; j < 4; ++j) table[4 * code + j] = (code >> 2) == j ? 2 : (code & 3) == j ? 0 : 0x80;
  for (int odd = 0; odd < 2; ++odd)
    for (int i = 0; i < 64; ++i) base[odd][i] = static_cast<uint8_t>((i / 4 % 4) * 4 + odd);
  return {_mm512_load_si512(table), {_mm512_load_si512(base[0]), _mm512_load_si512(base[1])}};
}

template <int half, int c> HW_INLINE void expand_quad(__m512i pairs, __m512i meta, const Positions& p, uint8_t* out) {
  const __m512i code = Simd::shr<8 * c + 4 * half>(meta);  // vpermd looks at four bits only
  const __m512i index = _mm512_add_epi8(_mm512_permutexvar_epi32(code, p.table), p.base[c & 1]);
  _mm512_store_si512(out + 64 * (4 * half + c), _mm512_shuffle_epi8(pairs, index));
}
// first, second: byte c of a lane is that kept value of quad c.
template <int half> HW_INLINE void expand_half(__m512i first, __m512i second, __m512i meta, const Positions& p, uint8_t* out) {
  const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, first, Simd::shl<16>(second));
  const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaa, Simd::shr<16>(first), second);
  expand_quad<half, 0>(low, meta, p, out), expand_quad<half, 1>(low, meta, p, out);
  expand_quad<half, 2>(high, meta, p, out), expand_quad<half, 3>(high, meta, p, out);
}

template <class Values> struct Unpack;
template <> struct Unpack<SparseInt4Values> {
  static HW_INLINE void chunk(const uint8_t* p, const Positions& at, uint8_t* out) {
    const Int meta = Simd::load(p);
    expand_half<0>(SparseInt4Values::slot<0, 0>(p), SparseInt4Values::slot<0, 1>(p), meta, at, out);
    expand_half<1>(SparseInt4Values::slot<1, 0>(p), SparseInt4Values::slot<1, 1>(p), meta, at, out);
  }
};
template <> struct Unpack<SparseInt8Values> {
  static HW_INLINE void chunk(const uint8_t* p, const Positions& at, uint8_t* out) {
    const Int meta = Simd::load(p);
    expand_half<0>(SparseInt8Values::slot<0, 0>(p), SparseInt8Values::slot<0, 1>(p), meta, at, out);
    expand_half<1>(SparseInt8Values::slot<1, 0>(p), SparseInt8Values::slot<1, 1>(p), meta, at, out);
  }
};
template <class Values> HW_INLINE void copy_units(const uint8_t* p, uint8_t* out) {
  _mm512_store_si512(out, Values::template unit<0>(p)), _mm512_store_si512(out + 64, Values::template unit<1>(p));
  _mm512_store_si512(out + 128, Values::template unit<2>(p)), _mm512_store_si512(out + 192, Values::template unit<3>(p));
  _mm512_store_si512(out + 256, Values::template unit<4>(p)), _mm512_store_si512(out + 320, Values::template unit<5>(p));
  _mm512_store_si512(out + 384, Values::template unit<6>(p)), _mm512_store_si512(out + 448, Values::template unit<7>(p));
}
template <> struct Unpack<Int4Values> {
  static HW_INLINE void chunk(const uint8_t* p, const Positions&, uint8_t* out) { copy_units<Int4Values>(p, out); }
};
template <> struct Unpack<Int8Values> {
  static HW_INLINE void chunk(const uint8_t* p, const Positions&, uint8_t* out) { copy_units<Int8Values>(p, out); }
};

template <class Values> void unpack_block(const Weight& w, int block, uint8_t* out) {
  constexpr int bytes = static_cast<int>(chunk_bytes(Values::kFormat));
  const Positions at = make_positions();
  const uint8_t* p = w.chunks(block);
  for (int c = 0; c < w.in_padded / kChunk; ++c, p += bytes, out += kRows * kChunk) {
    prefetch_chunk<bytes>(p);
    Unpack<Values>::chunk(p, at, out);
  }
}
void unpack(const Weight& w, int block, uint8_t* out) {
  switch (w.format) {
    case Format::sparse24_int4: return unpack_block<SparseInt4Values>(w, block, out);
    case Format::sparse24_int8: return unpack_block<SparseInt8Values>(w, block, out);
    case Format::int4: return unpack_block<Int4Values>(w, block, out);
    default: return unpack_block<Int8Values>(w, block, out);
  }
}

// ---- unpacking to bf16: a chunk becomes 16 vectors; vector p holds columns 2p and 2p + 1 of the 16 rows ----

HW_INLINE __m512i to_bf16(Float low, Float high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

struct Spread {
  __m512i order;       // halves of two vectors in turn: 0, 16, 1, 17, ...
  __m512i table[2];    // by a quad's nibble, for its first and last two columns: which bytes of the pair's lane each takes
  __m512i lane;        // where the row's lane starts within its 128 bits
  Float nibbles;       // as signed numbers
};
HW_INLINE Spread make_spread() {
  alignas(64) uint16_t order[32];
  alignas(64) uint8_t table[2][64], lane[64];
  for (uint16_t i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  for (int code = 0; code < 16; ++code)
    for (int j = 0; j < 8; ++j) {
      const int column = j / 2, slot = (code >> 2) == column ? 1 : (code & 3) == column ? 0 : -1;
      table[j / 4][4 * code + j % 4] = static_cast<uint8_t>(slot < 0 ? 0x80 : 2 * slot + j % 2);
    }
  for (int i = 0; i < 64; ++i) lane[i] = static_cast<uint8_t>(i / 4 % 4 * 4);
  const Float nibbles = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return {_mm512_load_si512(order), {_mm512_load_si512(table[0]), _mm512_load_si512(table[1])}, _mm512_load_si512(lane), nibbles};
}

HW_INLINE __m512i pair_of(Float low, Float high, const Spread& to) { return _mm512_permutexvar_epi16(to.order, to_bf16(low, high)); }

// `pairs`: a lane is both kept values of the row's quad.
template <int quad> HW_INLINE void expand_pairs(__m512i pairs, __m512i meta, const Spread& to, uint16_t* out) {
  const __m512i code = Simd::shr<8 * (quad & 3) + 4 * (quad / 4)>(meta);
  for (int half = 0; half < 2; ++half) {
    const __m512i index = _mm512_add_epi8(_mm512_permutexvar_epi32(code, to.table[half]), to.lane);
    _mm512_store_si512(out + 64 * quad + 32 * half, _mm512_shuffle_epi8(pairs, index));
  }
}

// One chunk to `out`; `scale` is that of its group, by row.
template <class Values> struct Halves {  // 2:4 and quantised
  template <int quad, int h> static HW_INLINE Float kept(const uint8_t* p, const Spread& to) {
    if constexpr (Values::kFormat != Format::sparse24_int4) return Values::template value<quad, h>(p, Half::bf16);
    return _mm512_permutexvar_ps(Simd::shr<8 * (quad & 3) + 4 * h>(Simd::load(p + 64 * (1 + quad / 4))), to.nibbles);  // by four bits only
  }
  template <int quad> static HW_INLINE void expand(const uint8_t* p, Int meta, Float scale, const Spread& to, uint16_t* out) {
    const Float first = Simd::mul(kept<quad, 0>(p, to), scale), second = Simd::mul(kept<quad, 1>(p, to), scale);
    expand_pairs<quad>(pair_of(first, second, to), meta, to, out);
    if constexpr (quad + 1 < 8) expand<quad + 1>(p, meta, scale, to, out);
  }
  static HW_INLINE void chunk(const uint8_t* p, Float scale, const Spread& to, uint16_t* out) { expand<0>(p, Simd::load(p), scale, to, out); }
};
template <> struct Halves<SparseHalfValues> {
  template <int quad> static HW_INLINE void expand(const uint8_t* p, Int meta, const Spread& to, uint16_t* out) {
    expand_pairs<quad>(Simd::load(p + 64 * (1 + quad)), meta, to, out);
    if constexpr (quad + 1 < 8) expand<quad + 1>(p, meta, to, out);
  }
  static HW_INLINE void chunk(const uint8_t* p, Float, const Spread& to, uint16_t* out) { expand<0>(p, Simd::load(p), to, out); }
};
template <class Values> struct WholeHalves {
  template <int k> static HW_INLINE void expand(const uint8_t* p, Float scale, const Spread& to, uint16_t* out) {
    const Float low = Simd::mul(Values::template value<k>(p, Half::bf16), scale), high = Simd::mul(Values::template value<k + 1>(p, Half::bf16), scale);
    _mm512_store_si512(out + 16 * k, pair_of(low, high, to));
    if constexpr (k + 2 < kChunk) expand<k + 2>(p, scale, to, out);
  }
  static HW_INLINE void chunk(const uint8_t* p, Float scale, const Spread& to, uint16_t* out) { expand<0>(p, scale, to, out); }
};
template <> struct Halves<Int4Values> : WholeHalves<Int4Values> {};
template <> struct Halves<Int8Values> : WholeHalves<Int8Values> {};

template <class Values> void unpack_block_halves(const Weight& w, int block, uint16_t* out) {
  constexpr int bytes = static_cast<int>(chunk_bytes(Values::kFormat));
  const Spread to = make_spread();
  const uint8_t* p = w.chunks(block);
  const uint16_t* scales = w.scales(block);
  for (int g = 0, c = 0; g < w.groups; ++g, scales += w.scale_stride) {
    const Float scale = is_quantised(Values::kFormat) ? load_halves(scales, w.half) : Simd::fset1(1);
    for (; c < w.group_end(g); ++c, p += bytes, out += kRows * kChunk) {
      prefetch_chunk<bytes>(p);
      Halves<Values>::chunk(p, scale, to, out);
    }
  }
}
void unpack_halves(const Weight& w, int block, uint16_t* out) {
  switch (w.format) {
    case Format::sparse24_int4: return unpack_block_halves<SparseInt4Values>(w, block, out);
    case Format::sparse24_int8: return unpack_block_halves<SparseInt8Values>(w, block, out);
    case Format::int4: return unpack_block_halves<Int4Values>(w, block, out);
    case Format::int8: return unpack_block_halves<Int8Values>(w, block, out);
    case Format::sparse24: return unpack_block_halves<SparseHalfValues>(w, block, out);
    case Format::dense: std::memcpy(out, w.chunks(block), static_cast<size_t>(kRows) * w.in_padded * sizeof(uint16_t));
  }
}

// ---- tiles: 0 to 3 sums [token tile][block], 4 and 5 activations, 6 and 7 weights ----

// GCC's tile loads do not say that they read memory: what was stored before must not be kept back.
HW_INLINE void written() { __asm__ volatile("" ::: "memory"); }
HW_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void configure_tiles(int columns) {
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;  // palette
  for (int t = 0; t < 8; ++t) {
    const bool activations = t == 4 || t == 5;
    const uint16_t bytes = static_cast<uint16_t>(activations ? columns : 64);
    std::memcpy(config + 16 + 2 * t, &bytes, 2);
    config[48 + t] = static_cast<uint8_t>(t >= 6 ? columns / 4 : kTile);
  }
  __asm__ volatile("" : : "r"(config) : "memory");  // GCC's load says that it reads eight bytes: the others might not be written
  _tile_loadconfig(config);
}

// sums[token tile][block] (int32 [16][16] each) = activations x weights over columns [begin, end).
template <int tokens, int blocks>
HW_INLINE void multiply(const int8_t* x, int64_t token_tile, const uint8_t* w, int64_t block_bytes, int begin, int end, int columns, int32_t* sums) {
  written();
  _tile_zero(0);
  if constexpr (blocks == 2) _tile_zero(1);
  if constexpr (tokens == 2) _tile_zero(2);
  if constexpr (tokens == 2 && blocks == 2) _tile_zero(3);
  for (int k = begin; k < end; k += columns) {
    _tile_loadd(6, w + k * kRows, 64);
    _tile_loadd(4, x + k * kTile, columns);
    _tile_dpbssd(0, 4, 6);
    if constexpr (blocks == 2) {
      _tile_loadd(7, w + block_bytes + k * kRows, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (tokens == 2) {
      _tile_loadd(5, x + token_tile + k * kTile, columns);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (tokens == 2 && blocks == 2) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (blocks == 2) _tile_stored(1, sums + 256, 64);
  if constexpr (tokens == 2) _tile_stored(2, sums + 512, 64);
  if constexpr (tokens == 2 && blocks == 2) _tile_stored(3, sums + 768, 64);
}

struct Step {  // of one group: where its sums go and what scales them
  float* out;  // [token][row] with `stride` floats a token
  int64_t stride;
  const uint16_t* scales[2];
  const float* token_scales;  // [token][groups], from this group on
  int groups;
};

template <int tokens, int blocks> HW_INLINE void scale_sums(const Step& s, Half half, const int32_t* sums) {
  Float weights[2];
  for (int b = 0; b < blocks; ++b) weights[b] = load_halves(s.scales[b], half);
  for (int tile = 0; tile < tokens; ++tile)
    for (int t = 0; t < kTile; ++t) {
      const int token = tile * kTile + t;
      const Float x = Simd::fset1(s.token_scales[token * s.groups]);
      for (int b = 0; b < blocks; ++b) {
        float* out = s.out + token * s.stride + b * kRows;
        const Float sum = Simd::to_float(Simd::load(sums + (tile * 2 + b) * 256 + t * kTile));
        Simd::fstore(out, Simd::fma(sum, Simd::mul(weights[b], x), Simd::fload(out)));
      }
    }
}

// out [tokens][blocks * 16] += one weight's share, for up to 32 tokens from `token` on.
template <int tokens, int blocks>
void multiply_pair(const Weight& w, const Activations& a, int token, int block, const uint8_t* panel, float* out, int64_t stride) {
  alignas(64) static thread_local int32_t sums[2][1024];
  const int columns = tile_columns(w);
  const int8_t* x = a.quantised + static_cast<int64_t>(token) * a.columns;
  const int64_t block_bytes = static_cast<int64_t>(kRows) * w.in_padded;
  Step before{};
  for (int g = 0; g < w.groups; ++g) {
    const int begin = g * w.group, end = w.group_end(g) * kChunk;
    multiply<tokens, blocks>(x, static_cast<int64_t>(kTile) * a.columns, panel, block_bytes, begin, end, columns, sums[g & 1]);
    if (g > 0) scale_sums<tokens, blocks>(before, w.half, sums[(g - 1) & 1]);
    before = {out, stride, {w.scales(block) + g * w.scale_stride, blocks == 2 ? w.scales(block + 1) + g * w.scale_stride : nullptr},
              a.scales + static_cast<int64_t>(token) * a.groups + g, a.groups};
  }
  scale_sums<tokens, blocks>(before, w.half, sums[(w.groups - 1) & 1]);
}

// One weight's share of `blocks` unpacked row blocks for up to 32 tokens.
void multiply_panel(const Weight& w, const Activations& a, int token, int first, int blocks, const uint8_t* panel, float* out) {
  const int64_t stride = static_cast<int64_t>(blocks) * kRows, block_bytes = static_cast<int64_t>(kRows) * w.in_padded;
  const bool two_tiles = a.tokens - token > kTile;
  for (int b = 0; b < blocks; b += 2) {
    const bool two_blocks = b + 1 < blocks;
    const auto run = two_tiles ? (two_blocks ? multiply_pair<2, 2> : multiply_pair<2, 1>) : (two_blocks ? multiply_pair<1, 2> : multiply_pair<1, 1>);
    run(w, a, token, first + b, panel + b * block_bytes, out + b * kRows, stride);
  }
}

struct Memory {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }
  uint8_t* get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<uint8_t*>(std::aligned_alloc(4096, size));
      if (data == nullptr) std::abort();  // out of memory within a parallel region
    }
    return data;
  }
};
thread_local Memory panel_memory;

void linear_tiles(const Linear& call, int begin, int end) {
  const Weight& w = *call.weight;
  const size_t block_bytes = static_cast<size_t>(kRows) * w.in_padded;
  const size_t branch_bytes = call.low_rank ? static_cast<size_t>(kRows) * call.low_rank->in_padded : 0;
  int panel = static_cast<int>(kPanelBytes / block_bytes) / 2 * 2;
  panel = panel < 2 ? 2 : panel > 8 ? 8 : panel;  // finish() takes 128 rows
  uint8_t* weights = panel_memory.get(panel * (block_bytes + branch_bytes) + kStepTokens * panel * kRows * sizeof(float));
  uint8_t* branch = weights + panel * block_bytes;
  float* out = reinterpret_cast<float*>(branch + panel * branch_bytes);
  for (int first = begin; first < end; first += panel) {
    const int blocks = end - first < panel ? end - first : panel;
    for (int b = 0; b < blocks; ++b) {
      unpack(w, first + b, weights + b * block_bytes);
      if (call.low_rank) unpack(*call.low_rank, first + b, branch + b * branch_bytes);
    }
    for (int token = 0; token < call.x.tokens; token += kStepTokens) {
      std::memset(out, 0, static_cast<size_t>(kStepTokens) * blocks * kRows * sizeof(float));
      configure_tiles(tile_columns(w));
      multiply_panel(w, call.x, token, first, blocks, weights, out);
      if (call.low_rank) {
        configure_tiles(tile_columns(*call.low_rank));
        multiply_panel(*call.low_rank, call.sums, token, first, blocks, branch, out);
      }
      const int tokens = call.x.tokens - token < kStepTokens ? call.x.tokens - token : kStepTokens;
      const int rows = blocks * kRows;
      for (int t = 0; t < tokens; ++t) finish(call, first * kRows, rows, token + t, out + static_cast<int64_t>(t) * rows);
    }
  }
  _tile_release();
}

// ---- bf16: 0 to 3 sums [token tile][block], 4 and 5 activations, 6 and 7 weights; all tiles of 16 rows of 64 bytes ----

// Sixteen tokens: the first 32 columns, the bytes from token to token, and the values to the next 32 columns.
struct TokenTile {
  const uint16_t* at;
  int64_t stride, step;
  TokenTile(const Activations& a, int token) {
    const bool in_place = a.rows && token + kTile <= a.tokens;
    at = (in_place ? a.rows : a.halves) + static_cast<int64_t>(token) * a.columns;
    stride = in_place ? a.columns * static_cast<int64_t>(sizeof(uint16_t)) : 64;
    step = in_place ? kHalfColumns : kTile * kHalfColumns;
  }
};

template <int tokens, int blocks> HW_INLINE void multiply_halves(const Activations& a, int token, const uint16_t* w) {
  const int64_t block = static_cast<int64_t>(kRows) * a.columns;
  TokenTile x(a, token), y(a, tokens == 2 ? token + kTile : token);
  for (const uint16_t* end = w + block; w < end; w += kTile * kHalfColumns, x.at += x.step, y.at += y.step) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x.at, x.stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (blocks == 2) {
      _tile_loadd(7, w + block, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (tokens == 2) {
      _tile_loadd(5, y.at, y.stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (tokens == 2 && blocks == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// out [32][32] = the products of one or two tiles of tokens and one or two row blocks.
template <int tokens, int blocks>
void multiply_pair_halves(const Linear& call, int token, const uint16_t* weights, const uint16_t* branch, float* out) {
  constexpr int64_t row = 2 * kRows, bytes = row * sizeof(float);
  written();
  zero_sums();
  multiply_halves<tokens, blocks>(call.x, token, weights);
  if (call.low_rank) multiply_halves<tokens, blocks>(call.sums, token, branch);
  _tile_stored(0, out, bytes);
  if constexpr (blocks == 2) _tile_stored(1, out + kRows, bytes);
  if constexpr (tokens == 2) _tile_stored(2, out + kTile * row, bytes);
  if constexpr (tokens == 2 && blocks == 2) _tile_stored(3, out + kTile * row + kRows, bytes);
}

// finish() of `tokens` tokens and 32 rows from row `first` on.
void finish_pair(const Linear& call, int first, int token, int tokens, float* sums) {
  const int out_features = call.weight->out_features;
  if (call.out_dtype != Dtype::bf16 || call.bias || first + 2 * kRows > out_features) {
    for (int t = 0; t < tokens; ++t) finish(call, first, 2 * kRows, token + t, sums + t * 2 * kRows);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(call.out) + static_cast<int64_t>(token) * out_features + first;
  for (int t = 0; t < tokens; ++t, sums += 2 * kRows, out += out_features)
    _mm512_storeu_si512(out, to_bf16(Simd::fload(sums), Simd::fload(sums + kRows)));
}

void linear_halves(const Linear& call, int begin, int end) {
  const Weight& w = *call.weight;
  const size_t block_values = static_cast<size_t>(kRows) * w.in_padded;
  const size_t branch_values = call.low_rank ? static_cast<size_t>(kRows) * call.low_rank->in_padded : 0;
  int panel = static_cast<int>(kPanelBytes / (2 * (block_values + branch_values))) / 2 * 2;
  panel = panel < 2 ? 2 : panel > kHalfPanel ? kHalfPanel : panel;
  uint16_t* weights = reinterpret_cast<uint16_t*>(panel_memory.get(panel * (block_values + branch_values) * sizeof(uint16_t)));
  uint16_t* branch = weights + panel * block_values;
  configure_tiles(64);
  for (int first = begin; first < end; first += panel) {
    const int blocks = end - first < panel ? end - first : panel;
    for (int b = 0; b < blocks; ++b) {
      unpack_halves(w, first + b, weights + b * block_values);
      if (call.low_rank) unpack_halves(*call.low_rank, first + b, branch + b * branch_values);
    }
    for (int token = 0; token < call.x.tokens; token += kStepTokens) {
      const int tokens = call.x.tokens - token < kStepTokens ? call.x.tokens - token : kStepTokens;
      for (int b = 0; b < blocks; b += 2) {
        alignas(64) float out[kStepTokens * 2 * kRows];
        const bool two_tiles = tokens > kTile, two_blocks = b + 1 < blocks;
        const auto run = two_tiles ? (two_blocks ? multiply_pair_halves<2, 2> : multiply_pair_halves<2, 1>)
                                   : (two_blocks ? multiply_pair_halves<1, 2> : multiply_pair_halves<1, 1>);
        run(call, token, weights + b * block_values, branch + b * branch_values, out);
        if (two_blocks) finish_pair(call, (first + b) * kRows, token, tokens, out);
        else for (int t = 0; t < tokens; ++t) finish(call, (first + b) * kRows, kRows, token + t, out + t * 2 * kRows);
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace halfweight
