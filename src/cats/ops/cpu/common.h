// What all operators of this backend share: types, and the threads of torch.
#pragma once

#include <cstdint>

namespace cats {

struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kMaxBatch = 8;

// The thread pool of torch: `run` calls `body(begin, end, context)` on parts of [0, count) and waits for all of them.
struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int64_t count;
  void (*run)(int64_t count, Body body, void* context);
};

}  // namespace cats
