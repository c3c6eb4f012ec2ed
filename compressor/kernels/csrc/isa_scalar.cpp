#include "simd_scalar.h"
#include "isa.h"

namespace halfweight {
static constexpr Kernels table = make_kernels("scalar");
const Kernels* const kScalar = &table;
}  // namespace halfweight
