// What a thread does in a loop that waits for another thread.
#pragma once

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace cats {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ __volatile__("yield");
#elif defined(_MSC_VER) && defined(_M_X64)
  _mm_pause();
#endif
}

}  // namespace cats
