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
  int tile;                 // 0, or for tiles: [tokens / 16][columns / tile][16][tile], so that a tile is one piece of memory
  float* scales;            // [tokens][groups]
  float* floats;            // [tokens][columns]
  uint16_t* halves;         // bf16 tiles: [tokens / 16][columns / 32][16][32]
  const uint16_t* rows;     // nullptr, or the same as bf16 rows [tokens][columns]: whole tiles of tokens are read from here
  int groups;
};

// From so many tokens on bf16 tiles are faster than int8 ones: to unpack int8 to bf16 takes longer than to copy it.
HW_INLINE int half_tokens(Format f) { return f == Format::int8 ? 96 : f == Format::int4 || f == Format::sparse24_int8 ? 64 : 17; }

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

// A head's row in a cache: dim bf16 values; dim int8 ones and the float factor that they share; or dim e4m3 ones.
enum class CacheRow { bf16, int8, fp8 };

struct Attention {
  const void* query;        // [tokens][heads][dim], query_stride elements from token to token
  const char* keys;         // [blocks][block_size][kv_heads][row]
  const char* values;
  const int32_t* tables;    // [sequences][max_blocks]
  const int32_t* starts;    // [sequences + 1]
  const int32_t* lengths;   // [sequences]
  Dtype dtype;
  int heads, kv_heads, dim, block_size, max_blocks;
  int64_t query_stride;
  float scale;
  CacheRow row;
  HW_INLINE size_t row_bytes() const {
    return static_cast<size_t>(dim) * (row == CacheRow::bf16 ? 2 : 1) + (row == CacheRow::int8 ? sizeof(float) : 0);
  }
};

constexpr int kAttentionRows = 64;
HW_INLINE size_t attention_floats(int dim) {
  return static_cast<size_t>(3 * kAttentionRows) * dim + kAttentionRows * kAttentionRows;
}

constexpr int kPanelChunks = 48;  // of a row block, unpacked at a time
HW_INLINE bool takes_panels(const Weight& w) { return is_quantised(w.format) && w.format != Format::int8 && w.group <= kPanelChunks * kChunk; }

constexpr int kTileTokens = 16;
constexpr int kHalfColumns = 32;  // of a tile of bf16
HW_INLINE int tile_columns(const Weight& w) { return w.group % 64 == 0 ? 64 : 32; }

// One piece of work: queries [first, first + count) of a sequence, one kv head, keys [key_begin, key_end).
struct AttentionPart {
  int sequence, kv_head, first, count, key_begin, key_end;
};

// Rows of a matrix in one of our dtypes.
struct RowsOf {
  const void* data;
  Dtype dtype;
  int64_t stride;  // elements from row to row
};

// One step of Adam on a trained tensor, with AST's decay of masked weights (retraining/optimizers.py).
struct AdamStep {
  float *master, *momentum, *variance;
  const void* gradient;
  const uint8_t* mask;      // nullptr: nothing is masked; else 1 for a kept value and 0 for a masked one
  void* visible;            // nullptr, or what the forward sees: the master, or with `prunes` the kept part of it
  const float* scales;      // nullptr, or of each `group` values in turn: visible ones are rounded to whole multiples of it
  int64_t group;
  Dtype gradient_dtype, visible_dtype;
  float scale, rate, beta1, beta2, eps, weight_decay, mask_decay;
  float correction1, correction2;  // what the first moment and the root of the second are divided by
  float lowest, highest;    // multiples of a scale
  bool decoupled, prunes;
};

// A 2:4 mask chosen anew by |W|; ties go to the earlier position (masks.py).
struct MaskRefresh {
  const float* master;
  uint8_t* mask;
  void* visible;  // nullptr, or what the forward sees, M*W
  Dtype visible_dtype;
};
struct MaskCount {
  int64_t changed;      // mask bits
  double kept, total;   // sums of |w|
};

// Loss of a student against a teacher, and its slope, a row of logits at a time (retraining/distillation.py).
struct Distillation {
  const void *student, *teacher;  // [rows][columns]; teacher: nullptr for cross-entropy alone
  const int64_t* labels;          // [rows]
  void* slope;                    // [rows][columns] in student_dtype: of the loss, times `scale`
  float* sums;                    // [rows][2]: KL times the temperature squared, cross-entropy
  Dtype student_dtype, teacher_dtype;
  int columns;
  float kl_weight, temperature, scale;
};
constexpr int kLossLanes = 64;
HW_INLINE int64_t distillation_floats(int columns) { return 3 * static_cast<int64_t>((columns + kLossLanes - 1) / kLossLanes * kLossLanes); }

struct Kernels {
  const char* name;
  // Row `t` of x [tokens][in] as float, summed over `segment` if that is not 0, zero-filled up to `columns`.
  void (*to_float)(const void* x, Dtype dtype, int in, int segment, float* out, int columns);
  // The same in bf16; memory: `columns` floats.
  void (*to_halves)(const void* x, Dtype dtype, int in, int segment, uint16_t* out, int columns, float* memory);
  // One row to int8 in groups; `factor` multiplies every scale. A group with a NaN or an infinity gets the scale NaN.
  void (*quantise)(const float* x, int columns, int group, float factor, bool as_unsigned, int8_t* out, float* scales);
  bool (*unsigned_x)(Format f);  // whether linear_int8 and linear_panels want activations + 128
  // Row blocks [begin, end) of a linear; weights int8-quantised x int8 activations, or float activations ("exact").
  void (*linear_int8)(const Linear& call, int begin, int end);
  void (*linear_float)(const Linear& call, int begin, int end);
  // linear_int8 for weights that takes_panels(), from `panel_tokens` tokens on; nullptr where it is of no use.
  void (*linear_panels)(const Linear& call, int begin, int end);
  int panel_tokens;
  // The same with matrix tiles; nullptr where the instruction set has none. Used from `tile_tokens` tokens on; takes signed x.
  void (*linear_tiles)(const Linear& call, int begin, int end);
  int tile_tokens;
  // From float activations and weights rounded to bf16, with matrix tiles; nullptr where there are none. For many tokens.
  void (*linear_halves)(const Linear& call, int begin, int end);
  // Row `id` of a weight, dequantised: out [in_features].
  void (*weight_row)(const Weight& w, int64_t id, float* out);
  // next: the part that is likely to follow, whose keys are then fetched ahead, or nullptr; memory: attention_floats(dim)
  // floats from a multiple of 64 bytes on.
  void (*attend)(const Attention& a, const AttentionPart& part, const AttentionPart* next, float* memory, float* sums, float* largest, float* total);
  // out = normalised(x (+ residual)) * weight; the sum, rounded to the dtype, goes to `sum` if there is a residual.
  void (*rms_norm)(const RowsOf& x, const RowsOf& residual, const RowsOf& weight, int columns, float eps, void* out, void* sum, int64_t row, float* memory);
  void (*silu_and_mul)(const RowsOf& x, int columns, void* out, int64_t row, float* memory);
  void (*rotary)(const RowsOf& x, int heads, int dim, const float* cos_sin, void* out, int64_t row, float* memory);
  void (*copy_row)(const void* x, Dtype from, void* out, Dtype to, int64_t count, float* memory);
  void (*adam)(const AdamStep& a, int64_t begin, int64_t count);
  void (*refresh)(const MaskRefresh& r, int64_t begin, int64_t count, MaskCount* sums);  // whole groups; adds to `sums`
  void (*distil)(const Distillation& d, int64_t row, float* memory);  // memory: distillation_floats(columns)
  double (*sum_squares)(const void* x, Dtype dtype, int64_t begin, int64_t count);
};

extern const Kernels* const kScalar;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx2Vnni;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx512Vnni;
extern const Kernels* const kAmx;
extern const Kernels* const kNeon;

// Whether a token's result must not depend on how many are computed with it: then linear_halves is left alone.
bool batch_invariant();
void set_batch_invariant(bool on);

const Kernels& kernels();              // the best this machine has, or HALFWEIGHT_ISA's
const Kernels* find_kernels(const char* name);  // nullptr: not to be had here
const char* isa_error();               // why HALFWEIGHT_ISA was not followed, or nullptr
const char* supported_isas();          // comma-separated, best first

}  // namespace halfweight
