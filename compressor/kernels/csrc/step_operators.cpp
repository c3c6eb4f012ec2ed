// The steps of a transformer around its linears: embedding rows, norms, activation, rotary positions, cache writes.
#include <cstring>
#include <utility>

#include "attention_step.h"
#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch scratch;
constexpr int64_t kSerialValues = 16384;  // below, waking the other threads takes longer than the work

// body(row, float memory) for every row, in parallel where that pays.
template <class F> void for_rows(int64_t rows, int64_t values_per_row, int64_t floats, F body) {
  const int64_t grain = kSerialValues / (values_per_row > 0 ? values_per_row : 1) + 1;
  parallel(0, rows, grain, [&](int64_t begin, int64_t end) {
    float* memory = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(floats) * 4));
    for (int64_t row = begin; row < end; ++row) body(row, memory);
  });
}

int64_t leading(const Tensor& x) {  // rows of x as a matrix
  int64_t rows = 1;
  for (int i = 0; i < x.dim() - 1; ++i) rows *= x.size(i);
  return rows;
}

RowsOf matrix(const Tensor& x, const char* what) {
  if (x.dim() < 1) fail("%s must have at least one dimension", what);
  return {x.data(), x.dtype(what), x.size(-1)};
}

Tensor empty_like(const Tensor& x) { return Tensor::empty(x.sizes(), x.dim(), x.type()); }

void norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, void* out, void* sum) {
  const RowsOf source = matrix(x, "x"), factors = matrix(weight, "weight");
  RowsOf other{};
  if (residual) {
    other = matrix(*residual, "residual");
    if (residual->numel() != x.numel() || residual->size(-1) != x.size(-1)) fail("x and residual differ in shape");
  }
  if (weight.numel() != x.size(-1)) fail("the weight has %lld elements, x has rows of %lld", static_cast<long long>(weight.numel()), static_cast<long long>(x.size(-1)));
  const int columns = static_cast<int>(x.size(-1));
  for_rows(leading(x), columns, 2 * columns, [&](int64_t row, float* memory) {
    kernels().rms_norm(source, other, factors, columns, static_cast<float>(eps), out, sum, row, memory);
  });
}

}  // namespace

void rows(Value* stack, uint64_t, uint64_t) {
  const Tensor blob(stack[0]);
  Tensor ids_in(stack[1]);
  const int64_t in_features = take<int64_t>(stack[2]);
  const Tensor ids = std::move(ids_in).dense();
  const Weight w = parsed(blob, "weight");
  if (ids.type() != Type::i64 || ids.dim() > 15) fail("ids must be int64 of rank at most 15");
  if (in_features != w.in_features) fail("in_features is %lld, the weight has %d", static_cast<long long>(in_features), w.in_features);
  const int64_t* id = static_cast<const int64_t*>(ids.data());
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= w.out_features) fail("row %lld is out of range: the weight has %d", static_cast<long long>(id[i]), w.out_features);
  int64_t sizes[16];
  for (int i = 0; i < ids.dim(); ++i) sizes[i] = ids.size(i);
  sizes[ids.dim()] = w.in_features;
  Tensor out = Tensor::empty(sizes, ids.dim() + 1, Type::f32);
  float* values = static_cast<float*>(out.data());
  for_rows(count, w.in_features, 1, [&](int64_t i, float*) { kernels().weight_row(w, id[i], values + i * w.in_features); });
  stack[0] = out.release();
}

// Reads every byte once, in 64 sequential streams: what a kernel bound by memory could do at best.
void read_bytes(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]);
  const Tensor x = std::move(x_in).dense();
  if (x.type() != Type::u8) fail("x must be uint8");
  const char* data = static_cast<const char*>(x.data());
  constexpr int64_t piece = 1 << 16;
  const int64_t pieces = x.numel() / piece;
  uint64_t sums[64] = {};
  parallel(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      uint64_t sum = 0;
      for (int64_t i = slot * pieces / 64; i < (slot + 1) * pieces / 64; ++i)
        for (int64_t at = i * piece; at < (i + 1) * piece; at += 64) {
          __builtin_prefetch(data + at + 4096);
          uint64_t words[8];
          std::memcpy(words, data + at, 64);
          sum += (words[0] + words[1]) + (words[2] + words[3]) + (words[4] + words[5]) + (words[6] + words[7]);
        }
      sums[slot] = sum;
    }
  });
  uint64_t total = 0;
  for (const uint64_t s : sums) total += s;
  stack[0] = total;
}

void rms_norm(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]), weight_in(stack[1]);
  const double eps = take<double>(stack[2]);
  const Tensor x = std::move(x_in).dense(), weight = std::move(weight_in).dense();
  Tensor out = empty_like(x);
  norm(x, nullptr, weight, eps, out.data(), nullptr);
  stack[0] = out.release();
}

void add_rms_norm(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]), residual_in(stack[1]), weight_in(stack[2]);
  const double eps = take<double>(stack[3]);
  const Tensor x = std::move(x_in).dense(), residual = std::move(residual_in).dense(), weight = std::move(weight_in).dense();
  Tensor out = empty_like(x), sum = empty_like(x);
  norm(x, &residual, weight, eps, out.data(), sum.data());
  stack[0] = out.release();
  stack[1] = sum.release();
}

void silu_and_mul(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]);
  const Tensor x = std::move(x_in).dense();
  const RowsOf source = matrix(x, "x");
  if (x.size(-1) % 2 || x.dim() > 16) fail("x has rows of %lld; an even number (gate, then up) is needed", static_cast<long long>(x.size(-1)));
  const int columns = static_cast<int>(x.size(-1) / 2);
  int64_t sizes[16];
  for (int i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = columns;
  Tensor out = Tensor::empty(sizes, x.dim(), x.type());
  void* data = out.data();
  for_rows(leading(x), 4 * columns, 2 * columns, [&](int64_t row, float* memory) { kernels().silu_and_mul(source, columns, data, row, memory); });
  stack[0] = out.release();
}

void rotary_embedding(Value* stack, uint64_t, uint64_t) {
  Tensor q_in(stack[0]), k_in(stack[1]), table_in(stack[2]), positions_in(stack[3]);
  const Tensor q = std::move(q_in).dense_rows(), k = std::move(k_in).dense_rows();
  const Tensor table = std::move(table_in).dense(), positions = std::move(positions_in).dense();
  if (q.dim() != 3 || k.dim() != 3 || q.size(0) != k.size(0) || q.size(2) != k.size(2) || q.size(2) % 2) fail("q must be [T, H, D] and k [T, Hkv, D], D even");
  if (table.type() != Type::f32 || table.dim() != 2 || table.size(1) != q.size(2)) fail("cos_sin must be float32 [positions, D]");
  if (positions.type() != Type::i64 || positions.numel() != q.size(0)) fail("positions must be int64 [T]");
  const int64_t* position = static_cast<const int64_t*>(positions.data());
  const float* cos_sin = static_cast<const float*>(table.data());
  const int64_t tokens = q.size(0);
  const int dim = static_cast<int>(q.size(2)), heads = static_cast<int>(q.size(1)), kv_heads = static_cast<int>(k.size(1));
  for (int64_t t = 0; t < tokens; ++t)
    if (position[t] < 0 || position[t] >= table.size(0)) fail("position %lld is beyond cos_sin's %lld", static_cast<long long>(position[t]), static_cast<long long>(table.size(0)));
  Tensor q_out = empty_like(q), k_out = empty_like(k);
  const RowsOf q_rows{q.data(), q.dtype("q"), q.row_stride()}, k_rows{k.data(), k.dtype("k"), k.row_stride()};
  void* q_data = q_out.data();
  void* k_data = k_out.data();
  for_rows(tokens, (heads + kv_heads) * dim, 2 * dim, [&](int64_t t, float* memory) {
    kernels().rotary(q_rows, heads, dim, cos_sin + position[t] * dim, q_data, t, memory);
    kernels().rotary(k_rows, kv_heads, dim, cos_sin + position[t] * dim, k_data, t, memory);
  });
  stack[0] = q_out.release();
  stack[1] = k_out.release();
}

void store_kv(Value* stack, uint64_t, uint64_t) {
  Tensor key_in(stack[0]), value_in(stack[1]);
  const Tensor k_cache(stack[2]), v_cache(stack[3]);
  Tensor slots_in(stack[4]);
  const Tensor key = std::move(key_in).dense_rows(), value = std::move(value_in).dense_rows(), slots = std::move(slots_in).dense();
  check_caches(k_cache, v_cache);
  if (slots.type() != Type::i64) fail("slot_mapping must be int64 [T]");
  if (key.dim() != 3) fail("key and value must be [T, Hkv, D], like the caches");
  Attention a{};
  a.kv_heads = static_cast<int>(k_cache.size(2)), a.dim = static_cast<int>(key.size(2)), a.row = row_of(k_cache, a.dim);
  const int64_t tokens = slots.numel(), width = static_cast<int64_t>(a.kv_heads) * a.dim, capacity = k_cache.size(0) * k_cache.size(1);
  for (const Tensor* source : {&key, &value})
    if (source->dim() != 3 || source->size(0) != tokens || source->size(1) * source->size(2) != width) fail("key and value must be [T, Hkv, D], like the caches");
  const int64_t* slot = static_cast<const int64_t*>(slots.data());
  for (int64_t t = 0; t < tokens; ++t)
    if (slot[t] < -1 || slot[t] >= capacity) fail("slot %lld is out of range: the cache has %lld", static_cast<long long>(slot[t]), static_cast<long long>(capacity));
  const Tensor *sources[] = {&key, &value}, *caches[] = {&k_cache, &v_cache};
  for (int i = 0; i < 2; ++i) {
    const Dtype dtype = sources[i]->dtype("key and value");
    const char* from = static_cast<const char*>(sources[i]->data());
    char* to = static_cast<char*>(caches[i]->data());
    const int64_t stride = sources[i]->row_stride() * static_cast<int64_t>(dtype_bytes(dtype));
    for_rows(tokens, width, 2 * width, [&](int64_t t, float* memory) {
      if (slot[t] >= 0) store_heads(a, from + t * stride, dtype, to + slot[t] * a.kv_heads * static_cast<int64_t>(a.row_bytes()), memory);
    });
  }
}

}  // namespace halfweight
