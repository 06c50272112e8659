// The table of one instruction set's kernels.
template <class P, class T = Sum<P>>
constexpr Kernels<P> table(const char* name) {
  return {name,
          packed_rows<P>,
          load_block<P>,
          store_block<T>,
          matmul_block<P>,
          add_block<T>,
          unweave<T>,
          activate_block<P>,
          load_rows<P>,
          store_rows<T>,
          matmul<P>,
          matmul_scratch<P>,
          outer<P>,
          outer_scratch<P>,
          activate_backward<P>,
          combine<T>,
          sum_rows<T>,
          dot<T>};
}
