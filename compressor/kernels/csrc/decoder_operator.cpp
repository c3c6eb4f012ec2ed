// decoder_layers: all layers of a Llama-like decoder in one parallel region, as phases of microseconds with barriers between
// them. The same functions in the same order as the operators one by one, so the result is the same to the bit.
//
// Shapes: T tokens, C hidden size, H query heads, G key heads, D head size, I inner size of the MLP.
#include <memory>
#include <utility>
#include <vector>

#include "attention_step.h"
#include "linear_step.h"
#include "operators.h"
#include "scratch.h"
#include "team.h"

namespace halfweight {
namespace {

thread_local Scratch decoder_scratch;
constexpr int64_t kPieceBlocks = 4;  // of a linear that a member takes at once, at least
constexpr int64_t kSmall = 1 << 22;  // weights of a linear that one token meets in some 50 us

struct Sizes {
  int tokens, hidden, heads, kv_heads, dim, inner;
  Dtype dtype;
  float eps;
  size_t item() const { return dtype_bytes(dtype); }
  int width() const { return (heads + 2 * kv_heads) * dim; }  // of q, k and v together
};

// The next tensors of the list; bit i of `present` says whether part i of a layer is there.
class Source {
 public:
  Source(const std::vector<Tensor>& list, int64_t present) : list_(list), present_(present) {}
  void begin_layer() { part_ = 0; }
  const Tensor& required(const char* name) {
    const Tensor* t = optional();
    if (t == nullptr) fail("a layer needs %s", name);
    return *t;
  }
  const Tensor* optional() { return present_ >> part_++ & 1 ? &next() : nullptr; }
  size_t taken() const { return at_; }

 private:
  const Tensor& next() {
    if (at_ >= list_.size()) fail("weights has %zu tensors; the layers need more", list_.size());
    return list_[at_++];
  }
  const std::vector<Tensor>& list_;
  const int64_t present_;
  size_t at_ = 0;
  int part_ = 0;
};

RowsOf factors(const Tensor* t, int elements, const char* name) {  // of a norm
  if (t == nullptr) return {};
  if (t->numel() != elements || !t->contiguous()) fail("%s must be contiguous with %d elements", name, elements);
  return {t->data(), t->dtype(name), elements};
}

class LayerLinear {
 public:
  LayerLinear(Source& source, const Sizes& sizes, int in, int out, const char* name) {
    weight_ = parsed(source.required(name), name);
    const Tensor *bias = source.optional(), *low_rank = source.optional();
    if (weight_.in_features != in || weight_.out_features != out)
      fail("%s is [%d, %d]; the layer needs [%d, %d]", name, weight_.out_features, weight_.in_features, out, in);
    if (low_rank) {
      branch_ = parsed(*low_rank, name);
      check_branch(branch_, weight_, name);
    }
    if (bias) {
      check_bias(*bias, weight_, name);
      bias_dtype_ = bias->dtype(name), bias_data_ = bias->data();
    }
    step_ = LinearStep(kernels(), weight_, low_rank ? &branch_ : nullptr, sizes.tokens, sizes.dtype, false);
  }
  LayerLinear(const LayerLinear&) = delete;  // the step points into it
  LinearStep& step() { return step_; }
  void fill(const void* x, Dtype dtype, int64_t t, char* row) const { step_.fill(x, dtype, t, row); }
  int blocks() const { return step_.blocks(); }
  bool is_small() const { return static_cast<int64_t>(weight_.in_features) * weight_.out_features < kSmall; }
  void run(void* out, Dtype dtype, int64_t begin, int64_t end) const { step_.run(bias_data_, bias_dtype_, out, dtype, begin, end); }

 private:
  Weight weight_{}, branch_{};
  Dtype bias_dtype_ = Dtype::f32;
  const void* bias_data_ = nullptr;
  LinearStep step_;
};

// Parts in the order of the list; serve/engine/models/decoder.py makes it.
struct Layer {
  Layer(Source& source, const Sizes& s, const Tensor& k_cache, const Tensor& v_cache)
      : attention_norm(factors((source.begin_layer(), &source.required("attention_norm")), s.hidden, "attention_norm")),
        qkv(source, s, s.hidden, s.width(), "qkv"),
        q_norm(factors(source.optional(), s.dim, "q_norm")), k_norm(factors(source.optional(), s.dim, "k_norm")),
        o(source, s, s.heads * s.dim, s.hidden, "o"),
        mlp_norm(factors(&source.required("mlp_norm"), s.hidden, "mlp_norm")),
        up(source, s, s.hidden, 2 * s.inner, "up"), down(source, s, s.inner, s.hidden, "down"),
        keys(static_cast<char*>(k_cache.data())), values(static_cast<char*>(v_cache.data())) {
    if ((q_norm.data == nullptr) != (k_norm.data == nullptr)) fail("q_norm and k_norm come together");
  }
  RowsOf attention_norm;
  LayerLinear qkv;
  RowsOf q_norm, k_norm;
  LayerLinear o;
  RowsOf mlp_norm;
  LayerLinear up, down;
  char *keys, *values;
};

// Working memory: pieces of one allocation, made before the region begins, for nothing in it may fail.
struct Buffers {
  char *normed, *sum, *mixed, *query, *key, *attended, *projected, *expanded, *gated, *partials, *work;
  char* inputs[4];  // of the four linears
  size_t work_bytes;

  Buffers(const Sizes& s, std::vector<std::unique_ptr<Layer>>& layers, const AttentionStep& attention, int members) {
    const size_t rows = static_cast<size_t>(s.tokens) * s.item();
    size_t bytes[4] = {};
    work_bytes = max(attention.work_bytes(), max(attention.row_bytes(), static_cast<size_t>(s.hidden + s.inner + s.width()) * 8));
    for (const auto& layer : layers)
      for (int i = 0; i < 4; ++i) {
        LinearStep& step = linear(*layer, i).step();
        bytes[i] = max(bytes[i], step.bytes()), work_bytes = max(work_bytes, step.row_bytes());
      }
    work_bytes = (work_bytes + 127) / 64 * 64;
    size_t total = 0;
    struct { char** piece; size_t offset; } pieces[15];
    int count = 0;
    const auto ask = [&](char** piece, size_t size) { pieces[count++] = {piece, total}, total += (size + 63) / 64 * 64; };
    ask(&normed, rows * s.hidden), ask(&sum, rows * s.hidden), ask(&mixed, rows * s.width());
    ask(&query, rows * s.heads * s.dim), ask(&key, rows * s.kv_heads * s.dim), ask(&attended, rows * s.heads * s.dim);
    ask(&projected, rows * s.hidden), ask(&expanded, rows * 2 * s.inner), ask(&gated, rows * s.inner);
    for (int i = 0; i < 4; ++i) ask(&inputs[i], bytes[i]);
    ask(&partials, attention.bytes()), ask(&work, work_bytes * static_cast<size_t>(members));
    char* memory = decoder_scratch.get(total);
    for (const auto& p : pieces) *p.piece = memory + p.offset;
    for (const auto& layer : layers)
      for (int i = 0; i < 4; ++i) {
        linear(*layer, i).step().place(inputs[i]);
        linear(*layer, i).step().read(i == 1 ? attended : i == 3 ? gated : normed);
      }
  }

 private:
  static size_t max(size_t a, size_t b) { return a > b ? a : b; }
  static LayerLinear& linear(Layer& layer, int i) { return i == 0 ? layer.qkv : i == 1 ? layer.o : i == 2 ? layer.up : layer.down; }
};

struct Step {
  Sizes sizes;
  Attention caches;  // what the caches of all layers have in common
  AttentionStep attention;
  const float* cos_sin;
  const int64_t *positions, *slots;
};

// Norms of the heads, rotary positions, and this step's keys and values into their slots.
void place_token(const Kernels& k, const Layer& layer, const Step& step, const Buffers& b, int64_t t, float* floats) {
  const Sizes& s = step.sizes;
  const int64_t item = static_cast<int64_t>(s.item()), q_width = static_cast<int64_t>(s.heads) * s.dim, kv_width = static_cast<int64_t>(s.kv_heads) * s.dim;
  char *q = b.mixed + t * s.width() * item, *key = q + q_width * item, *value = key + kv_width * item;
  if (layer.q_norm.data) {
    for (int h = 0; h < s.heads; ++h) k.rms_norm({q, s.dtype, s.dim}, {}, layer.q_norm, s.dim, s.eps, q, nullptr, h, floats);
    for (int h = 0; h < s.kv_heads; ++h) k.rms_norm({key, s.dtype, s.dim}, {}, layer.k_norm, s.dim, s.eps, key, nullptr, h, floats);
  }
  const float* turn = step.cos_sin + step.positions[t] * s.dim;
  k.rotary({q, s.dtype, 0}, s.heads, s.dim, turn, b.query + t * q_width * item, 0, floats);
  k.rotary({key, s.dtype, 0}, s.kv_heads, s.dim, turn, b.key + t * kv_width * item, 0, floats);
  const int64_t slot = step.slots[t];
  if (slot < 0) return;
  const int64_t at = slot * s.kv_heads * static_cast<int64_t>(step.caches.row_bytes());
  store_heads(step.caches, b.key + t * kv_width * item, s.dtype, layer.keys + at, floats);
  store_heads(step.caches, value, s.dtype, layer.values + at, floats);
}

// x: the stream without the last block's output `block` (nullptr before the first layer). Leaves both in `stream` and `out`.
void run_layer(Team::Member& member, const Layer& layer, const Step& step, const Buffers& b, const void* x, const void* block,
               char* stream, char* out) {
  const Kernels& k = kernels();
  const Sizes& s = step.sizes;
  const AttentionStep& attention = step.attention;
  char* own = b.work + b.work_bytes * static_cast<size_t>(member.index());
  float* floats = reinterpret_cast<float*>(own);
  const RowsOf before{block ? block : x, s.dtype, s.hidden}, residual{block ? x : nullptr, s.dtype, s.hidden};
  const RowsOf sum{block ? b.sum : x, s.dtype, s.hidden};
  // One token's product with few weights is best done in one go; what takes longer is worth to be balanced.
  const auto multiply = [&](const LayerLinear& linear, void* y) {
    const auto run = [&](int64_t begin, int64_t end) { linear.run(y, s.dtype, begin, end); };
    s.tokens == 1 && linear.is_small() ? member.share(linear.blocks(), run) : member.claim(linear.blocks(), kPieceBlocks, true, run);
  };
  member.each(s.tokens, [&](int64_t t) {
    k.rms_norm(before, residual, layer.attention_norm, s.hidden, s.eps, b.normed, b.sum, t, floats);
    layer.qkv.fill(b.normed, s.dtype, t, own);
  });
  multiply(layer.qkv, b.mixed);
  member.each(s.tokens, [&](int64_t t) { place_token(k, layer, step, b, t, floats); });
  member.claim(attention.parts(), 1, attention.even(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attention.attend(i, layer.keys, layer.values, own);
  });
  member.each(attention.jobs(), [&](int64_t i) { attention.merge(i, b.attended, own); });
  member.each(s.tokens, [&](int64_t t) { layer.o.fill(b.attended, s.dtype, t, own); });
  multiply(layer.o, b.projected);
  member.each(s.tokens, [&](int64_t t) {
    k.rms_norm({b.projected, s.dtype, s.hidden}, sum, layer.mlp_norm, s.hidden, s.eps, b.normed, stream, t, floats);
    layer.up.fill(b.normed, s.dtype, t, own);
  });
  multiply(layer.up, b.expanded);
  member.each(s.tokens, [&](int64_t t) {
    k.silu_and_mul({b.expanded, s.dtype, 2 * s.inner}, s.inner, b.gated, t, floats);
    layer.down.fill(b.gated, s.dtype, t, own);
  });
  multiply(layer.down, out);
}

void check_step(const Tensor& positions, const Tensor& slots, const Tensor& table, int64_t tokens, int64_t capacity) {
  for (const Tensor* t : {&positions, &slots})
    if (t->type() != Type::i64 || t->numel() != tokens || !t->contiguous()) fail("positions and slot_mapping must be contiguous int64 [T]");
  const int64_t *position = static_cast<const int64_t*>(positions.data()), *slot = static_cast<const int64_t*>(slots.data());
  for (int64_t t = 0; t < tokens; ++t) {
    if (position[t] < 0 || position[t] >= table.size(0)) fail("position %lld is beyond cos_sin's %lld", static_cast<long long>(position[t]), static_cast<long long>(table.size(0)));
    if (slot[t] < -1 || slot[t] >= capacity) fail("slot %lld is out of range: the cache has %lld", static_cast<long long>(slot[t]), static_cast<long long>(capacity));
  }
}

}  // namespace

void decoder_layers(Value* stack, uint64_t, uint64_t) {
  const Tensor x(stack[0]);
  const std::vector<Tensor> weights = take_list(stack[1]), k_caches = take_list(stack[3]), v_caches = take_list(stack[4]);
  const Tensor table(stack[5]), positions(stack[6]), slots(stack[7]), tables(stack[8]), starts(stack[9]), lengths(stack[10]);
  const int64_t heads = take<int64_t>(stack[11]), inner = take<int64_t>(stack[12]);
  const double eps = take<double>(stack[13]), scale = take<double>(stack[14]);
  const size_t count = k_caches.size();
  if (x.dim() != 2 || !x.contiguous() || x.size(0) > 1 << 24) fail("x must be contiguous [T, C]");
  if (count < 1 || v_caches.size() != count) fail("k_caches and v_caches must have one cache a layer");
  if (table.type() != Type::f32 || table.dim() != 2 || !table.contiguous() || table.size(1) % 2) fail("cos_sin must be float32 [positions, D]");
  for (const Tensor* t : {&tables, &starts, &lengths})
    if (!t->contiguous()) fail("block_tables, query_start and context_lens must be contiguous");

  const Tensor& first_keys = k_caches[0];
  const Attention a = attention_over(first_keys, v_caches[0], heads, table.size(1), x.dtype("x"), tables, starts, lengths, scale);
  const Sizes sizes{static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), a.heads, a.kv_heads, a.dim, static_cast<int>(inner), a.dtype, static_cast<float>(eps)};
  check_step(positions, slots, table, sizes.tokens, first_keys.size(0) * first_keys.size(1));
  Step step{sizes, a, AttentionStep(a, static_cast<int>(tables.size(0)), sizes.tokens, first_keys.size(0)), static_cast<const float*>(table.data()),
            static_cast<const int64_t*>(positions.data()), static_cast<const int64_t*>(slots.data())};

  Source source(weights, take<int64_t>(stack[2]));
  std::vector<std::unique_ptr<Layer>> layers;
  for (size_t i = 0; i < count; ++i) {
    check_caches(k_caches[i], v_caches[i]);
    if (k_caches[i].type() != first_keys.type()) fail("the caches differ in dtype");
    for (int d = 0; d < 4; ++d)
      if (k_caches[i].size(d) != first_keys.size(d)) fail("the caches differ in shape");
    layers.push_back(std::make_unique<Layer>(source, sizes, k_caches[i], v_caches[i]));
  }
  if (source.taken() != weights.size()) fail("weights has %zu tensors; %zu layers need %zu", weights.size(), count, source.taken());

  Tensor out = Tensor::empty(x.sizes(), 2, x.type()), stream = Tensor::empty(x.sizes(), 2, x.type());
  if (sizes.tokens > 0) {
    const int members = team_slots();
    const Buffers buffers(sizes, layers, step.attention, members);
    step.attention.set_query(buffers.query, static_cast<int64_t>(sizes.heads) * sizes.dim);
    step.attention.place(buffers.partials);
    step.attention.clear_padding(buffers.attended);
    char *block = static_cast<char*>(out.data()), *sums = static_cast<char*>(stream.data());
    const void* data = x.data();
    run_team(members, [&](Team::Member& member) {
      for (size_t i = 0; i < layers.size(); ++i) run_layer(member, *layers[i], step, buffers, i ? sums : data, i ? block : nullptr, sums, block);
    });
  }
  stack[0] = out.release();
  stack[1] = stream.release();
}

}  // namespace halfweight
