// What all operators of this backend share: types, and the threads of torch.
#pragma once

#include <cstdint>

namespace cats {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr int64_t kMaxBatch = 8;

// For fewer bytes, a second thread saves 2 microseconds at most on a quiet machine, and costs milliseconds on a busy one.
// 384 KiB took 12 us in two threads and 14 in one, 1536 KiB 31 and 49 (docs/kernels.md).
constexpr int64_t kBytesPerThread = 256 * 1024;

// The thread pool of torch: `run` calls `body(begin, end, context)` on parts of [0, count) and waits for all of them. Each
// thread reads at least `bytes_each` bytes of weights.
struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int64_t count;
  void (*run)(int64_t count, Body body, void* context);
  int64_t bytes_each = kBytesPerThread;
};

}  // namespace cats
