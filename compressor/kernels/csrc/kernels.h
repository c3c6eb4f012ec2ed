// What one instruction set offers: a table of functions, filled by its own translation unit (isa_*.cpp), chosen at run time.
#pragma once
#include "layout.h"

namespace halfweight {

enum class Dtype : int { bf16, fp16, f32 };
HW_INLINE constexpr size_t dtype_bytes(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// Activations of one linear, as its kernel wants them: int8 with a scale per group, or float.
struct Activations {
  int tokens, columns;      // columns = in_padded, zero-filled behind in_features
  int8_t* quantised;        // [tokens][columns]; value + 128 where the kernel asks for unsigned ones
  float* scales;            // [tokens][groups]
  float* floats;            // [tokens][columns]
  int groups;
};

struct Linear {
  const Weight* weight;
  Activations x;
  const Weight* low_rank;   // nullptr: none; an int8 or dense weight over the segment sums of x
  Activations sums;
  const void* bias;         // nullptr or [out_features] in bias_dtype
  Dtype bias_dtype;
  void* out;                // [tokens][out_features]
  Dtype out_dtype;
};

struct Attention {
  const void* query;        // [tokens][heads][dim]
  const uint16_t* keys;     // bf16 [blocks][block_size][kv_heads][dim]
  const uint16_t* values;
  const int32_t* tables;    // [sequences][max_blocks]
  const int32_t* starts;    // [sequences + 1]
  const int32_t* lengths;   // [sequences]
  void* out;
  Dtype dtype;
  int heads, kv_heads, dim, block_size, max_blocks;
  float scale;
};

struct Kernels {
  const char* name;
  bool unsigned_x;
  // Row `t` of x [tokens][in] as float, summed over `segment` if that is not 0, zero-filled up to `columns`.
  void (*to_float)(const void* x, Dtype dtype, int in, int segment, float* out, int columns);
  // One row to int8 in groups; `factor` multiplies every scale. A group with a NaN or an infinity gets the scale NaN.
  void (*quantise)(const float* x, int columns, int group, float factor, bool as_unsigned, int8_t* out, float* scales);
  // Row blocks [begin, end) of a linear; weights int8-quantised x int8 activations, or float activations ("exact").
  void (*linear_int8)(const Linear& call, int begin, int end);
  void (*linear_float)(const Linear& call, int begin, int end);
  // The same with matrix tiles; nullptr where the instruction set has none. Used from `tile_tokens` tokens on; takes signed x.
  void (*linear_tiles)(const Linear& call, int begin, int end);
  int tile_tokens;
  void (*rows)(const Weight& w, const int64_t* ids, int64_t begin, int64_t end, void* out, Dtype dtype);
  void (*rms_norm)(const void* x, const void* residual, const void* weight, Dtype dtype, int columns, float eps, void* out, void* sum, int64_t begin, int64_t end);
  void (*silu_and_mul)(const void* x, Dtype dtype, int columns, void* out, int64_t begin, int64_t end);
  void (*rotary)(const void* x, Dtype dtype, int heads, int dim, const float* cos_sin, const int64_t* positions, void* out, int64_t begin, int64_t end);
  void (*to_bf16)(const void* x, Dtype dtype, uint16_t* out, int64_t count);
  // Queries [first, first + count) of one sequence's kv head over cached keys [key_begin, key_end): unnormalised sums with their maxima.
  void (*attention)(const Attention& a, int sequence, int kv_head, int first, int count, int key_begin, int key_end, float* sums, float* maxima, float* weights);
  void (*from_float)(const float* x, void* out, Dtype dtype, int64_t count);
};

extern const Kernels* const kScalar;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx2Vnni;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx512Vnni;
extern const Kernels* const kAmx;
extern const Kernels* const kNeon;

const Kernels& kernels();              // the best this machine has, or HALFWEIGHT_ISA's
const char* isa_error();               // why HALFWEIGHT_ISA was not followed, or nullptr
const char* supported_isas();          // comma-separated, best first

}  // namespace halfweight
