#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa/table.h"
#include "ops.h"

namespace latent_rl {
namespace {

#ifdef LATENT_RL_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const OpTable& best() {
#ifdef LATENT_RL_X86
  if (has_avx512bf16()) return avx512bf16::table();
  if (has_avx512()) return avx512::table();
  if (has_avx2()) return avx2::table();
#endif
  return baseline::table();
}

const OpTable& named(const char* name) {
  if (*name == '\0') return best();
  if (std::strcmp(name, "baseline") == 0) return baseline::table();
#ifdef LATENT_RL_X86
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) return avx2::table();
  if (std::strcmp(name, "avx512") == 0 && has_avx512()) return avx512::table();
  if (std::strcmp(name, "avx512bf16") == 0 && has_avx512bf16()) return avx512bf16::table();
#endif
  throw std::invalid_argument(
      "the instruction set must be baseline, avx2, avx512 or avx512bf16 and this processor must "
      "have it, got '" +
      std::string(name) + "'");
}

std::atomic<const OpTable*> g_table{nullptr};

}  // namespace

void select_isa(const char* name) { g_table.store(&named(name), std::memory_order_release); }

const OpTable& op_table() {
  const OpTable* table = g_table.load(std::memory_order_acquire);
  return table == nullptr ? best() : *table;
}

}  // namespace latent_rl
