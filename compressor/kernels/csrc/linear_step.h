// A linear as a step of an operator: where its quantised input lies, how a token's is filled, how row blocks are run.
#pragma once
#include "kernels.h"

namespace halfweight {

class LinearStep {
 public:
  LinearStep() = default;
  // dtype: of x. branch: nullptr, or the low-rank branch's matrix over segment sums. Both must outlive the step.
  LinearStep(const Kernels& kernels, const Weight& weight, const Weight* branch, int tokens, Dtype dtype, bool exact);

  size_t bytes() const { return input_.bytes + (branch_ ? sums_.bytes : 0); }
  char* place(char* memory);  // takes bytes() of working memory, any alignment; returns its end
  size_t row_bytes() const;   // working memory of fill()
  // Where x [tokens][in_features] will lie for fill() and run(): bf16 rows may be read where they are.
  void read(const void* x) { input_.a.rows = in_place_ ? static_cast<const uint16_t*>(x) : nullptr; }
  // Brings token `t` of x to the form the weight wants.
  void fill(const void* x, Dtype dtype, int64_t t, char* row) const;
  int blocks() const { return weight_->blocks; }
  // Row blocks [begin, end), all tokens. bias: nullptr or [out_features]; out: [tokens][out_features].
  void run(const void* bias, Dtype bias_dtype, void* out, Dtype out_dtype, int64_t begin, int64_t end) const;

 private:
  enum class Path { floats, int8, panels, tiles, halves };
  // How one weight wants its input.
  struct Input {
    Activations a{};
    Path path = Path::floats;
    size_t bytes = 0;
  };
  Path choose(int tokens, Dtype dtype, bool exact) const;
  Input plan(const Weight& w, int tokens, Path path) const;
  char* place(Input& in, char* memory) const;
  void fill(const Weight& w, const Input& in, const char* x, Dtype dtype, int64_t t, char* row) const;

  const Kernels* kernels_ = nullptr;
  const Weight* weight_ = nullptr;
  const Weight* branch_ = nullptr;
  Path path_ = Path::floats;
  bool in_place_ = false;
  int padded_ = 0;  // tokens, rounded up to whole tiles
  Input input_, sums_;
};

}  // namespace halfweight
