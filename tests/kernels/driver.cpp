// Runs every kernel of every instruction set on buffers of exactly the needed size, for the sanitizers, and compares the
// results with the scalar path's. No torch. Prints one line per instruction set; exits 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "halves.h"
#include "kernels.h"

using namespace halfweight;

namespace {

std::mt19937 random_bits(7);
int failures = 0;

// A vector whose data starts one byte behind an aligned address: nothing may rely on alignment.
struct Bytes {
  explicit Bytes(size_t n) : memory(n + 1), data(memory.data() + 1) {}
  std::vector<uint8_t> memory;
  uint8_t* data;
};

uint16_t bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float uniform() { return static_cast<float>(random_bits() % 2001) / 1000 - 1; }

// A blob with random contents; positions are valid, halves finite.
std::vector<uint8_t> make_blob(Format format, int rows, int columns, int group, int segment) {
  Header h{};
  h.magic = kMagic, h.version = 1, h.format = format, h.half = Half::bf16;
  h.out_features = rows, h.in_features = columns, h.group = group, h.segment = segment;
  h.in_padded = group == 0 || group % 64 == 0 ? (columns + 63) / 64 * 64 : columns;
  const int blocks = (rows + kRows - 1) / kRows;
  const size_t groups = is_quantised(format) ? (group ? h.in_padded / group : 1) : 0;
  const size_t scale_bytes = (groups * 32 + 63) / 64 * 64, chunk = chunk_bytes(format);
  const size_t block_bytes = scale_bytes + chunk * (h.in_padded / kChunk);
  std::vector<uint8_t> blob(sizeof h + blocks * block_bytes);
  std::memcpy(blob.data(), &h, sizeof h);
  static const uint8_t valid[] = {4, 8, 12, 9, 13, 14};
  for (int b = 0; b < blocks; ++b) {
    uint8_t* p = blob.data() + sizeof h + b * block_bytes;
    const auto fill_halves = [](uint8_t* to, size_t bytes) {
      for (size_t i = 0; i + 1 < bytes; i += 2) { const uint16_t v = bf16(uniform()); std::memcpy(to + i, &v, 2); }
    };
    fill_halves(p, groups * 32);
    p += scale_bytes;
    for (int c = 0; c < h.in_padded / kChunk; ++c, p += chunk) {
      const size_t meta = is_sparse(format) ? 64 : 0;
      for (size_t i = 0; i < meta; ++i) p[i] = static_cast<uint8_t>(valid[random_bits() % 6] | valid[random_bits() % 6] << 4);
      if (is_quantised(format)) for (size_t i = meta; i < chunk; ++i) p[i] = static_cast<uint8_t>(random_bits());
      else fill_halves(p + meta, chunk - meta);
    }
  }
  return blob;
}

struct Quantised {
  std::vector<int8_t> values;
  std::vector<float> scales, floats;
  std::vector<uint16_t> halves;
  Activations a;
};

enum class Path { int8, exact, panels, tiles, halves };

Quantised make_input(const Kernels& k, const Weight& w, const std::vector<float>& x, int tokens, Path path) {
  const bool tiles = path == Path::tiles;
  const int padded = tiles || path == Path::halves ? (tokens + kTileTokens - 1) / kTileTokens * kTileTokens : tokens, columns = w.in_padded;
  const int features = w.segment ? w.in_features * w.segment : w.in_features;
  Quantised q{std::vector<int8_t>(static_cast<size_t>(padded) * columns), std::vector<float>(static_cast<size_t>(padded) * w.groups),
              std::vector<float>(static_cast<size_t>(padded) * columns), std::vector<uint16_t>(static_cast<size_t>(padded) * columns), {}};
  q.a = {tokens, columns, q.values.data(), tiles ? tile_columns(w) : 0, q.scales.data(), q.floats.data(), q.halves.data(), nullptr, w.groups};
  std::vector<int8_t> row(columns);
  for (int t = 0; t < tokens; ++t) {
    float* f = q.floats.data() + static_cast<size_t>(t) * columns;
    k.to_float(x.data() + static_cast<size_t>(t) * features, Dtype::f32, features, w.segment, f, columns);
    for (int c = 0; path == Path::halves && c < columns; ++c) {
      const size_t at = static_cast<size_t>(t / kTileTokens * (columns / kHalfColumns) + c / kHalfColumns) * kTileTokens * kHalfColumns;
      q.halves[at + t % kTileTokens * kHalfColumns + c % kHalfColumns] = bf16(f[c]);
    }
    if (!is_quantised(w.format)) continue;
    const float factor = w.format == Format::sparse24_int4 || w.format == Format::int4 ? 16 : 1;
    k.quantise(f, columns, w.group, factor, !tiles && k.unsigned_x(w.format), row.data(), q.scales.data() + static_cast<size_t>(t) * w.groups);
    for (int c = 0; c < columns; ++c) {
      const size_t tile = tiles ? tile_columns(w) : 0;
      const size_t at = tiles ? (t / kTileTokens * (columns / tile) + c / tile) * kTileTokens * tile + t % kTileTokens * tile + c % tile
                              : static_cast<size_t>(t) * columns + c;
      q.values[at] = row[c];
    }
  }
  return q;
}

std::vector<float> run(const Kernels& k, Path path, const Weight& w, const Weight* branch, const std::vector<float>& x, int tokens) {
  Quantised input = make_input(k, w, x, tokens, path), sums;
  if (branch) sums = make_input(k, *branch, x, tokens, path == Path::panels ? Path::int8 : path);
  if (path == Path::exact) {
    std::fill(input.scales.begin(), input.scales.end(), 0.0f);
    std::fill(sums.scales.begin(), sums.scales.end(), 0.0f);
  }
  std::vector<float> bias(w.out_features, 0.5f), out(static_cast<size_t>(tokens) * w.out_features);
  const Linear call{&w, input.a, branch, sums.a, bias.data(), Dtype::f32, out.data(), Dtype::f32};
  const auto blocks = path == Path::halves ? k.linear_halves : path == Path::tiles ? k.linear_tiles : path == Path::panels ? k.linear_panels : path == Path::int8 ? k.linear_int8 : k.linear_float;
  blocks(call, 0, w.blocks);
  return out;
}

// `terms`: what the summed terms amount to without their signs; sums in another order differ by a share of that.
void compare(const char* what, const Kernels& k, const std::vector<float>& ours, const std::vector<float>& expected,
             float terms = 0) {
  float largest = 1e-6f, difference = 0;
  for (float v : expected) largest = std::fmax(largest, std::fabs(v));
  bool numbers = ours.size() == expected.size();  // std::fmax drops NaN
  for (size_t i = 0; i < ours.size(); ++i) {
    difference = std::fmax(difference, std::fabs(ours[i] - expected[i]));
    numbers = numbers && !std::isnan(ours[i]);
  }
  if (!numbers || difference > 1e-5f * largest + 1e-6f * terms) {
    std::printf("%s: %s differs from scalar by %g of %g\n", k.name, what, difference, largest);
    ++failures;
  }
}

// The largest sum of a row's weights without their signs; inputs lie in [-1, 1], a branch's are sums of four.
float largest_row(const Kernels& scalar, const Weight& w) {
  std::vector<float> row(w.in_features);
  float largest = 0;
  for (int i = 0; i < w.out_features; ++i) {
    scalar.weight_row(w, i, row.data());
    largest = std::fmax(largest, std::accumulate(row.begin(), row.end(), 0.0f, [](float sum, float v) { return sum + std::fabs(v); }));
  }
  return largest;
}

void check_linears(const Kernels& k, const Kernels& scalar) {
  struct Shape { int rows, columns, group; };
  const Shape shapes[] = {{1, 32, 32}, {17, 192, 64}, {40, 256, 128}, {33, 100, 0}, {16, 192, 96}, {70, 640, 128},
                          {17, 1632, 96}, {33, 1700, 0}, {16, 3200, 128}};  // several panels a row
  for (int f = 0; f <= static_cast<int>(Format::dense); ++f)
    for (const Shape& s : shapes) {
      const Format format = static_cast<Format>(f);
      const bool quantised = is_quantised(format);
      const auto blob = make_blob(format, s.rows, s.columns, quantised ? s.group : 0, 0);
      const auto branch_blob = make_blob(Format::int8, s.rows, s.columns / 4, 0, 4);
      Bytes shifted(blob.size());
      std::memcpy(shifted.data, blob.data(), blob.size());
      Weight w, branch;
      if (parse(shifted.data, blob.size(), &w) || parse(branch_blob.data(), branch_blob.size(), &branch)) { std::puts("a good blob is refused"); ++failures; return; }
      for (size_t cut = 1; cut < blob.size(); cut += blob.size() / 3) {
        Weight ignored;
        if (s.rows == 1 && !parse(blob.data(), blob.size() - cut, &ignored)) { std::puts("a cut blob is accepted"); ++failures; }
      }
      const float terms = std::fmax(largest_row(scalar, w), largest_row(scalar, branch));
      for (int tokens : {1, 2, 3, 7, 8, 17, 33, 130}) {
        if (s.columns > 1000 ? tokens != 8 : tokens == 130 && s.columns != 100) continue;
        std::vector<float> x(static_cast<size_t>(tokens) * s.columns);
        for (float& v : x) v = uniform();
        for (const Weight* b : {static_cast<const Weight*>(nullptr), static_cast<const Weight*>(&branch)}) {
          const auto exact = run(scalar, Path::exact, w, b, x, tokens);
          compare("exact", k, run(k, Path::exact, w, b, x, tokens), exact, terms);
          // Weights, inputs and a branch's weights are rounded to eight bits each.
          if (k.linear_halves && (quantised || w.half == Half::bf16)) compare("halves", k, run(k, Path::halves, w, b, x, tokens), exact, 8000 * terms);
          if (!quantised) continue;
          const auto expected = run(scalar, Path::int8, w, b, x, tokens);
          compare("int8", k, run(k, Path::int8, w, b, x, tokens), expected, terms);
          if (k.linear_panels && takes_panels(w)) compare("panels", k, run(k, Path::panels, w, b, x, tokens), expected, terms);
          if (k.linear_tiles) compare("tiles", k, run(k, Path::tiles, w, b, x, tokens), expected, terms);
        }
      }
      std::vector<float> row(w.in_features), expected(w.in_features);
      k.weight_row(w, s.rows - 1, row.data());
      scalar.weight_row(w, s.rows - 1, expected.data());
      compare("row", k, row, expected);
    }
}

void check_steps(const Kernels& k, const Kernels& scalar) {
  for (int n : {1, 15, 33, 64}) {
    std::vector<float> x(2 * n), weight(n), memory(2 * n), out(n), expected(n), sum(n);
    for (float& v : x) v = 9 * uniform();
    for (float& v : weight) v = uniform();
    const RowsOf rows{x.data(), Dtype::f32, n}, factors{weight.data(), Dtype::f32, n}, wide{x.data(), Dtype::f32, 2 * n};
    k.rms_norm(rows, rows, factors, n, 1e-5f, out.data(), sum.data(), 0, memory.data());
    scalar.rms_norm(rows, rows, factors, n, 1e-5f, expected.data(), sum.data(), 0, memory.data());
    compare("rms_norm", k, out, expected);
    k.silu_and_mul(wide, n, out.data(), 0, memory.data());
    scalar.silu_and_mul(wide, n, expected.data(), 0, memory.data());
    compare("silu_and_mul", k, out, expected);
    if (n % 2 == 0) {
      k.rotary(rows, 1, n, weight.data(), out.data(), 0, memory.data());
      scalar.rotary(rows, 1, n, weight.data(), expected.data(), 0, memory.data());
      compare("rotary", k, out, expected);
    }
  }
}

void check_training(const Kernels& k, const Kernels& scalar) {
  for (const int n : {1, 15, 64, 700})
    for (const bool masked : {false, true})
      for (const bool decoupled : {false, true}) {
        std::vector<float> state[2][4];
        std::vector<float> start(n), scales{0.3f, 0.1f, 1.0f, 0.31f, 0.07f};
        std::vector<uint16_t> halves(n);
        std::vector<uint8_t> mask(n);
        for (int i = 0; i < n; ++i) start[i] = uniform(), halves[i] = bf16(uniform()), mask[i] = random_bits() % 2;
        for (auto& s : state) {
          const Kernels& kernels = &s == &state[0] ? k : scalar;
          s[0] = start, s[1].assign(n, 0), s[2].assign(n, 0), s[3].assign(n, 0);
          AdamStep a{};
          a.master = s[0].data(), a.momentum = s[1].data(), a.variance = s[2].data(), a.gradient = halves.data();
          a.mask = masked ? mask.data() : nullptr, a.visible = s[3].data();
          if (n % 5 == 0 && decoupled) a.scales = scales.data(), a.group = n / 5, a.lowest = -8, a.highest = 7;
          a.gradient_dtype = Dtype::bf16, a.visible_dtype = Dtype::f32;
          a.scale = 0.5f, a.rate = 1e-2f, a.beta1 = 0.9f, a.beta2 = 0.95f, a.eps = 1e-3f, a.weight_decay = 0.1f, a.mask_decay = 0.3f;
          a.correction1 = 0.1f, a.correction2 = 0.2f, a.decoupled = decoupled, a.prunes = true;
          kernels.adam(a, 0, n / 2);
          kernels.adam(a, n / 2, n - n / 2);
        }
        for (int i = 0; i < 4; ++i) compare("adam", k, state[0][i], state[1][i]);
        compare("sum of squares", k, {static_cast<float>(k.sum_squares(halves.data(), Dtype::bf16, 0, n))},
                {static_cast<float>(scalar.sum_squares(halves.data(), Dtype::bf16, 0, n))});
      }
}

void check_refresh(const Kernels& k, const Kernels& scalar) {
  for (const int n : {4, 60, 512, 700}) {
    std::vector<float> master(n), visible[2];
    for (float& v : master) v = static_cast<float>(random_bits() % 9) - 4;  // many ties
    std::vector<uint8_t> mask[2];
    std::vector<float> counts[2];
    for (int i = 0; i < 2; ++i) {
      MaskCount count{};
      mask[i].assign(n, 0), visible[i].resize(n);
      const MaskRefresh r{master.data(), mask[i].data(), visible[i].data(), Dtype::f32};
      (i ? scalar : k).refresh(r, 0, n, &count);
      counts[i] = {static_cast<float>(count.changed), static_cast<float>(count.kept), static_cast<float>(count.total)};
    }
    compare("refresh", k, visible[0], visible[1]);
    compare("counts", k, counts[0], counts[1]);
    if (mask[0] != mask[1] || counts[0][0] != static_cast<float>(n / 2)) { std::printf("%s: masks differ\n", k.name); ++failures; }
  }
}

void check_distillation(const Kernels& k, const Kernels& scalar) {
  for (const int columns : {1, 63, 64, 1000})
    for (const float temperature : {1.0f, 2.0f})
      for (const bool taught : {false, true}) {
        std::vector<float> student(columns), teacher(columns), slope[2], sums[2];
        for (float& v : student) v = 9 * uniform();
        for (float& v : teacher) v = 9 * uniform();
        const int64_t label = columns - 1;
        for (int i = 0; i < 2; ++i) {
          std::vector<float> memory(static_cast<size_t>(distillation_floats(columns)));
          slope[i].resize(columns), sums[i].resize(2);
          Distillation d{student.data(), taught ? teacher.data() : nullptr, &label, slope[i].data(), sums[i].data(),
                         Dtype::f32, Dtype::f32, columns, 0.5f, temperature, 0.25f};
          (i ? scalar : k).distil(d, 0, memory.data());
        }
        compare("distil", k, slope[0], slope[1]);
        compare("loss", k, sums[0], sums[1]);
      }
}

void check_attention(const Kernels& k, const Kernels& scalar, CacheRow kind, Dtype dtype) {
  for (int dim : {16, 64, 80, 128})
    for (int queries : {1, 5, 20}) {
      const int heads = 3, block = 16, length = 100, blocks = 7;
      std::vector<float> query(static_cast<size_t>(queries) * heads * dim);
      for (float& v : query) v = uniform();
      const std::vector<int32_t> table{3, 0, 6, 1, 5, 2, 4}, starts{0, queries}, lengths{length};
      std::vector<uint16_t> halves(query.size());
      for (size_t i = 0; i < query.size(); ++i) halves[i] = bf16(query[i]);
      const void* data = dtype == Dtype::bf16 ? static_cast<const void*>(halves.data()) : query.data();
      Attention a{data, nullptr, nullptr, table.data(), starts.data(), lengths.data(), dtype,
                  heads, 1, dim, block, blocks, heads * dim, 0.3f, kind};
      std::vector<char> cache(static_cast<size_t>(blocks) * block * a.row_bytes());
      a.keys = a.values = cache.data();
      std::vector<float> row(static_cast<size_t>(dim));
      for (int i = 0; i < blocks * block; ++i) {
        char* to = cache.data() + static_cast<size_t>(i) * a.row_bytes();
        float factor;
        for (float& v : row) v = uniform();
        if (kind == CacheRow::int8) {
          scalar.quantise(row.data(), dim, dim, 1, false, reinterpret_cast<int8_t*>(to), &factor);
          std::memcpy(to + dim, &factor, sizeof factor);
        } else if (kind == CacheRow::fp8) {
          for (int d = 0; d < dim; ++d) to[d] = static_cast<char>(float_to_e4m3(row[static_cast<size_t>(d)]));
        } else {
          for (int d = 0; d < dim; ++d) reinterpret_cast<uint16_t*>(to)[d] = bf16(row[static_cast<size_t>(d)]);
        }
      }
      const AttentionPart part{0, 0, 0, queries, 0, length}, next{0, 0, 0, queries, 64, length};
      const size_t rows = static_cast<size_t>(queries * heads + 3) / 4 * 4;
      std::vector<float> memory(attention_floats(dim) + 16), largest(rows), total(rows), ours(rows * dim), expected(rows * dim);
      float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
      const auto divide = [&](std::vector<float>& sums) {
        for (size_t i = 0; i < sums.size(); ++i) sums[i] = total[i / dim] > 0 ? sums[i] / total[i / dim] : 0;
      };
      k.attend(a, part, &next, aligned, ours.data(), largest.data(), total.data());
      divide(ours);
      scalar.attend(a, part, nullptr, aligned, expected.data(), largest.data(), total.data());
      divide(expected);
      // Tiles round each softmax weight to eight bits; values lie in [-1, 1].
      compare("attention", k, ours, expected, dtype == Dtype::bf16 ? 4000 : 0);
    }
}

}  // namespace

int main() {
  const Kernels& scalar = *find_kernels("scalar");
  std::string names = supported_isas();
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = names.find(',', begin) == std::string::npos ? names.size() : names.find(',', begin);
    const Kernels& k = *find_kernels(names.substr(begin, end - begin).c_str());
    check_linears(k, scalar);
    check_steps(k, scalar);
    check_training(k, scalar);
    check_distillation(k, scalar);
    check_refresh(k, scalar);
    for (CacheRow kind : {CacheRow::bf16, CacheRow::int8, CacheRow::fp8}) for (Dtype dtype : {Dtype::f32, Dtype::bf16}) check_attention(k, scalar, kind, dtype);
    std::printf("%s: %s\n", k.name, failures ? "failed" : "ok");
    begin = end + 1;
  }
  return failures != 0;
}
