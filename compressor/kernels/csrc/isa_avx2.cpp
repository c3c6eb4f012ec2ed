#include "simd_avx2.h"
#include "isa.h"

namespace halfweight {
static constexpr Kernels table = make_kernels("avx2");
const Kernels* const kAvx2 = &table;
}  // namespace halfweight
