// Included last by every isa_*.cpp, after its simd_*.h: fills the table.
#pragma once
#include "attention.h"
#include "training.h"

namespace halfweight {
namespace {

constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.unsigned_x = unsigned_x;
  k.to_float = to_float;
  k.to_halves = to_halves;
  k.quantise = quantise;
  k.linear_int8 = linear_int8;
  k.linear_float = linear_float;
  k.weight_row = weight_row;
  k.attend = attend;
  k.rms_norm = rms_norm;
  k.silu_and_mul = silu_and_mul;
  k.rotary = rotary;
  k.copy_row = copy_row;
  k.adam = adam;
  k.refresh = refresh;
  k.distil = distil;
  k.sum_squares = sum_squares;
  return k;
}

}  // namespace
}  // namespace halfweight
