#include "team.h"

#include <sched.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace halfweight {
namespace {

bool concurrent_pieces = false;
constexpr int kSpins = 2000;  // some 100 us; then whoever is needed may be waiting for this processor

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1 << 16;
}

template <class F> void wait_until(F done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) {
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    } else {
      sched_yield();
    }
  }
}

}  // namespace

void allow_teams(bool concurrent) { concurrent_pieces = concurrent; }

int team_slots() { return concurrent_pieces ? std::max(1, std::min(num_threads(), processors())) : 1; }

// torch may use fewer threads than there are pieces and give one several: the team is complete when all pieces are taken.
Team::Member Team::join(int64_t pieces) {
  const int index = members_.fetch_add(1, std::memory_order_acq_rel);
  covered_.fetch_add(pieces, std::memory_order_acq_rel);
  wait_until([&] { return covered_.load(std::memory_order_acquire) == slots_; });
  return {*this, index, members_.load(std::memory_order_acquire)};
}

void Team::Member::barrier() {
  const uint32_t phase = passed_++;
  if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    team_.arrived_.store(0, std::memory_order_relaxed);
    team_.phase_.store(phase + 1, std::memory_order_release);
  } else {
    wait_until([&] { return team_.phase_.load(std::memory_order_acquire) != phase; });
  }
}

}  // namespace halfweight
