// The experts' backward pass: rows of an expert through down_proj, the activation and up_proj;
// then the gradients of weights, factors and biases, each the sum over all rows of its expert, in
// strips.

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

  Backward(const Experts& call, const T* weight)
      : call_(call),
        upstream_(
            rows_of(call.upstream).with_index(call.weights.defined() ? tokens().index : nullptr)),
        weight_(weight),
        dh_(call.kept, call.width),
        wa_(call.kept, call.intermediate),
        dx_(wants(kX) ? call.kept : 0, call.hidden),
        x_a_(wants(kUpLoraB) ? call.kept : 0, rank(call.up_lora_a)),
        dh_b_(wants_dh_b() ? call.kept : 0, rank(call.up_lora_a)),
        wa_a_(wants(kDownLoraB) ? call.kept : 0, rank(call.down_lora_a)),
        dy_b_(call.down_lora_a.defined() ? call.kept : 0, rank(call.down_lora_a)) {}

  // dL/dh and weight * activation of every row, its score unless that is null, dL/dx, and what
  // the factors of low-rank parts make of rows.
  void rows(T* score) const;

  at::Tensor of(Gradient gradient) const {
    switch (gradient) {
      case kX:
        return x();
      case kUpProj:
        return weight_gradient(call_.up_proj, dh_.rows(), tokens());
      case kDownProj:
        return weight_gradient(call_.down_proj, upstream_, wa_.rows());
      case kUpBias:
        return bias_gradient(call_.width, dh_.rows(), nullptr);
      case kDownBias:
        return bias_gradient(call_.hidden, upstream_, weight_);
      case kUpLoraA:
        return sum_of_products(call_.up_lora_a, tokens(), dh_b_.rows());
      case kUpLoraB:
        return sum_of_products(call_.up_lora_b, x_a_.rows(), dh_.rows());
      case kDownLoraA:
        return sum_of_products(call_.down_lora_a, wa_.rows(), dy_b_.rows());
      case kDownLoraB:
        return sum_of_products(call_.down_lora_b, wa_a_.rows(), upstream_);
      default:  // moe_backward has the routing weights'
        return {};
    }
  }

 private:
  bool wants(Gradient gradient) const { return call_.wanted[gradient]; }
  bool wants_dh_b() const { return call_.up_lora_a.defined() && (wants(kX) || wants(kUpLoraA)); }
  static int64_t rank(const at::Tensor& a) { return a.defined() ? a.size(2) : 0; }

  Rows tokens() const {
    return rows_of(call_.x).with_index(call_.row_token.template const_data_ptr<int32_t>());
  }
  // out = `rows` of an expert times its factor, whose dimension n_dim counts the results.
  struct Inner {
    T* product;
    Scratch matmul;
  };
  void inner(const Inner& scratch, const WorkspaceRows<P>& out, const RowBlock& block,
             const Matrix<P>& rows, const at::Tensor& factor, int64_t n_dim) const;
  // c += the block's rows of `inner` times columns n0.. of the factor A, transposed.
  void add(const Inner& scratch, const Matrix<T>& c, const WorkspaceRows<P>& inner,
           const RowBlock& block, const at::Tensor& a, int64_t n0) const;

  // Each expert's sum over its rows of p^T q, of the shape of `like`.
  at::Tensor sum_of_products(const at::Tensor& like, const Rows& p, const Rows& q) const;
  // The same of outputs and inputs, in the weight's layout.
  at::Tensor weight_gradient(const at::Tensor& weight, const Rows& outputs,
                             const Rows& inputs) const {
    return call_.transposed ? sum_of_products(weight, inputs, outputs)
                            : sum_of_products(weight, outputs, inputs);
  }
  at::Tensor bias_gradient(int64_t cols, const Rows& rows, const T* weight) const;
  at::Tensor x() const;

  const Experts& call_;
  const Kernels<P>& kernel_ = kernels<P>();
  Rows upstream_;
  const T* weight_;
  WorkspaceRows<P> dh_, wa_;
  WorkspaceRows<T> dx_;  // of rows, to be summed per token
  // Of low-rank parts: x A, dh B^T; weight * activation times A, dy B^T.
  WorkspaceRows<P> x_a_, dh_b_, wa_a_, dy_b_;
};

template <class P>
void Backward<P>::inner(const Inner& scratch, const WorkspaceRows<P>& out, const RowBlock& block,
                        const Matrix<P>& rows, const at::Tensor& factor, int64_t n_dim) const {
  const Weight w = factor_of(call_, factor, block.expert, n_dim);
  for (int64_t n = 0, rank = factor.size(n_dim); n < rank; n += NC) {
    const int64_t cols = std::min(NC, rank - n);
    const Matrix<T> part{scratch.product, rows.rows, cols, padded<T>(cols)};
    kernel_.matmul(part, rows, w, n, scratch.matmul);
    kernel_.store_rows(out.out().from_row(block.begin).from_column(n), part);
  }
  // Pairs of bf16 reach past an odd rank.
  const Matrix<P> stored = out.part(block.begin, rows.rows);
  for (int64_t r = 0; r < stored.rows; ++r) {
    P* row = stored.data + r * stored.ld;
    std::fill(row + stored.cols, row + stored.ld, P());
  }
}

template <class P>
void Backward<P>::add(const Inner& scratch, const Matrix<T>& c, const WorkspaceRows<P>& inner,
                      const RowBlock& block, const at::Tensor& a, int64_t n0) const {
  const Matrix<T> more{scratch.product, c.rows, c.cols, c.ld};
  kernel_.matmul(more, inner.part(block.begin, block.rows()), factor_of(call_, a, block.expert, 1),
                 n0, scratch.matmul);
  kernel_.add_block({c.data, c.rows, 0, c.cols}, {more.data, c.rows, 0, c.cols});
}

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
    P* rows;  // dy, or x
    T* product;
    Scratch matmul;
    Inner inner;
  };
  const bool low_rank = call_.up_lora_a.defined() || call_.down_lora_a.defined();
  const auto carve = [&](Scratch& scratch) {
    const int64_t product = height * padded<T>(std::max(up.widest(), down.widest()));
    Pieces pieces{scratch.take<P>(height * padded<P>(hidden)), scratch.take<T>(product),
                  scratch.take_scratch(std::max(kernel_.matmul_scratch(height, hidden),
                                                kernel_.matmul_scratch(height, width)))};
    if (low_rank) {
      const int64_t k = std::max({hidden, width, rank(call_.up_lora_a), rank(call_.down_lora_a)});
      pieces.inner = {scratch.take<T>(std::max(product, height * padded<T>(NC))),
                      scratch.take_scratch(kernel_.matmul_scratch(height, k))};
    }
    return pieces;
  };
  for_items(
      blocks.size(), call_.kept * width * hidden, carve, [&](const Pieces& pieces, int64_t item) {
        const RowBlock& block = blocks[item];
        const int64_t e = block.expert, m = block.rows();
        const Matrix<P> dy{pieces.rows, m, hidden, padded<P>(hidden)};
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
        const bool down_low_rank = call_.down_lora_a.defined();
        if (down_low_rank) inner(pieces.inner, dy_b_, block, dy, call_.down_lora_b, 1);
        const Matrix<P> dh = dh_.part(block.begin, m), wa = wa_.part(block.begin, m);
        const Rows h = rows_of(call_.preactivations);
        const ActivationBackward<P> to{dh,
                                       wa,
                                       score ? score + block.begin : nullptr,
                                       h.from_row(block.begin),
                                       weight_ ? weight_ + block.begin : nullptr,
                                       call_.spec};
        const Weight w_down = weight_of(call_, call_.down_proj, e, 0, 1, /*swapped=*/true);
        up.for_blocks(0, [&](int64_t i0, int64_t i1) {
          const Matrix<T> da = product(i1 - i0);
          kernel_.matmul(da, dy, w_down, i0, pieces.matmul);
          if (down_low_rank) add(pieces.inner, da, dy_b_, block, call_.down_lora_a, i0);
          for (int64_t i = i0; i < i1; i += kActivateColumns) {
            kernel_.activate_backward(
                to, da.from_column(i - i0, std::min(kActivateColumns, i1 - i)), i);
          }
        });
        if (wants(kDownLoraB)) inner(pieces.inner, wa_a_, block, wa, call_.down_lora_a, 2);
        if (wants_dh_b()) inner(pieces.inner, dh_b_, block, dh, call_.up_lora_b, 1);
        if (wants(kUpLoraB)) {
          const Matrix<P> x{pieces.rows, m, hidden, padded<P>(hidden)};
          kernel_.load_rows(x, tokens().from_row(block.begin));
          inner(pieces.inner, x_a_, block, x, call_.up_lora_a, 2);
        }
        if (!wants(kX)) return;
        const Weight w_up = weight_of(call_, call_.up_proj, e, 0, 1, /*swapped=*/true);
        down.for_blocks(0, [&](int64_t h0, int64_t h1) {
          const Matrix<T> dx = product(h1 - h0);
          kernel_.matmul(dx, dh, w_up, h0, pieces.matmul);
          if (call_.up_lora_a.defined()) {
            add(pieces.inner, dx, dh_b_, block, call_.up_lora_a, h0);
          }
          kernel_.store_rows(dx_.out().from_row(block.begin).from_column(h0), dx);
        });
      });
}

template <class P>
at::Tensor Backward<P>::sum_of_products(const at::Tensor& like, const Rows& p,
                                        const Rows& q) const {
  const at::Tensor gradient = empty_large(like.sizes(), call_.x.options());
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
Gradients ffn_backward(const Experts& call, const Sum<P>* weight, Sum<P>* score) {
  const Backward<P> backward(call, weight);
  // The bias of down_proj alone needs no row's gradient.
  bool wants_rows = score != nullptr;
  for (int g = kX; g < kGradients; ++g) wants_rows |= g != kDownBias && call.wanted[g];
  if (wants_rows) backward.rows(score);
  Gradients gradients;
  gradients.fill(at::empty({0}, call.x.options()));
  for (int g = kX; g < kGradients; ++g) {
    if (call.wanted[g] && g != kWeights) gradients[g] = backward.of(static_cast<Gradient>(g));
  }
  return gradients;
}
template Gradients ffn_backward<float>(const Experts&, const float*, float*);
template Gradients ffn_backward<double>(const Experts&, const double*, double*);
template Gradients ffn_backward<bf16>(const Experts&, const float*, float*);

}  // namespace moe_ext::cpu
