// accumulate_stats: one token's largest logit, and the entropy of its scores (the formulas are in
// csrc/cpu/accumulate_stats.cpp).

template <class A, class T>
void entropy_of_token(const T* logits, int64_t num_experts, bool is_sigmoid, A* result,
                      A* max_logit) {
  A top = -kInf<A>;
  A nan = 0;
#pragma omp simd reduction(max : top) reduction(+ : nan)
  for (int64_t e = 0; e < num_experts; ++e) {
    const A l = to_compute(logits[e]);
    top = l > top ? l : top;
    nan += l != l ? l : A(0);
  }
  A sum = 0, weighted = 0;
  if (is_sigmoid) {
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t e = 0; e < num_experts; ++e) {
      const A s = sigmoid_of_score(A(to_compute(logits[e])));
      sum += s;
      weighted += s > A(0) ? s * std::log(s) : A(0);
    }
  } else {
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t e = 0; e < num_experts; ++e) {
      const A d = to_compute(logits[e]) - top;
      const A p = exp_nonpositive(d);
      sum += p;
      weighted += p * (d < A(-1000) ? A(-1000) : d);  // 0, not NaN, where d is -inf
    }
  }
  *result = std::log(sum) - weighted / sum;
  *max_logit = top + nan;
}

template <class A>
void entropy(const Rows& logits, int64_t num_experts, bool is_sigmoid, A* result, A* max_logit) {
  with_storage<A>(logits.dtype, [&](auto stored) {
    entropy_of_token(row_of<decltype(stored)>(logits, 0), num_experts, is_sigmoid, result,
                     max_logit);
  });
}
