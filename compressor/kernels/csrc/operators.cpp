// Schemas, and the C functions that loading.py calls.
#include "operators.h"
#include "team.h"

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
      {"adam_step(Tensor(a!) master, Tensor(b!) momentum, Tensor(c!) variance, Tensor gradient, Tensor? mask, Tensor(d!)? visible, "
       "Tensor? scales, int lowest, int highest, float scale, float rate, float beta1, float beta2, float eps, float weight_decay, float mask_decay, float correction1, "
       "float correction2, bool decoupled, bool prunes) -> ()", "adam_step", adam_step},
      {"refresh(Tensor master, Tensor(a!) mask, Tensor(b!)? visible) -> (int, float, float)", "refresh", refresh},
      {"distil(Tensor student, Tensor? teacher, Tensor labels, float kl_weight, float temperature, float scale) -> (Tensor, Tensor)",
       "distil", distil},
      {"sum_squares(Tensor x) -> float", "sum_squares", sum_squares},
      {"decoder_layers(Tensor x, Tensor[] weights, int present, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor cos_sin, "
       "Tensor positions, Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor context_lens, int heads, int inner, "
       "float eps, float scale) -> (Tensor, Tensor)", "decoder_layers", decoder_layers},
  };
  for (const auto& op : operators)
    if (const char* error = register_operator(op.schema, op.name, op.kernel)) return error;
  done = true;
  return nullptr;
}

// Whether torch runs all pieces of a parallel_for at the same time.
__attribute__((visibility("default"))) void halfweight_allow_teams(int concurrent) { allow_teams(concurrent != 0); }
// Whether a token's result must not depend on how many are computed with it.
__attribute__((visibility("default"))) void halfweight_set_batch_invariant(int on) { set_batch_invariant(on != 0); }
__attribute__((visibility("default"))) const char* halfweight_isa() { return kernels().name; }
__attribute__((visibility("default"))) const char* halfweight_supported_isas() { return supported_isas(); }
}
