#define HW_VNNI
#include "simd_avx2.h"
#include "isa.h"
#include "panels.h"

namespace halfweight {
static constexpr Kernels table = with_panels(make_kernels("avx2_vnni"));
const Kernels* const kAvx2Vnni = &table;
}  // namespace halfweight
