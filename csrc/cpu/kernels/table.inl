// The table of one instruction set's kernels.

template <class P, class S = Sum<P>>
constexpr Kernels<P> products() {
  return {packed_rows<P>,    load_block<P>,     store_block<S>,   matmul_block<P>,     add_block<S>,
          unweave<S>,        activate_block<P>, load_rows<P>,     store_rows<S>,       matmul<P>,
          matmul_scratch<P>, outer<P>,          outer_scratch<P>, activate_backward<P>};
}

template <class A>
constexpr RowKernels<A> row_by_row() {
  return {router_logits<A>,    logits_scratch<A>, route<A>,    route_backward<A>, combine<A>,
          combine_backward<A>, entropy<A>,        sum_rows<A>, sum_columns<A>,    dot<A>};
}

constexpr Table table() {
  return {products<float>(), products<double>(), row_by_row<float>(), row_by_row<double>()};
}
