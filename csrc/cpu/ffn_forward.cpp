// The experts' forward pass: rows of one expert through up_proj and the activation, for some of
// its columns; then all of them through down_proj.

#include "cpu/blocking.h"
#include "cpu/ffn.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace moe_ext::cpu {
namespace {

template <class P>
class Forward {
 public:
  using T = Sum<P>;

  explicit Forward(const Experts& call)
      : call_(call),
        blocks_(call, sizeof(P)),
        activations_(block_size<P>(blocks_.places, call.intermediate)),
        along_k_(call.up_proj.stride(call.in_dim()) == 1 &&
                 call.down_proj.stride(call.in_dim()) == 1) {}

  void up(void* kept) const;
  void down(const RowsOut& out) const;

 private:
  // Rows are packed where both weights' rows run along the sums, unless all must be summed alike.
  int64_t packed_rows(int64_t rows) const {
    return along_k_ && !call_.batch_invariant ? kernel_.packed_rows(rows, call_.dtype) : 0;
  }
  Block<P> activations_of(const RowBlock& block) const {
    return {activations_.data() + block_size<P>(block.place, call_.intermediate), block.rows(),
            packed_rows(block.rows()), call_.intermediate};
  }

  const Experts& call_;
  const Kernels<P>& kernel_ = kernels<P>();
  RowBlocks blocks_;
  Workspace<P> activations_;
  bool along_k_;
};

template <class P>
void Forward<P>::up(void* kept) const {
  const int64_t hidden = call_.hidden, intermediate = call_.intermediate;
  const bool gated = call_.spec.gated;
  const at::Tensor bias = in_sums_type<T>(call_.up_bias);
  // Where gate's and up's columns alternate in memory, a block of both is one product.
  const bool woven =
      call_.spec.interleaved && !along_k_ && call_.up_proj.stride(call_.out_dim()) == 1;
  const int64_t step = call_.spec.interleaved && !woven ? 2 : 1;
  const int64_t up_begin = call_.spec.interleaved ? 1 : intermediate;
  const ColumnBlocks columns(woven ? call_.width : intermediate, blocks_.height, 64,
                             blocks_.size());
  const Rows tokens = rows_of(call_.x).with_index(call_.row_token.const_data_ptr<int32_t>());
  struct Pieces {
    P* x;
    T *gate, *up, *both;
    Scratch matmul;
  };
  const auto carve = [&](Scratch& scratch) {
    const int64_t product = block_size<T>(blocks_.height, columns.widest());
    return Pieces{scratch.take<P>(block_size<P>(blocks_.height, hidden)), scratch.take<T>(product),
                  gated ? scratch.take<T>(product) : nullptr,
                  woven ? scratch.take<T>(product) : nullptr,
                  scratch.take_scratch(kernel_.matmul_scratch(blocks_.height, hidden))};
  };
  for_items(blocks_.size() * columns.groups, call_.kept * call_.width * hidden, carve,
            [&](const Pieces& pieces, int64_t item) {
              const RowBlock& block = blocks_[item / columns.groups];
              const int64_t e = block.expert, m = block.rows(), packed = packed_rows(m);
              const Block<P> x{pieces.x, m, packed, hidden};
              kernel_.load_block(x, tokens.from_row(block.begin));
              const Weight w_gate = weight_of(call_, call_.up_proj, e, 0, step);
              const Weight w_up =
                  gated ? weight_of(call_, call_.up_proj, e, up_begin, step) : Weight{};
              const RowsOut kept_rows{kept, call_.dtype, call_.width};
              columns.for_blocks(item % columns.groups, [&](int64_t c0, int64_t c1) {
                const int64_t i0 = woven ? c0 / 2 : c0, count = woven ? (c1 - c0) / 2 : c1 - c0;
                const Block<T> gate{pieces.gate, m, packed, count}, up{pieces.up, m, packed, count};
                if (woven) {
                  const Block<T> both{pieces.both, m, packed, c1 - c0};
                  kernel_.matmul_block(both, x, w_gate, c0, pieces.matmul);
                  kernel_.unweave(gate, up, both);
                } else {
                  kernel_.matmul_block(gate, x, w_gate, c0, pieces.matmul);
                  if (gated) kernel_.matmul_block(up, x, w_up, c0, pieces.matmul);
                }
                kernel_.activate_block(activations_of(block),
                                       {gate, up, call_.spec,
                                        bias.defined() ? data<T>(bias) + e * call_.width : nullptr,
                                        kept ? kept_rows.from_row(block.begin) : kept_rows},
                                       i0);
              });
            });
}

template <class P>
void Forward<P>::down(const RowsOut& out) const {
  const int64_t hidden = call_.hidden;
  const at::Tensor bias = in_sums_type<T>(call_.down_bias);
  const ColumnBlocks columns(hidden, blocks_.height, 64, blocks_.size());
  struct Pieces {
    T* y;
    Scratch matmul;
  };
  const auto carve = [&](Scratch& scratch) {
    return Pieces{scratch.take<T>(block_size<T>(blocks_.height, columns.widest())),
                  scratch.take_scratch(kernel_.matmul_scratch(blocks_.height, call_.intermediate))};
  };
  for_items(blocks_.size() * columns.groups, call_.kept * call_.intermediate * hidden, carve,
            [&](const Pieces& pieces, int64_t item) {
              const RowBlock& block = blocks_[item / columns.groups];
              const int64_t e = block.expert;
              const Block<P> activations = activations_of(block);
              const Weight w = weight_of(call_, call_.down_proj, e);
              columns.for_blocks(item % columns.groups, [&](int64_t h0, int64_t h1) {
                const Block<T> y{pieces.y, block.rows(), activations.packed, h1 - h0};
                kernel_.matmul_block(y, activations, w, h0, pieces.matmul);
                kernel_.store_block(out.from_row(block.begin).from_column(h0), y,
                                    bias.defined() ? data<T>(bias) + e * hidden + h0 : nullptr);
              });
            });
}

}  // namespace

template <class P>
void ffn_forward(const Experts& call, const RowsOut& out, void* kept) {
  const Forward<P> forward(call);
  forward.up(kept);
  forward.down(out);
}
template void ffn_forward<float>(const Experts&, const RowsOut&, void*);
template void ffn_forward<double>(const Experts&, const RowsOut&, void*);
template void ffn_forward<bf16>(const Experts&, const RowsOut&, void*);

}  // namespace moe_ext::cpu
