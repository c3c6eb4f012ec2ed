// Attention as a step of an operator: the work cut into parts, each part's result, and the parts of a query put together.
#pragma once
#include <vector>

#include "torch_shim.h"

namespace halfweight {

// A token's row of all kv heads to its place in a cache: `to`, of heads * row_bytes bytes. memory: 2 * heads * dim floats.
void store_heads(const Attention& a, const void* heads, Dtype dtype, char* to, float* memory);

class AttentionStep {
 public:
  // a: all but `query`, which may not exist yet, and the caches, which are attend()'s. Fails where tables, starts and lengths do not fit together.
  AttentionStep(const Attention& a, int sequences, int64_t tokens, int64_t cache_blocks);

  size_t bytes() const;
  void place(char* memory);
  size_t work_bytes() const { return attention_floats(a_.dim) * 4 + 64; }  // working memory of attend()
  size_t row_bytes() const { return static_cast<size_t>(a_.dim) * 8; }     // and of merge()

  void set_query(const void* query, int64_t stride) { a_.query = query, a_.query_stride = stride; }
  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  bool even() const { return even_; }  // all parts take about as long
  void attend(int64_t part, const char* keys, const char* values, char* work) const;
  int64_t jobs() const { return static_cast<int64_t>(jobs_.size()); }
  void merge(int64_t job, void* out, char* row) const;  // out [tokens][heads][dim] in the query's dtype
  // Tokens before the first and behind the last sequence (padding) have no queries: they are 0, not what was in memory.
  void clear_padding(void* out) const;

 private:
  struct Job {
    int sequence, kv_head, first, count, parts, part_of_first;  // its parts lie kv_heads apart
  };
  struct Partial {
    float *sums, *largest, *total;
  };
  size_t rows_of(const AttentionPart& p) const { return static_cast<size_t>((p.count * (a_.heads / a_.kv_heads) + 3) / 4 * 4); }

  Attention a_;
  int sequences_;
  int64_t tokens_;
  std::vector<Job> jobs_;
  std::vector<AttentionPart> parts_;
  bool even_ = true;
  std::vector<Partial> partials_;
};

}  // namespace halfweight
