// How the experts' work is cut up, on kernels of csrc/cpu/kernels.
//
// Forward, two phases over items that threads take in turn: (rows of one expert) x
// (columns of up_proj), then x (columns of down_proj). Backward: rows of an expert
// through down_proj, the activation and up_proj; then strips of the weights' gradients,
// each the sum over all rows of its expert. An item writes what no other item writes,
// and its sums do not depend on how the work was cut, so neither do the bits.

#include "cpu/ffn.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "cpu/memory.h"

namespace moe_ext::cpu {

// ---- checks

namespace {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      return Dtype::f16;
  }
}

// The kernels take weights of any layout in which one of the matrix's strides is 1.
at::Tensor with_unit_stride(const at::Tensor& weight) {
  return weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : weight.contiguous();
}

}  // namespace

Experts check_memory(const char* op, FfnCall arguments) {
  Experts call{std::move(arguments)};
  call.up_proj = with_unit_stride(call.up_proj);
  call.down_proj = with_unit_stride(call.down_proj);
  call.dtype = dtype_of(call.x);
  check_plan_memory(op, call.expert_offsets, call.row_token, call.tokens);
  call.kept = call.offsets()[call.experts];
  const int32_t* row = call.assignment_row.const_data_ptr<int32_t>();
  bool ok = true;
  for (int64_t a = 0; a < call.assignment_row.numel(); ++a) ok &= row[a] < call.kept;
  TORCH_CHECK_VALUE(ok, op, ": assignment_row must be below expert_offsets[E] = ", call.kept);
  return call;
}

at::Tensor preactivations_of(const Experts& experts) {
  if (!experts.keep_preactivations) return at::empty({0}, experts.x.options());
  at::Tensor kept = empty_large({experts.rows, experts.width}, experts.x.options());
  kept.narrow(0, experts.kept, experts.rows - experts.kept).zero_();
  return kept;
}

// ---- memory and threads

namespace {

template <class T>
T* data(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Below this many multiplications, waking other threads costs more than they bring.
constexpr int64_t kSerialWork = 1 << 18;

// body(scratch, item) for every item, by whichever thread is free; a thread has so many
// bytes of scratch.
template <class Body>
void for_items(int64_t items, int64_t work, int64_t scratch_bytes, Body body) {
  std::atomic<int64_t> next{0};
  const auto worker = [&] {
    const at::Tensor scratch = workspace<float>(scratch_bytes / int64_t(sizeof(float)));
    for (int64_t i = next++; i < items; i = next++) body(Scratch{data<char>(scratch)}, i);
  };
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  if (threads <= 1 || work < kSerialWork) {
    worker();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(); });
  }
}

// ---- cutting up

// Rows begin..end of one expert: as many as leave room in a core's cache for weights.
// `place` counts the rows of the blocks before it, each rounded up to whole kRowUnits.
struct RowBlock {
  int64_t expert, begin, end, place;
};

template <class P>
std::vector<RowBlock> row_blocks(const Experts& experts) {
  constexpr int64_t cache_bytes = int64_t(1) << 20;
  const int64_t fit = cache_bytes / int64_t(sizeof(P) * std::max<int64_t>(experts.hidden, 1));
  const int64_t share = experts.kept / (2 * at::get_num_threads());
  const int64_t most = std::clamp<int64_t>(std::min(fit, share), 32, kRowChunk);
  std::vector<RowBlock> blocks;
  int64_t place = 0;
  const int32_t* offsets = experts.offsets();
  for (int64_t e = 0; e < experts.experts; ++e) {
    const int64_t begin = offsets[e], count = offsets[e + 1] - begin;
    const int64_t pieces = (count + most - 1) / most;
    for (int64_t i = 0; i < pieces; ++i) {
      const auto cut = [&](int64_t at) {
        return begin + (at < pieces ? count * at / pieces / kRowUnit * kRowUnit : count);
      };
      blocks.push_back({e, cut(i), cut(i + 1), place});
      place += (cut(i + 1) - cut(i) + kRowUnit - 1) / kRowUnit * kRowUnit;
    }
  }
  // The largest first, so that no thread ends on a large one alone.
  std::stable_sort(blocks.begin(), blocks.end(), [](const RowBlock& a, const RowBlock& b) {
    return a.end - a.begin > b.end - b.begin;
  });
  return blocks;
}

int64_t most_rows(const std::vector<RowBlock>& blocks) {
  return blocks.empty() ? 0 : blocks.front().end - blocks.front().begin;
}

// Columns in blocks that leave a block of c in a core's cache, wider for fewer rows:
// a matrix is read along its rows, and long reads are what memory likes. `groups` groups
// of neighbouring blocks are the items, enough of them for all threads.
constexpr int64_t kNoSplit = int64_t(1) << 40;  // as the number of items: there are enough
struct ColumnBlocks {
  int64_t columns, unit, units, blocks, groups;

  // A block begins at a multiple of `unit`.
  ColumnBlocks(int64_t columns, int64_t rows, int64_t unit, int64_t items)
      : columns(columns), unit(unit), units((columns + unit - 1) / unit) {
    const int64_t most =
        std::clamp<int64_t>((1 << 15) / std::max<int64_t>(rows, 1), 256, kMatmulColumns) / unit;
    // A thread that ends early should find more to do.
    const int64_t wanted = 4 * at::get_num_threads();
    groups = std::clamp<int64_t>((wanted + items - 1) / std::max<int64_t>(items, 1), 1,
                                 std::max<int64_t>(units, 1));
    blocks = std::max((units + most - 1) / most, groups);
  }
  int64_t begin(int64_t b) const { return std::min(columns, units * b / blocks * unit); }

  template <class Body>
  void for_blocks(int64_t group, Body body) const {
    for (int64_t b = blocks * group / groups; b < blocks * (group + 1) / groups; ++b) {
      body(begin(b), begin(b + 1));
    }
  }
  int64_t widest() const { return std::min(columns, (units + blocks - 1) / blocks * unit); }
};

Weight weight_of(const Experts& call, const at::Tensor& weight, int64_t expert, int64_t out_begin,
                 int64_t out_step, bool swapped) {
  const int64_t out = call.transposed ? 2 : 1, in = 3 - out;
  const int64_t offset = expert * weight.stride(0) + out_begin * weight.stride(out);
  const void* at = static_cast<const char*>(weight.const_data_ptr()) + offset * size_of(call.dtype);
  const int64_t along_out = out_step * weight.stride(out), along_in = weight.stride(in);
  if (swapped) return {at, call.dtype, along_in, along_out};
  return {at, call.dtype, along_out, along_in};
}

template <class T>
at::Tensor in_sums_type(const at::Tensor& bias) {
  if (!bias.defined()) return bias;
  return bias.to(sizeof(T) == 8 ? at::kDouble : at::kFloat).contiguous();
}

}  // namespace

template <class T>
void combine_tokens(const Experts& call, const at::Tensor& y, const T* rows, int64_t ld,
                    const T* weight) {
  const int32_t* row = call.assignment_row.const_data_ptr<int32_t>();
  const int64_t top_k = call.top_k, row_bytes = call.hidden * size_of(call.dtype);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t grain = 1 + (1 << 15) / std::max<int64_t>(1, call.hidden * top_k);
  at::parallel_for(0, call.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels<T>().combine(out + t * row_bytes, call.dtype, rows, ld, row + t * top_k,
                           weight ? weight + t * top_k : nullptr, top_k, call.hidden);
    }
  });
}
template void combine_tokens<float>(const Experts&, const at::Tensor&, const float*, int64_t,
                                    const float*);
template void combine_tokens<double>(const Experts&, const at::Tensor&, const double*, int64_t,
                                     const double*);

// ---- forward

template <class P>
void ffn_forward(const Experts& call, void* out, Dtype out_dtype, int64_t out_stride, void* kept) {
  using T = Sum<P>;
  const Kernels<P>& k = kernels<P>();
  const int64_t hidden = call.hidden, intermediate = call.intermediate;
  const bool gated = call.spec.gated;
  const std::vector<RowBlock> blocks = row_blocks<P>(call);
  const int64_t height = most_rows(blocks);
  // Rows are turned over where both weights' rows run along the sums, unless all must be
  // summed alike.
  const auto turned_of = [&](int64_t m) {
    const bool along = call.up_proj.stride(call.transposed ? 1 : 2) == 1 &&
                       call.down_proj.stride(call.transposed ? 1 : 2) == 1;
    return along && !call.batch_invariant ? k.turned_rows(m, call.dtype) : 0;
  };
  const at::Tensor activations = workspace<P>(blocks.size() * kRowUnit * padded<P>(intermediate) +
                                              block_size<P>(call.kept, intermediate));
  const auto activations_of = [&](const RowBlock& block) {
    return data<P>(activations) + block_size<P>(block.place, intermediate);
  };
  const at::Tensor up_bias = in_sums_type<T>(call.up_bias);
  const at::Tensor down_bias = in_sums_type<T>(call.down_bias);
  const int32_t* row_token = call.row_token.const_data_ptr<int32_t>();

  // Where gate's and up's columns alternate in memory, a block of both is one product.
  const bool woven = call.spec.interleaved && call.up_proj.stride(call.transposed ? 2 : 1) == 1;
  const int64_t step = call.spec.interleaved ? 2 : 1;
  const ColumnBlocks up(woven ? call.width : intermediate, height, 64, blocks.size());
  const int64_t x_size = block_size<P>(height, hidden), c_size = block_size<T>(height, up.widest());
  for_items(
      blocks.size() * up.groups, call.kept * call.width * hidden,
      Scratch::bytes<P>(x_size) + (woven ? 3 : 2) * Scratch::bytes<T>(c_size) +
          k.matmul_scratch(height, hidden),
      [&](Scratch scratch, int64_t item) {
        const RowBlock& block = blocks[item / up.groups];
        const auto [e, begin, end, _] = block;
        const int64_t m = end - begin, turned = turned_of(m);
        P* x = scratch.take<P>(x_size);
        T *gate = scratch.take<T>(c_size), *linear = scratch.take<T>(c_size);
        T* both = woven ? scratch.take<T>(c_size) : nullptr;
        k.load_block(x, {call.x.const_data_ptr(), call.dtype, call.x.stride(0), row_token + begin},
                     m, turned, hidden);
        const Weight w_gate = weight_of(call, call.up_proj, e, 0, woven ? 1 : step, false);
        const Weight w_up =
            gated ? weight_of(call, call.up_proj, e, step == 2 ? 1 : intermediate, step, false)
                  : Weight{};
        up.for_blocks(item % up.groups, [&](int64_t c0, int64_t c1) {
          const int64_t i0 = woven ? c0 / 2 : c0, i1 = woven ? c1 / 2 : c1;
          k.matmul_block(woven ? both : gate, x, m, turned, w_gate, hidden, c0, c1, scratch);
          if (woven) {
            k.unweave(gate, linear, both, m, i1 - i0);
          } else if (gated) {
            k.matmul_block(linear, x, m, turned, w_up, hidden, c0, c1, scratch);
          }
          void* kept_rows =
              kept ? static_cast<char*>(kept) + begin * call.width * size_of(call.dtype) : nullptr;
          k.activate_block(activations_of(block), gate, gated ? linear : nullptr, m, turned, i0, i1,
                           intermediate, call.spec,
                           up_bias.defined() ? data<T>(up_bias) + e * call.width : nullptr,
                           kept_rows, call.dtype, call.width);
        });
      });

  const ColumnBlocks down(hidden, height, 64, blocks.size());
  const int64_t y_size = block_size<T>(height, down.widest());
  for_items(
      blocks.size() * down.groups, call.kept * intermediate * hidden,
      Scratch::bytes<T>(y_size) + k.matmul_scratch(height, intermediate),
      [&](Scratch scratch, int64_t item) {
        const RowBlock& block = blocks[item / down.groups];
        const auto [e, begin, end, _] = block;
        const int64_t m = end - begin, turned = turned_of(m);
        T* c = scratch.take<T>(y_size);
        const Weight w = weight_of(call, call.down_proj, e, 0, 1, false);
        down.for_blocks(item % down.groups, [&](int64_t h0, int64_t h1) {
          k.matmul_block(c, activations_of(block), m, turned, w, intermediate, h0, h1, scratch);
          k.store_block(static_cast<char*>(out) + (begin * out_stride + h0) * size_of(out_dtype),
                        out_dtype, out_stride, c, m, turned, h1 - h0,
                        down_bias.defined() ? data<T>(down_bias) + e * hidden + h0 : nullptr);
        });
      });
}
template void ffn_forward<float>(const Experts&, void*, Dtype, int64_t, void*);
template void ffn_forward<double>(const Experts&, void*, Dtype, int64_t, void*);
template void ffn_forward<bf16>(const Experts&, void*, Dtype, int64_t, void*);

// ---- backward

namespace {

// Strips of a weight's gradient: enough of them to share out, tall enough to reuse
// the rows that each of them loads.
constexpr int64_t kStrip = 192;
// A gradient of this many bytes is still in a cache when the optimizer reads it.
constexpr int64_t kCached = 1 << 20;

// out (E, M, N) = each expert's sum over its rows of p^T q.
template <class P>
void weight_gradient(const Experts& call, const at::Tensor& out, Rows p, Rows q) {
  const Kernels<P>& k = kernels<P>();
  const int64_t m = out.size(1), n = out.size(2), strips = (m + kStrip - 1) / kStrip;
  const int32_t* offsets = call.offsets();
  const bool past_caches = int64_t(out.nbytes()) > kCached;
  for_items(
      call.experts * strips, call.kept * m * n, k.outer_scratch(std::min(kStrip, m)),
      [&](Scratch scratch, int64_t item) {
        const int64_t e = item / strips, strip = item % strips, begin = offsets[e];
        char* expert = static_cast<char*>(out.mutable_data_ptr()) + e * m * n * size_of(call.dtype);
        k.outer(expert, call.dtype, n, past_caches, rows_from(p, begin), m * strip / strips,
                m * (strip + 1) / strips, rows_from(q, begin), n, offsets[e + 1] - begin, scratch);
      });
}

template <class T>
at::Tensor bias_gradient(const Experts& call, int64_t cols, Rows rows, const T* weight) {
  at::Tensor out = at::empty({call.experts, cols}, call.x.options());
  const int32_t* offsets = call.offsets();
  for_items(call.experts, call.kept * cols, 0, [&](Scratch, int64_t e) {
    kernels<T>().sum_rows(
        static_cast<char*>(out.mutable_data_ptr()) + e * cols * size_of(call.dtype), call.dtype,
        rows_from(rows, offsets[e]), weight ? weight + offsets[e] : nullptr,
        offsets[e + 1] - offsets[e], cols);
  });
  return out;
}

}  // namespace

template <class P>
FfnGradients ffn_backward(const Experts& call, Rows upstream, const Sum<P>* weight, Sum<P>* score,
                          const at::Tensor& preactivations, std::array<bool, 5> mask) {
  using T = Sum<P>;
  const auto [want_x, want_up, want_down, want_up_bias, want_down_bias] = mask;
  const Kernels<P>& k = kernels<P>();
  const int64_t hidden = call.hidden, intermediate = call.intermediate, width = call.width;
  constexpr Dtype operand = Operand<P>::dtype, sum = Operand<T>::dtype;
  const std::vector<RowBlock> blocks = row_blocks<P>(call);
  const int64_t height = most_rows(blocks);
  const int64_t ld_dh = padded<P>(width), ld_wa = padded<P>(intermediate),
                ld_dx = padded<T>(hidden);

  // dL/dh and weight * activation of every row, and, to be summed per token, dL/dx.
  const at::Tensor dh = workspace<P>(call.kept * ld_dh);
  const at::Tensor wa = workspace<P>(call.kept * ld_wa);
  const at::Tensor dx_rows = want_x ? workspace<T>(call.kept * ld_dx) : at::Tensor();
  const at::Tensor down_bias = in_sums_type<T>(call.down_bias);
  // One group each: an item has all columns of its rows, so the sums over them stay with it.
  const ColumnBlocks up(intermediate, height, kActivateColumns, kNoSplit),
      down(hidden, height, 64, kNoSplit);
  const int64_t dy_size = height * padded<P>(hidden);
  const int64_t c_size = height * padded<T>(std::max(up.widest(), down.widest()));
  const int64_t matmul_scratch =
      std::max(k.matmul_scratch(height, hidden), k.matmul_scratch(height, width));

  const bool want_rows = want_x || want_up || want_down || want_up_bias || score;
  for_items(want_rows ? blocks.size() : 0, call.kept * width * hidden,
            Scratch::bytes<P>(dy_size) + Scratch::bytes<T>(c_size) + matmul_scratch,
            [&](Scratch scratch, int64_t item) {
              const auto [e, begin, end, _] = blocks[item];
              const int64_t m = end - begin;
              P* dy = scratch.take<P>(dy_size);
              T* c = scratch.take<T>(c_size);
              k.load_rows(dy, rows_from(upstream, begin), m, hidden);
              if (score) {
                for (int64_t r = 0; r < m; ++r) {
                  score[begin + r] =
                      down_bias.defined()
                          ? k.dot({dy + r * padded<P>(hidden), operand, 0, nullptr},
                                  {data<T>(down_bias) + e * hidden, sum, 0, nullptr}, hidden)
                          : T(0);
                }
              }
              const Weight w_down = weight_of(call, call.down_proj, e, 0, 1, true);
              const char* h = static_cast<const char*>(preactivations.const_data_ptr()) +
                              begin * width * size_of(call.dtype);
              P *my_dh = data<P>(dh) + begin * ld_dh, *my_wa = data<P>(wa) + begin * ld_wa;
              up.for_blocks(0, [&](int64_t i0, int64_t i1) {
                k.matmul(c, dy, padded<P>(hidden), m, w_down, hidden, i0, i1, scratch);
                for (int64_t s0 = i0; s0 < i1; s0 += kActivateColumns) {
                  k.activate_backward(my_dh, ld_dh, my_wa, ld_wa, score ? score + begin : nullptr,
                                      c + (s0 - i0), padded<T>(i1 - i0), h, call.dtype, width,
                                      weight ? weight + begin : nullptr, m, s0,
                                      std::min(s0 + kActivateColumns, i1), intermediate, call.spec);
                }
              });
              if (!want_x) return;
              const Weight w_up = weight_of(call, call.up_proj, e, 0, 1, true);
              down.for_blocks(0, [&](int64_t h0, int64_t h1) {
                k.matmul(c, my_dh, ld_dh, m, w_up, width, h0, h1, scratch);
                k.store_rows(data<T>(dx_rows) + begin * ld_dx + h0, sum, ld_dx, c,
                             padded<T>(h1 - h0), m, h1 - h0);
              });
            });

  const at::Tensor none = at::empty({0}, call.x.options());
  FfnGradients gradients{none, none, none, none, none};
  const Rows x{call.x.const_data_ptr(), call.dtype, call.x.stride(0),
               call.row_token.const_data_ptr<int32_t>()};
  const Rows dh_rows{data<P>(dh), operand, ld_dh, nullptr},
      wa_rows{data<P>(wa), operand, ld_wa, nullptr};
  if (want_up) {
    gradients.up_proj = empty_large(call.up_proj.sizes(), call.x.options());
    weight_gradient<P>(call, gradients.up_proj, call.transposed ? x : dh_rows,
                       call.transposed ? dh_rows : x);
  }
  if (want_down) {
    gradients.down_proj = empty_large(call.down_proj.sizes(), call.x.options());
    weight_gradient<P>(call, gradients.down_proj, call.transposed ? wa_rows : upstream,
                       call.transposed ? upstream : wa_rows);
  }
  if (want_up_bias) gradients.up_bias = bias_gradient<T>(call, width, dh_rows, nullptr);
  if (want_down_bias) gradients.down_bias = bias_gradient<T>(call, hidden, upstream, weight);
  if (want_x) {
    gradients.x = at::empty({call.tokens, hidden}, call.x.options());
    combine_tokens<T>(call, gradients.x, data<T>(dx_rows), ld_dx, nullptr);
  }
  return gradients;
}
template FfnGradients ffn_backward<float>(const Experts&, Rows, const float*, float*,
                                          const at::Tensor&, std::array<bool, 5>);
template FfnGradients ffn_backward<double>(const Experts&, Rows, const double*, double*,
                                           const at::Tensor&, std::array<bool, 5>);
template FfnGradients ffn_backward<bf16>(const Experts&, Rows, const float*, float*,
                                         const at::Tensor&, std::array<bool, 5>);

}  // namespace moe_ext::cpu
