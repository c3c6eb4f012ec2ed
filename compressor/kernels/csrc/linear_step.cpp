#include "linear_step.h"

#include <cstring>

namespace halfweight {
namespace {

char* aligned(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

// Rows of a multiple of 2 KB would share two sets of the first-level cache: such tiles are better copied.
bool tiles_of_rows(const Weight& w) { return w.in_features == w.in_padded && w.in_features % 1024 != 0; }

float weight_factor(Format f) { return is_int4(f) ? 16 : 1; }

// Row `t` into tiles [tokens / 16][columns / tile][16][tile].
template <class T> void scatter(T* tiles, int columns, int tile, int64_t t, const T* row) {
  T* to = tiles + t / kTileTokens * kTileTokens * columns + t % kTileTokens * tile;
  for (int k = 0; k < columns; k += tile, to += kTileTokens * tile) std::memcpy(to, row + k, static_cast<size_t>(tile) * sizeof(T));
}

}  // namespace

LinearStep::LinearStep(const Kernels& kernels, const Weight& weight, const Weight* branch, int tokens, Dtype dtype, bool exact)
    : kernels_(&kernels), weight_(&weight), branch_(branch) {
  path_ = choose(tokens, dtype, exact);
  const bool tiles = path_ == Path::tiles || path_ == Path::halves;
  padded_ = tiles ? (tokens + kTileTokens - 1) / kTileTokens * kTileTokens : tokens;
  in_place_ = path_ == Path::halves && dtype == Dtype::bf16 && tiles_of_rows(weight);
  input_ = plan(weight, tokens, path_);
  // A branch has no panels, and an unquantised one beside int8 has floats; both run by the same function.
  const Path of_branch = path_ == Path::panels ? Path::int8 : path_;
  if (branch) sums_ = plan(*branch, tokens, of_branch == Path::int8 && !is_quantised(branch->format) ? Path::floats : of_branch);
}

LinearStep::Path LinearStep::choose(int tokens, Dtype dtype, bool exact) const {
  if (exact) return Path::floats;
  const bool quantised = is_quantised(weight_->format), halves = weight_->half == Half::bf16 && dtype == Dtype::bf16;
  const bool branch_quantised = branch_ == nullptr || is_quantised(branch_->format);
  if (kernels_->linear_halves && tokens >= half_tokens(weight_->format) && !batch_invariant() && (quantised || halves) &&
      (branch_quantised || branch_->half == Half::bf16))
    return Path::halves;
  if (!quantised) return Path::floats;
  if (kernels_->linear_tiles && tokens >= kernels_->tile_tokens && branch_quantised) return Path::tiles;
  return kernels_->linear_panels && tokens >= kernels_->panel_tokens && takes_panels(*weight_) ? Path::panels : Path::int8;
}

LinearStep::Input LinearStep::plan(const Weight& w, int tokens, Path path) const {
  Input in;
  in.path = path;
  in.a = {tokens, w.in_padded, nullptr, path == Path::tiles ? tile_columns(w) : 0, nullptr, nullptr, nullptr, nullptr, w.groups};
  const size_t values = static_cast<size_t>(padded_) * w.in_padded;
  const size_t size = path == Path::floats ? 4 : path == Path::halves ? 2 : 1;
  in.bytes = values * size + static_cast<size_t>(padded_) * w.groups * 4 + 192;
  return in;
}

char* LinearStep::place(Input& in, char* memory) const {
  memory = aligned(memory);
  const size_t values = static_cast<size_t>(padded_) * in.a.columns;
  if (in.path == Path::floats) in.a.floats = reinterpret_cast<float*>(memory), memory += values * 4;
  else if (in.path == Path::halves) in.a.halves = reinterpret_cast<uint16_t*>(memory), memory += values * 2;
  else in.a.quantised = reinterpret_cast<int8_t*>(memory), memory += values;
  in.a.scales = reinterpret_cast<float*>(aligned(memory));
  return reinterpret_cast<char*>(in.a.scales) + static_cast<size_t>(padded_) * in.a.groups * 4;
}

char* LinearStep::place(char* memory) {
  memory = place(input_, memory);
  return branch_ ? place(sums_, memory) : memory;
}

size_t LinearStep::row_bytes() const {
  const int columns = branch_ && branch_->in_padded > weight_->in_padded ? branch_->in_padded : weight_->in_padded;
  return static_cast<size_t>(columns) * 6 + 64;
}

void LinearStep::fill(const Weight& w, const Input& in, const char* x, Dtype dtype, int64_t t, char* memory) const {
  const int columns = in.a.columns;
  if (in.a.rows && t < in.a.tokens / kTileTokens * kTileTokens) return;
  float* row = in.path == Path::floats ? in.a.floats + t * columns : reinterpret_cast<float*>(aligned(memory));
  x += t * weight_->in_features * static_cast<int64_t>(dtype_bytes(dtype));
  if (in.path == Path::halves) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(row + columns);
    kernels_->to_halves(x, dtype, weight_->in_features, w.segment, halves, columns, row);
    return scatter(in.a.halves, columns, kHalfColumns, t, halves);
  }
  kernels_->to_float(x, dtype, weight_->in_features, w.segment, row, columns);
  float* scales = in.a.scales + t * in.a.groups;
  if (in.path != Path::floats) {
    int8_t* out = in.a.tile ? reinterpret_cast<int8_t*>(row + columns) : in.a.quantised + t * columns;
    const bool as_unsigned = in.path != Path::tiles && kernels_->unsigned_x(w.format);
    kernels_->quantise(row, columns, w.group, weight_factor(w.format), as_unsigned, out, scales);
    if (in.a.tile) scatter(in.a.quantised, columns, in.a.tile, t, out);
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
  const auto blocks = path_ == Path::halves  ? kernels_->linear_halves
                      : path_ == Path::tiles ? kernels_->linear_tiles
                      : path_ == Path::panels ? kernels_->linear_panels
                      : path_ == Path::int8  ? kernels_->linear_int8
                                             : kernels_->linear_float;
  blocks(call, static_cast<int>(begin), static_cast<int>(end));
}

}  // namespace halfweight
