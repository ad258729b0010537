// The threads that help with tokens: one team per process, whatever the number of conversations.
#pragma once

#include <atomic>
#include <cstdint>

namespace cats {

// What a team runs: work that any number of threads may take part in at the same time.
class Shared {
 public:
  // Takes part until there is nothing left to do for the moment.
  virtual void take_part() = 0;

 protected:
  ~Shared() = default;
};

// A place of a Shared in the team, from its creation to its end. Without a place (all are taken) it runs in its caller alone.
class Membership {
 public:
  explicit Membership(Shared* shared);
  // Waits until no thread of the team is in `take_part`.
  ~Membership();
  Membership(const Membership&) = delete;

  // Lets up to `helpers` threads take part, from now until `stop`. They are started on first use and woken here.
  void start(int64_t helpers);
  void stop();
  // After `stop`: waits until no thread is in `take_part`. One that the system has stopped may still read what a token has read.
  void settle() const;

 private:
  int place_ = -1;
};

// How many threads this process may run at the same time: by its affinity and the quota of its cgroup.
int64_t available_processors();

// For tests: another number of them, or 0 for the real one.
void pretend_processors(int64_t count);

// The number of threads that the team has started, for tests.
int64_t team_size();

}  // namespace cats
