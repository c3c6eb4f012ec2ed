#include "team.h"

#include <dirent.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace halfweight {
namespace {

bool concurrent_pieces = false;
constexpr int kSpins = 2000;  // some 100 us; then whoever is needed may be waiting for this processor

// Processors that the process' threads may use between them: OMP_PROC_BIND ties each thread to one of its own. No more
// than `enough` are counted.
int processors(int enough) {
  cpu_set_t all, own;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return enough;
  if (CPU_COUNT(&all) >= enough) return enough;
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (const dirent* task = readdir(tasks))
      if (const int id = std::atoi(task->d_name); id > 0 && sched_getaffinity(id, sizeof own, &own) == 0)
        CPU_OR(&all, &all, &own);
    closedir(tasks);
  }
  return std::min(enough, CPU_COUNT(&all));
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

int team_slots() { return concurrent_pieces ? std::max(1, processors(num_threads())) : 1; }

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
