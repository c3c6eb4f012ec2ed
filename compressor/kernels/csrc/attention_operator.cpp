// paged_attention: the parts on torch's threads, then the parts of a query in the order of their keys. The cut does not depend
// on the number of threads.
#include <atomic>
#include <utility>

#include "attention_step.h"
#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch part_scratch, partial_scratch;

}  // namespace

void check_caches(const Tensor& keys, const Tensor& values) {
  for (const Tensor* cache : {&keys, &values})
    if ((cache->type() != Type::bf16 && cache->type() != Type::u8) || cache->dim() != 4 || !cache->contiguous())
      fail("the caches must be contiguous [blocks, block_size, Hkv, D], bfloat16, or uint8: e4m3, or int8 with 4 more bytes a row");
  if (values.numel() != keys.numel() || values.type() != keys.type()) fail("the caches differ in size or dtype");
}

CacheRow row_of(const Tensor& cache, int64_t dim) {
  if (cache.type() == Type::bf16 && cache.size(3) == dim) return CacheRow::bf16;
  if (cache.type() == Type::u8 && cache.size(3) == dim) return CacheRow::fp8;
  if (cache.type() == Type::u8 && cache.size(3) == dim + 4) return CacheRow::int8;
  fail("query, key and value must be [T, H, D] with the caches' D");
}

Attention attention_over(const Tensor& keys, const Tensor& values, int64_t heads, int64_t dim, Dtype dtype, const Tensor& tables, const Tensor& starts,
                         const Tensor& lengths, double scale) {
  check_caches(keys, values);
  const CacheRow row = row_of(keys, dim);
  for (const Tensor* t : {&tables, &starts, &lengths})
    if (t->type() != Type::i32) fail("block_tables, query_start and context_lens must be int32");
  if (dim % 16 || dim > 512 || keys.size(2) < 1 || heads < 1 || heads % keys.size(2))
    fail("query must be [T, H, D] with the caches' D, a multiple of 16 up to 512, and H a multiple of Hkv");
  if (heads / keys.size(2) > kAttentionRows) fail("at most %d query heads can share a kv head", kAttentionRows);
  if (keys.size(1) < 1) fail("the caches have blocks of no tokens");
  if (tables.dim() != 2 || starts.numel() != tables.size(0) + 1 || lengths.numel() != tables.size(0))
    fail("block_tables is [S, blocks], query_start [S + 1], context_lens [S]");
  return {nullptr, static_cast<const char*>(keys.data()), static_cast<const char*>(values.data()),
          static_cast<const int32_t*>(tables.data()), static_cast<const int32_t*>(starts.data()), static_cast<const int32_t*>(lengths.data()),
          dtype, static_cast<int>(heads), static_cast<int>(keys.size(2)), static_cast<int>(dim), static_cast<int>(keys.size(1)),
          static_cast<int>(tables.size(1)), 0, static_cast<float>(scale), row};
}

void paged_attention(Value* stack, uint64_t, uint64_t) {
  Tensor query_in(stack[0]);
  const Tensor keys(stack[1]), values(stack[2]);
  Tensor tables_in(stack[3]), starts_in(stack[4]), lengths_in(stack[5]);
  const double scale = take<double>(stack[6]);
  const Tensor query = std::move(query_in).dense_rows(), tables = std::move(tables_in).dense();
  const Tensor starts = std::move(starts_in).dense(), lengths = std::move(lengths_in).dense();
  if (query.dim() != 3) fail("query must be [T, H, D]");
  const Attention a = attention_over(keys, values, query.size(1), query.size(2), query.dtype("query"), tables, starts, lengths, scale);
  AttentionStep step(a, static_cast<int>(tables.size(0)), query.size(0), keys.size(0));
  step.set_query(query.data(), query.row_stride());
  step.place(partial_scratch.get(step.bytes()));
  Tensor out = Tensor::empty(query.sizes(), 3, query.type());
  step.clear_padding(out.data());
  std::atomic<int64_t> next{0};
  parallel(0, step.parts(), 1, [&](int64_t begin, int64_t end) {
    char* work = part_scratch.get(step.work_bytes());
    for (; begin < end; ++begin) step.attend(next.fetch_add(1, std::memory_order_relaxed), a.keys, a.values, work);
  });
  char* row = part_scratch.get(step.row_bytes());
  for (int64_t j = 0; j < step.jobs(); ++j) step.merge(j, out.data(), row);
  stack[0] = out.release();
}

}  // namespace halfweight
