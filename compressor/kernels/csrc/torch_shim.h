// torch's stable C interface, found at run time in the libtorch_cpu that the process has already loaded: no torch headers, no
// link to torch, so one library serves every torch from 2.10 on. Signatures: torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace halfweight {

using Value = uint64_t;                    // one argument or result on the stack of a boxed operator
using Handle = struct TensorOpaque*;
using Boxed = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

// nullptr, or what is missing. Idempotent.
const char* load_torch();
const char* register_operator(const char* schema, const char* name, Boxed kernel);

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int num_threads();
template <class F> void parallel(int64_t begin, int64_t end, int64_t grain, F body) {
  parallel_for(begin, end, grain, [](int64_t b, int64_t e, void* f) { (*static_cast<F*>(f))(b, e); }, &body);
}

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Type { bf16, fp16, f32, i64, i32, u8, other };

// An argument of a boxed operator: owned, read-only metadata, contiguous memory.
class Tensor {
 public:
  explicit Tensor(Value v);                // takes ownership
  static Tensor optional(Value v);         // of a `Tensor?`; `!defined()` for None
  Tensor() = default;
  Tensor(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
  ~Tensor();
  bool defined() const { return handle_ != nullptr; }
  int dim() const;
  const int64_t* sizes() const;
  int64_t size(int i) const { return sizes()[i < 0 ? dim() + i : i]; }
  int64_t numel() const;
  Type type() const;
  bool contiguous(int from = 0) const;     // from this dimension on
  int64_t row_stride() const;              // elements from one index of dimension 0 to the next; inner ones are contiguous
  Tensor dense() &&;                       // itself, or a contiguous copy
  Tensor dense_rows() &&;                  // itself, or a contiguous copy where inner dimensions are not
  void* data() const;
  Value release() { Value v = reinterpret_cast<Value>(handle_); handle_ = nullptr; return v; }
  static Tensor empty(const int64_t* sizes, int dim, Type type);
  Dtype dtype(const char* what) const;     // fails unless a float type of ours

 private:
  Handle handle_ = nullptr;
};

// A `Tensor[]` argument, taken over: the list gives each of its items away once.
std::vector<Tensor> take_list(Value v);

template <class T> T take(Value v) { T out; __builtin_memcpy(&out, &v, sizeof out); return out; }  // int64, double, bool

}  // namespace halfweight
