// Retraining on a CPU: the optimiser's step, and the norm of the gradients before it.
#include "operators.h"
#include "scratch.h"

namespace halfweight {
namespace {

thread_local Scratch scratch;
constexpr int64_t kGrain = 1 << 15;  // values; below, waking another thread takes longer than the work

float* floats_of(const Tensor& x, int64_t count, const char* what) {
  if (x.type() != Type::f32 || !x.contiguous() || x.numel() != count) fail("%s must be %lld contiguous float32 values", what, static_cast<long long>(count));
  return static_cast<float*>(x.data());
}

uint8_t* mask_of(const Tensor& x, int64_t count) {
  if (x.type() != Type::u8 || !x.contiguous() || x.numel() != count) fail("mask must be contiguous uint8 of the master's size");
  return static_cast<uint8_t*>(x.data());
}

void* visible_of(const Tensor& x, int64_t count) {
  if (!x.contiguous() || x.numel() != count) fail("visible must be contiguous and of the master's size");
  return x.data();
}

}  // namespace

void adam_step(Value* stack, uint64_t, uint64_t) {
  const Tensor master(stack[0]), momentum(stack[1]), variance(stack[2]);
  Tensor gradient_in(stack[3]);
  const Tensor gradient = std::move(gradient_in).dense();
  const Tensor mask = Tensor::optional(stack[4]), visible = Tensor::optional(stack[5]), scales = Tensor::optional(stack[6]);
  const int64_t count = master.numel();
  AdamStep a{};
  a.master = floats_of(master, count, "master");
  a.momentum = floats_of(momentum, count, "momentum");
  a.variance = floats_of(variance, count, "variance");
  if (gradient.numel() != count) fail("the gradient has %lld values, the master %lld", static_cast<long long>(gradient.numel()), static_cast<long long>(count));
  a.gradient = gradient.data(), a.gradient_dtype = gradient.dtype("gradient");
  if (mask.defined()) a.mask = mask_of(mask, count);
  if (visible.defined()) a.visible = visible_of(visible, count), a.visible_dtype = visible.dtype("visible");
  if (scales.defined()) {
    const int64_t groups = scales.numel();
    if (groups == 0 || count % groups) fail("%lld scales do not divide %lld values", static_cast<long long>(groups), static_cast<long long>(count));
    a.scales = floats_of(scales, groups, "scales"), a.group = count / groups;
  }
  a.lowest = static_cast<float>(take<int64_t>(stack[7])), a.highest = static_cast<float>(take<int64_t>(stack[8]));
  float* const numbers[] = {&a.scale, &a.rate, &a.beta1, &a.beta2, &a.eps, &a.weight_decay, &a.mask_decay, &a.correction1, &a.correction2};
  for (int i = 0; i < 9; ++i) *numbers[i] = static_cast<float>(take<double>(stack[9 + i]));
  a.decoupled = take<bool>(stack[18]), a.prunes = take<bool>(stack[19]);
  // In pieces that do not depend on the threads: what is left of one is rounded otherwise than whole registers.
  parallel(0, (count + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kGrain; first < end * kGrain && first < count; first += kGrain)
      kernels().adam(a, first, count - first < kGrain ? count - first : kGrain);
  });
}

void refresh(Value* stack, uint64_t, uint64_t) {
  const Tensor master(stack[0]), mask(stack[1]), visible = Tensor::optional(stack[2]);
  const int64_t count = master.numel();
  MaskRefresh r{};
  r.master = floats_of(master, count, "master");
  const int64_t columns = master.dim() > 0 ? master.size(master.dim() - 1) : 0;
  if (columns % 4) fail("the master has rows of %lld values; 2:4 needs whole groups of four", static_cast<long long>(columns));
  r.mask = mask_of(mask, count);
  if (visible.defined()) r.visible = visible_of(visible, count), r.visible_dtype = visible.dtype("visible");
  const int64_t pieces = (count + kGrain - 1) / kGrain;
  std::vector<MaskCount> found(static_cast<size_t>(pieces));  // by piece, so that sums do not depend on the threads
  parallel(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kGrain, left = count - first;
      kernels().refresh(r, first, left < kGrain ? left : kGrain, &found[static_cast<size_t>(i)]);
    }
  });
  MaskCount sums{};
  for (const MaskCount& f : found) sums.changed += f.changed, sums.kept += f.kept, sums.total += f.total;
  stack[0] = static_cast<Value>(sums.changed);
  __builtin_memcpy(&stack[1], &sums.kept, sizeof sums.kept);
  __builtin_memcpy(&stack[2], &sums.total, sizeof sums.total);
}

void distil(Value* stack, uint64_t, uint64_t) {
  Tensor student_in(stack[0]), teacher_in = Tensor::optional(stack[1]), labels_in(stack[2]);
  const Tensor student = std::move(student_in).dense(), labels = std::move(labels_in).dense();
  const Tensor teacher = teacher_in.defined() ? std::move(teacher_in).dense() : Tensor();
  if (student.dim() != 2 || student.size(0) != labels.numel()) fail("student must be [rows, columns], labels [rows]");
  if (labels.type() != Type::i64) fail("labels must be int64");
  if (teacher.defined() && (teacher.dim() != 2 || teacher.size(0) != student.size(0) || teacher.size(1) != student.size(1)))
    fail("teacher must have the student's shape");
  const int64_t rows = student.size(0), columns = student.size(1);
  Distillation d{};
  d.student = student.data(), d.student_dtype = student.dtype("student");
  if (teacher.defined()) d.teacher = teacher.data(), d.teacher_dtype = teacher.dtype("teacher");
  d.labels = static_cast<const int64_t*>(labels.data());
  for (int64_t i = 0; i < rows; ++i)
    if (d.labels[i] < 0 || d.labels[i] >= columns) fail("label %lld is out of range: there are %lld columns", static_cast<long long>(d.labels[i]), static_cast<long long>(columns));
  d.columns = static_cast<int>(columns);
  d.kl_weight = static_cast<float>(take<double>(stack[3]));
  d.temperature = static_cast<float>(take<double>(stack[4]));
  d.scale = static_cast<float>(take<double>(stack[5]));
  const int64_t sizes[] = {rows, 2};
  Tensor slope = Tensor::empty(student.sizes(), 2, student.type()), sums = Tensor::empty(sizes, 2, Type::f32);
  d.slope = slope.data(), d.sums = static_cast<float*>(sums.data());
  parallel(0, rows, 1, [&](int64_t begin, int64_t end) {
    float* memory = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(distillation_floats(d.columns)) * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) kernels().distil(d, row, memory);
  });
  stack[0] = slope.release();
  stack[1] = sums.release();
}

// In pieces that do not depend on the number of threads: a run must give the same bits again.
void sum_squares(Value* stack, uint64_t, uint64_t) {
  Tensor x_in(stack[0]);
  const Tensor x = std::move(x_in).dense();
  const Dtype dtype = x.dtype("x");
  const int64_t count = x.numel(), pieces = (count + kGrain - 1) / kGrain;
  std::vector<double> sums(static_cast<size_t>(pieces));
  const void* data = x.data();
  parallel(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kGrain, left = count - first;
      sums[static_cast<size_t>(i)] = kernels().sum_squares(data, dtype, first, left < kGrain ? left : kGrain);
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  __builtin_memcpy(&stack[0], &total, sizeof total);
}

}  // namespace halfweight
