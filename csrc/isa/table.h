#pragma once

#include "ops.h"

namespace latent_rl {
namespace baseline {
const OpTable& table();
}
namespace avx2 {
const OpTable& table();
}
namespace avx512 {
const OpTable& table();
}
namespace avx512bf16 {
const OpTable& table();
}
}  // namespace latent_rl
