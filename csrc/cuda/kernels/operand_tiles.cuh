// A stage's share of a GEMM operand in shared memory: how it lies there, how cp.async
// brings it, and how the tensor cores' fragments come out of it.
//
// An operand is a matrix of (m or n) x k. Major says along which of the two its elements
// are neighbours in global memory, and so in shared memory too: nothing is transposed on
// the way in, ldmatrix does that on the way out. A tile is rows of 16-byte chunks, and a
// chunk's place in its row is xored with a key of the row. Eight lanes that read the same
// chunk of eight rows (ldmatrix), or write the eight chunks of a row (cp.async), then meet
// eight different sets of four banks: no conflicts, no padding.
//
// What is not there, chunks past a row's end and rows past the last, is zero: cp.async
// fills it without reading. Chunks exist whole or not at all; then nvcc makes a predicate
// of the copy's size, where any size would cost five instructions a copy.
#pragma once

#include "ptx.cuh"

namespace moe_ext::cuda {

enum class Major { kK, kMN };

// kExtent (of m or n) x kBytesK / sizeof(T) (of k) elements.
template <class T, Major kMajor_, int kExtent_, int kBytesK>
struct OperandTile {
  using Element = T;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kExtent = kExtent_;
  static constexpr int kDepth = kBytesK / sizeof(T);  // along k
  static constexpr int kRows = kMajor == Major::kK ? kExtent : kDepth;
  static constexpr int kRowBytes = kMajor == Major::kK ? kBytesK : kExtent * sizeof(T);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  // ldmatrix transposes 16-bit elements only; wider ones are read one by one.
  static constexpr bool kByWords = kMajor == Major::kMN && sizeof(T) == 4;
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "the keys below are for these");

  static __device__ __forceinline__ int key(int row) {
    if (kByWords) return row % 4 * 2;                // 4 rows x 8 words that are neighbours
    return kRowBytes == 64 ? row / 2 % 4 : row % 8;  // two rows of 64 bytes share 32 banks
  }
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ key(row)) * 16;
  }
};

// ---- from global memory ---------------------------------------------------------------

// Fills K-major tiles, one after the other along k. A thread has the same chunk of some
// rows of the tile, and keeps a pointer into each: the rows may come from anywhere.
template <class Tile, int kThreads>
class KMajorLoader {
  static constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static constexpr bool kIdle = Tile::kRows < kRowsAtOnce;  // some threads have no row
  static constexpr int kLoads = kIdle ? 1 : Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % Tile::kChunks == 0 && kLoads <= 32);
  static_assert(kIdle || Tile::kRows % kRowsAtOnce == 0);

 public:
  // row_at(i): where the tile's row i begins in global memory, or null if there is none.
  // k_bytes: of a row. somewhere: any valid address; cp.async wants one even for nothing.
  template <class RowAt>
  __device__ KMajorLoader(RowAt row_at, int k_bytes, const char* somewhere) {
    const int chunk = threadIdx.x % Tile::kChunks, row = threadIdx.x / Tile::kChunks;
    target_ = row < Tile::kRows ? Tile::offset(row, chunk) : -1;
    chunks_left_ = k_bytes / 16 - chunk;
    present_ = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const char* begin = kIdle && target_ < 0 ? nullptr : row_at(row + i * kRowsAtOnce);
      present_ |= static_cast<unsigned>(begin != nullptr) << i;
      source_[i] = (begin ? begin : somewhere) + chunk * 16;
    }
  }

  __device__ __forceinline__ void load(unsigned char* tile) {
    if (kIdle && target_ < 0) return;
    const uint32_t target = ptx::smem_u32(tile) + target_;
    const unsigned present = chunks_left_ > 0 ? present_ : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      // kRowsAtOnce is a multiple of 8, so all of a thread's rows have the same key.
      static_assert(kRowsAtOnce % 8 == 0);
      ptx::cp_async_16(target + i * kRowsAtOnce * Tile::kRowBytes, source_[i],
                       present >> i & 1 ? 16 : 0);
      source_[i] += Tile::kChunks * 16;
    }
    chunks_left_ -= Tile::kChunks;
  }

 private:
  const char* source_[kLoads];
  int chunks_left_;   // of a row, from this thread's on
  unsigned present_;  // bit i: there is a row i
  int target_;
};

// Fills MN-major tiles: the tile's rows are neighbours along k. A thread has the same
// chunk, `column`, of some rows of the tile.
template <class Tile, int kThreads, bool kIndexed>
class MnMajorLoader {
  static constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static constexpr int kLoads = Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowsAtOnce == 0);

 public:
  // chunk_at(c): where chunk c of row 0 is, or null if there is none. Row k of the operand
  // is row index[k] (null: k) of the matrix, zeros where index[k] is not in 0..limit-1; there are
  // `rows` of them.
  template <class ChunkAt>
  __device__ MnMajorLoader(ChunkAt chunk_at, int64_t row_bytes, const int32_t* index, int64_t limit,
                           int rows, const char* somewhere)
      : row_bytes_(row_bytes),
        index_(index),
        limit_(static_cast<unsigned>(limit)),
        chunk_(threadIdx.x % Tile::kChunks),
        row_(threadIdx.x / Tile::kChunks) {
    const char* column = chunk_at(chunk_);
    rows_ = column ? rows : 0;
    column_ = column ? column : somewhere;
    if (kIndexed) look_up();
  }

  __device__ __forceinline__ void load(unsigned char* tile) {
    const uint32_t target = ptx::smem_u32(tile);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = row_ + i * kRowsAtOnce;
      const int from = kIndexed ? next_[i] : k;
      ptx::cp_async_16(target + Tile::offset(row_in_tile() + i * kRowsAtOnce, chunk_),
                       column_ + max(from, 0) * row_bytes_, k < rows_ && from >= 0 ? 16 : 0);
    }
    row_ += Tile::kRows;
    if (kIndexed) look_up();
  }

 private:
  static __device__ __forceinline__ int row_in_tile() { return threadIdx.x / Tile::kChunks; }

  // Where the next tile's rows are: read a tile ahead, so that no thread waits for it.
  __device__ __forceinline__ void look_up() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = row_ + i * kRowsAtOnce;
      next_[i] = k >= rows_ ? 0 : index_ ? index_[k] : k;
      if (index_ && static_cast<unsigned>(next_[i]) >= limit_) next_[i] = -1;
    }
  }

  const char* column_;
  int64_t row_bytes_;
  const int32_t* index_;
  unsigned limit_;  // as unsigned, what is below 0 is not below it either
  int chunk_;
  int row_, rows_;  // along k: this thread's first row of the next tile; how many there are
  int next_[kIndexed ? kLoads : 1];
};

// ---- to fragments ---------------------------------------------------------------------

// A step of the tensor cores takes 32 bytes of k of every row: 16 elements of 16 bits
// (m16n8k16) or 8 of 32 (m16n8k8).
constexpr int kStepBytes = 32;

enum class Side { kA, kB };

// Reads a warp's kExtent rows (of m or n, from `begin`) of a tile, 16 rows in four
// registers: for A one mma's operand, for B two mmas' operands side by side.
template <class Tile, Side kSide, int kExtent>
class FragmentReader {
  using T = typename Tile::Element;
  static constexpr int kStep = kStepBytes / sizeof(T);

 public:
  __device__ explicit FragmentReader(int begin) {
    const int lane = threadIdx.x % kWarpSize;
    // Of the four 8x8 matrices, A's come with the halves of m first, B's of k.
    const int extent_half = kSide == Side::kA ? lane / 8 % 2 : lane / 16;
    const int k_half = kSide == Side::kA ? lane / 16 : lane / 8 % 2;
    if constexpr (Tile::kByWords) {
      row_ = lane % 4 * Tile::kRowBytes + lane / 4 % 4 * 4;
      chunk_ = begin / 4 + lane / 16;
      key_ = Tile::key(lane % 4);
    } else if constexpr (Tile::kMajor == Major::kK) {
      const int row = begin + lane % 8 + extent_half * 8;
      row_ = row * Tile::kRowBytes;
      chunk_ = k_half;
      key_ = Tile::key(row);
    } else {
      const int row = lane % 8 + k_half * 8;
      row_ = row * Tile::kRowBytes;
      chunk_ = begin / 8 + extent_half;
      key_ = Tile::key(row);
    }
  }

  // fragment[i]: rows 16 i.. of the warp's, step `step` of the tile's k.
  __device__ __forceinline__ void read(uint32_t (&fragment)[kExtent / 16][4],
                                       const unsigned char* tile, int step) const {
#pragma unroll
    for (int i = 0; i < kExtent / 16; ++i) {
      if constexpr (Tile::kByWords) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int extent_half = kSide == Side::kA ? r % 2 : r / 2;
          const int k_half = kSide == Side::kA ? r / 2 : r % 2;
          const int offset = row_ + (step * kStep + k_half * 4) * Tile::kRowBytes +
                             ((chunk_ + i * 4 + extent_half * 2) ^ key_) * 16;
          fragment[i][r] = *reinterpret_cast<const uint32_t*>(tile + offset);
        }
      } else if constexpr (Tile::kMajor == Major::kK) {
        const int offset =
            row_ + i * 16 * Tile::kRowBytes + ((chunk_ + step * (kStepBytes / 16)) ^ key_) * 16;
        ptx::ldmatrix_x4(fragment[i], ptx::smem_u32(tile) + offset);
      } else {
        const int offset = row_ + step * kStep * Tile::kRowBytes + ((chunk_ + i * 2) ^ key_) * 16;
        ptx::ldmatrix_x4_trans(fragment[i], ptx::smem_u32(tile) + offset);
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          fragment[i][r] = ptx::to_tf32(__uint_as_float(fragment[i][r]));
        }
      }
    }
  }

 private:
  int row_, chunk_, key_;  // bytes to this lane's row; its chunk in it, before the key
};

}  // namespace moe_ext::cuda
