// An NVTX range for the length of a scope; nothing where the headers are missing at build time.
#pragma once

#ifdef LATENT_RL_HAS_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

namespace latent_rl {

class NvtxRange {
 public:
#ifdef LATENT_RL_HAS_NVTX
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
#else
  explicit NvtxRange(const char*) {}
#endif
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

}  // namespace latent_rl
