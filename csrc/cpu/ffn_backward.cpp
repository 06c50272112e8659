// The experts' backward pass: rows of an expert through down_proj, the activation and up_proj;
// then the gradients of weights and biases, each the sum over all rows of its expert, in strips.

#include <ATen/ops/empty.h>

#include "cpu/blocking.h"
#include "cpu/ffn.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace moe_ext::cpu {
namespace {

// Strips of a weight's gradient: enough of them to share out, tall enough to reuse
// the rows that each of them loads.
constexpr int64_t kStrip = 192;
// A gradient of this many bytes is still in a cache when the optimizer reads it.
constexpr int64_t kCached = 1 << 20;

template <class P>
class Backward {
 public:
  using T = Sum<P>;

  Backward(const Experts& call, const Rows& upstream, const T* weight)
      : call_(call),
        upstream_(upstream),
        weight_(weight),
        dh_(call.kept, call.width),
        wa_(call.kept, call.intermediate),
        dx_(call.wanted[kX] ? call.kept : 0, call.hidden) {}

  // dL/dh and weight * activation of every row, its score unless that is null, and dL/dx if it
  // is wanted.
  void rows(T* score) const;

  at::Tensor x() const;
  at::Tensor up_proj() const { return weight_gradient(call_.up_proj, dh_.rows(), tokens()); }
  at::Tensor down_proj() const { return weight_gradient(call_.down_proj, upstream_, wa_.rows()); }
  at::Tensor up_bias() const { return bias_gradient(call_.width, dh_.rows(), nullptr); }
  at::Tensor down_bias() const { return bias_gradient(call_.hidden, upstream_, weight_); }

 private:
  Rows tokens() const {
    return rows_of(call_.x).with_index(call_.row_token.template const_data_ptr<int32_t>());
  }
  // Each expert's sum over its rows of outputs^T inputs, in the weight's layout.
  at::Tensor weight_gradient(const at::Tensor& weight, Rows outputs, Rows inputs) const;
  at::Tensor bias_gradient(int64_t cols, const Rows& rows, const T* weight) const;

  const Experts& call_;
  const Kernels<P>& kernel_ = kernels<P>();
  Rows upstream_;
  const T* weight_;
  WorkspaceRows<P> dh_, wa_;
  WorkspaceRows<T> dx_;  // of rows, to be summed per token
};

template <class P>
void Backward<P>::rows(T* score) const {
  const int64_t hidden = call_.hidden, intermediate = call_.intermediate, width = call_.width;
  const RowBlocks blocks(call_, sizeof(P));
  const int64_t height = blocks.height;
  const at::Tensor down_bias = in_sums_type<T>(call_.down_bias);
  // One group each: an item has all columns of its rows, so the sums over them stay with it.
  const ColumnBlocks up(intermediate, height, kActivateColumns, kNoSplit),
      down(hidden, height, 64, kNoSplit);
  struct Pieces {
    P* dy;
    T* product;
    Scratch matmul;
  };
  const auto carve = [&](Scratch& scratch) {
    return Pieces{scratch.take<P>(height * padded<P>(hidden)),
                  scratch.take<T>(height * padded<T>(std::max(up.widest(), down.widest()))),
                  scratch.take_scratch(std::max(kernel_.matmul_scratch(height, hidden),
                                                kernel_.matmul_scratch(height, width)))};
  };
  for_items(
      blocks.size(), call_.kept * width * hidden, carve, [&](const Pieces& pieces, int64_t item) {
        const RowBlock& block = blocks[item];
        const int64_t e = block.expert, m = block.rows();
        const Matrix<P> dy{pieces.dy, m, hidden, padded<P>(hidden)};
        const auto product = [&](int64_t cols) {
          return Matrix<T>{pieces.product, m, cols, padded<T>(cols)};
        };
        kernel_.load_rows(dy, upstream_.from_row(block.begin));
        for (int64_t r = 0; score && r < m; ++r) {
          score[block.begin + r] =
              down_bias.defined()
                  ? row_kernels<T>().dot({dy.data + r * dy.ld, Operand<P>::dtype, 0},
                                         {data<T>(down_bias) + e * hidden, Operand<T>::dtype, 0},
                                         hidden)
                  : T(0);
        }
        const Matrix<P> dh = dh_.part(block.begin, m);
        const Rows h = rows_of(call_.preactivations);
        const ActivationBackward<P> to{dh,
                                       wa_.part(block.begin, m),
                                       score ? score + block.begin : nullptr,
                                       h.from_row(block.begin),
                                       weight_ ? weight_ + block.begin : nullptr,
                                       call_.spec};
        const Weight w_down = weight_of(call_, call_.down_proj, e, 0, 1, /*swapped=*/true);
        up.for_blocks(0, [&](int64_t i0, int64_t i1) {
          const Matrix<T> da = product(i1 - i0);
          kernel_.matmul(da, dy, w_down, i0, pieces.matmul);
          for (int64_t i = i0; i < i1; i += kActivateColumns) {
            kernel_.activate_backward(
                to, da.from_column(i - i0, std::min(kActivateColumns, i1 - i)), i);
          }
        });
        if (!call_.wanted[kX]) return;
        const Weight w_up = weight_of(call_, call_.up_proj, e, 0, 1, /*swapped=*/true);
        down.for_blocks(0, [&](int64_t h0, int64_t h1) {
          const Matrix<T> dx = product(h1 - h0);
          kernel_.matmul(dx, dh, w_up, h0, pieces.matmul);
          kernel_.store_rows(dx_.out().from_row(block.begin).from_column(h0), dx);
        });
      });
}

template <class P>
at::Tensor Backward<P>::weight_gradient(const at::Tensor& weight, Rows p, Rows q) const {
  if (call_.transposed) std::swap(p, q);
  const at::Tensor gradient = empty_large(weight.sizes(), call_.x.options());
  const int64_t m = gradient.size(1), n = gradient.size(2), strips = (m + kStrip - 1) / kStrip;
  const int32_t* offsets = call_.offsets();
  const RowsOut out{gradient.mutable_data_ptr(), call_.dtype, n};
  const bool past_caches = int64_t(gradient.nbytes()) > kCached;
  const auto carve = [&](Scratch& scratch) {
    return scratch.take_scratch(kernel_.outer_scratch(std::min(kStrip, m)));
  };
  for_items(
      call_.experts * strips, call_.kept * m * n, carve, [&](const Scratch& scratch, int64_t item) {
        const int64_t e = item / strips, strip = item % strips;
        const int64_t begin = m * strip / strips, end = m * (strip + 1) / strips;
        kernel_.outer(
            {out.from_row(e * m + begin), past_caches, p.from_row(offsets[e]).from_column(begin),
             q.from_row(offsets[e]), end - begin, n, offsets[e + 1] - offsets[e]},
            scratch);
      });
  return gradient;
}

template <class P>
at::Tensor Backward<P>::bias_gradient(int64_t cols, const Rows& rows, const T* weight) const {
  at::Tensor gradient = at::empty({call_.experts, cols}, call_.x.options());
  const RowsOut out = rows_out(gradient);
  const int32_t* offsets = call_.offsets();
  const auto nothing = [](Scratch& scratch) { return scratch; };
  for_items(call_.experts, call_.kept * cols, nothing, [&](const Scratch&, int64_t e) {
    row_kernels<T>().sum_rows(out.from_row(e), rows.from_row(offsets[e]),
                              weight ? weight + offsets[e] : nullptr, offsets[e + 1] - offsets[e],
                              cols);
  });
  return gradient;
}

template <class P>
at::Tensor Backward<P>::x() const {
  at::Tensor dx = at::empty({call_.tokens, call_.hidden}, call_.x.options());
  combine_tokens<T>(call_, dx, dx_, nullptr);
  return dx;
}

}  // namespace

template <class P>
FfnGradients ffn_backward(const Experts& call, const Rows& upstream, const Sum<P>* weight,
                          Sum<P>* score) {
  const auto& wanted = call.wanted;
  const Backward<P> backward(call, upstream, weight);
  if (score || wanted[kX] || wanted[kUpProj] || wanted[kDownProj] || wanted[kUpBias])
    backward.rows(score);
  const at::Tensor none = at::empty({0}, call.x.options());
  return {wanted[kX] ? backward.x() : none, wanted[kUpProj] ? backward.up_proj() : none,
          wanted[kDownProj] ? backward.down_proj() : none,
          wanted[kUpBias] ? backward.up_bias() : none,
          wanted[kDownBias] ? backward.down_bias() : none};
}
template FfnGradients ffn_backward<float>(const Experts&, const Rows&, const float*, float*);
template FfnGradients ffn_backward<double>(const Experts&, const Rows&, const double*, double*);
template FfnGradients ffn_backward<bf16>(const Experts&, const Rows&, const float*, float*);

}  // namespace moe_ext::cpu
