// Attention of many queries with AMX: scores and sums are bf16 tile products with fp32 sums, the softmax between them is fp32.
// Everything lies transposed, with 16 rows (queries and heads of the kv head) in the lanes, so that maxima and totals never
// cross them. A block of keys and values is read from the cache once for up to 64 rows.
#pragma once
#include <type_traits>

#include "attention.h"
#include "tiles.h"

namespace halfweight {
namespace {

constexpr int kSlab = kHalfColumns;  // dimensions, or keys, in a tile's row
constexpr int kTileValues = kTile * kSlab;

// Tiles of one kilobyte each, in attention_floats(dim) floats.
struct TileWorkspace {
  uint16_t* query;    // [tile of rows][slab of D][16 pairs of D][16 rows][2]
  uint16_t* keys;     // [16 of keys][slab of D][16 keys][32]
  uint16_t* values;   // [16 of D][slab of keys][16 of D][32]
  uint16_t* weights;  // [slab of keys][16 pairs of keys][16 rows][2], of one tile of rows
  float* sums;        // [tile of rows][D][16 rows]
  float* scores;      // [64 keys][16 rows], of one tile of rows
  int slabs, dims;    // of D: in 32 and in 16
  TileWorkspace(float* memory, int dim) : slabs(dim / kSlab), dims(dim / kTile) {
    query = reinterpret_cast<uint16_t*>(memory);
    keys = query + kKeys * dim, values = keys + kKeys * dim, weights = values + kKeys * dim;
    sums = reinterpret_cast<float*>(weights + kKeys * kTile);
    scores = sums + kKeys * dim;
  }
};

// 16 x 16 lanes of 32 bits: out[i] lane j = in[j] lane i.
HW_INLINE void transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // v[4 b + i]: lanes i, 4 + i, 8 + i, 12 + i of rows 4 b to 4 b + 3
    const __m512i a = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), b = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd), d = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88), t[8 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(c, d, 0x88), t[12 + i] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 32 numbers of a cache's row. They are bf16, or small ones that bf16 holds exactly: their factors multiply scores and weights.
template <class Row> HW_INLINE __m512i load_slab(const char* row, int d) {
  if constexpr (std::is_same_v<Row, PlainRow>) return _mm512_loadu_si512(row + d * sizeof(uint16_t));
  else return to_bf16(Row::load(row, d), Row::load(row, d + 16));
}
template <class Row> void load_keys(const char* cache, const Places& places, int dim, uint16_t* out) {
  const int keys = places.keys;  // behind the last one, the last one: it counts for nothing
  for (int first = 0; first < keys; first += kTile)
    for (int d = 0; d < dim; d += kSlab)
      for (int j = 0; j < kTile; ++j, out += kSlab) _mm512_store_si512(out, load_slab<Row>(cache + places.at[first + j < keys ? first + j : keys - 1], d));
}
template <class Row> void load_values(const char* cache, const Places& places, int dim, uint16_t* out) {
  const int keys = places.keys;
  for (int first = 0; first < keys; first += kSlab, out += kTileValues)
    for (int d = 0; d < dim; d += kSlab) {
      __m512i low[16], high[16];  // pairs of keys: dimensions 8 i to 8 i + 3, and those behind them, in 128 bits
      for (int pair = 0; pair < kTile; ++pair) {
        const int j = first + 2 * pair;
        const __m512i even = j < keys ? load_slab<Row>(cache + places.at[j], d) : _mm512_setzero_si512();
        const __m512i odd = j + 1 < keys ? load_slab<Row>(cache + places.at[j + 1], d) : _mm512_setzero_si512();
        low[pair] = _mm512_unpacklo_epi16(even, odd), high[pair] = _mm512_unpackhi_epi16(even, odd);
      }
      transpose(low), transpose(high);
      for (int i = 0; i < kTile; ++i) {
        const int at = d + i / 4 * 8 + i % 4;
        const auto row = [&](int dimension) { return out + dimension / kTile * 2 * kTileValues + dimension % kTile * kSlab; };
        _mm512_store_si512(row(at), low[i]), _mm512_store_si512(row(at + 4), high[i]);
      }
    }
}

// A pair's bf16 numbers from two halves of a register into the halves of 16 lanes.
alignas(64) constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// sums [tiles * 16][columns] of a [tiles * 16][32 * depth] x b, tile by tile: `b` points at the first of `depth` tiles that are
// `b_stride` values apart; `c` at 16 columns of rows `c_stride` bytes apart. New sums, or added to those there.
template <bool add>
HW_INLINE void multiply_bf16(const uint16_t* a, int64_t a_tile, int64_t a_slab, int64_t a_stride, const uint16_t* b, int64_t b_stride, int depth, int tiles, char* c, int64_t c_stride) {
  const int64_t c_tile = kTile * c_stride;
  written();
  if (add) {
    _tile_loadd(0, c, c_stride);
    if (tiles > 1) _tile_loadd(1, c + c_tile, c_stride);
    if (tiles > 2) _tile_loadd(2, c + 2 * c_tile, c_stride);
    if (tiles > 3) _tile_loadd(3, c + 3 * c_tile, c_stride);
  } else {
    zero_sums();
  }
  for (int k = 0; k < depth; ++k, a += a_slab, b += b_stride) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (tiles > 1) {
      _tile_loadd(5, a + a_tile, a_stride);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (tiles > 2) {
      _tile_loadd(4, a + 2 * a_tile, a_stride);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (tiles > 3) {
      _tile_loadd(5, a + 3 * a_tile, a_stride);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, c, c_stride);
  if (tiles > 1) _tile_stored(1, c + c_tile, c_stride);
  if (tiles > 2) _tile_stored(2, c + 2 * c_tile, c_stride);
  if (tiles > 3) _tile_stored(3, c + 3 * c_tile, c_stride);
}

// Scores of up to 64 keys and a tile of rows.
HW_INLINE void score_tile(const TileWorkspace& w, int tile, int keys) {
  multiply_bf16<false>(w.keys, w.slabs * kTileValues, kTileValues, 64, w.query + tile * w.slabs * kTileValues, kTileValues, w.slabs, (keys + kTile - 1) / kTile,
                       reinterpret_cast<char*>(w.scores), 64);
}
// Adds to the sums of a tile of rows what `slabs` of keys weigh.
HW_INLINE void add_tile(const TileWorkspace& w, int tile, int slabs) {
  for (int d = 0; d < w.dims; d += 4)
    multiply_bf16<true>(w.values + d * 2 * kTileValues, 2 * kTileValues, kTileValues, 64, w.weights, kTileValues, slabs, w.dims - d < 4 ? w.dims - d : 4,
                        reinterpret_cast<char*>(w.sums + (tile * w.dims + d) * kTile * kTile), 64);
}

// 2^x, right to 3e-6 relative, for x from -150 up; NaN stays NaN.
HW_INLINE Float exp2_fast(Float x) {
  const Float n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  Float p = Simd::fset1(9.57010222e-3f);
  constexpr float factors[] = {0.0559178591f, 0.240247443f, 0.693121791f, 0.999999285f};
  for (const float factor : factors) p = Simd::fma(p, f, Simd::fset1(factor));
  return _mm512_scalef_ps(p, n);
}

// What the rows of a tile know of the keys before: the score that weights are taken relative to, and their total.
struct RowState {
  alignas(64) float largest[kTile], total[kTile];
  alignas(64) int32_t positions[kTile];
};
struct KeyBlock {
  Places places;
  int first = 0;
  alignas(64) float key_factors[kKeys], value_factors[kKeys];
};

// Turns the scores of a tile of rows into bf16 weights of the running softmax. masked: not all keys count for all rows.
template <bool scaled, bool masked>
HW_INLINE void weigh_tile(const TileWorkspace& w, int tile, const KeyBlock& block, float factor, RowState& state) {
  const float* scores = w.scores;
  const Int positions = Simd::load(state.positions);
  const auto score = [&](int j) {
    const Float x = Simd::fload(scores + j * kTile);
    return scaled ? Simd::mul(x, Simd::fset1(block.key_factors[j])) : x;
  };
  const auto seen = [&](int j) { return j < block.places.keys ? _mm512_cmpge_epi32_mask(positions, Simd::set1(static_cast<uint32_t>(block.first + j))) : __mmask16(0); };
  Float most[4];  // the second operand of vmaxps is what NaN gives
  for (Float& m : most) m = Simd::fset1(-INFINITY);
  for (int j = 0; j < kKeys; j += 4)
    for (int i = 0; i < 4; ++i) most[i] = masked ? _mm512_mask_max_ps(most[i], seen(j + i), score(j + i), most[i]) : Simd::fmax(score(j + i), most[i]);
  const Float found = Simd::fmax(Simd::fmax(most[0], most[1]), Simd::fmax(most[2], most[3]));
  Float largest = Simd::fload(state.largest), total = Simd::fload(state.total);
  const Float factors = Simd::fset1(factor), least = Simd::fset1(-150);
  const __mmask16 grown = _mm512_cmp_ps_mask(found, largest, _CMP_GT_OQ);
  if (grown) {
    const Float before = largest, one = Simd::fset1(1);
    largest = _mm512_mask_mov_ps(largest, grown, found);
    const Float keep = _mm512_mask_mov_ps(one, grown, exp2_fast(Simd::fmax(least, Simd::mul(Simd::fsub(before, largest), factors))));
    total = Simd::mul(total, keep);
    float* sums = w.sums + tile * w.dims * kTile * kTile;
    for (int d = 0; d < w.dims * kTile; ++d) Simd::fstore(sums + d * kTile, Simd::mul(Simd::fload(sums + d * kTile), keep));
    Simd::fstore(state.largest, largest);
  }
  // Only NaN or -inf so far: let them through.
  const Float from = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(largest, Simd::fset1(-INFINITY), _CMP_GT_OQ), largest);
  const Float minus = Simd::mul(from, Simd::fset1(-factor));
  const __m512i interleave = _mm512_loadu_si512(kInterleave);
  Float totals[2] = {total, Simd::fzero()};
  uint16_t* weights = w.weights;
  const auto weigh = [&](int j, Float& sum) {
    Float weight = exp2_fast(Simd::fmax(least, Simd::fma(score(j), factors, minus)));
    if (masked) weight = _mm512_maskz_mov_ps(seen(j), weight);
    sum = Simd::fadd(sum, weight);
    return scaled ? Simd::mul(weight, Simd::fset1(block.value_factors[j])) : weight;
  };
  for (int j = 0; j < kKeys; j += 2) {
    const Float even = weigh(j, totals[0]), odd = weigh(j + 1, totals[1]);
    _mm512_store_si512(weights + j * kTile, _mm512_permutexvar_epi16(interleave, to_bf16(even, odd)));
  }
  Simd::fstore(state.total, Simd::fadd(totals[0], totals[1]));
}

template <class Row> void attend_tiles_of(const Attention& a, const AttentionPart& part, float* memory, float* sums, float* largest, float* total) {
  const int dim = a.dim, heads = a.heads / a.kv_heads, rows = part.count * heads, tiles = (rows + kTile - 1) / kTile;
  const int queries = a.starts[part.sequence + 1] - a.starts[part.sequence];
  const int position = a.lengths[part.sequence] - queries + part.first;
  const float factor = 1.44269504f * a.scale;
  const TileWorkspace w(memory, dim);
  configure_tiles(64);
  std::memset(w.sums, 0, static_cast<size_t>(tiles) * kTile * dim * sizeof(float));
  RowState states[kKeys / kTile];
  for (int r = 0; r < tiles * kTile; ++r) {
    RowState& state = states[r / kTile];
    state.largest[r % kTile] = -INFINITY, state.total[r % kTile] = 0;
    state.positions[r % kTile] = position + r / heads;
  }
  for (int tile = 0; tile < tiles; ++tile)
    for (int slab = 0; slab < w.slabs; ++slab) {
      __m512i lines[16];
      for (int i = 0; i < kTile; ++i) {
        const int r = tile * kTile + i;
        const int64_t token = a.starts[part.sequence] + part.first + r / heads;
        const uint16_t* from = static_cast<const uint16_t*>(a.query) + token * a.query_stride + (part.kv_head * heads + r % heads) * dim;
        lines[i] = r < rows ? _mm512_loadu_si512(from + slab * kSlab) : _mm512_setzero_si512();
      }
      transpose(lines);
      uint16_t* to = w.query + (tile * w.slabs + slab) * kTileValues;
      for (int i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kSlab, lines[i]);
    }

  for (int key = part.key_begin; key < part.key_end; key += kKeys) {
    KeyBlock block;
    block.places = Places(a, part, key), block.first = key;
    const Places& places = block.places;
    for (int j = 0; j < places.keys; ++j) prefetch_row<Row>(a.keys, places, j, dim);
    if (Row::kScaled)
      for (int j = 0; j < kKeys; ++j) {
        const int64_t at = places.at[j < places.keys ? j : places.keys - 1];
        block.key_factors[j] = Row::factor(a.keys + at, dim), block.value_factors[j] = Row::factor(a.values + at, dim);
      }
    load_keys<Row>(a.keys, places, dim, w.keys);
    for (int j = 0; j < places.keys; ++j) prefetch_row<Row>(a.values, places, j, dim);
    load_values<Row>(a.values, places, dim, w.values);
    for (int tile = 0; tile < tiles; ++tile) {
      RowState& state = states[tile];
      if (key > state.positions[kTile - 1]) continue;
      score_tile(w, tile, places.keys);
      const bool masked = places.keys < kKeys || key + kKeys - 1 > state.positions[0];
      if (masked) weigh_tile<Row::kScaled, true>(w, tile, block, factor, state);
      else weigh_tile<Row::kScaled, false>(w, tile, block, factor, state);
      add_tile(w, tile, (places.keys + kSlab - 1) / kSlab);
    }
  }
  _tile_release();

  for (int r = 0; r < rows; ++r) largest[r] = states[r / kTile].largest[r % kTile] * a.scale, total[r] = states[r / kTile].total[r % kTile];
  for (int tile = 0; tile < tiles; ++tile)
    for (int dims = 0; dims < w.dims; ++dims) {
      __m512i lines[16];
      for (int i = 0; i < kTile; ++i) lines[i] = _mm512_load_si512(w.sums + ((tile * w.dims + dims) * kTile + i) * kTile);
      transpose(lines);
      for (int i = 0; i < kTile && tile * kTile + i < rows; ++i) _mm512_storeu_si512(sums + static_cast<int64_t>(tile * kTile + i) * dim + dims * kTile, lines[i]);
    }
}

void attend_tiles(const Attention& a, const AttentionPart& part, const AttentionPart* next, float* memory, float* sums, float* largest, float* total) {
  const int rows = part.count * (a.heads / a.kv_heads);
  const bool plain = a.dtype == Dtype::bf16 && a.dim % kSlab == 0 && a.scale > 0;  // the largest score is the largest weight
  if (rows <= kFewRows || !plain) return attend(a, part, next, memory, sums, largest, total);
  const auto run = a.row == CacheRow::bf16 ? attend_tiles_of<PlainRow> : a.row == CacheRow::int8 ? attend_tiles_of<ScaledRow> : attend_tiles_of<Fp8Row>;
  run(a, part, memory, sums, largest, total);
}

}  // namespace
}  // namespace halfweight
