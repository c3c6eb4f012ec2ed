// paged_attention: cut the work into pieces of at most 64 rows and a fixed number of keys, run them on torch's threads, and
// put the pieces of a query together in the order of their keys. The cut does not depend on the number of threads.
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch part_scratch, partial_scratch;
constexpr int kSplitKeys = 512;   // of a decode step: lets several threads share one long sequence
constexpr int kSplitQueries = 4;  // with more queries there is work enough without splitting keys

struct Job {
  int sequence, kv_head, first, count, parts, part_of_first;  // its parts lie one behind the other
};

void check_shapes(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& tables, const Tensor& starts, const Tensor& lengths) {
  for (const Tensor* cache : {&keys, &values})
    if (cache->type() != Type::bf16 || cache->dim() != 4 || !cache->contiguous()) fail("the caches must be contiguous bfloat16 [blocks, block_size, Hkv, D]");
  for (const Tensor* t : {&tables, &starts, &lengths})
    if (t->type() != Type::i32) fail("block_tables, query_start and context_lens must be int32");
  if (query.dim() != 3 || query.size(2) != keys.size(3) || query.size(2) % 16 || query.size(2) > 512 || keys.size(2) < 1 || query.size(1) % keys.size(2))
    fail("query must be [T, H, D] with the caches' D, a multiple of 16 up to 512, and H a multiple of Hkv");
  if (query.size(1) / keys.size(2) > kAttentionRows) fail("at most %d query heads can share a kv head", kAttentionRows);
  if (values.numel() != keys.numel()) fail("the caches differ in size");
  if (tables.dim() != 2 || starts.numel() != tables.size(0) + 1 || lengths.numel() != tables.size(0))
    fail("block_tables is [S, blocks], query_start [S + 1], context_lens [S]");
}

void check_values(const Attention& a, int sequences, int64_t tokens, int64_t blocks) {
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

void plan(const Attention& a, int sequences, std::vector<Job>* jobs, std::vector<AttentionPart>* parts) {
  const int per_tile = kAttentionRows / (a.heads / a.kv_heads);
  for (int s = 0; s < sequences; ++s) {
    const int queries = a.starts[s + 1] - a.starts[s];
    for (int h = 0; h < a.kv_heads; ++h)
      for (int first = 0; first < queries; first += per_tile) {
        const int count = queries - first < per_tile ? queries - first : per_tile;
        const int keys = a.lengths[s] - queries + first + count;  // the last query of the tile sees these
        const int split = queries <= kSplitQueries ? kSplitKeys : keys;
        Job job{s, h, first, count, 0, static_cast<int>(parts->size())};
        for (int begin = 0; begin < keys; begin += split, ++job.parts)
          parts->push_back({s, h, first, count, begin, begin + split < keys ? begin + split : keys});
        jobs->push_back(job);
      }
  }
}

struct Partial {
  float *sums, *largest, *total;
};

void merge(const Attention& a, const Job& job, const Partial* partials, void* out, float* row) {
  const int heads = a.heads / a.kv_heads;
  for (int r = 0; r < job.count * heads; ++r) {
    float largest = -INFINITY, total = 0;
    for (int p = 0; p < job.parts; ++p) largest = partials[p].largest[r] > largest ? partials[p].largest[r] : largest;
    std::memset(row, 0, static_cast<size_t>(a.dim) * 4);
    for (int p = 0; p < job.parts; ++p) {
      // A part whose maximum is -inf saw no key; its sums are 0.
      const float factor = partials[p].largest[r] > -INFINITY ? std::exp(partials[p].largest[r] - largest) : 0;
      total += factor * partials[p].total[r];
      for (int d = 0; d < a.dim; ++d) row[d] += factor * partials[p].sums[r * a.dim + d];
    }
    for (int d = 0; d < a.dim; ++d) row[d] /= total;
    const int64_t token = a.starts[job.sequence] + job.first + r / heads;
    char* to = static_cast<char*>(out) + (token * a.heads + job.kv_head * heads + r % heads) * a.dim * static_cast<int64_t>(dtype_bytes(a.dtype));
    kernels().copy_row(row, Dtype::f32, to, a.dtype, a.dim, row + a.dim);
  }
}

}  // namespace

void paged_attention(Value* stack, uint64_t, uint64_t) {
  Tensor query_in(stack[0]);
  const Tensor keys(stack[1]), values(stack[2]);
  Tensor tables_in(stack[3]), starts_in(stack[4]), lengths_in(stack[5]);
  const double scale = take<double>(stack[6]);
  const Tensor query = std::move(query_in).dense_rows(), tables = std::move(tables_in).dense();
  const Tensor starts = std::move(starts_in).dense(), lengths = std::move(lengths_in).dense();
  check_shapes(query, keys, values, tables, starts, lengths);
  const Attention a{query.data(), static_cast<const uint16_t*>(keys.data()), static_cast<const uint16_t*>(values.data()),
                    static_cast<const int32_t*>(tables.data()), static_cast<const int32_t*>(starts.data()),
                    static_cast<const int32_t*>(lengths.data()), query.dtype("query"), static_cast<int>(query.size(1)),
                    static_cast<int>(keys.size(2)), static_cast<int>(query.size(2)), static_cast<int>(keys.size(1)),
                    static_cast<int>(tables.size(1)), query.row_stride(), static_cast<float>(scale)};
  const int sequences = static_cast<int>(tables.size(0));
  check_values(a, sequences, query.size(0), keys.size(0));
  Tensor out = Tensor::empty(query.sizes(), 3, query.type());
  void* data = out.data();
  // Tokens behind the last sequence (padding) have no queries: they are 0, not what was in memory.
  const size_t row_bytes = static_cast<size_t>(a.heads) * a.dim * dtype_bytes(a.dtype);
  std::memset(data, 0, static_cast<size_t>(a.starts[0]) * row_bytes);
  std::memset(static_cast<char*>(data) + static_cast<size_t>(a.starts[sequences]) * row_bytes, 0, (static_cast<size_t>(query.size(0)) - a.starts[sequences]) * row_bytes);

  std::vector<Job> jobs;
  std::vector<AttentionPart> parts;
  plan(a, sequences, &jobs, &parts);
  std::vector<Partial> partials(parts.size());
  size_t floats = 0;
  const auto rows_of = [&](const AttentionPart& p) { return static_cast<size_t>((p.count * (a.heads / a.kv_heads) + 3) / 4 * 4); };
  for (const AttentionPart& p : parts) floats += rows_of(p) * (a.dim + 2);
  float* memory = reinterpret_cast<float*>(partial_scratch.get(floats * 4 + 64));
  for (size_t i = 0; i < parts.size(); ++i) {
    const size_t rows = rows_of(parts[i]);
    partials[i] = {memory, memory + rows * a.dim, memory + rows * (a.dim + 1)};
    memory += rows * (a.dim + 2);
  }
  const int64_t count = static_cast<int64_t>(parts.size());
  parallel(0, count, 1, [&](int64_t begin, int64_t end) {
    float* work = reinterpret_cast<float*>(part_scratch.get(attention_floats(a.dim) * 4));
    for (int64_t n = begin; n < end; ++n) {
      // From both ends in turn: of a causal prefill the late pieces are the long ones.
      const int64_t i = n % 2 ? count - 1 - n / 2 : n / 2;
      kernels().attend(a, parts[i], work, partials[i].sums, partials[i].largest, partials[i].total);
    }
  });
  float* row = reinterpret_cast<float*>(part_scratch.get(static_cast<size_t>(a.dim) * 8));
  for (const Job& job : jobs) merge(a, job, partials.data() + job.part_of_first, data, row);
  stack[0] = out.release();
}

}  // namespace halfweight
