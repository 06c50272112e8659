// The table of one instruction set's kernels.
template <class T>
constexpr Kernels<T> table(const char* name) {
  return {name,
          turned_rows<T>,
          load_block<T>,
          store_block<T>,
          matmul_block<T>,
          unweave<T>,
          activate_block<T>,
          load_rows<T>,
          store_rows<T>,
          matmul<T>,
          matmul_scratch<T>,
          outer<T>,
          outer_scratch<T>,
          activate_backward<T>,
          combine<T>,
          sum_rows<T>,
          dot<T>};
}
