// The update of a training step, in plain loops that the compiler vectorises for each instruction set.
#pragma once
#include <cmath>

#include "elementwise.h"

namespace halfweight {
namespace {

// Values [at, at + n) of a tensor become whole multiples of their group's scale.
void snap(const AdamStep& a, int64_t at, int n, float* __restrict values) {
  const float lowest = a.lowest, highest = a.highest;
  for (int i = 0; i < n;) {
    const int64_t group = (at + i) / a.group, end = (group + 1) * a.group - at;
    const int stop = end < n ? static_cast<int>(end) : n;
    const float scale = a.scales[group];
    for (; i < stop; ++i) {
      float v = values[i] / scale;
      v = v < lowest ? lowest : v > highest ? highest : v;
      values[i] = (v + 12582912.0f - 12582912.0f) * scale;  // 1.5 * 2^23: to the nearest integer, to even from between
    }
  }
}

// Adam on values [begin, begin + count): all that is read and written of them passes through the processor once.
void adam(const AdamStep& step, int64_t begin, int64_t count) {
  const AdamStep a = step;  // of our own, so that what is written to the tensors cannot change it
  constexpr int kPiece = 512;
  alignas(64) float g[kPiece], visible[kPiece];
  const float keep = 1 - a.rate * a.weight_decay, size = a.rate / a.correction1, root = 1 / a.correction2;
  const float first = 1 - a.beta1, second = 1 - a.beta2;
  for (int64_t at = begin; at < begin + count; at += kPiece) {
    const int n = static_cast<int>(begin + count - at < kPiece ? begin + count - at : kPiece);
    float* __restrict w = a.master + at;
    float* __restrict m = a.momentum + at;
    float* __restrict v = a.variance + at;
    const uint8_t* kept = a.mask ? a.mask + at : nullptr;
    load_row(a.gradient, a.gradient_dtype, at, n, g);
    for (int i = 0; i < n; ++i) g[i] *= a.scale;
    if (kept && !a.decoupled) for (int i = 0; i < n; ++i) g[i] += kept[i] ? 0 : a.mask_decay * w[i];
    for (int i = 0; i < n; ++i) m[i] += first * (g[i] - m[i]);
    if (kept && a.decoupled) for (int i = 0; i < n; ++i) g[i] = m[i] + (kept[i] ? 0 : a.mask_decay * w[i]);  // what moves w
    const float* __restrict moved = kept && a.decoupled ? g : m;
    const float* __restrict squared = g;
    for (int i = 0; i < n; ++i) v[i] = a.beta2 * v[i] + second * squared[i] * squared[i];
    for (int i = 0; i < n; ++i) w[i] = keep * w[i] - size * moved[i] / (std::sqrt(v[i]) * root + a.eps);
    if (!a.visible) continue;
    for (int i = 0; i < n; ++i) visible[i] = kept && a.prunes && !kept[i] ? 0 : w[i];
    if (a.scales) snap(a, at, n, visible);
    store_row(visible, a.visible_dtype, at, n, a.visible);
  }
}

HW_INLINE uint32_t two_of(uint32_t x, uint32_t y, uint32_t z) { return (x & y) | (z & (x | y)); }

void refresh(const MaskRefresh& step, int64_t begin, int64_t count, MaskCount* sums) {
  constexpr int kPiece = 512, kLanes = 16;
  const MaskRefresh r = step;
  alignas(64) float size[kPiece], seen[kPiece];
  alignas(64) uint32_t groups[kPiece / 4];
  alignas(64) uint8_t chosen[kPiece];
  for (int64_t at = begin; at < begin + count; at += kPiece) {
    const int n = static_cast<int>(begin + count - at < kPiece ? begin + count - at : kPiece);
    const float* __restrict w = r.master + at;
    uint8_t* __restrict mask = r.mask + at;
    for (int i = 0; i < n; ++i) size[i] = std::fabs(w[i]);
    for (int i = n; i < kPiece; ++i) size[i] = 0;
    // A weight is kept that beats two of the other three; >= against later positions makes the order total.
    for (int i = 0; i < kPiece / 4; ++i) {
      const float a = size[4 * i], b = size[4 * i + 1], c = size[4 * i + 2], d = size[4 * i + 3];
      const uint32_t ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
      const uint32_t ba = ab ^ 1, ca = ac ^ 1, da = ad ^ 1, cb = bc ^ 1, db = bd ^ 1, dc = cd ^ 1;
      groups[i] = two_of(ab, ac, ad) | two_of(ba, bc, bd) << 8 | two_of(ca, cb, cd) << 16 | two_of(da, db, dc) << 24;
    }
    std::memcpy(chosen, groups, sizeof chosen);  // as bytes, the first weight's lowest
    int32_t changed = 0;
    for (int i = 0; i < n; ++i) changed += chosen[i] ^ mask[i];
    std::memcpy(mask, chosen, static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) seen[i] = chosen[i] ? w[i] : 0;
    for (int i = n; i < kPiece; ++i) seen[i] = 0;
    float kept[kLanes] = {}, all[kLanes] = {}, kept_sum = 0, sum = 0;
    for (int i = 0; i < kPiece; i += kLanes)
      for (int j = 0; j < kLanes; ++j) all[j] += size[i + j], kept[j] += std::fabs(seen[i + j]);
    for (int j = 0; j < kLanes; ++j) kept_sum += kept[j], sum += all[j];
    sums->changed += changed, sums->kept += kept_sum, sums->total += sum;
    if (!r.visible) continue;
    store_row(seen, r.visible_dtype, at, n, r.visible);
  }
}

// x[i] becomes e^((x[i] - largest) / temperature), in lanes that the compiler keeps in registers; returns the sum of them.
float exponentials(float* __restrict x, int n, float largest, float temperature) {
  float sums[kLossLanes] = {}, sum = 0;
  const float inverse = 1 / temperature;
  for (int i = 0; i < n; i += kLossLanes)
    for (int j = 0; j < kLossLanes; ++j) sums[j] += x[i + j] = exp_fast((x[i + j] - largest) * inverse);
  for (const float s : sums) sum += s;
  return sum;
}

float largest_of(const float* x, int n) {
  float lanes[kLossLanes];
  for (int j = 0; j < kLossLanes; ++j) lanes[j] = x[j];
  for (int i = kLossLanes; i < n; i += kLossLanes)
    for (int j = 0; j < kLossLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  float largest = lanes[0];
  for (const float v : lanes) largest = v > largest ? v : largest;
  return largest;
}

// With q and p the softmax of student and teacher over temperature T, q1 the student's at 1 and a the weight of KL:
// loss a T^2 KL(p || q) + (1 - a) CE(q1), slope a T (q - p) + (1 - a) (q1 - label).
void distil(const Distillation& d, int64_t row, float* memory) {
  constexpr float kFill = -1e30f;  // behind the last column: its exponential is nothing
  const int columns = d.columns, n = (columns + kLossLanes - 1) / kLossLanes * kLossLanes;
  const bool plain = d.temperature == 1;
  float* __restrict q1 = memory;
  float* __restrict p = memory + n;
  float* q = plain ? q1 : memory + 2 * n;
  load_row(d.student, d.student_dtype, row * columns, columns, q1);
  for (int i = columns; i < n; ++i) q1[i] = kFill;
  const float label = q1[d.labels[row]], top = largest_of(q1, n);
  float a = 0, kl = 0, sum_q = 1, sum_p = 1;
  if (d.teacher) {
    a = d.kl_weight;
    load_row(d.teacher, d.teacher_dtype, row * columns, columns, p);
    for (int i = columns; i < n; ++i) p[i] = kFill;
    if (!plain) std::memcpy(q, q1, static_cast<size_t>(n) * sizeof(float));
    // KL = sum p (t - s) / T - log sum e^(t / T) + log sum e^(s / T), the logits counted from their largest.
    const float top_p = largest_of(p, n), inverse = 1 / d.temperature;
    float between[kLossLanes] = {}, sums_q[kLossLanes] = {}, sums_p[kLossLanes] = {};
    for (int i = 0; i < n; i += kLossLanes)
      for (int j = 0; j < kLossLanes; ++j) {
        const float s = (q[i + j] - top) * inverse, t = (p[i + j] - top_p) * inverse;
        sums_q[j] += q[i + j] = exp_fast(s);
        sums_p[j] += p[i + j] = exp_fast(t);
        between[j] += p[i + j] * (t - s);
      }
    float sum = 0;
    sum_q = sum_p = 0;
    for (int j = 0; j < kLossLanes; ++j) sum += between[j], sum_q += sums_q[j], sum_p += sums_p[j];
    kl = d.temperature * d.temperature * (sum / sum_p - std::log(sum_p) + std::log(sum_q));
  }
  const float sum_1 = d.teacher && plain ? sum_q : exponentials(q1, n, top, 1);
  d.sums[2 * row] = kl;
  d.sums[2 * row + 1] = top + std::log(sum_1) - label;
  const float of_q1 = (1 - a) * d.scale / sum_1, of_q = a * d.temperature * d.scale / sum_q, of_p = a * d.temperature * d.scale / sum_p;
  if (!d.teacher) for (int i = 0; i < columns; ++i) q1[i] *= of_q1;
  else if (plain) for (int i = 0; i < columns; ++i) q1[i] = (of_q1 + of_q) * q1[i] - of_p * p[i];
  else for (int i = 0; i < columns; ++i) q1[i] = of_q1 * q1[i] + of_q * q[i] - of_p * p[i];
  q1[d.labels[row]] -= (1 - a) * d.scale;
  store_row(q1, d.student_dtype, row * columns, columns, d.slope);
}

// Sum of squares of values [begin, begin + count).
double sum_squares(const void* x, Dtype dtype, int64_t begin, int64_t count) {
  constexpr int kPiece = 512, kSums = 64;
  alignas(64) float values[kPiece];
  double total = 0;
  for (int64_t at = begin; at < begin + count; at += kPiece) {
    const int n = static_cast<int>(begin + count - at < kPiece ? begin + count - at : kPiece);
    load_row(x, dtype, at, n, values);
    for (int i = n; i < kPiece; ++i) values[i] = 0;
    float sums[kSums] = {};
    for (int i = 0; i < kPiece; i += kSums)
      for (int j = 0; j < kSums; ++j) sums[j] += values[i + j] * values[i + j];
    float sum = 0;
    for (const float s : sums) sum += s;
    total += sum;
  }
  return total;
}

}  // namespace
}  // namespace halfweight
