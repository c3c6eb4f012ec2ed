// The boxed operators; operators.cpp holds their schemas and registers them.
#pragma once
#include "torch_shim.h"

namespace halfweight {

Weight parsed(const Tensor& blob, const char* what);  // fails on a damaged blob
void check_branch(const Weight& branch, const Weight& weight, const char* what);
void check_bias(const Tensor& bias, const Weight& weight, const char* what);
void check_caches(const Tensor& keys, const Tensor& values);
CacheRow row_of(const Tensor& cache, int64_t dim);  // fails where a head of this size is not what the cache holds
// All of an Attention but its query; fails where shapes do not fit together.
Attention attention_over(const Tensor& keys, const Tensor& values, int64_t heads, int64_t dim, Dtype dtype, const Tensor& tables,
                         const Tensor& starts, const Tensor& lengths, double scale);

void linear(Value* stack, uint64_t inputs, uint64_t outputs);
void rows(Value* stack, uint64_t inputs, uint64_t outputs);
void read_bytes(Value* stack, uint64_t inputs, uint64_t outputs);
void rms_norm(Value* stack, uint64_t inputs, uint64_t outputs);
void add_rms_norm(Value* stack, uint64_t inputs, uint64_t outputs);
void silu_and_mul(Value* stack, uint64_t inputs, uint64_t outputs);
void rotary_embedding(Value* stack, uint64_t inputs, uint64_t outputs);
void store_kv(Value* stack, uint64_t inputs, uint64_t outputs);
void paged_attention(Value* stack, uint64_t inputs, uint64_t outputs);
void adam_step(Value* stack, uint64_t inputs, uint64_t outputs);
void refresh(Value* stack, uint64_t inputs, uint64_t outputs);
void distil(Value* stack, uint64_t inputs, uint64_t outputs);
void sum_squares(Value* stack, uint64_t inputs, uint64_t outputs);
void decoder_layers(Value* stack, uint64_t inputs, uint64_t outputs);

}  // namespace halfweight
