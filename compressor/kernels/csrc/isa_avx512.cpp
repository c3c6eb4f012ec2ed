#include "simd_avx512.h"
#include "isa.h"

namespace halfweight {
static constexpr Kernels table = make_kernels("avx512");
const Kernels* const kAvx512 = &table;
}  // namespace halfweight
