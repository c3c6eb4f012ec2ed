// linear: quantise the activations, then share the row blocks among torch's threads.
#include <utility>

#include "linear_step.h"
#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch activations_scratch, row_scratch;

constexpr int64_t kSerialActivations = 32768;  // below, waking the other threads takes longer than the work

}  // namespace

Weight parsed(const Tensor& blob, const char* what) {
  Weight w;
  if (blob.type() != Type::u8 || blob.dim() != 2 || !blob.contiguous()) fail("%s must be a contiguous uint8 matrix made by prepare()", what);
  const char* error = parse(static_cast<const uint8_t*>(blob.data()), static_cast<size_t>(blob.numel()), &w);
  if (error) fail("%s: %s", what, error);
  if (blob.size(0) != w.out_features) fail("%s has %lld rows, its header says %d", what, static_cast<long long>(blob.size(0)), w.out_features);
  return w;
}

void check_branch(const Weight& branch, const Weight& w, const char* what) {
  if (branch.segment < 1 || branch.out_features != w.out_features || static_cast<int64_t>(branch.in_features) * branch.segment != w.in_features)
    fail("%s is [%d, %d] over segments of %d; the weight is [%d, %d]", what, branch.out_features, branch.in_features, branch.segment, w.out_features, w.in_features);
}

void check_bias(const Tensor& bias, const Weight& w, const char* what) {
  if (bias.numel() != w.out_features || !bias.contiguous()) fail("%s must be contiguous with %d elements", what, w.out_features);
}

void linear(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]), blob(stack[1]);
  const Tensor bias = Tensor::optional(stack[2]), low_rank = Tensor::optional(stack[3]);
  const bool exact = take<bool>(stack[4]);
  const Tensor x = std::move(x_in).dense();
  const Weight w = parsed(blob, "weight");
  Weight branch{};
  if (low_rank.defined()) {
    branch = parsed(low_rank, "low_rank");
    check_branch(branch, w, "low_rank");
  }
  if (bias.defined()) check_bias(bias, w, "bias");

  const int dim = x.dim();
  if (dim < 1 || x.size(-1) != w.in_features)
    fail("x has %lld features, the weight %d", static_cast<long long>(dim < 1 ? 0 : x.size(-1)), w.in_features);
  const Dtype dtype = x.dtype("x");

  int64_t sizes[16], rows = 1;
  if (dim > 16) fail("x has rank %d; at most 16 is accepted", dim);
  for (int i = 0; i < dim; ++i) sizes[i] = x.size(i);
  for (int i = 0; i < dim - 1; ++i) rows *= sizes[i];
  sizes[dim - 1] = w.out_features;
  if (rows > 1 << 24) fail("x has %lld rows; at most %d are accepted", static_cast<long long>(rows), 1 << 24);
  Tensor out = Tensor::empty(sizes, dim, static_cast<Type>(dtype));
  if (rows > 0 && w.out_features > 0) {
    LinearStep step(kernels(), w, low_rank.defined() ? &branch : nullptr, static_cast<int>(rows), dtype, exact);
    step.place(activations_scratch.get(step.bytes()));
    const void *data = x.data(), *offsets = bias.defined() ? bias.data() : nullptr;
    const Dtype bias_dtype = bias.defined() ? bias.dtype("bias") : dtype;
    void* result = out.data();
    step.read(data);
    parallel(0, rows, rows * w.in_features < kSerialActivations ? rows : 1, [&](int64_t begin, int64_t end) {
      char* row = row_scratch.get(step.row_bytes());
      for (int64_t t = begin; t < end; ++t) step.fill(data, dtype, t, row);
    });
    parallel(0, w.blocks, 1, [&](int64_t begin, int64_t end) { step.run(offsets, bias_dtype, result, dtype, begin, end); });
  }
  stack[0] = out.release();
}

}  // namespace halfweight
