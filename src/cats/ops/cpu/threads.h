// Whether other threads help a call. Where other programs use the processors, a call waits until the system has run the last
// of its threads, which can take much longer than the work. Then calls run in the calling thread alone for a while.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "cpu/common.h"

namespace cats {

class Helpers {
 public:
  using Clock = std::chrono::steady_clock;
  using Duration = Clock::duration;

  // How many times the wait calls then run alone: a new try costs a twentieth of the time at most.
  static constexpr int kPause = 20;
  // an upper bound, so that threads help again soon after a machine has become quiet
  static constexpr Duration kLongest = std::chrono::seconds(10);

  // Whether calls that start now run alone.
  bool are_paused(Clock::time_point now) const { return now.time_since_epoch().count() < until_.load(std::memory_order_relaxed); }

  // Takes note of a call in threads: how long the calling thread worked, and how long it then waited for the others.
  void note(int64_t threads, Duration worked, Duration waited, Clock::time_point now) {
    // alone, the call would have taken about `threads` times the work of one thread: less than it took in threads
    if (waited > worked * (threads - 1))
      until_.store((now + std::min(waited * kPause, kLongest)).time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Calls `body` from up to `count` threads. Each call takes work until none is left, so that one call is enough.
  void run(int64_t count, Threads::Body body, void* context, void (*in_threads)(int64_t, Threads::Body, void*)) {
    struct Call {
      Threads::Body body;
      void* context;
      std::thread::id caller;
      Clock::time_point done;
    };
    const Clock::time_point start = Clock::now();
    if (are_paused(start)) return body(0, count, context);
    Call call{body, context, std::this_thread::get_id(), start};
    in_threads(count, [](int64_t begin, int64_t end, void* pointer) {
      auto& call = *static_cast<Call*>(pointer);
      call.body(begin, end, call.context);
      if (std::this_thread::get_id() == call.caller) call.done = Clock::now();
    }, &call);
    const Clock::time_point end = Clock::now();
    note(count, call.done - start, end - call.done, end);
  }

 private:
  std::atomic<Duration::rep> until_{0};
};

}  // namespace cats
