// Attention over a paged cache, bf16, int8 or fp8: blocks of 64 keys, online softmax, fp32 throughout. The factors of int8
// and fp8 rows multiply scores, never the rows themselves.
// Shapes: R rows = queries x query heads of one kv head; D head dimension; 64 keys a block.
#pragma once
#include "elementwise.h"

namespace halfweight {
namespace {

constexpr int kKeys = kAttentionRows;  // a block; rows of a piece of work are as many at most
constexpr int kFewRows = 8;            // with so few, unpacking the keys and values to fp32 costs more than it saves

// c[r][n] (+)= sum over k of a[r][k] * b[k][n], R rows and V registers of columns at a time.
template <bool add, int R, int V> HW_INLINE void gemm_block(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth) {
  Float acc[R][V];
  for (int r = 0; r < R; ++r) for (int v = 0; v < V; ++v) acc[r][v] = add ? Simd::fload(c + r * ldc + v * Simd::kLanes) : Simd::fzero();
  for (int k = 0; k < depth; ++k) {
    Float row[V];
    for (int v = 0; v < V; ++v) row[v] = Simd::fload(b + k * ldb + v * Simd::kLanes);
    for (int r = 0; r < R; ++r) {
      const Float x = Simd::fset1(a[r * lda + k]);
      for (int v = 0; v < V; ++v) acc[r][v] = Simd::fma(x, row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) for (int v = 0; v < V; ++v) Simd::fstore(c + r * ldc + v * Simd::kLanes, acc[r][v]);
}
template <bool add, int R> HW_INLINE void gemm_rows(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int depth, int columns) {
  constexpr int wide = Simd::kLanes == 16 ? 4 : 2;
  int n = 0;
  for (; n + wide * Simd::kLanes <= columns; n += wide * Simd::kLanes) gemm_block<add, R, wide>(a, lda, b + n, ldb, c + n, ldc, depth);
  for (; n < columns; n += Simd::kLanes) gemm_block<add, R, 1>(a, lda, b + n, ldb, c + n, ldc, depth);
}
// Rows a multiple of 4, columns of 16. Six rows at a time keep more sums of 256 bits under way than four.
template <bool add> void gemm(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int depth, int columns) {
  int r = 0;
  for (; r < rows && (Simd::kLanes != 8 || (rows - r) % 6 != 0); r += 4) gemm_rows<add, 4>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
  for (; r < rows; r += 6) gemm_rows<add, 6>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
}

struct Workspace {
  float *query, *keys, *values, *scores;
  Workspace(float* memory, int dim) {
    query = memory, keys = query + kKeys * dim, values = keys + kKeys * dim, scores = values + kKeys * dim;
  }
};

// A head's row in a cache: what `d` values from `d` on are, one of them, and what multiplies them all.
struct PlainRow {
  static constexpr bool kScaled = false;
  static constexpr size_t kBytes = 2;
  static HW_INLINE Float load(const char* row, int d) { return Simd::load_bf16(reinterpret_cast<const uint16_t*>(row) + d); }
  static HW_INLINE float at(const char* row, int d) { return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[d]); }
  static HW_INLINE float factor(const char*, int) { return 1; }
};
struct ScaledRow {
  static constexpr bool kScaled = true;
  static constexpr size_t kBytes = 1;
  static HW_INLINE Float load(const char* row, int d) { return Simd::to_float(Simd::load_bytes(row + d)); }
  static HW_INLINE float at(const char* row, int d) { return static_cast<float>(static_cast<signed char>(row[d])); }
  static HW_INLINE float factor(const char* row, int dim) { float f; __builtin_memcpy(&f, row + dim, sizeof f); return f; }
};
// e4m3 has fp16's form with fewer bits and an exponent that is 8 less; only its NaN (0x7f) needs care.
struct Fp8Row {
  static constexpr bool kScaled = true;
  static constexpr size_t kBytes = 1;
  static HW_INLINE Float load(const char* row, int d) {
    const Int byte = Simd::load_bytes(row + d), body = Simd::and_(byte, Simd::set1(0x7f));
    const Int nan = Simd::template sar<21>(Simd::template shl<24>(Simd::add(body, Simd::set1(1))));
    const Int half = Simd::and_or(Simd::template shl<8>(byte), Simd::set1(0x8000), Simd::template shl<7>(body));
    return Simd::low_fp16(Simd::and_or(nan, Simd::set1(0x7c00), half));
  }
  static HW_INLINE float at(const char* row, int d) { return e4m3_to_float(static_cast<uint8_t>(row[d])) / 256; }
  static HW_INLINE float factor(const char*, int) { return 256; }
};

// Where the keys of a block lie in both caches, in bytes.
struct Places {
  int keys = 0;
  int64_t at[kKeys];
  Places() {}
  Places(const Attention& a, const AttentionPart& part, int first) : keys(part.key_end - first < kKeys ? part.key_end - first : kKeys) {
    const int32_t* table = a.tables + static_cast<int64_t>(part.sequence) * a.max_blocks;
    const int64_t row = static_cast<int64_t>(a.row_bytes()), token = a.kv_heads * row;
    int block = first / a.block_size, offset = first % a.block_size;
    for (int j = 0; j < keys; ++j) {
      at[j] = (static_cast<int64_t>(table[block]) * a.block_size + offset) * token + part.kv_head * row;
      if (++offset == a.block_size) offset = 0, ++block;
    }
  }
};

// Rows of a head are far apart in the cache: no hardware prefetcher follows them.
constexpr int kAhead = 8;
template <class Row> HW_INLINE void prefetch_row(const char* cache, const Places& places, int j, int dim) {
  if (j < places.keys) for (size_t d = 0; d < static_cast<size_t>(dim) * Row::kBytes; d += 64) Simd::prefetch(cache + places.at[j] + d);
}

// scores[r][j] *= the factor of key or value j.
template <class Row> void multiply_by_factors(const char* cache, const Attention& a, const Workspace& w, const Places& places, int rows) {
  const int keys = places.keys;
  float factors[kKeys];
  for (int j = 0; j < keys; ++j) factors[j] = Row::factor(cache + places.at[j], a.dim);
  for (int r = 0; r < rows; ++r) for (int j = 0; j < keys; ++j) w.scores[r * kKeys + j] *= factors[j];
}

// Of few rows: one key meets four of them, or one row four keys, so that four sums cross their lanes together.
template <class Row> void score_few(const Attention& a, const Workspace& w, const Places& places, int rows) {
  const int dim = a.dim, keys = places.keys;
  if (rows == 1) {
    for (int j = 0; j < keys; j += 4) {
      Float sum[4] = {Simd::fzero(), Simd::fzero(), Simd::fzero(), Simd::fzero()};
      for (int i = 0; i < 4; ++i) {
        prefetch_row<Row>(a.keys, places, j + i + kAhead, dim);
        prefetch_row<Row>(a.values, places, j + i, dim);
      }
      for (int d = 0; d < dim; d += Simd::kLanes) {
        const Float query = Simd::fload(w.query + d);
        for (int i = 0; i < 4; ++i) sum[i] = Simd::fma(Row::load(a.keys + places.at[j + i < keys ? j + i : keys - 1], d), query, sum[i]);
      }
      Simd::reduce_add4(sum[0], sum[1], sum[2], sum[3], w.scores + j);
    }
    return;
  }
  for (int r = 0; r < rows; r += 4) {
    float* turned = w.keys;  // [keys][4]
    for (int j = 0; j < keys; ++j) {
      Float sum[4] = {Simd::fzero(), Simd::fzero(), Simd::fzero(), Simd::fzero()};
      const char* key = a.keys + places.at[j];
      prefetch_row<Row>(a.keys, places, j + kAhead, dim);
      if (r == 0) prefetch_row<Row>(a.values, places, j, dim);
      for (int d = 0; d < dim; d += Simd::kLanes) {
        const Float k = Row::load(key, d);
        for (int i = 0; i < 4; ++i) sum[i] = Simd::fma(k, Simd::fload(w.query + (r + i) * dim + d), sum[i]);
      }
      Simd::reduce_add4(sum[0], sum[1], sum[2], sum[3], turned + 4 * j);
    }
    for (int i = 0; i < 4; ++i) for (int j = 0; j < keys; ++j) w.scores[(r + i) * kKeys + j] = turned[4 * j + i];
  }
}

// Keys [first, first + 8) as columns of `out` [dim][kKeys]; behind the last one, the last one.
template <class Row, class S = Simd> HW_INLINE void turn_keys(const char* cache, float* out, const Places& places, int first, int dim) {
  const char* key[8];
  Float factor[8], v[8];
  for (int i = 0; i < 8; ++i) {
    key[i] = cache + places.at[first + i < places.keys ? first + i : places.keys - 1];
    if constexpr (Row::kScaled) factor[i] = Simd::fset1(Row::factor(key[i], dim));
  }
  for (int d = 0; d < dim; d += 8) {
    for (int i = 0; i < 8; ++i) v[i] = Row::kScaled ? Simd::mul(Row::load(key[i], d), factor[i]) : Row::load(key[i], d);
    S::transpose(v);
    for (int i = 0; i < 8; ++i) Simd::fstore(out + (d + i) * kKeys, v[i]);
  }
}

// scores[r][j] = query r . key j. With many rows the keys are transposed first, so that lanes are keys.
template <class Row> void score(const Attention& a, const Workspace& w, const Places& places, int rows) {
  const int dim = a.dim, keys = places.keys;
  if (rows <= kFewRows) {
    score_few<Row>(a, w, places, rows);
    if (Row::kScaled) multiply_by_factors<Row>(a.keys, a, w, places, rows);
    return;
  }
  for (int j = 0; j < kKeys; ++j) {
    prefetch_row<Row>(a.keys, places, j + kAhead, dim);
    prefetch_row<Row>(a.values, places, j, dim);
    if constexpr (Simd::kLanes == 8) {
      if (j % 8 == 7) turn_keys<Row>(a.keys, w.keys + j - 7, places, j - 7, dim);
    } else {
      const char* key = a.keys + places.at[j < keys ? j : keys - 1];
      const float factor = Row::factor(key, dim);
      for (int d = 0; d < dim; ++d) w.keys[d * kKeys + j] = Row::at(key, d) * factor;
    }
  }
  gemm<false>(w.query, dim, w.keys, kKeys, w.scores, kKeys, (rows + 3) / 4 * 4, dim, kKeys);
}

// sums[r][d] += sum over j of scores[r][j] * value j [d], for V registers of columns; gemm_block without a copy of the values.
// Meanwhile it fetches the keys at `next`, if that is not nullptr.
template <class Row, int V>
HW_INLINE void weigh_block(const float* scores, const char* values, int at, const Places& places, float* sums, int dim, const char* keys, const Places* next) {
  Float acc[4][V];
  for (int r = 0; r < 4; ++r) for (int v = 0; v < V; ++v) acc[r][v] = Simd::fload(sums + r * dim + v * Simd::kLanes);
  for (int j = 0; j < places.keys; ++j) {
    if (next) prefetch_row<Row>(keys, *next, j, dim);
    const char* value = values + places.at[j];
    Float row[V];
    for (int v = 0; v < V; ++v) row[v] = Row::load(value, at + v * Simd::kLanes);
    for (int r = 0; r < 4; ++r) {
      const Float x = Simd::fset1(scores[r * kKeys + j]);
      for (int v = 0; v < V; ++v) acc[r][v] = Simd::fma(x, row[v], acc[r][v]);
    }
  }
  for (int r = 0; r < 4; ++r) for (int v = 0; v < V; ++v) Simd::fstore(sums + r * dim + v * Simd::kLanes, acc[r][v]);
}
template <class Row> void weigh(const Attention& a, const Workspace& w, const Places& places, const Places& next, int rows, float* sums) {
  const int dim = a.dim, keys = places.keys;
  if (rows > kFewRows) {
    for (int j = 0; j < keys; ++j) {
      const char* value = a.values + places.at[j];
      const float factor = Row::factor(value, dim);
      for (int d = 0; d < dim; ++d) w.values[j * dim + d] = Row::at(value, d) * factor;
    }
    return gemm<true>(w.scores, kKeys, w.values, dim, sums, dim, rows, keys, dim);
  }
  if (Row::kScaled) multiply_by_factors<Row>(a.values, a, w, places, rows);
  constexpr int wide = Simd::kLanes == 16 ? 4 : 2;
  for (int r = 0; r < rows; r += 4) {
    int n = 0;
    for (; n + wide * Simd::kLanes <= dim; n += wide * Simd::kLanes)
      weigh_block<Row, wide>(w.scores + r * kKeys, a.values, n, places, sums + r * dim + n, dim, a.keys, r + n == 0 ? &next : nullptr);
    for (; n < dim; n += Simd::kLanes) weigh_block<Row, 1>(w.scores + r * kKeys, a.values, n, places, sums + r * dim + n, dim, a.keys, r + n == 0 ? &next : nullptr);
  }
}

// Turns scores into weights of the running softmax; `visible` keys of this block are before or at the row's position.
void softmax_row(float* scores, int visible, float* out, int dim, float* largest, float* total) {
  for (int i = visible; i < kKeys; ++i) scores[i] = visible > 0 ? -INFINITY : 0;
  if (visible <= 0) return;
  Float highest_of[2] = {Simd::fload(scores), Simd::fload(scores + Simd::kLanes)};
  for (int j = 2 * Simd::kLanes; j < kKeys; j += 2 * Simd::kLanes)
    for (int i = 0; i < 2; ++i) highest_of[i] = Simd::fmax(highest_of[i], Simd::fload(scores + j + i * Simd::kLanes));
  float highest = Simd::reduce_max(Simd::fmax(highest_of[0], highest_of[1]));
  highest = *largest > highest ? *largest : highest;
  if (!(highest > -INFINITY)) highest = 0;  // only NaN or -inf so far: let them through
  const Float from = Simd::fset1(highest);
  Float sums[2] = {Simd::fzero(), Simd::fzero()};
  for (int j = 0; j < kKeys; j += 2 * Simd::kLanes)
    for (int i = 0; i < 2; ++i) {
      float* at = scores + j + i * Simd::kLanes;
      const Float weight = exp_fast(Simd::fsub(Simd::fload(at), from));
      Simd::fstore(at, weight);
      sums[i] = Simd::fadd(sums[i], weight);
    }
  for (int i = visible; i < kKeys; ++i) scores[i] = 0;  // exp_fast() ends at e^-87
  const float keep = *largest > -INFINITY ? exp_fast(*largest - highest) : 0;
  *total = *total * keep + Simd::reduce_add(Simd::fadd(sums[0], sums[1]));
  if (*largest != highest) for (int d = 0; d < dim; ++d) out[d] *= keep;
  *largest = highest;
}

// Queries [first, first + count) of a sequence, all heads of kv_head, over keys [begin, end): sums [R][D], not yet divided by
// `total` [R]; `largest` [R] is the maximum they were taken relative to.
template <class Row> void attend_rows(const Attention& a, const AttentionPart& part, const AttentionPart* next, float* memory, float* sums, float* largest, float* total) {
  const int dim = a.dim, heads = a.heads / a.kv_heads, rows = part.count * heads;
  const int queries = a.starts[part.sequence + 1] - a.starts[part.sequence];
  const int position = a.lengths[part.sequence] - queries + part.first;  // of the first query
  const Workspace w(memory, dim);
  const int padded = (rows + 3) / 4 * 4;
  for (int i = 0; i < padded * dim; ++i) sums[i] = 0;
  for (int r = 0; r < padded; ++r) largest[r] = -INFINITY, total[r] = 0;
  for (int i = rows * dim; i < padded * dim; ++i) w.query[i] = 0;
  for (int r = 0; r < rows; ++r) {
    const int64_t token = a.starts[part.sequence] + part.first + r / heads;
    load_row(a.query, a.dtype, token * a.query_stride + (part.kv_head * heads + r % heads) * dim, dim, w.query + r * dim);
    for (int d = 0; d < dim; ++d) w.query[r * dim + d] *= a.scale;
  }
  for (int key = part.key_begin; key < part.key_end; key += kKeys) {
    const Places places(a, part, key);
    const Places following = key + kKeys < part.key_end ? Places(a, part, key + kKeys) : next ? Places(a, *next, next->key_begin) : Places();
    for (int j = 0; j < kAhead; ++j) prefetch_row<Row>(a.keys, places, j, dim);
    score<Row>(a, w, places, rows);
    for (int r = rows; r < padded; ++r) for (int j = 0; j < kKeys; ++j) w.scores[r * kKeys + j] = 0;
    for (int r = 0; r < rows; ++r) {
      const int before = position + r / heads + 1 - key;
      softmax_row(w.scores + r * kKeys, before < 0 ? 0 : before < places.keys ? before : places.keys, sums + r * dim, dim, largest + r, total + r);
    }
    weigh<Row>(a, w, places, following, padded, sums);
  }
}
void attend(const Attention& a, const AttentionPart& part, const AttentionPart* next, float* memory, float* sums, float* largest, float* total) {
  const auto rows = a.row == CacheRow::bf16 ? attend_rows<PlainRow> : a.row == CacheRow::int8 ? attend_rows<ScaledRow> : attend_rows<Fp8Row>;
  rows(a, part, next, memory, sums, largest, total);
}

}  // namespace
}  // namespace halfweight
