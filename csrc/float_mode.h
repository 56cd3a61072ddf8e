// The caller's thread may flush subnormals (torch.set_flush_denormal); results must not depend on
// which thread computes a row, so an op runs in the default mode and restores the caller's.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace latent_rl {

class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatMode() {}
  ~DefaultFloatMode() {}

 public:
#endif
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;
};

}  // namespace latent_rl
