// Models of Hopper's instructions (include/hopper_emulated.h), from the PTX ISA's sections on
// mbarrier, cp.async.bulk.tensor and wgmma.
#include "common/hopper.cuh"

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace emulator {
namespace {

constexpr unsigned kGroupThreads = 128;
constexpr int kSums = 64, kDepth = 16;
constexpr uint32_t kRowBytes = 128;

struct Barrier {
  unsigned count, pending;
  int64_t bytes = 0;
  unsigned phase = 0;

  void settle() {
    if (pending > 0 || bytes != 0) return;
    pending = count;
    phase ^= 1;
  }
};

struct Product {
  float* sums;
  uint64_t left, right;
  bool add;
  Decode decode;
};

// What a thread's tensor core still owes it. Until then its sums are garbage, as if in use.
struct Tensor {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> sums;
  std::map<float*, int> owed;
  bool begun = false;
  size_t issued = 0;
};

struct Engines {
  uint64_t serial = 0;
  std::map<const uint64_t*, Barrier> barriers;
  std::vector<Tensor> tensors;
  std::map<unsigned, std::vector<uint64_t>> issued;  // by warpgroup
};

Engines& engines() {
  static Engines all;
  if (all.serial != block_serial()) {
    all = Engines();
    all.serial = block_serial();
    all.tensors.resize(blockDim.x);
  }
  return all;
}

Barrier& barrier_at(const uint64_t* at) {
  auto& barriers = engines().barriers;
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("an mbarrier is used before its init");
  return found->second;
}

unsigned char* shared_bytes(uint32_t address, uint32_t count) {
  if (address + count > dynamic_shared_bytes()) fail("shared address %u is past the end", address);
  return static_cast<unsigned char*>(dynamic_shared()) + address;
}

// Address bits 4 to 6 are mixed with bits 7 to 9, so that eight rows fall on different banks.
uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Columns 0 to 15 of a row of a matrix. A swizzle moves 16 bytes at once.
void read_row(uint64_t descriptor, uint32_t row, Decode decode, double* out) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t plain = start + row / 8 * eight_rows + row % 8 * kRowBytes;
  for (uint32_t half = 0; half < 2; ++half) {
    uint16_t bits[kDepth / 2];
    memcpy(bits, shared_bytes(swizzle(plain + 16 * half), 16), 16);
    for (int k = 0; k < kDepth / 2; ++k) out[half * kDepth / 2 + k] = decode(bits[k]);
  }
}

void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("only descriptors with 128-byte swizzle (mode 1) are modelled");
  if ((descriptor >> 49 & 7) != 0) fail("only base offset 0 is modelled");
  constexpr uint64_t kUsed = 3ull << 62 | 7ull << 49 | 0x3fffull << 32 | 0x3fffull << 16 | 0x3fff;
  if ((descriptor & ~kUsed) != 0) fail("a descriptor with reserved bits set");
}

// Sums of 16 exact products and the accumulator, cut to float32 as matrix units do.
float cut(double total) {
  const float near = static_cast<float>(total);
  if (std::isfinite(near) && std::fabs(static_cast<double>(near)) > std::fabs(total)) {
    return std::nextafter(near, 0.0f);
  }
  return near;
}

void carry_out(Tensor& tensor, const Product& product) {
  std::vector<float>& sums = tensor.sums[product.sums];
  const uint32_t first_row = thread() % kGroupThreads / 32 * 16 + lane() / 4;
  double left[2][kDepth];
  for (uint32_t h = 0; h < 2; ++h) {
    read_row(product.left, first_row + 8 * h, product.decode, left[h]);
  }
  for (uint32_t fragment = 0; fragment < kSums / 4; ++fragment) {
    for (uint32_t e = 0; e < 2; ++e) {
      const uint32_t column = fragment * 8 + lane() % 4 * 2 + e;
      double right[kDepth];
      read_row(product.right, column, product.decode, right);
      for (uint32_t h = 0; h < 2; ++h) {
        float& sum = sums[fragment * 4 + h * 2 + e];
        double total = product.add ? sum : 0.0;
        for (int k = 0; k < kDepth; ++k) total += left[h][k] * right[k];
        sum = cut(total);
      }
    }
  }
  if (--tensor.owed[product.sums] > 0) return;
  memcpy(product.sums, sums.data(), kSums * sizeof(float));
  tensor.sums.erase(product.sums);
}

Tensor& own_tensor() { return engines().tensors[thread()]; }

void carry_out_groups(Tensor& tensor, size_t left) {
  while (tensor.groups.size() > left) {
    for (const Product& product : tensor.groups.front()) carry_out(tensor, product);
    tensor.groups.pop_front();
  }
}

// The lanes of a warp must do the same, and so must the warps of a warpgroup.
void do_together(uint64_t what) {
  const uint64_t* all = meet(WarpOp::kProduct, 0xffffffffu, what);
  for (int l = 0; l < 32; ++l) {
    if (all[l] != what) fail("lanes of a warp issue different products");
  }
  std::vector<uint64_t>& issued = engines().issued[thread() / kGroupThreads];
  const size_t at = own_tensor().issued++;
  if (at == issued.size()) issued.push_back(what);
  if (issued[at] != what) fail("warps of a warpgroup issue different products");
}

}  // namespace

uint32_t shared_address(const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const auto begin = reinterpret_cast<uintptr_t>(dynamic_shared());
  if (address < begin || address >= begin + dynamic_shared_bytes()) {
    fail("an address that is not in shared memory");
  }
  return static_cast<uint32_t>(address - begin);
}

void init_barrier(uint64_t* barrier, unsigned count) {
  if (shared_address(barrier) % 8 != 0) fail("a misaligned mbarrier");
  engines().barriers[barrier] = {count, count};
}

void arrive(uint64_t* barrier, unsigned expected_bytes) {
  Barrier& b = barrier_at(barrier);
  if (b.pending == 0) fail("more arrivals at an mbarrier than its count");
  b.bytes += expected_bytes;
  --b.pending;
  b.settle();
}

void wait_barrier(uint64_t* barrier, unsigned parity) {
  if (parity > 1) fail("an mbarrier's parity is 0 or 1, not %u", parity);
  const Barrier& b = barrier_at(barrier);
  wait_until([&b, parity] { return b.phase != parity; },
             "parity " + std::to_string(parity) + " of the mbarrier at byte " +
                 std::to_string(shared_address(barrier)));
}

void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const int (&at)[3]) {
  TensorMap tensor;
  memcpy(&tensor, map, sizeof(tensor));
  if (tensor.magic != kMapMagic) fail("a copy by something that is no tensor map");
  if (!tensor.swizzled) fail("only tensor maps with 128-byte swizzle are modelled");
  const uint32_t begin = shared_address(to);
  if (begin % 1024 != 0) fail("a swizzled copy to byte %u, not a multiple of 1024", begin);
  Barrier& b = barrier_at(barrier);
  const uint32_t pitch = tensor.box[0] * 2;
  std::vector<unsigned char> box(pitch * tensor.box[1] * tensor.box[2], 0);
  for (uint32_t i = 0; i < box.size(); i += 2) {
    const int64_t place[] = {at[0] + int64_t{i % pitch / 2},
                             at[1] + int64_t{i / pitch % tensor.box[1]},
                             at[2] + int64_t{i / pitch / tensor.box[1]}};
    bool inside = true;
    uint64_t offset = 0;
    for (int d = 0; d < 3; ++d) {
      inside &= place[d] >= 0 && static_cast<uint64_t>(place[d]) < tensor.sizes[d];
      offset += static_cast<uint64_t>(place[d]) * tensor.strides[d];
    }
    if (inside) memcpy(box.data() + i, tensor.base + offset, 2);
  }
  // Nobody may count on what was there before, nor on what will be.
  unsigned char* shared = shared_bytes(begin, static_cast<uint32_t>(box.size()));
  memset(shared, 0xff, box.size());
  defer([&b, shared, begin, box] {
    for (uint32_t i = 0; i < box.size(); i += 2) {
      memcpy(shared + swizzle(begin + i) - begin, box.data() + i, 2);
    }
    b.bytes -= static_cast<int64_t>(box.size());
    if (b.bytes < 0) complain("more bytes arrive at an mbarrier than it expects");
    b.settle();
  });
}

void product_step(Step step) {
  do_together(static_cast<uint64_t>(step));
  Tensor& tensor = own_tensor();
  if (step == Step::kBegin) tensor.begun = true;
  if (step != Step::kCommit) return;
  tensor.groups.push_back(std::move(tensor.open));
  tensor.open.clear();
}

void multiply(float* sums, uint64_t left, uint64_t right, bool add, Decode decode) {
  check_descriptor(left);
  check_descriptor(right);
  do_together(left * 31 + right * 2 + (add ? 1 : 0));
  Tensor& tensor = own_tensor();
  if (!tensor.begun) fail("products without wgmma.fence after sums were touched");
  if (tensor.owed[sums] == 0) {
    tensor.sums[sums].assign(sums, sums + kSums);
    memset(sums, 0xff, kSums * sizeof(float));
  }
  ++tensor.owed[sums];
  const Product product = {sums, left, right, add, decode};
  // Early only if nothing of the thread is owed: products are done in order.
  const bool nothing_owed = tensor.open.empty() && tensor.groups.empty();
  if (nothing_owed && !late()) return carry_out(tensor, product);
  tensor.open.push_back(product);
}

void wait_products(unsigned pending) {
  Tensor& tensor = own_tensor();
  if (!tensor.open.empty()) fail("a wait for products that were not committed");
  carry_out_groups(tensor, pending);
  if (pending == 0) tensor.begun = false;
  // Only when all lanes are here is the warp's part done.
  do_together(0x77616974u + pending);
}

}  // namespace emulator
