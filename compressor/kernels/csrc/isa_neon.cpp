#include "simd_neon.h"
#include "isa.h"

namespace halfweight {
static constexpr Kernels table = make_kernels("neon");
const Kernels* const kNeon = &table;
}  // namespace halfweight
