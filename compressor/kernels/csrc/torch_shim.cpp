#include "torch_shim.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace halfweight {
namespace {

using Error = int32_t;
using Library = struct LibraryOpaque*;
using Range = void (*)(int64_t, int64_t, void*);

struct Shim {
  Error (*library)(const char* ns, const char* file, uint32_t line, Library* out);
  Error (*implementations)(const char* ns, const char* key, const char* file, uint32_t line, Library* out);
  Error (*define)(Library, const char* schema);
  Error (*implement)(Library, const char* name, Boxed);
  Error (*delete_tensor)(Handle);
  Error (*dim)(Handle, int64_t*);
  Error (*sizes)(Handle, int64_t**);
  Error (*strides)(Handle, int64_t**);
  Error (*data)(Handle, void**);
  Error (*dtype)(Handle, int32_t*);
  Error (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  Error (*copy)(Handle self, Handle src, int32_t non_blocking);
  Error (*parallel_for)(int64_t, int64_t, int64_t, Range, void*);
  Error (*num_threads)(uint32_t*);
  Error (*list_size)(Value, size_t*);
  Error (*list_item)(Value, size_t, Value*);
  Error (*delete_list)(Value);
  Error (*delete_value)(Value*);  // from torch 2.13; before, values were plain `new`
  int32_t cpu, types[6];          // in the order of Type
} shim;
bool loaded = false;
char missing[128];

void check(Error error, const char* what) {
  if (error != 0) fail("torch could not %s", what);
}

template <class F> bool find(void* torch, const char* name, F* out) {
  *reinterpret_cast<void**>(out) = dlsym(torch, name);
  if (*out == nullptr) std::snprintf(missing, sizeof missing, "this torch has no %s (torch 2.10 or newer is needed)", name);
  return *out != nullptr;
}

int32_t constant(void* torch, const char* name) {
  int32_t (*get)();
  return find(torch, name, &get) ? get() : -1;
}

}  // namespace

const char* load_torch() {
  if (loaded) return nullptr;
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (torch == nullptr) return "libtorch_cpu.so is not loaded: import torch first";
  const bool found =
      find(torch, "aoti_torch_library_init_fragment", &shim.library) &&
      find(torch, "aoti_torch_library_init_impl", &shim.implementations) &&
      find(torch, "aoti_torch_library_def", &shim.define) && find(torch, "aoti_torch_library_impl", &shim.implement) &&
      find(torch, "aoti_torch_delete_tensor_object", &shim.delete_tensor) &&
      find(torch, "aoti_torch_get_dim", &shim.dim) && find(torch, "aoti_torch_get_sizes", &shim.sizes) &&
      find(torch, "aoti_torch_get_strides", &shim.strides) && find(torch, "aoti_torch_get_data_ptr", &shim.data) &&
      find(torch, "aoti_torch_get_dtype", &shim.dtype) && find(torch, "aoti_torch_empty_strided", &shim.empty) &&
      find(torch, "aoti_torch_copy_", &shim.copy) && find(torch, "torch_parallel_for", &shim.parallel_for) &&
      find(torch, "torch_get_num_threads", &shim.num_threads) && find(torch, "torch_list_size", &shim.list_size) &&
      find(torch, "torch_list_get_item", &shim.list_item) && find(torch, "torch_delete_list", &shim.delete_list);
  if (!found) return missing;
  *reinterpret_cast<void**>(&shim.delete_value) = dlsym(torch, "torch_delete_stable_ivalue");
  missing[0] = 0;
  shim.cpu = constant(torch, "aoti_torch_device_type_cpu");
  const char* names[] = {"bfloat16", "float16", "float32", "int64", "int32", "uint8"};
  for (int i = 0; i < 6; ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "aoti_torch_dtype_%s", names[i]);
    shim.types[i] = constant(torch, name);
  }
  if (missing[0]) return missing;
  loaded = true;
  return nullptr;
}

const char* register_operator(const char* schema, const char* name, Boxed kernel) {
  // One fragment for all definitions and one for all kernels; both live as long as the process.
  static Library definitions = nullptr, kernels = nullptr;
  if (!definitions && shim.library("halfweight", __FILE__, __LINE__, &definitions) != 0) return "torch refused a library";
  if (!kernels && shim.implementations("halfweight", "CPU", __FILE__, __LINE__, &kernels) != 0) return "torch refused a library";
  if (shim.define(definitions, schema) != 0 || shim.implement(kernels, name, kernel) != 0) return schema;
  return nullptr;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, Range body, void* context) {
  if (end > begin) check(shim.parallel_for(begin, end, grain, body, context), "run in parallel");
}

int num_threads() {
  uint32_t n = 1;
  check(shim.num_threads(&n), "tell its number of threads");
  return static_cast<int>(n);
}

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw std::runtime_error(message);
}

Tensor::Tensor(Value v) : handle_(reinterpret_cast<Handle>(v)) {}

Tensor Tensor::optional(Value v) {
  Value* boxed = reinterpret_cast<Value*>(v);
  if (boxed == nullptr) return Tensor();
  Tensor tensor(*boxed);
  if (shim.delete_value) shim.delete_value(boxed);
  else delete boxed;
  return tensor;
}

Tensor::~Tensor() {
  if (handle_) shim.delete_tensor(handle_);
}

std::vector<Tensor> take_list(Value list) {
  size_t size = 0;
  check(shim.list_size(list, &size), "tell a list's length");
  std::vector<Tensor> tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    Value item = 0;
    check(shim.list_item(list, i, &item), "take an item of a list");
    tensors.emplace_back(item);
  }
  check(shim.delete_list(list), "delete a list");
  return tensors;
}

int Tensor::dim() const {
  int64_t n = 0;
  check(shim.dim(handle_, &n), "tell a tensor's rank");
  return static_cast<int>(n);
}
const int64_t* Tensor::sizes() const {
  int64_t* sizes = nullptr;
  check(shim.sizes(handle_, &sizes), "tell a tensor's sizes");
  return sizes;
}
int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < dim(); ++i) n *= sizes()[i];
  return n;
}
Type Tensor::type() const {
  int32_t type = -1;
  check(shim.dtype(handle_, &type), "tell a tensor's dtype");
  for (int i = 0; i < 6; ++i)
    if (shim.types[i] == type) return static_cast<Type>(i);
  return Type::other;
}
bool Tensor::contiguous(int from) const {
  int64_t* strides = nullptr;
  check(shim.strides(handle_, &strides), "tell a tensor's strides");
  const int64_t* n = sizes();
  int64_t expected = 1;
  for (int i = dim() - 1; i >= from; --i) {
    if (n[i] == 0) return true;
    if (n[i] != 1 && strides[i] != expected) return false;
    expected *= n[i];
  }
  return true;
}
Tensor Tensor::dense() && {
  if (contiguous()) return std::move(*this);
  Tensor copy = empty(sizes(), dim(), type());
  check(shim.copy(copy.handle_, handle_, 0), "copy a tensor");
  return copy;
}
Tensor Tensor::dense_rows() && {
  return contiguous(1) ? std::move(*this) : std::move(*this).dense();
}
int64_t Tensor::row_stride() const {
  int64_t* strides = nullptr;
  check(shim.strides(handle_, &strides), "tell a tensor's strides");
  return strides[0];
}
void* Tensor::data() const {
  void* data = nullptr;
  check(shim.data(handle_, &data), "tell a tensor's address");
  return data;
}
Tensor Tensor::empty(const int64_t* sizes, int dim, Type type) {
  if (type == Type::other) fail("a tensor of this dtype cannot be made here");
  if (dim > 16) fail("a tensor of rank %d; at most 16 is accepted", dim);
  int64_t strides[16], stride = 1;
  for (int i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  Tensor out;
  check(shim.empty(dim, sizes, strides, shim.types[static_cast<int>(type)], shim.cpu, 0, &out.handle_), "allocate a tensor");
  return out;
}
Dtype Tensor::dtype(const char* what) const {
  const Type t = type();
  if (t > Type::f32) fail("%s must be bfloat16, float16 or float32", what);
  return static_cast<Dtype>(t);
}

}  // namespace halfweight
