// Softmax on CUDA: which kernel runs, and with what shape. The kernels are in softmax_forward.cuh and
// softmax_backward.cuh; all formulas in ops/softmax.h.
//
//   y = exp(z - max(z)) / sum(exp(z - max(z))),   grad_z = y * (grad_out - sum(grad_out * y))
//
// Bytes that must move per element of n bytes: forward reads scores and writes out, 2n; backward reads y and grad_out
// and writes grad_scores, 3n. What causal and window exclude is not read, so a causal row of a square moves 1.5n and
// 2n. That traffic is the limit, so:
//   - a row of up to 8192 keys (4096 in float64) lies in registers, of a part of a warp, a warp or a block, as its
//     length asks: one read. A thread has up to 64 bytes of 16-bit scores on their way, and two blocks of the longest
//     rows share an SM, so that one loads while the other computes. Mixtures of dtypes and addresses off 16 bytes go to
//     the kernels named _any, which hold such a row in shared memory or read it again, and give it the same bits. So do
//     longer rows, read twice, the second time from the L2 cache where they fit.
//   - the largest score and the sum take one shuffle tree each; the mask, ALiBi, soft-cap and dropout cost arithmetic
//     only, but for the mask's own bytes. Philox words are computed again in backward: 10 rounds for 4 elements are
//     cheaper than a byte of memory each way.
#include "../ops/softmax.h"
#include "softmax_backward.cuh"
#include "softmax_forward.cuh"

namespace bigmodel::cuda {
namespace {

constexpr int kBlockThreads = 128;  // of a block that holds several short rows

int64_t rows_of(const SoftmaxRows& r) { return r.dims.d[0] * r.dims.d[1] * r.dims.d[2] * r.dims.d[3]; }

// Whether every row of a tensor can be moved 16 bytes at a time.
bool in_packs(const void* base, const RowDims& strides, DType dtype) {
  bool aligned = reinterpret_cast<uintptr_t>(base) % kPackBytes == 0;
  for (int64_t stride : strides.d) aligned &= stride * size_of(dtype) % kPackBytes == 0;
  return aligned;
}
bool in_packs(const void* base, int64_t keys, DType dtype) { return in_packs(base, RowDims{{0, 0, 0, keys}}, dtype); }

struct Shape {
  dim3 block, grid;
  Shape(const SoftmaxLayout& layout, int64_t rows)
      : block(layout.lanes, std::max(1, kBlockThreads / layout.lanes)),
        grid(unsigned(SoftmaxLayout::divide_up(rows, block.y))) {}
};

}  // namespace

void softmax_forward(const SoftmaxForward& a, Exec exec) {
  const char* op = "softmax_forward";
  const int64_t rows = rows_of(a.rows);
  if (rows == 0 || a.rows.keys == 0) return;
  const DeviceGuard guard(op, exec.index);
  const bool packed = a.out_dtype == a.scores_dtype && in_packs(a.scores, a.scores_strides, a.scores_dtype) &&
                      in_packs(a.out, a.out_strides, a.out_dtype) && in_packs(a.probs, a.rows.keys, a.out_dtype);
  visit_dtype(a.scores_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SoftmaxLayout layout(a.rows.keys, kElements<T>, kHeldPacks<T>);
    const Shape shape(layout, rows);
    const bool in_registers = packed && layout.held;
    const auto kernel = in_registers  ? softmax_forward<T>
                        : layout.held ? softmax_forward_any<Compute<T>, kElements<T>, true>
                                      : softmax_forward_any<Compute<T>, kElements<T>, false>;
    const int64_t shared_bytes = layout.held && !in_registers ? int64_t(kHeldBytes) * shape.block.x * shape.block.y : 0;
    launch(kernel, shape.grid, shape.block, shared_bytes, 1, exec.stream, op, a, rows);
  });
}

void softmax_backward(const SoftmaxBackward& a, Exec exec) {
  const char* op = "softmax_backward";
  const int64_t rows = rows_of(a.rows);
  if (rows == 0 || a.rows.keys == 0) return;
  const DeviceGuard guard(op, exec.index);
  const bool packed = a.out_dtype == a.scores_dtype && in_packs(a.grad_out, a.grad_out_strides, a.out_dtype) &&
                      in_packs(a.saved, a.rows.keys, a.out_dtype) &&
                      in_packs(a.grad_scores, a.rows.keys, a.scores_dtype) &&
                      in_packs(a.scores, a.scores_strides, a.scores_dtype);
  visit_dtype(a.scores_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Compute<T>;
    const SoftmaxLayout layout(a.rows.keys, kElements<T>, kHeldPacks<T>);
    const Shape shape(layout, rows);
    const auto kernel = packed && layout.held ? softmax_backward<T> : softmax_backward_any<C, kElements<T>>;
    launch(kernel, shape.grid, shape.block, 0, 1, exec.stream, op, a, rows);
    if (a.grad_mask) {
      int64_t mask_rows = 1;
      for (int64_t size : a.mask_dims.d) mask_rows *= size;
      const int64_t high = std::min<int64_t>(mask_rows, 65535);  // the most that gridDim.y may be
      const dim3 grid(unsigned(SoftmaxLayout::divide_up(a.mask_keys, kWarp)), unsigned(high),
                      unsigned(SoftmaxLayout::divide_up(mask_rows, high)));
      launch(softmax_reduce_mask<C>, grid, dim3(kWarp, kReduceRows), 0, 1, exec.stream, op, a, rows);
    }
    if (a.grad_sinks)
      launch(softmax_reduce_sinks<C>, dim3(unsigned(a.rows.dims.d[2])), dim3(kMaxThreads), 0, 1, exec.stream, op, a,
             rows);
  });
}

int64_t softmax_backward_scratch(int64_t rows, int64_t keys, bool wants_mask, bool wants_sinks, Exec) {
  return (wants_mask ? rows * keys : 0) + (wants_sinks ? rows : 0);
}

}  // namespace bigmodel::cuda
