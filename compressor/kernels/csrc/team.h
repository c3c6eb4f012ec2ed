// A team of torch's threads that runs a chain of short phases in one parallel region. Leaving and entering a region costs about
// as much as a small linear; a barrier between phases costs a tenth of that.
#pragma once
#include <atomic>

#include "torch_shim.h"

namespace halfweight {

// How many threads a team may have: torch's, as far as the process has processors for them; 1 unless torch runs all pieces of
// a parallel_for at the same time (its OpenMP backend does), for otherwise a barrier would wait for ever.
int team_slots();
void allow_teams(bool concurrent);

class Team {
 public:
  explicit Team(int slots) : slots_(slots) {}

  // What one thread knows of its team.
  class Member {
   public:
    Member(Team& team, int index, int size) : team_(team), index_(index), size_(size) {}
    int index() const { return index_; }

    // body(begin, end) for this member's share of [0, count). All members have finished the phase before when it begins;
    // member 0 goes from one phase of a single piece to the next without waiting for those who have nothing to do.
    template <class F> void share(int64_t count, F body) {
      enter(count);
      const int64_t begin = count * index_ / size_, end = count * (index_ + 1) / size_;
      if (count <= 1) {
        if (index_ == 0 && count == 1) body(int64_t{0}, int64_t{1});
      } else if (begin < end) {
        body(begin, end);
      }
    }
    // The same in pieces that members take as they get there, smaller and smaller ones, down to `grain`: for long phases, in
    // which one may be held up by whatever else its processor has to do, or whose pieces differ. Of `even` ones each member
    // first does seven eighths of its share in one go.
    template <class F> void claim(int64_t count, int64_t grain, bool even, F body) {
      if (count <= 1) return share(count, body);
      enter(count);
      const int64_t own = even ? count * 7 / 8 / size_ / grain * grain : 0, left = count - own * size_;
      std::atomic<int64_t>& next = team_.claimed_[claims_ & 1];
      ++claims_;
      if (index_ == 0) team_.claimed_[claims_ & 1].store(0, std::memory_order_relaxed);  // all have left that phase
      if (own > 0) body(own * index_, own * (index_ + 1));
      for (int64_t begin = next.load(std::memory_order_relaxed); begin < left;) {
        const int64_t piece = (left - begin) / (2 * size_) / grain * grain, end = begin + (piece > grain ? piece : grain);
        if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        body(count - left + begin, end < left ? count - left + end : count);
        begin = next.load(std::memory_order_relaxed);
      }
    }
    template <class F> void each(int64_t count, F body) {
      share(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
      });
    }

   private:
    void enter(int64_t count) {
      if (!first_ && !(single_ && count <= 1)) barrier();
      first_ = false, single_ = count <= 1;
    }
    void barrier();

    Team& team_;
    const int index_, size_;
    uint32_t passed_ = 0, claims_ = 0;
    bool first_ = true, single_ = false;
  };

  Member join(int64_t pieces);

 private:
  const int slots_;
  alignas(64) std::atomic<int> members_{0};
  std::atomic<int64_t> covered_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int64_t> claimed_[2] = {};
};

// body(member) on every thread of a team of at most `slots`; it must not throw, or the others would wait for ever.
template <class F> void run_team(int slots, F body) {
  Team team(slots);
  parallel(0, slots, 1, [&](int64_t begin, int64_t end) {
    Team::Member member = team.join(end - begin);
    body(member);
  });
}

}  // namespace halfweight
