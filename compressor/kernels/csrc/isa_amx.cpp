#define HW_VNNI
#include "simd_avx512.h"
#include "isa.h"
#include "attention_tiles.h"

namespace halfweight {
static constexpr Kernels make() {
  Kernels k = make_kernels("amx");
  k.linear_tiles = linear_tiles;
  k.tile_tokens = 12;
  k.linear_halves = linear_halves;
  k.attend = attend_tiles;
  return k;
}
static constexpr Kernels table = make();
const Kernels* const kAmx = &table;
}  // namespace halfweight
