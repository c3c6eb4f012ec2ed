#include "linear_step.h"

#include <cstring>

namespace halfweight {
namespace {

char* aligned(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

float weight_factor(Format f) { return f == Format::sparse24_int4 || f == Format::int4 ? 16 : 1; }

void scatter(const Activations& a, int64_t t, const int8_t* row) {
  int8_t* to = a.quantised + t / kTileTokens * kTileTokens * a.columns + t % kTileTokens * a.tile;
  for (int k = 0; k < a.columns; k += a.tile, to += kTileTokens * a.tile) std::memcpy(to, row + k, static_cast<size_t>(a.tile));
}

}  // namespace

LinearStep::LinearStep(const Kernels& kernels, const Weight& weight, const Weight* branch, int tokens, bool exact)
    : kernels_(&kernels), weight_(&weight), branch_(branch) {
  tiles_ = !exact && is_quantised(weight.format) && kernels.linear_tiles && tokens >= kernels.tile_tokens &&
           (branch == nullptr || is_quantised(branch->format));
  padded_ = tiles_ ? (tokens + kTileTokens - 1) / kTileTokens * kTileTokens : tokens;
  input_ = plan(weight, tokens, exact);
  if (branch) sums_ = plan(*branch, tokens, exact || !is_quantised(weight.format));  // both run by the same function
}

LinearStep::Input LinearStep::plan(const Weight& w, int tokens, bool exact) const {
  Input in;
  in.int8 = !exact && is_quantised(w.format);
  in.a = {tokens, w.in_padded, nullptr, tiles_ ? tile_columns(w) : 0, nullptr, nullptr, w.groups};
  const size_t values = static_cast<size_t>(padded_) * w.in_padded;
  in.bytes = (in.int8 ? values : values * 4) + static_cast<size_t>(padded_) * w.groups * 4 + 192;
  return in;
}

char* LinearStep::place(Input& in, char* memory) const {
  memory = aligned(memory);
  const size_t values = static_cast<size_t>(padded_) * in.a.columns;
  if (in.int8) in.a.quantised = reinterpret_cast<int8_t*>(memory), memory += values;
  else in.a.floats = reinterpret_cast<float*>(memory), memory += values * 4;
  in.a.scales = reinterpret_cast<float*>(aligned(memory));
  return reinterpret_cast<char*>(in.a.scales) + static_cast<size_t>(padded_) * in.a.groups * 4;
}

char* LinearStep::place(char* memory) {
  memory = place(input_, memory);
  return branch_ ? place(sums_, memory) : memory;
}

size_t LinearStep::row_bytes() const {
  const int columns = branch_ && branch_->in_padded > weight_->in_padded ? branch_->in_padded : weight_->in_padded;
  return static_cast<size_t>(columns) * 5 + 64;
}

void LinearStep::fill(const Weight& w, const Input& in, const char* x, Dtype dtype, int64_t t, char* memory) const {
  const int columns = in.a.columns;
  float* row = in.int8 ? reinterpret_cast<float*>(aligned(memory)) : in.a.floats + t * columns;
  kernels_->to_float(x + t * weight_->in_features * dtype_bytes(dtype), dtype, weight_->in_features, w.segment, row, columns);
  float* scales = in.a.scales + t * in.a.groups;
  if (in.int8) {
    int8_t* out = in.a.tile ? reinterpret_cast<int8_t*>(row + columns) : in.a.quantised + t * columns;
    kernels_->quantise(row, columns, w.group, weight_factor(w.format), !tiles_ && kernels_->unsigned_x, out, scales);
    if (in.a.tile) scatter(in.a, t, out);
    return;
  }
  // 0 where all are finite, else NaN: (x - x) is 0 or NaN, and sums keep a NaN.
  float poison = 0;
  for (int i = 0; i < columns; ++i) poison += row[i] - row[i];
  scales[0] = poison;
}

void LinearStep::fill(const void* x, Dtype dtype, int64_t t, char* row) const {
  fill(*weight_, input_, static_cast<const char*>(x), dtype, t, row);
  if (branch_) fill(*branch_, sums_, static_cast<const char*>(x), dtype, t, row);
}

void LinearStep::run(const void* bias, Dtype bias_dtype, void* out, Dtype out_dtype, int64_t begin, int64_t end) const {
  const Linear call{weight_, input_.a, branch_, sums_.a, bias, bias_dtype, out, out_dtype};
  const auto blocks = tiles_ ? kernels_->linear_tiles : input_.int8 ? kernels_->linear_int8 : kernels_->linear_float;
  blocks(call, static_cast<int>(begin), static_cast<int>(end));
}

}  // namespace halfweight
