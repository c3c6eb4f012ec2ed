// Schemas, and the C functions that loading.py calls.
#include "operators.h"

using namespace halfweight;

extern "C" {

// nullptr, or what went wrong. Idempotent; called once by loading.py.
__attribute__((visibility("default"))) const char* halfweight_register() {
  static bool done = false;
  if (done) return nullptr;
  if (const char* error = isa_error()) return error;
  if (const char* error = load_torch()) return error;
  const struct { const char* schema; const char* name; Boxed kernel; } operators[] = {
      {"linear(Tensor x, Tensor weight, Tensor? bias, Tensor? low_rank, bool exact) -> Tensor", "linear", linear},
      {"rows(Tensor weight, Tensor ids, int in_features) -> Tensor", "rows", rows},
      {"read_bytes(Tensor x) -> int", "read_bytes", read_bytes},
      {"rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", "rms_norm", rms_norm},
      {"add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", "add_rms_norm", add_rms_norm},
      {"silu_and_mul(Tensor x) -> Tensor", "silu_and_mul", silu_and_mul},
      {"rotary_embedding(Tensor q, Tensor k, Tensor cos_sin, Tensor positions) -> (Tensor, Tensor)", "rotary_embedding", rotary_embedding},
      {"store_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()", "store_kv", store_kv},
      {"paged_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, Tensor context_lens, "
       "float scale) -> Tensor", "paged_attention", paged_attention},
  };
  for (const auto& op : operators)
    if (const char* error = register_operator(op.schema, op.name, op.kernel)) return error;
  done = true;
  return nullptr;
}

__attribute__((visibility("default"))) const char* halfweight_isa() { return kernels().name; }
__attribute__((visibility("default"))) const char* halfweight_supported_isas() { return supported_isas(); }
}
