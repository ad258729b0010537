// How threads share a token without waiting for each other. A token is a row of parts, and a part is a number of pieces. All
// pieces of a part are written before the next part begins.
//
// A thread that the system has stopped must hold up nobody. So a piece is computed in the thread's own memory, and a thread that
// finds no piece left computes one again that another thread has taken and not finished. The first one that is ready writes
// (`begin_commit`); the others throw their result away. Only while it copies a finished piece, a fraction of a microsecond,
// does a thread hold the others up.
//
// A stopped thread goes on when the others are parts or tokens ahead. What it reads may be overwritten meanwhile. So it copies
// its inputs, and uses the copy only if the part has not ended (`is_current`). All that is passed on between threads is
// written and read by `share` and `copy_shared`.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

namespace cats {

// Shared memory may be overwritten while it is copied: the copy is not used then. The thread sanitizer sees single atomic
// copies instead; the compiler would not copy these by vectors.
#if defined(__SANITIZE_THREAD__)
inline void copy_shared(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) __atomic_load(from + i, to + i, __ATOMIC_RELAXED);
}
inline void share(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) __atomic_store(to + i, const_cast<float*>(from + i), __ATOMIC_RELAXED);
}
#else
inline void copy_shared(const float* from, int64_t count, float* to) {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memcpy(to, from, count * sizeof(float));
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
inline void share(const float* from, int64_t count, float* to) { copy_shared(from, count, to); }
#endif

class Claims {
 public:
  static constexpr int64_t kMaxPieces = 1 << 12;

  Claims() : states_(new std::atomic<uint64_t>[kMaxPieces]) {
    for (int64_t i = 0; i < kMaxPieces; ++i) states_[i].store(0, std::memory_order_relaxed);
  }

  // The number of the part that runs, over all tokens.
  uint64_t part() const { return ticket_.load(std::memory_order_acquire) >> kBits; }

  // Whether this part still runs: what was copied before is what the part began with.
  bool is_current(uint64_t part) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    return ticket_.load(std::memory_order_relaxed) >> kBits == part;
  }

  bool is_all_claimed(uint64_t part, int64_t pieces) const {
    const uint64_t ticket = ticket_.load(std::memory_order_relaxed);
    return ticket >> kBits != part || static_cast<int64_t>(ticket & kMask) >= pieces;
  }

  // The next piece of this part, or -1 where all are claimed or the part has ended.
  int64_t claim(uint64_t part, int64_t pieces) {
    uint64_t ticket = ticket_.load(std::memory_order_relaxed);
    while (ticket >> kBits == part && static_cast<int64_t>(ticket & kMask) < pieces)
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_relaxed))
        return static_cast<int64_t>(ticket & kMask);
    return -1;
  }

  // Whether this thread may write the piece: no other one has begun to. The part cannot end before `end_commit`.
  bool begin_commit(uint64_t part, int64_t piece) {
    uint64_t state = states_[piece].load(std::memory_order_relaxed);
    if (state >= 2 * part) return false;
    if (!states_[piece].compare_exchange_strong(state, 2 * part, std::memory_order_acq_rel)) return false;
    // a reader that sees what is written next also sees that this part has begun
    std::atomic_thread_fence(std::memory_order_release);
    return true;
  }
  void end_commit(uint64_t part, int64_t piece) { states_[piece].store(2 * part + 1, std::memory_order_release); }

  // The first piece from `from` on that is not written; `pieces` where all are.
  int64_t first_open(uint64_t part, int64_t from, int64_t pieces) const {
    while (from < pieces && states_[from].load(std::memory_order_acquire) > 2 * part) ++from;
    return from;
  }
  // Whether no thread has begun to write the piece.
  bool is_unwritten(uint64_t part, int64_t piece) const { return states_[piece].load(std::memory_order_relaxed) < 2 * part; }

  // Ends a part, all pieces of which are written; `next` is the part after it.
  void advance(uint64_t part, uint64_t next) {
    uint64_t ticket = ticket_.load(std::memory_order_relaxed);
    while (ticket >> kBits == part &&
           !ticket_.compare_exchange_weak(ticket, next << kBits, std::memory_order_acq_rel, std::memory_order_relaxed)) {
    }
  }

  // Begins a token, where no part runs.
  void begin(uint64_t part) { ticket_.store(part << kBits, std::memory_order_release); }

 private:
  static constexpr int kBits = 16;
  static constexpr uint64_t kMask = (1 << kBits) - 1;

  alignas(64) std::atomic<uint64_t> ticket_{0};
  // twice the part that a piece was last written in, and 1 more once it is complete
  alignas(64) std::unique_ptr<std::atomic<uint64_t>[]> states_;
};

}  // namespace cats
