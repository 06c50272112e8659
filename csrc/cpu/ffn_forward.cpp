// The experts' forward pass: rows of one expert through up_proj and the activation, for some of
// its columns; then all of them through down_proj.

#include "cpu/blocking.h"
#include "cpu/ffn.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace moe_ext::cpu {
namespace {

// The low-rank part of a weight, (rows A_e) B_e; without one, nothing. rows A_e is an operand like
// the rows themselves, rounded to P.
template <class P>
class LowRank {
 public:
  using T = Sum<P>;

  // Packed rows need both factors, and columns that alternate need B, to run along their sums.
  LowRank(const Experts& call, const at::Tensor& a, const at::Tensor& b, bool packs, bool skips)
      : call_(call), a_(packs ? along_k(a) : a), b_(packs || skips ? along_k(b) : b) {}

  bool exists() const { return a_.defined(); }

  struct Pieces {
    P *rows, *block;
    T *inner, *sums;
    Scratch matmul;
  };
  Pieces carve(Scratch& scratch, int64_t height, int64_t columns) const {
    if (!exists()) return {};
    const int64_t operands = block_size<P>(height, rank());
    const int64_t k = std::max(a_.size(1), rank());
    return {scratch.take<P>(height * rank()), scratch.take<P>(operands),
            scratch.take<T>(block_size<T>(height, std::min(rank(), NC))),
            scratch.take<T>(block_size<T>(height, columns)),
            scratch.take_scratch(kernel_.matmul_scratch(height, k))};
  }

  // rows A_e
  Block<P> inner(const Pieces& pieces, const Block<P>& rows, int64_t expert) const {
    const Block<P> block{pieces.block, rows.rows, rows.packed, rank()};
    if (!exists()) return block;
    const Weight w = factor_of(call_, a_, expert, 2);
    const RowsOut out{pieces.rows, Operand<P>::dtype, rank()};
    for (int64_t n = 0; n < rank(); n += NC) {
      const Block<T> part{pieces.inner, rows.rows, rows.packed, std::min(NC, rank() - n)};
      kernel_.matmul_block(part, rows, w, n, pieces.matmul);
      kernel_.store_block(out.from_column(n), part, nullptr);
    }
    kernel_.load_block(block, {pieces.rows, Operand<P>::dtype, rank()});
    return block;
  }

  // c += inner times columns begin + n0 * step, ... of B_e.
  void add(const Pieces& pieces, const Block<T>& c, const Block<P>& inner, int64_t expert,
           int64_t n0, int64_t begin = 0, int64_t step = 1) const {
    if (!exists()) return;
    const Block<T> more{pieces.sums, c.rows, c.packed, c.cols};
    kernel_.matmul_block(more, inner, factor_of(call_, b_, expert, 2, begin, step), n0,
                         pieces.matmul);
    kernel_.add_block(c, more);
  }

 private:
  static at::Tensor along_k(const at::Tensor& factor) {
    if (!factor.defined() || factor.stride(1) == 1) return factor;
    return factor.mT().contiguous().mT();
  }
  int64_t rank() const { return exists() ? a_.size(2) : 0; }

  const Experts& call_;
  const Kernels<P>& kernel_ = kernels<P>();
  at::Tensor a_, b_;
};

template <class P>
class Forward {
 public:
  using T = Sum<P>;

  explicit Forward(const Experts& call)
      : call_(call),
        blocks_(call, sizeof(P)),
        activations_(block_size<P>(blocks_.places, call.intermediate)),
        along_k_(call.up_proj.stride(call.in_dim()) == 1 &&
                 call.down_proj.stride(call.in_dim()) == 1),
        woven_(call.spec.interleaved && !along_k_ && call.up_proj.stride(call.out_dim()) == 1),
        up_low_rank_(call, call.up_lora_a, call.up_lora_b, packed_rows(blocks_.height) > 0,
                     call.spec.interleaved && !woven_),
        down_low_rank_(call, call.down_lora_a, call.down_lora_b, packed_rows(blocks_.height) > 0,
                       false) {}

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
  // Where gate's and up's columns alternate in memory, a block of both is one product.
  bool woven_;
  LowRank<P> up_low_rank_, down_low_rank_;
};

template <class P>
void Forward<P>::up(void* kept) const {
  const int64_t hidden = call_.hidden, intermediate = call_.intermediate;
  const bool gated = call_.spec.gated;
  const at::Tensor bias = in_sums_type<T>(call_.up_bias);
  const int64_t step = call_.spec.interleaved && !woven_ ? 2 : 1;
  const int64_t up_begin = call_.spec.interleaved ? 1 : intermediate;
  const ColumnBlocks columns(woven_ ? call_.width : intermediate, blocks_.height, 64,
                             blocks_.size());
  const Rows tokens = rows_of(call_.x).with_index(call_.row_token.const_data_ptr<int32_t>());
  struct Pieces {
    P* x;
    T *gate, *up, *both;
    Scratch matmul;
    typename LowRank<P>::Pieces low_rank;
  };
  const auto carve = [&](Scratch& scratch) {
    const int64_t product = block_size<T>(blocks_.height, columns.widest());
    return Pieces{scratch.take<P>(block_size<P>(blocks_.height, hidden)),
                  scratch.take<T>(product),
                  gated ? scratch.take<T>(product) : nullptr,
                  woven_ ? scratch.take<T>(product) : nullptr,
                  scratch.take_scratch(kernel_.matmul_scratch(blocks_.height, hidden)),
                  up_low_rank_.carve(scratch, blocks_.height, columns.widest())};
  };
  for_items(blocks_.size() * columns.groups, call_.kept * call_.width * hidden, carve,
            [&](const Pieces& pieces, int64_t item) {
              const RowBlock& block = blocks_[item / columns.groups];
              const int64_t e = block.expert, m = block.rows(), packed = packed_rows(m);
              const Block<P> x{pieces.x, m, packed, hidden};
              kernel_.load_block(x, tokens.from_row(block.begin));
              const Block<P> inner = up_low_rank_.inner(pieces.low_rank, x, e);
              const auto add = [&](const Block<T>& c, int64_t c0, int64_t begin) {
                up_low_rank_.add(pieces.low_rank, c, inner, e, c0, begin, step);
              };
              const Weight w_gate = weight_of(call_, call_.up_proj, e, 0, step);
              const Weight w_up =
                  gated ? weight_of(call_, call_.up_proj, e, up_begin, step) : Weight{};
              const RowsOut kept_rows{kept, call_.dtype, call_.width};
              columns.for_blocks(item % columns.groups, [&](int64_t c0, int64_t c1) {
                const int64_t i0 = woven_ ? c0 / 2 : c0, count = woven_ ? (c1 - c0) / 2 : c1 - c0;
                const Block<T> gate{pieces.gate, m, packed, count}, up{pieces.up, m, packed, count};
                if (woven_) {
                  const Block<T> both{pieces.both, m, packed, c1 - c0};
                  kernel_.matmul_block(both, x, w_gate, c0, pieces.matmul);
                  add(both, c0, 0);
                  kernel_.unweave(gate, up, both);
                } else {
                  kernel_.matmul_block(gate, x, w_gate, c0, pieces.matmul);
                  add(gate, c0, 0);
                  if (gated) {
                    kernel_.matmul_block(up, x, w_up, c0, pieces.matmul);
                    add(up, c0, up_begin);
                  }
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
    typename LowRank<P>::Pieces low_rank;
  };
  const auto carve = [&](Scratch& scratch) {
    return Pieces{scratch.take<T>(block_size<T>(blocks_.height, columns.widest())),
                  scratch.take_scratch(kernel_.matmul_scratch(blocks_.height, call_.intermediate)),
                  down_low_rank_.carve(scratch, blocks_.height, columns.widest())};
  };
  for_items(blocks_.size() * columns.groups, call_.kept * call_.intermediate * hidden, carve,
            [&](const Pieces& pieces, int64_t item) {
              const RowBlock& block = blocks_[item / columns.groups];
              const int64_t e = block.expert;
              const Block<P> activations = activations_of(block);
              const Weight w = weight_of(call_, call_.down_proj, e);
              const Block<P> inner = down_low_rank_.inner(pieces.low_rank, activations, e);
              columns.for_blocks(item % columns.groups, [&](int64_t h0, int64_t h1) {
                const Block<T> y{pieces.y, block.rows(), activations.packed, h1 - h0};
                kernel_.matmul_block(y, activations, w, h0, pieces.matmul);
                down_low_rank_.add(pieces.low_rank, y, inner, e, h0);
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
