// ldmatrix and mma.sync, in the layouts of the PTX manual (see ptx.cuh).

#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "block.h"

namespace emulator {

void ldmatrix(uint32_t* registers, uint32_t row, int matrices, bool transposed) {
  block->warp_operation(kLdmatrix, ~0u, row, matrices | transposed << 8, registers,
                        EMULATOR_CALL_SITE);
}

void stmatrix(uint32_t row, const uint32_t* registers, bool transposed) {
  block->warp_operation(kStmatrix, ~0u, row, 4 | transposed << 8, const_cast<uint32_t*>(registers),
                        EMULATOR_CALL_SITE);
}

// The eight rows of matrix m, whose addresses its lanes have given.
void Block::rows_of_matrix(char* (&rows)[8], Warp& warp, int m, bool write, void* call_site) {
  const char* const what = write ? "stmatrix" : "ldmatrix";
  Thread* const self = current;
  const size_t first = (&warp - warps.data()) * 32;
  for (int r = 0; r < 8; ++r) {
    const int lane = m * 8 + r;
    const auto address = static_cast<uint32_t>(warp.value[lane]);
    current = &threads[first + lane];  // it is this lane's access
    if (address % 16)
      fail_at(call_site, "%s: the row's address 0x%x is not a multiple of 16", what, address);
    rows[r] = shared_pointer(address, 16, what, call_site);
    if (checked()) track_shared(shared_offset(address), 16, write, false, call_site);
  }
  current = self;
}

void Block::load_matrices(Warp& warp, void* call_site) {
  const int matrices = warp.argument[0] & 0xff;
  const bool transposed = warp.argument[0] >> 8 & 1;
  uint32_t loaded[4][32];
  for (int m = 0; m < matrices; ++m) {
    char* rows[8];
    rows_of_matrix(rows, warp, m, false, call_site);
    const auto element = [&](int row, int column) {
      uint16_t value;
      std::memcpy(&value, rows[row] + 2 * column, 2);
      return uint32_t{value};
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      loaded[m][lane] = transposed ? element(pair, group) | element(pair + 1, group) << 16
                                   : element(group, pair) | element(group, pair + 1) << 16;
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < matrices; ++m)
      static_cast<uint32_t*>(warp.pointer[lane])[m] = loaded[m][lane];
}

void Block::store_matrices(Warp& warp, void* call_site) {
  const bool transposed = warp.argument[0] >> 8 & 1;
  for (int m = 0; m < 4; ++m) {
    char* rows[8];
    rows_of_matrix(rows, warp, m, true, call_site);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      const uint32_t both = static_cast<const uint32_t*>(warp.pointer[lane])[m];
      for (int i = 0; i < 2; ++i) {
        const auto value = static_cast<uint16_t>(both >> (16 * i));
        const int row = transposed ? pair + i : group, column = transposed ? group : pair + i;
        std::memcpy(rows[row] + 2 * column, &value, 2);
      }
    }
  }
}

void mma(WarpOp op, float* c, const uint32_t* a, const uint32_t* b) {
  MmaOperands operands{c, a, b};
  block->warp_operation(op, ~0u, 0, 0, &operands, EMULATOR_CALL_SITE);
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;  // infinity and NaN
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

static float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float from_half(bool bf16, uint32_t bits) {
  if (bf16) return from_bits(bits << 16);
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}

void execute_mma(WarpOp op, void* const* pointers) {
  const int depth = op == kMmaTf32 ? 8 : 16;
  alignas(32) float A[16][16], B[16][8], C[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<const MmaOperands*>(pointers[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) C[group + i / 2 * 8][2 * member + i % 2] = x.c[i];
    if (op == kMmaTf32) {
      for (int i = 0; i < 4; ++i)
        A[group + i % 2 * 8][member + i / 2 * 4] = from_bits(x.a[i] & ~uint32_t{0x1fff});
      for (int i = 0; i < 2; ++i) B[member + i * 4][group] = from_bits(x.b[i] & ~uint32_t{0x1fff});
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        A[group + i % 2 * 8][2 * member + half + i / 2 * 8] =
            from_half(op == kMmaBf16, x.a[i] >> (16 * half) & 0xffff);
      for (int i = 0; i < 2; ++i)
        B[2 * member + half + i * 8][group] =
            from_half(op == kMmaBf16, x.b[i] >> (16 * half) & 0xffff);
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum{};
    for (int k = 0; k < depth; ++k) sum += A[row][k] * *reinterpret_cast<const Row*>(B[k]);
    *reinterpret_cast<Row*>(C[row]) += sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<const MmaOperands*>(pointers[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) x.c[i] = C[group + i / 2 * 8][2 * member + i % 2];
  }
}

}  // namespace emulator
