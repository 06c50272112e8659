// The CPU's matrix kernels under the address sanitizer: sizes with every tail, every operand and
// every scratch in a piece of memory of just the size that kernels.h asks for. Results are compared
// with plain loops in double, so that a tile which skips its work is not called clean.
//
// Usage: kernels [operand ...], of float, double and bf16; prints one line for each. Built and run
// by tests/test_sanitized_kernels.py.

#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace moe_ext::cpu;

namespace {

std::mt19937 random_engine(0);

void set(double& to, float value) { to = value; }
void set(float& to, float value) { to = value; }
void set(bf16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = uint16_t(bits >> 16);
}
double get(double value) { return value; }
double get(float value) { return value; }
double get(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// As many elements as are asked for and not one more, on a cache line, holding NaN.
template <class T>
struct Memory {
  explicit Memory(int64_t elements)
      : elements(elements),
        data(static_cast<T*>(::operator new(elements * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data), 0xff, elements * sizeof(T));
  }
  ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  Memory(const Memory&) = delete;

  void draw() {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < elements; ++i) set(data[i], normal(random_engine));
  }

  int64_t elements;
  T* data;
};

int failures = 0;

// `size` is the norm that sums of products of normal data have on average.
void judge(const char* what, double error, double size, const std::string& sizes) {
  if (error <= 1e-5 * size) return;  // NaN is not
  std::printf("%s of %s: off by %g of %g\n", what, sizes.c_str(), error, size);
  ++failures;
}

// c = a W^T of rows packed where they can be, then stored; and of rows as they are. W's rows
// are `apart` elements further from each other than they are long.
template <class P>
void products(int64_t m, int64_t n, int64_t k, bool along_k, int64_t apart) {
  using T = Sum<P>;
  const Kernels<P>& kernel = kernels<P>();
  const std::string sizes = std::to_string(m) + " x " + std::to_string(n) + " x " +
                            std::to_string(k) + (along_k ? "" : ", weights across k") +
                            (apart ? ", apart" : "");
  const int64_t ld = (along_k ? k : n) + apart;
  Memory<P> x(m * k), w((along_k ? n : k) * ld - apart);
  x.draw();
  w.draw();
  const Weight weight = {w.data, Operand<P>::dtype, along_k ? ld : 1, along_k ? 1 : ld};
  const int64_t packed = along_k ? kernel.packed_rows(m, weight.dtype) : 0;
  Memory<P> a(block_size<P>(m, k));
  Memory<T> c(block_size<T>(m, n)), stored(m * n), rows(m * padded<T>(n));
  Memory<char> scratch(kernel.matmul_scratch(m, k)), again(kernel.matmul_scratch(m, k));
  const Rows source = {x.data, Operand<P>::dtype, k};
  const Block<P> block = {a.data, m, packed, k};
  const Block<T> product = {c.data, m, packed, n};
  kernel.load_block(block, source);
  kernel.matmul_block(product, block, weight, 0, Scratch{scratch.data});
  kernel.store_block({stored.data, Operand<T>::dtype, n}, product, nullptr);
  Memory<P> loaded(m * padded<P>(k));
  const Matrix<P> plain_x = {loaded.data, m, k, padded<P>(k)};
  kernel.load_rows(plain_x, source);
  kernel.matmul({rows.data, m, n, padded<T>(n)}, plain_x, weight, 0, Scratch{again.data});
  double blocks = 0, plain = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += get(x.data[i * k + l]) * get(w.data[j * weight.stride_n + l * weight.stride_k]);
      blocks += std::pow(stored.data[i * n + j] - sum, 2);
      plain += std::pow(rows.data[i * padded<T>(n) + j] - sum, 2);
    }
  }
  judge("a product of blocks", std::sqrt(blocks), std::sqrt(double(m * n * k)), sizes);
  judge("a product of rows", std::sqrt(plain), std::sqrt(double(m * n * k)), sizes);
}

// out = p^T q, of a strip of p's columns.
template <class P>
void outer(int64_t rows, int64_t m, int64_t n) {
  using T = Sum<P>;
  const Kernels<P>& kernel = kernels<P>();
  const std::string sizes =
      std::to_string(rows) + " rows, " + std::to_string(m) + " x " + std::to_string(n);
  const int64_t m0 = m / 3;
  Memory<P> p(rows * m), q(rows * n);
  p.draw();
  q.draw();
  Memory<T> out(m * n);
  Memory<char> scratch(kernel.outer_scratch(m - m0));
  const Rows p_rows = {p.data, Operand<P>::dtype, m}, q_rows = {q.data, Operand<P>::dtype, n};
  const RowsOut to = {out.data, Operand<T>::dtype, n};
  kernel.outer({to.from_row(m0), false, p_rows.from_column(m0), q_rows, m - m0, n, rows},
               Scratch{scratch.data});
  double error = 0;
  for (int64_t i = m0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += get(p.data[r * m + i]) * get(q.data[r * n + j]);
      error += std::pow(out.data[i * n + j] - sum, 2);
    }
  }
  judge("a sum over rows", std::sqrt(error), std::sqrt(double(rows * (m - m0) * n)), sizes);
}

template <class P>
void all() {
  for (int64_t m : {1, 2, 5, 6, 7, 12, 13, 16, 29, 33, 48, 67})
    for (int64_t n : {1, 8, 15, 32, 64, 97})
      for (int64_t k : {1, 2, 17, 31, 32, 64, 131, 1025, 2050})
        if (m * n * k < 2000000) {
          for (int64_t apart : {0, 1}) {
            products<P>(m, n, k, true, apart);
            products<P>(m, n, k, false, apart);
          }
        }
  for (int64_t rows : {0, 1, 2, 3, 16, 255, 257, 700, 1030})
    for (int64_t m : {1, 12, 13, 40})
      for (int64_t n : {1, 31, 32, 33, 70}) outer<P>(rows, m, n);
}

}  // namespace

int main(int arguments, char** argument) {
  for (int i = 1; i < arguments; ++i) {
    const std::string operand = argument[i];
    if (operand == "float") all<float>();
    if (operand == "double") all<double>();
    if (operand == "bf16") all<bf16>();
    std::printf("%s on %s: %d failures\n", operand.c_str(), name_of(instruction_set()), failures);
  }
  return failures > 0;
}
