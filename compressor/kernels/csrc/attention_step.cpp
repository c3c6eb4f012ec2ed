#include "attention_step.h"

#include <cmath>
#include <cstring>

#include "halves.h"

namespace halfweight {
namespace {

constexpr int kSplitKeys = 64;    // of a decode step: lets several threads share one sequence evenly
constexpr int kSplitQueries = 4;  // with more queries there is work enough without splitting keys

void check(const Attention& a, int sequences, int64_t tokens, int64_t blocks) {
  if (a.starts[0] < 0 || a.starts[sequences] > tokens) fail("query_start leaves the %lld queries", static_cast<long long>(tokens));
  for (int s = 0; s < sequences; ++s) {
    const int queries = a.starts[s + 1] - a.starts[s];
    if (queries < 0 || a.lengths[s] < queries) fail("sequence %d has %d queries but %d tokens of context", s, queries, a.lengths[s]);
    const int64_t used = (static_cast<int64_t>(a.lengths[s]) + a.block_size - 1) / a.block_size;
    if (used > a.max_blocks) fail("sequence %d needs %lld blocks, block_tables has %d", s, static_cast<long long>(used), a.max_blocks);
    for (int64_t i = 0; i < used && queries > 0; ++i) {
      const int32_t block = a.tables[static_cast<int64_t>(s) * a.max_blocks + i];
      if (block < 0 || block >= blocks) fail("block %d of sequence %d is out of range: the cache has %lld", block, s, static_cast<long long>(blocks));
    }
  }
}

}  // namespace

void store_heads(const Attention& a, const void* heads, Dtype dtype, char* to, float* memory) {
  const int64_t width = static_cast<int64_t>(a.kv_heads) * a.dim;
  if (a.row == CacheRow::bf16) return kernels().copy_row(heads, dtype, to, Dtype::bf16, width, memory);
  float *values = memory, factor;
  kernels().copy_row(heads, dtype, values, Dtype::f32, width, memory + width);
  if (a.row == CacheRow::fp8) {
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<char>(float_to_e4m3(values[i]));
    return;
  }
  for (int h = 0; h < a.kv_heads; ++h, to += a.row_bytes()) {
    kernels().quantise(values + static_cast<int64_t>(h) * a.dim, a.dim, a.dim, 1, false, reinterpret_cast<int8_t*>(to), &factor);
    std::memcpy(to + a.dim, &factor, sizeof factor);
  }
}

AttentionStep::AttentionStep(const Attention& a, int sequences, int64_t tokens, int64_t cache_blocks)
    : a_(a), sequences_(sequences), tokens_(tokens) {
  check(a, sequences, tokens, cache_blocks);
  const int per_tile = kAttentionRows / (a.heads / a.kv_heads);
  for (int s = 0; s < sequences; ++s) {
    const int queries = a.starts[s + 1] - a.starts[s];
    for (int first = 0; first < queries; first += per_tile) {
      const int count = queries - first < per_tile ? queries - first : per_tile;
      const int keys = a.lengths[s] - queries + first + count;  // the last query of the tile sees these
      const int split = queries <= kSplitQueries ? kSplitKeys : keys;
      even_ = even_ && queries <= kSplitQueries;
      const int parts = keys > 0 ? (keys + split - 1) / split : 0, part_of_first = static_cast<int>(parts_.size());
      // The heads of the same keys follow one another: in the cache they lie side by side.
      for (int begin = 0; begin < keys; begin += split)
        for (int h = 0; h < a.kv_heads; ++h) parts_.push_back({s, h, first, count, begin, begin + split < keys ? begin + split : keys});
      for (int h = 0; h < a.kv_heads; ++h) jobs_.push_back({s, h, first, count, parts, part_of_first + h});
    }
  }
}

size_t AttentionStep::bytes() const {
  size_t floats = 16;
  for (const AttentionPart& p : parts_) floats += rows_of(p) * (static_cast<size_t>(a_.dim) + 2);
  return floats * 4;
}

void AttentionStep::place(char* memory) {
  float* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  for (const AttentionPart& p : parts_) {
    const size_t rows = rows_of(p);
    partials_.push_back({at, at + rows * a_.dim, at + rows * (a_.dim + 1)});
    at += rows * (a_.dim + 2);
  }
}

void AttentionStep::attend(int64_t n, const char* keys, const char* values, char* work) const {
  const int64_t i = parts() - 1 - n;  // of a causal prefill the late parts are the long ones
  const Partial& p = partials_[i];
  float* memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(work) + 63) / 64 * 64);
  Attention a = a_;
  a.keys = keys, a.values = values;
  kernels().attend(a, parts_[i], i > 0 ? &parts_[i - 1] : nullptr, memory, p.sums, p.largest, p.total);
}

void AttentionStep::merge(int64_t j, void* out, char* memory) const {
  const Job& job = jobs_[j];
  const auto partial = [&](int p) -> const Partial& { return partials_[job.part_of_first + p * a_.kv_heads]; };
  float* row = reinterpret_cast<float*>(memory);
  const int heads = a_.heads / a_.kv_heads;
  for (int r = 0; r < job.count * heads; ++r) {
    float largest = -INFINITY, total = 0;
    for (int p = 0; p < job.parts; ++p) largest = partial(p).largest[r] > largest ? partial(p).largest[r] : largest;
    std::memset(row, 0, static_cast<size_t>(a_.dim) * 4);
    for (int p = 0; p < job.parts; ++p) {
      // A part whose maximum is -inf saw no key; its sums are 0.
      const float factor = partial(p).largest[r] > -INFINITY ? std::exp(partial(p).largest[r] - largest) : 0;
      total += factor * partial(p).total[r];
      for (int d = 0; d < a_.dim; ++d) row[d] += factor * partial(p).sums[r * a_.dim + d];
    }
    const float inverse = 1 / total;
    for (int d = 0; d < a_.dim; ++d) row[d] *= inverse;
    const int64_t token = a_.starts[job.sequence] + job.first + r / heads;
    char* to = static_cast<char*>(out) + (token * a_.heads + job.kv_head * heads + r % heads) * a_.dim * static_cast<int64_t>(dtype_bytes(a_.dtype));
    kernels().copy_row(row, Dtype::f32, to, a_.dtype, a_.dim, row + a_.dim);
  }
}

void AttentionStep::clear_padding(void* out) const {
  const size_t row_bytes = static_cast<size_t>(a_.heads) * a_.dim * dtype_bytes(a_.dtype);
  const size_t end = static_cast<size_t>(a_.starts[sequences_]);
  std::memset(out, 0, static_cast<size_t>(a_.starts[0]) * row_bytes);
  std::memset(static_cast<char*>(out) + end * row_bytes, 0, (static_cast<size_t>(tokens_) - end) * row_bytes);
}

}  // namespace halfweight
