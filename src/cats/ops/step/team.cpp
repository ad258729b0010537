// The team: threads that look for work for a short time, then sleep until a token begins.
#include "step/team.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "step/pause.h"

namespace cats {
namespace {

constexpr int kPlaces = 64;
constexpr int64_t kMaxThreads = 255;
// How long a thread looks for the next token before it sleeps: Python takes less between two tokens on a quiet machine.
constexpr std::chrono::microseconds kLook{50};

struct alignas(64) Place {
  std::atomic<bool> taken{false};
  std::atomic<Shared*> shared{nullptr};
  std::atomic<int64_t> helpers{0};  // threads that may take part now
  std::atomic<int64_t> inside{0};   // threads that look at `shared`, or are in it
};

Place places[kPlaces];
std::atomic<int64_t> pretended{0};

// Where threads sleep until a token begins. On Linux it is a futex: a caller that wakes others must not wait for one of them,
// and that of a condition variable may, in its lock or for the end of earlier waits.
class Bed {
 public:
  uint32_t calls() const { return calls_.load(); }

  // Sleeps until there was another call than the one that was seen.
  void sleep(uint32_t seen) {
    sleeping_.fetch_add(1);
#if defined(__linux__)
    static_assert(sizeof calls_ == sizeof(uint32_t));
    while (calls_.load() == seen) syscall(SYS_futex, &calls_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return calls_.load() != seen; });
#endif
    sleeping_.fetch_sub(1);
  }

  void call() {
    calls_.fetch_add(1);
    // a thread that is about to sleep is counted, or sees the new call
    if (!sleeping_.load()) return;
#if defined(__linux__)
    syscall(SYS_futex, &calls_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
#endif
  }

 private:
  std::atomic<uint32_t> calls_{0};
  std::atomic<int64_t> sleeping_{0};
#if !defined(__linux__)
  std::mutex mutex_;
  std::condition_variable wake_;
#endif
};

struct Team {
  std::mutex mutex;  // of the threads' creation
  Bed bed;
  std::atomic<int64_t> size{0};

  // Takes part in what runs; returns whether there was anything.
  static bool help(int64_t number) {
    bool found = false;
    for (Place& place : places) {
      if (number >= place.helpers.load(std::memory_order_relaxed)) continue;
      // in this order, so that the end of a membership waits for us, or we see it
      place.inside.fetch_add(1);
      Shared* shared = place.shared.load();
      if (shared && number < place.helpers.load()) {
        shared->take_part();
        found = true;
      }
      place.inside.fetch_sub(1);
    }
    return found;
  }

  void run(int64_t number) {
    using Clock = std::chrono::steady_clock;
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "cats step");
#endif
    for (;;) {
      const uint32_t seen = bed.calls();
      Clock::time_point until = Clock::now() + kLook;
      while (bed.calls() == seen) {
        if (help(number)) until = Clock::now() + kLook;
        pause_briefly();
        if (Clock::now() > until) break;
      }
      bed.sleep(seen);
    }
  }

  void start(int64_t count) {
    if (count > size.load(std::memory_order_relaxed)) {
      std::lock_guard<std::mutex> lock(mutex);
      while (size.load() < count) {
        try {
          std::thread([this, number = size.load()] { run(number); }).detach();
        } catch (const std::system_error&) {
          break;  // the system has no more threads: those that there are do the work
        }
        size.fetch_add(1);
      }
    }
    bed.call();
  }
};

// Never deleted: detached threads use it until the process ends.
Team* team = nullptr;
std::once_flag team_made;

#if defined(__unix__) || defined(__APPLE__)
// A forked process has none of the threads, and the mutex may be held by one of them.
void after_fork() {
  team = new Team;
  for (Place& place : places) {
    place.helpers = 0;
    place.inside = 0;
  }
}
#endif

Team& the_team() {
  std::call_once(team_made, [] {
    team = new Team;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, after_fork);
#endif
  });
  return *team;
}

#if defined(__linux__)
// Processors' worth of time that the cgroup allows, or 0 where it has no limit.
int64_t quota_in(const std::string& folder) {
  const auto first_two = [&](const char* name, long long (&numbers)[2]) {
    std::FILE* file = std::fopen((folder + name).c_str(), "r");
    if (!file) return 0;
    const int read = std::fscanf(file, "%lld %lld", &numbers[0], &numbers[1]);
    std::fclose(file);
    return read;
  };
  long long both[2], period[2];
  if (first_two("/cpu.max", both) == 2 && both[0] > 0 && both[1] > 0) return (both[0] + both[1] - 1) / both[1];
  if (first_two("/cpu.cfs_quota_us", both) >= 1 && first_two("/cpu.cfs_period_us", period) >= 1 && both[0] > 0 && period[0] > 0)
    return (both[0] + period[0] - 1) / period[0];
  return 0;
}

// The smallest quota of this process's cgroup and those above it.
int64_t quota() {
  int64_t smallest = 0;
  const auto note = [&](int64_t found) {
    if (found && (!smallest || found < smallest)) smallest = found;
  };
  std::FILE* file = std::fopen("/proc/self/cgroup", "r");
  char line[4096];
  while (file && std::fgets(line, sizeof line, file)) {
    const std::string text(line);
    const size_t first = text.find(':'), second = text.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = text.substr(first + 1, second - first - 1);
    std::string path = text.substr(second + 1, text.find('\n') - second - 1);
    const bool is_v2 = controllers.empty();
    if (!is_v2 && controllers.find("cpu") != 0 && controllers.find(",cpu") == std::string::npos) continue;
    const std::string root = is_v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (; !path.empty() && path != "/"; path = path.substr(0, path.rfind('/'))) note(quota_in(root + path));
    note(quota_in(root));
  }
  if (file) std::fclose(file);
  return smallest;
}
#endif

}  // namespace

void pretend_processors(int64_t count) { pretended = count; }

int64_t available_processors() {
  if (const int64_t count = pretended.load(std::memory_order_relaxed)) return count;
  int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = std::max(1, CPU_COUNT(&allowed));
  // once: it reads files
  static const int64_t limit = quota();
  if (limit) count = std::min(count, limit);
#endif
  return count;
}

int64_t team_size() { return the_team().size.load(); }

Membership::Membership(Shared* shared) {
  the_team();
  for (int i = 0; i < kPlaces && place_ < 0; ++i) {
    bool taken = false;
    if (!places[i].taken.compare_exchange_strong(taken, true)) continue;
    places[i].shared = shared;
    place_ = i;
  }
}

Membership::~Membership() {
  if (place_ < 0) return;
  Place& place = places[place_];
  place.helpers = 0;
  place.shared = nullptr;
  // a thread that looked before is inside, and one that looks now finds nothing
  settle();
  place.taken = false;
}

void Membership::start(int64_t helpers) {
  helpers = std::min(helpers, kMaxThreads);
  if (place_ < 0 || helpers <= 0) return;
  places[place_].helpers = helpers;
  the_team().start(helpers);
}

void Membership::stop() {
  if (place_ >= 0) places[place_].helpers = 0;
}

void Membership::settle() const {
  while (place_ >= 0 && places[place_].inside.load() != 0) std::this_thread::yield();
}

}  // namespace cats
