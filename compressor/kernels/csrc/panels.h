// Linears of many tokens with 256-bit registers: a panel of columns of a row block is unpacked once, into the first-level cache,
// and meets all tokens, four at a time. Sums are formed in the order of linear.h, so the results are the same to the bit.
//
// Without VNNI a product of int4 weights takes half as many instructions as one of int8: eight of them are added up in 16 bits
// before they are widened. Its activations are unsigned, and what + 128 adds is known from the unpacked weights.
#pragma once
#include "linear.h"

namespace halfweight {
namespace {

constexpr int kPanelTokens = 128;
constexpr int kUnpackedBytes = 512;  // of a chunk, at most

// Sums of T tokens' products with the weights of one register. Short ones stay in 16 bits until flush().
template <int T, bool is_short> struct PanelSums {
  Int acc[T], pairs[is_short ? T : 1];
  HW_INLINE void clear() {
    for (Int& v : acc) v = Simd::zero();
    for (Int& v : pairs) v = Simd::zero();
  }
  // The only flush() after clear().
  HW_INLINE void flush_once() {
    if constexpr (is_short)
      for (int t = 0; t < T; ++t) acc[t] = _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(16));
  }
  HW_INLINE void add(int t, Int x, Int w) {
    if constexpr (is_short) pairs[t] = Simd::held(_mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(x, w)));  // 8 * 2 * 255 * 8 < 2^15
    else acc[t] = Simd::held(Simd::dot(acc[t], x, w));
  }
  HW_INLINE void flush() {
    if constexpr (is_short)  // int4 weights count 16 times, as they do elsewhere
      for (int t = 0; t < T; ++t) acc[t] = Simd::add(acc[t], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(16))), pairs[t] = Simd::zero();
  }
};

// 2:4: for each of a chunk's four products, 64 bytes that say which activations, and 64 of weights.
template <class Values> struct SparsePanel {
  static constexpr Format kFormat = Values::kFormat;
  static constexpr bool kIsShort = is_short(Values::kFormat);
  static constexpr int kProducts = 4, kBytes = kProducts * 128;
  template <int half, int h> static HW_INLINE void unpack_slot(const uint8_t* p, Int meta, uint8_t* out) {
    out += 128 * (2 * half + h);
    Simd::store(out, Simd::and_or(Simd::shr<4 * half + 2 * h>(meta), Simd::set1(0x03030303), Simd::set1(0x0c080400)));
    Simd::store(out + 64, Values::template slot<half, h>(p));
  }
  static HW_INLINE void unpack(const uint8_t* p, uint8_t* out) {
    const Int meta = Simd::load(p);
    unpack_slot<0, 0>(p, meta, out), unpack_slot<0, 1>(p, meta, out);
    unpack_slot<1, 0>(p, meta, out), unpack_slot<1, 1>(p, meta, out);
  }
  static HW_INLINE const uint8_t* weights(const uint8_t* p, int product) { return p + 128 * product + 64; }
  template <int T> static HW_INLINE void dot(const uint8_t* p, Rows<int8_t> x, PanelSums<T, kIsShort> (&sums)[kParts]) {
    for (int n = 0; n < kProducts; ++n, p += 128) {
      Int at[kParts], w[kParts];
      for (int part = 0; part < kParts; ++part) {
        at[part] = Simd::held(Simd::load(p + part * Simd::kBytes));
        w[part] = Simd::held(Simd::load(p + 64 + part * Simd::kBytes));
      }
      for (int t = 0; t < T; ++t) {
        const Int row = Simd::load128(x[t] + n / 2 * 16);
        for (int part = 0; part < kParts; ++part) sums[part].add(t, Simd::shuffle(row, at[part]), w[part]);
      }
    }
  }
};

// Every column: for each of a chunk's eight products, 64 bytes of weights.
template <class Values> struct DensePanel {
  static constexpr Format kFormat = Values::kFormat;
  static constexpr bool kIsShort = is_short(Values::kFormat);
  static constexpr int kProducts = 8, kBytes = kProducts * 64;
  template <int i> static HW_INLINE void unpack_from(const uint8_t* p, uint8_t* out) {
    Simd::store(out + 64 * i, Values::template unit<i>(p));
    if constexpr (i + 1 < kProducts) unpack_from<i + 1>(p, out);
  }
  static HW_INLINE void unpack(const uint8_t* p, uint8_t* out) { unpack_from<0>(p, out); }
  static HW_INLINE const uint8_t* weights(const uint8_t* p, int product) { return p + 64 * product; }
  template <int T> static HW_INLINE void dot(const uint8_t* p, Rows<int8_t> x, PanelSums<T, kIsShort> (&sums)[kParts]) {
    for (int n = 0; n < kProducts; ++n, p += 64) {
      Int w[kParts];
      for (int part = 0; part < kParts; ++part) w[part] = Simd::held(Simd::load(p + part * Simd::kBytes));
      for (int t = 0; t < T; ++t) {
        const Int four = Simd::held(Simd::load32(x[t] + 4 * n));
        for (int part = 0; part < kParts; ++part) sums[part].add(t, four, w[part]);
      }
    }
  }
};

struct Panel {
  alignas(64) uint8_t chunks[kPanelChunks * kUnpackedBytes];
  alignas(64) int32_t offsets[kPanelChunks][kRows];  // of a group: what the + 128 of unsigned activations adds
};

// Groups [first, last) of a row block.
template <class P> void unpack_panel(const Weight& w, int block, int first, int last, Panel& panel) {
  constexpr int bytes = static_cast<int>(chunk_bytes(P::kFormat));
  static_assert(P::kBytes <= kUnpackedBytes, "no room for a chunk");
  int c = w.group_end(first - 1);
  const uint8_t* p = w.chunks(block) + static_cast<int64_t>(c) * bytes;
  uint8_t* out = panel.chunks;
  for (int g = first; g < last; ++g) {
    PanelSums<1, P::kIsShort> sums[kParts];
    for (auto& s : sums) s.clear();
    for (; c < w.group_end(g); ++c, p += bytes, out += P::kBytes) {
      prefetch_chunk<bytes>(p);
      for (int part = 0; part < kParts; ++part) {
        P::unpack(p + part * Simd::kBytes, out + part * Simd::kBytes);
        for (int n = 0; n < P::kProducts; ++n) sums[part].add(0, Simd::set1(0x01010101), Simd::load(P::weights(out, n) + part * Simd::kBytes));
        sums[part].flush();
      }
    }
    for (int part = 0; part < kParts; ++part) {
      const Int offset = Simd::kUnsignedX || P::kIsShort ? Simd::shl<7>(sums[part].acc[0]) : Simd::zero();
      Simd::store(&panel.offsets[g - first][part * Simd::kLanes], offset);
    }
  }
}

// out[t][row] += what groups [first, last) give.
template <class P, int T>
void panel_tile(const Weight& w, const Activations& a, int block, int token, int first, int last, const Panel& panel, float* out) {
  constexpr int most = P::kIsShort ? 8 / P::kProducts : 1 << 30;  // chunks before a flush
  const Half half = w.half;
  const uint8_t* p = panel.chunks;
  const uint16_t* scales = w.scales(block) + static_cast<int64_t>(first) * w.scale_stride;
  const int64_t x_scales = a.groups, columns = a.columns;  // of a token: stores to `out` may change what is behind a reference
  const float* token_scales = a.scales + token * x_scales + first;
  int c = w.group_end(first - 1);
  const int8_t* x = a.quantised + token * columns + c * kChunk;
  for (int g = first; g < last; ++g, scales += w.scale_stride) {
    PanelSums<T, P::kIsShort> sums[kParts];
    for (auto& s : sums) s.clear();
    const int end = w.group_end(g);
    if (end - c <= most) {
      for (; c < end; ++c, p += P::kBytes, x += kChunk) P::template dot<T>(p, {x, columns}, sums);
      for (auto& s : sums) s.flush_once();
    }
    while (c < end) {
      const int stop = end - c > most ? c + most : end;
      for (; c < stop; ++c, p += P::kBytes, x += kChunk) P::template dot<T>(p, {x, columns}, sums);
      for (auto& s : sums) s.flush();
    }
    __asm__ volatile("" ::: "memory");  // GCC would keep copies of all of `out` from one group to the next, on the stack
    for (int part = 0; part < kParts; ++part) {
      const Float scale = load_halves(scales + part * Simd::kLanes, half);
      const Int offset = Simd::load(&panel.offsets[g - first][part * Simd::kLanes]);
      for (int t = 0; t < T; ++t) {
        float* o = out + t * kRows + part * Simd::kLanes;
        const Float sum = Simd::to_float(Simd::sub(sums[part].acc[t], offset));
        Simd::fstore(o, Simd::fma(sum, Simd::mul(scale, Simd::fset1(token_scales[t * x_scales])), Simd::fload(o)));
      }
    }
    ++token_scales;
  }
}

template <class P> void panel_blocks(const Linear& call, int begin, int end) {
  const Weight& w = *call.weight;
  const Tiles low_rank = low_rank_tiles(call, false);
  const int groups = kPanelChunks * kChunk / w.group;  // of a panel
  Panel panel;
  alignas(64) float out[kPanelTokens * kRows];
  const auto each = [](int count, auto body) {  // body(t, how many tokens at once)
    for (int t = 0, n; t < count; t += n) body(t, n = count - t >= 4 ? 4 : count - t >= 2 ? 2 : 1);
  };
  for (int block = begin; block < end; ++block)
    for (int token = 0; token < call.x.tokens; token += kPanelTokens) {
      const int tokens = call.x.tokens - token < kPanelTokens ? call.x.tokens - token : kPanelTokens;
      std::memset(out, 0, static_cast<size_t>(tokens) * kRows * sizeof(float));
      for (int first = 0; first < w.groups; first += groups) {
        const int last = first + groups < w.groups ? first + groups : w.groups;
        unpack_panel<P>(w, block, first, last, panel);
        each(tokens, [&](int t, int n) {
          (n == 4 ? panel_tile<P, 4> : n == 2 ? panel_tile<P, 2> : panel_tile<P, 1>)(w, call.x, block, token + t, first, last, panel, out + t * kRows);
        });
      }
      if (call.low_rank)
        each(tokens, [&](int t, int n) {
          (n == 4 ? low_rank.four : n == 2 ? low_rank.two : low_rank.one)(*call.low_rank, call.sums, block, 0, token + t, out + t * kRows);
        });
      for (int t = 0; t < tokens; ++t) finish(call, block * kRows, kRows, token + t, out + t * kRows);
    }
}

void linear_panels(const Linear& call, int begin, int end) {
  switch (call.weight->format) {
    case Format::sparse24_int4: return panel_blocks<SparsePanel<SparseInt4Values>>(call, begin, end);
    case Format::sparse24_int8: return panel_blocks<SparsePanel<SparseInt8Values>>(call, begin, end);
    default: return panel_blocks<DensePanel<Int4Values>>(call, begin, end);
  }
}

constexpr Kernels with_panels(Kernels k) {
  k.linear_panels = linear_panels;
  k.panel_tokens = 8;
  return k;
}

}  // namespace
}  // namespace halfweight
