// linear: quantise the activations, then share the row blocks among torch's threads.
#include <cstring>
#include <utility>

#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch activations_scratch, row_scratch;

constexpr int64_t kSerialActivations = 32768;  // below, waking the other threads takes longer than the work

// How one weight wants its input.
struct Input {
  Activations a;
  bool int8, as_unsigned;
  size_t bytes;
};

Input plan_input(const Weight& w, int tokens, bool int8, bool as_unsigned, bool tiles, int padded_tokens) {
  Input in{};
  in.int8 = int8 && is_quantised(w.format);
  in.as_unsigned = as_unsigned;
  in.a = {tokens, w.in_padded, nullptr, tiles ? tile_columns(w) : 0, nullptr, nullptr, w.groups};
  const size_t values = static_cast<size_t>(padded_tokens) * w.in_padded;
  in.bytes = (in.int8 ? values : values * 4) + static_cast<size_t>(padded_tokens) * w.groups * 4 + 192;
  return in;
}

char* place(Input& in, char* memory, int padded_tokens) {
  const auto align = [](char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); };
  memory = align(memory);
  const size_t values = static_cast<size_t>(padded_tokens) * in.a.columns;
  if (in.int8) in.a.quantised = reinterpret_cast<int8_t*>(memory), memory += values;
  else in.a.floats = reinterpret_cast<float*>(memory), memory += values * 4;
  in.a.scales = reinterpret_cast<float*>(align(memory));
  return reinterpret_cast<char*>(in.a.scales) + static_cast<size_t>(padded_tokens) * in.a.groups * 4;
}

float weight_factor(Format f) { return f == Format::sparse24_int4 || f == Format::int4 ? 16 : 1; }

void scatter(const Activations& a, int64_t t, const int8_t* row) {
  int8_t* to = a.quantised + t / kTileTokens * kTileTokens * a.columns + t % kTileTokens * a.tile;
  for (int k = 0; k < a.columns; k += a.tile, to += kTileTokens * a.tile) std::memcpy(to, row + k, static_cast<size_t>(a.tile));
}

void fill_row(const Kernels& k, const Weight& w, Input& in, const char* x, Dtype dtype, int features, int64_t t) {
  const int columns = in.a.columns;
  float* row = in.int8 ? reinterpret_cast<float*>(row_scratch.get(static_cast<size_t>(columns) * 5)) : in.a.floats + t * columns;
  k.to_float(x + t * features * dtype_bytes(dtype), dtype, features, w.segment, row, columns);
  float* scales = in.a.scales + t * in.a.groups;
  if (in.int8) {
    int8_t* out = in.a.tile ? reinterpret_cast<int8_t*>(row + columns) : in.a.quantised + t * columns;
    k.quantise(row, columns, w.group, weight_factor(w.format), in.as_unsigned, out, scales);
    if (in.a.tile) scatter(in.a, t, out);
    return;
  }
  // 0 where all are finite, else NaN: (x - x) is 0 or NaN, and sums keep a NaN.
  float poison = 0;
  for (int i = 0; i < columns; ++i) poison += row[i] - row[i];
  scales[0] = poison;
}

void fill(const Kernels& k, const Weight& w, Input& in, const char* x, Dtype dtype, int features) {
  const int64_t tokens = in.a.tokens;
  const int64_t grain = tokens * features < kSerialActivations ? tokens : 1;
  parallel(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) fill_row(k, w, in, x, dtype, features, t);
  });
}

}  // namespace

Weight parsed(const Tensor& blob, const char* what) {
  Weight w;
  if (blob.type() != Type::u8 || blob.dim() != 2 || !blob.contiguous()) fail("%s must be a contiguous uint8 matrix made by prepare()", what);
  const char* error = parse(static_cast<const uint8_t*>(blob.data()), static_cast<size_t>(blob.numel()), &w);
  if (error) fail("%s: %s", what, error);
  if (blob.size(0) != w.out_features) fail("%s has %lld rows, its header says %d", what, static_cast<long long>(blob.size(0)), w.out_features);
  return w;
}

void linear(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]), blob(stack[1]);
  const Tensor bias_in = Tensor::optional(stack[2]), low_rank_blob = Tensor::optional(stack[3]);
  const bool exact = take<bool>(stack[4]);
  const Tensor x = std::move(x_in).dense();
  const Weight w = parsed(blob, "weight");
  Weight branch{};
  if (low_rank_blob.defined()) branch = parsed(low_rank_blob, "low_rank");

  const int dim = x.dim();
  if (dim < 1 || x.size(-1) != w.in_features)
    fail("x has %lld features, the weight %d", static_cast<long long>(dim < 1 ? 0 : x.size(-1)), w.in_features);
  if (low_rank_blob.defined() && (branch.segment < 1 || branch.out_features != w.out_features ||
                                  static_cast<int64_t>(branch.in_features) * branch.segment != w.in_features))
    fail("low_rank is [%d, %d] over segments of %d; the weight is [%d, %d]", branch.out_features, branch.in_features, branch.segment, w.out_features, w.in_features);
  if (bias_in.defined() && (bias_in.numel() != w.out_features || !bias_in.contiguous()))
    fail("bias must be contiguous with %d elements", w.out_features);
  const Dtype dtype = x.dtype("x");

  int64_t sizes[16], rows = 1;
  if (dim > 16) fail("x has rank %d; at most 16 is accepted", dim);
  for (int i = 0; i < dim; ++i) sizes[i] = x.size(i);
  for (int i = 0; i < dim - 1; ++i) rows *= sizes[i];
  sizes[dim - 1] = w.out_features;
  if (rows > 1 << 24) fail("x has %lld rows; at most %d are accepted", static_cast<long long>(rows), 1 << 24);
  Tensor out = Tensor::empty(sizes, dim, static_cast<Type>(dtype));
  const int tokens = static_cast<int>(rows);
  if (tokens > 0 && w.out_features > 0) {
    const Kernels& k = kernels();
    const bool tiles = !exact && is_quantised(w.format) && k.linear_tiles && tokens >= k.tile_tokens && (!low_rank_blob.defined() || is_quantised(branch.format));
    const int padded = tiles ? (tokens + kTileTokens - 1) / kTileTokens * kTileTokens : tokens;
    Input in = plan_input(w, tokens, !exact, !tiles && k.unsigned_x, tiles, padded);
    Input sums{};
    if (low_rank_blob.defined()) sums = plan_input(branch, tokens, !exact, !tiles && k.unsigned_x, tiles, padded);
    char* memory = place(in, activations_scratch.get(in.bytes + sums.bytes), padded);
    const char* data = static_cast<const char*>(x.data());
    fill(k, w, in, data, dtype, w.in_features);
    if (low_rank_blob.defined()) {
      place(sums, memory, padded);
      fill(k, branch, sums, data, dtype, w.in_features);
    }
    const Linear call{&w, in.a, low_rank_blob.defined() ? &branch : nullptr, sums.a, bias_in.defined() ? bias_in.data() : nullptr,
                      bias_in.defined() ? bias_in.dtype("bias") : dtype, out.data(), dtype};
    const auto run = tiles ? k.linear_tiles : in.int8 ? k.linear_int8 : k.linear_float;
    parallel(0, w.blocks, 1, [&](int64_t begin, int64_t end) { run(call, static_cast<int>(begin), static_cast<int>(end)); });
  }
  stack[0] = out.release();
}

}  // namespace halfweight
