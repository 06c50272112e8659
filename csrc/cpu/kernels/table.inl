// The table of one instruction set's kernels.
template <class T>
constexpr Kernels<T> table(const char* name) {
  return {name,
          load_rows<T>,
          store_rows<T>,
          matmul<T>,
          matmul_scratch<T>,
          outer<T>,
          outer_scratch<T>,
          activate<T>,
          activate_backward<T>,
          combine<T>,
          sum_rows<T>,
          dot<T>};
}
