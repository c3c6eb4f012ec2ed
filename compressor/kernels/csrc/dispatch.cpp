// Which instruction set runs: the best that processor and kernel offer, or HALFWEIGHT_ISA's.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace halfweight {
namespace {

#if defined(__x86_64__)
struct Processor {
  bool avx2 = false, avx512 = false, vnni = false, avx_vnni = false, amx = false;

  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c & bit_FMA, f16c = c & bit_F16C, xsave = c & bit_OSXSAVE;
    if (!xsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
    avx2 = ymm && fma && f16c && (b & bit_AVX2);
    avx512 = avx2 && zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
    vnni = avx512 && (c & bit_AVX512VNNI);
    const bool vbmi = c & 1u << 1;
    const bool amx_tile = d & 1u << 24, amx_int8 = d & 1u << 25, amx_bf16 = d & 1u << 22;
    bool bf16 = false;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avx_vnni = avx2 && (a & 1u << 4), bf16 = a & 1u << 5;
    // Linux keeps the tile state off until a process asks: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    amx = vnni && vbmi && bf16 && tiles && amx_tile && amx_int8 && amx_bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }
};
#endif

struct Choice {
  const Kernels* available[8] = {};
  int count = 0;
  const Kernels* chosen = nullptr;
  char error[256] = "";
  char names[128] = "";

  void offer(const Kernels* k, bool usable) {
    if (!usable) return;
    available[count++] = k;
    if (names[0]) std::strcat(names, ",");
    std::strcat(names, k->name);
  }

  Choice() {
#if defined(__x86_64__)
    const Processor p;
    offer(kAmx, p.amx);
    offer(kAvx512Vnni, p.vnni);
    offer(kAvx512, p.avx512);
    offer(kAvx2Vnni, p.avx_vnni);
    offer(kAvx2, p.avx2);
#elif defined(__aarch64__)
#if defined(__linux__)
    offer(kNeon, getauxval(AT_HWCAP) & 1u << 20);  // HWCAP_ASIMDDP
#else
    offer(kNeon, true);
#endif
#endif
    offer(kScalar, true);
    chosen = available[0];
    const char* wanted = std::getenv("HALFWEIGHT_ISA");
    if (wanted == nullptr || !*wanted) return;
    for (int i = 0; i < count; ++i)
      if (!std::strcmp(available[i]->name, wanted)) {
        chosen = available[i];
        return;
      }
    std::snprintf(error, sizeof error, "HALFWEIGHT_ISA=%.32s is not to be had here; accepted: %s", wanted, names);
  }
};

std::atomic<bool> invariant{false};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

bool batch_invariant() { return invariant.load(std::memory_order_relaxed); }
void set_batch_invariant(bool on) { invariant.store(on, std::memory_order_relaxed); }

const Kernels& kernels() { return *choice().chosen; }
const Kernels* find_kernels(const char* name) {
  for (int i = 0; i < choice().count; ++i)
    if (!std::strcmp(choice().available[i]->name, name)) return choice().available[i];
  return nullptr;
}
const char* isa_error() { return choice().error[0] ? choice().error : nullptr; }
const char* supported_isas() { return choice().names; }

}  // namespace halfweight
