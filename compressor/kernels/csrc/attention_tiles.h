// Attention of many queries with AMX: scores and sums are bf16 tile products with fp32 sums, the softmax between them is
// fp32. Rows are [query][head of the kv head], as there; the cache is read once for all of them.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace halfweight {
namespace {

constexpr int kSlab = kHalfColumns;  // dimensions of a query, or keys of a weight, in a tile's row

// Tiles of one kilobyte each, in attention_floats(dim) floats.
struct TileWorkspace {
  uint16_t* query;   // [tile of rows][slab of D][16 rows][32]
  uint16_t* keys;    // [tile of keys][slab of D][16 pairs of D][16 keys][2]
  uint16_t* values;  // [slab of keys][16 of D][16 pairs of keys][16 of D][2]
  float* sums;       // [64 rows][D]
  float* scores;     // [64 rows][64 keys]; then bf16 weights in the first half of each row
  TileWorkspace(float* memory, int dim) {
    query = reinterpret_cast<uint16_t*>(memory);
    keys = query + kKeys * dim, values = keys + kKeys * dim;
    sums = reinterpret_cast<float*>(values + kKeys * dim);
    scores = memory + 3 * kKeys * dim;
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

// Rows of a cache are bf16, or small numbers that bf16 holds exactly: their factors multiply scores and weights.
template <class Row> void load_keys(const char* cache, const Places& places, int dim, uint16_t* out) {
  const int keys = places.keys;
  for (int first = 0; first < keys; first += kTile)
    for (int d = 0; d < dim; d += kSlab, out += kTile * kSlab) {
      __m512i rows[16];
      for (int j = 0; j < kTile; ++j) {
        const char* row = cache + places.at[first + j < keys ? first + j : keys - 1];
        rows[j] = to_bf16(Row::load(row, d), Row::load(row, d + 16));
      }
      transpose(rows);
      for (int p = 0; p < kTile; ++p) _mm512_store_si512(out + p * kSlab, rows[p]);
    }
}
template <class Row> void load_values(const char* cache, const Places& places, int dim, uint16_t* out) {
  const int keys = places.keys;
  for (int first = 0; first < keys; first += kSlab, out += kSlab * dim)
    for (int pair = 0; pair < kTile; ++pair) {
      const int j = first + 2 * pair;
      for (int d = 0; d < dim; d += kTile) {
        const Float even = j < keys ? Row::load(cache + places.at[j], d) : Simd::fzero();
        const Float odd = j + 1 < keys ? Row::load(cache + places.at[j + 1], d) : Simd::fzero();
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, Simd::shr<16>(_mm512_castps_si512(even)), _mm512_castps_si512(odd));
        _mm512_store_si512(out + d * kSlab + pair * kSlab, both);
      }
    }
}

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

// 2^x, right to 3e-6 relative, for x from -150 up; NaN stays NaN.
HW_INLINE Float exp2_fast(Float x) {
  const Float n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  Float p = Simd::fset1(1.3333558e-3f);
  constexpr float factors[] = {9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1};
  for (const float factor : factors) p = Simd::fma(p, f, Simd::fset1(factor));
  return _mm512_scalef_ps(p, n);
}

// What a row knows of the keys before: the largest score, in units of log 2, and the sums of the weights lane by lane.
struct RowState {
  float largest[kKeys];
  alignas(64) float total[kKeys][16];
};

// Turns a row of scores into bf16 weights of the running softmax, in place; `visible` keys, at least one, count.
template <bool scaled>
HW_INLINE void weigh_row(float* scores, int visible, const float* key_factors, const float* value_factors, float* sums, int dim, RowState& state, int row) {
  constexpr int parts = kKeys / 16;
  Float x[parts];
  __mmask16 seen[parts];
  Float most = Simd::fset1(-INFINITY);
  for (int i = 0; i < parts; ++i) {
    const int left = visible - 16 * i;
    seen[i] = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
    x[i] = Simd::mul(Simd::fload(scores + 16 * i), Simd::fload(key_factors + 16 * i));
    most = _mm512_mask_max_ps(most, seen[i], x[i], most);
  }
  const float before = state.largest[row], found = _mm512_reduce_max_ps(most);
  float largest = found > before ? found : before;
  if (!(largest > -INFINITY)) largest = 0;  // only NaN or -inf so far: let them through
  Float total = Simd::fload(state.total[row]);
  if (largest != before) {
    const Float keep = exp2_fast(_mm512_max_ps(Simd::fset1(-150), Simd::fset1(before - largest)));
    total = Simd::mul(total, keep);
    for (int d = 0; d < dim; d += 16) Simd::fstore(sums + d, Simd::mul(Simd::fload(sums + d), keep));
    state.largest[row] = largest;
  }
  // The second operand of vmaxps is what NaN gives.
  for (int i = 0; i < parts; ++i) {
    const Float weight = exp2_fast(_mm512_max_ps(Simd::fset1(-150), _mm512_sub_ps(x[i], Simd::fset1(largest))));
    x[i] = _mm512_maskz_mov_ps(seen[i], weight);
    total = Simd::fadd(total, x[i]);
    if constexpr (scaled) x[i] = Simd::mul(x[i], Simd::fload(value_factors + 16 * i));
  }
  Simd::fstore(state.total[row], total);
  for (int i = 0; i < parts; i += 2) _mm512_store_si512(reinterpret_cast<uint16_t*>(scores) + 16 * i, to_bf16(x[i], x[i + 1]));
}

template <class Row> void attend_tiles_of(const Attention& a, const AttentionPart& part, float* memory, float* sums, float* largest, float* total) {
  const int dim = a.dim, heads = a.heads / a.kv_heads, rows = part.count * heads, tiles = (rows + kTile - 1) / kTile;
  const int queries = a.starts[part.sequence + 1] - a.starts[part.sequence];
  const int position = a.lengths[part.sequence] - queries + part.first;
  const TileWorkspace w(memory, dim);
  configure_tiles(64);
  std::memset(w.sums, 0, static_cast<size_t>(tiles) * kTile * dim * sizeof(float));
  RowState state;
  for (int r = 0; r < tiles * kTile; ++r) {
    state.largest[r] = -INFINITY;
    Simd::fstore(state.total[r], Simd::fzero());
    uint16_t* to = w.query + (r / kTile * dim * kTile + r % kTile * kSlab);
    const int64_t token = a.starts[part.sequence] + part.first + r / heads;
    const uint16_t* from = static_cast<const uint16_t*>(a.query) + token * a.query_stride + (part.kv_head * heads + r % heads) * dim;
    for (int d = 0; d < dim; d += kSlab, to += kTile * kSlab)
      _mm512_store_si512(to, r < rows ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512());
  }
  for (int key = part.key_begin; key < part.key_end; key += kKeys) {
    const Places places(a, part, key);
    const int keys = places.keys;
    for (int j = 0; j < keys; ++j) prefetch_row<Row>(a.keys, places, j, dim);
    load_keys<Row>(a.keys, places, dim, w.keys);
    for (int j = 0; j < keys; ++j) prefetch_row<Row>(a.values, places, j, dim);
    for (int tile = 0; tile < (keys + kTile - 1) / kTile; ++tile)
      multiply_bf16<false>(w.query, kTile * dim, kTile * kSlab, 2 * kSlab, w.keys + tile * kTile * dim, kTile * kSlab, dim / kSlab, tiles,
                           reinterpret_cast<char*>(w.scores + tile * kTile), kKeys * sizeof(float));
    alignas(64) float key_factors[kKeys], value_factors[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      const int64_t at = places.at[j < keys ? j : keys - 1];
      key_factors[j] = 1.44269504f * a.scale * Row::factor(a.keys + at, dim), value_factors[j] = Row::factor(a.values + at, dim);
    }
    for (int r = 0; r < tiles * kTile; ++r) {
      float* scores = w.scores + r * kKeys;
      const int before = r < rows ? position + r / heads + 1 - key : 0;
      const int visible = before < 0 ? 0 : before < keys ? before : keys;
      if (visible == 0) std::memset(scores, 0, kKeys * sizeof(uint16_t));
      else weigh_row<Row::kScaled>(scores, visible, key_factors, value_factors, w.sums + r * dim, dim, state, r);
    }
    load_values<Row>(a.values, places, dim, w.values);
    for (int d = 0; d < dim; d += kTile)
      multiply_bf16<true>(reinterpret_cast<uint16_t*>(w.scores), kTile * 2 * kKeys, kSlab, kKeys * sizeof(float), w.values + d * kSlab, kSlab * dim,
                          (keys + kSlab - 1) / kSlab, tiles, reinterpret_cast<char*>(w.sums + d), static_cast<int64_t>(dim) * sizeof(float));
  }
  _tile_release();
  for (int r = 0; r < rows; ++r) largest[r] = state.largest[r] * 0.69314718f, total[r] = Simd::reduce_add(Simd::fload(state.total[r]));
  std::memcpy(sums, w.sums, static_cast<size_t>(rows) * dim * sizeof(float));
}

void attend_tiles(const Attention& a, const AttentionPart& part, const AttentionPart* next, float* memory, float* sums, float* largest, float* total) {
  const int rows = part.count * (a.heads / a.kv_heads);
  if (rows <= kFewRows || a.dtype != Dtype::bf16 || a.dim % kSlab != 0) return attend(a, part, next, memory, sums, largest, total);
  const auto run = a.row == CacheRow::bf16 ? attend_tiles_of<PlainRow> : a.row == CacheRow::int8 ? attend_tiles_of<ScaledRow> : attend_tiles_of<Fp8Row>;
  run(a, part, memory, sums, largest, total);
}

}  // namespace
}  // namespace halfweight
