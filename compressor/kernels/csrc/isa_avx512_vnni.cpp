#define HW_VNNI
#include "simd_avx512.h"
#include "isa.h"

namespace halfweight {
static constexpr Kernels table = make_kernels("avx512_vnni");
const Kernels* const kAvx512Vnni = &table;
}  // namespace halfweight
