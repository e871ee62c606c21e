// Normalisation on the CPU: dtypes, threads and the order of every reduction. The arithmetic is in norm.isa.cpp,
// the formulas in ops/norm.h.
//
// Bytes per element that must move: forward read x, write out; backward read x and grad_out, write grad_x.
// A row is cut into chunks of kChunk; each thread takes whole rows, so that a row's second pass finds it in the cache.
// Few long rows are shared out chunk by chunk instead, with the same chunks and so the same bits.
#include "../ops/norm.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "convert.h"
#include "isa.h"
#include "memory.h"
#include "norm_kernels.h"
#include "parallel.h"

namespace bigmodel::cpu {
namespace {

// One chunk in the widest type.
struct alignas(64) Scratch { char bytes[kChunk * sizeof(double)]; };

DType compute_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// An output of at least this size whose memory is there already is stored past the caches: no line is read before it is
// overwritten. A fresh one has just been zeroed by the kernel, in the caches, and storing past them takes longer
// (docs/decisions.md has the figures of both).
constexpr int64_t kStreamingBytes = int64_t(32) << 20;

// A matrix read, or written, as another dtype than the one it is stored in.
struct Source {
  const void* base;
  int64_t stride;
  DType stored, wanted;
  const void* chunk(int64_t row, int64_t begin, int64_t n, Scratch& scratch) const {
    const char* address = static_cast<const char*>(base) + (row * stride + begin) * size_of(stored);
    if (stored == wanted) return address;
    convert_table().convert[int(wanted)][int(stored)](&scratch, address, n);
    return &scratch;
  }
  // Where the kernel finds this row's values if nothing has to be converted; else `other`.
  const void* ahead(int64_t row, int64_t begin, const void* other) const {
    if (stored != wanted) return other;
    return static_cast<const char*>(base) + (row * stride + begin) * size_of(stored);
  }
};

struct Sink {
  void* base;
  int64_t stride;
  DType stored, given;
  char* address(int64_t row, int64_t begin) const {
    return static_cast<char*>(base) + (row * stride + begin) * size_of(stored);
  }
  void* chunk(int64_t row, int64_t begin, Scratch& scratch) const {
    return stored == given ? static_cast<void*>(address(row, begin)) : &scratch;
  }
  bool streams(int64_t rows) const {
    int64_t row_bytes = stride * size_of(stored);
    return stored == given && rows * row_bytes >= kStreamingBytes && row_bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(base) % 64 == 0 && resident(base, rows * row_bytes);
  }
  void commit(int64_t row, int64_t begin, int64_t n, const void* values) const {
    if (values != address(row, begin)) convert_table().convert[int(stored)][int(given)](address(row, begin), values, n);
  }
};

// weight + weight_offset, or the bias, in the compute type: the caller's own memory where nothing has to be changed.
class Affine {
 public:
  Affine(const void* values, DType stored, DType compute, double offset, double absent, int64_t cols, int threads)
      : size_(size_of(compute)), step_(values ? 1 : 0) {
    if (values && stored == compute && offset == 0) {
      base_ = static_cast<const char*>(values);
      return;
    }
    int64_t count = values ? cols : std::min(cols, kChunk);
    own_.reset(new char[count * size_]);
    base_ = own_.get();
    parallel_for(useful_threads(threads, count), count, [&](int64_t begin, int64_t end) {
      char* to = own_.get() + begin * size_;
      if (values)
        convert_table().convert[int(compute)][int(stored)](
            to, static_cast<const char*>(values) + begin * size_of(stored), end - begin);
      auto shift = [&](auto* p) {
        for (int64_t i = 0; i < end - begin; ++i) p[i] = values ? p[i] + offset : absent;
      };
      compute == DType::float64 ? shift(reinterpret_cast<double*>(to)) : shift(reinterpret_cast<float*>(to));
    });
  }
  const void* chunk(int64_t begin) const { return base_ + step_ * begin * size_; }

 private:
  std::unique_ptr<char[]> own_;
  const char* base_;
  int64_t size_, step_;
};

double stored_value(const void* values, int64_t row, DType dtype) {
  return dtype == DType::float64 ? static_cast<const double*>(values)[row] : static_cast<const float*>(values)[row];
}

void store_value(void* values, int64_t row, DType dtype, double value) {
  if (!values) return;
  if (dtype == DType::float64) static_cast<double*>(values)[row] = value;
  else static_cast<float*>(values)[row] = float(value);
}

// What both directions know of a row.
struct Rows {
  int64_t rows, cols, chunks;
  int threads;
  Rows(int64_t rows, int64_t cols, Exec exec)
      : rows(rows), cols(cols), chunks((cols + kChunk - 1) / kChunk), threads(useful_threads(exec.index, rows * cols)) {
  }
  int64_t begin(int64_t chunk) const { return chunk * kChunk; }
  int64_t size(int64_t chunk) const { return std::min(kChunk, cols - chunk * kChunk); }
  // Four units per thread keep the last one from being waited for.
  bool share_rows(int64_t units) const { return threads == 1 || chunks == 1 || units >= 4 * threads; }
};

class Forward : Rows {
 public:
  Forward(const NormForward& a, Exec exec, bool centred)
      : Rows(a.rows, a.cols, exec), a_(a), centred_(centred), x_dtype_(a.residual ? a.summed_dtype : a.input_dtype),
        compute_(compute_dtype(x_dtype_)), dtype_(a.out_dtype == x_dtype_ ? x_dtype_ : compute_),
        kernels_(centred ? norm_table().layer[int(dtype_)] : norm_table().rms[int(dtype_)]),
        x_{a.residual ? a.summed : a.input, a.residual ? a.cols : a.input_stride, x_dtype_, dtype_},
        out_{a.out, a.cols, a.out_dtype, dtype_}, streaming_(out_.streams(a.rows)),
        weight_(a.weight, a.weight_dtype, compute_, a.weight_offset, 1, a.cols, threads),
        bias_(a.bias, a.weight_dtype, compute_, 0, 0, centred ? a.cols : 0, threads) {}

  void run() {
    if (share_rows(rows)) {
      parallel_for(threads, rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          Moments total{};
          for (int64_t c = 0; c < chunks; ++c) total = combine(total, begin(c), moments(row, c), size(c));
          finish(row, total);
          for (int64_t c = 0; c < chunks; ++c) apply(row, c, total, row + 1 < last);
        }
        store_fence();
      });
      return;
    }
    std::vector<Moments> parts(rows * chunks), totals(rows);
    parallel_for(threads, rows * chunks, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) parts[i] = moments(i / chunks, i % chunks);
    });
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < chunks; ++c)
        totals[row] = combine(totals[row], begin(c), parts[row * chunks + c], size(c));
      finish(row, totals[row]);
    }
    parallel_for(threads, rows * chunks, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) apply(i / chunks, i % chunks, totals[i / chunks], false);
      store_fence();
    });
  }

 private:
  // Chan, Golub, LeVeque (1979): the moments of two parts joined.
  static Moments combine(Moments left, int64_t left_count, Moments right, int64_t right_count) {
    double share = double(right_count) / double(left_count + right_count), delta = right.mean - left.mean;
    return {left.mean + delta * share, left.square + right.square + delta * delta * double(left_count) * share};
  }

  double rstd(const Moments& total) const { return 1 / std::sqrt(total.square / double(cols) + a_.eps); }

  void finish(int64_t row, const Moments& total) const {
    store_value(a_.mean, row, compute_, total.mean);
    store_value(a_.rstd, row, compute_, rstd(total));
  }

  void add_residual(int64_t row, int64_t c) const {
    bool same = a_.input_dtype == a_.residual_dtype && a_.input_dtype == a_.summed_dtype;
    bool wide = a_.input_dtype == DType::float64 || a_.residual_dtype == DType::float64;
    DType dtype = same ? a_.input_dtype : wide ? DType::float64 : DType::float32;
    Scratch left, right, sum;
    Sink summed{a_.summed, cols, a_.summed_dtype, dtype};
    void* to = summed.chunk(row, begin(c), sum);
    convert_table().add[int(dtype)](
        to, Source{a_.input, a_.input_stride, a_.input_dtype, dtype}.chunk(row, begin(c), size(c), left),
        Source{a_.residual, a_.residual_stride, a_.residual_dtype, dtype}.chunk(row, begin(c), size(c), right),
        size(c));
    summed.commit(row, begin(c), size(c), to);
  }

  Moments moments(int64_t row, int64_t c) const {
    if (a_.residual) add_residual(row, c);
    Scratch scratch;
    return kernels_.moments(x_.chunk(row, begin(c), size(c), scratch), size(c));
  }

  void apply(int64_t row, int64_t c, const Moments& total, bool more) const {
    Scratch x_scratch, out_scratch;
    void* to = out_.chunk(row, begin(c), out_scratch);
    const void* x = x_.chunk(row, begin(c), size(c), x_scratch);
    kernels_.apply({to, x, weight_.chunk(begin(c)), centred_ ? bias_.chunk(begin(c)) : nullptr, size(c), total.mean,
                    rstd(total), more ? x_.ahead(row + 1, begin(c), x) : x, streaming_});
    out_.commit(row, begin(c), size(c), to);
  }

  const NormForward& a_;
  bool centred_;
  DType x_dtype_, compute_, dtype_;
  NormKernels kernels_;
  Source x_;
  Sink out_;
  bool streaming_;
  Affine weight_, bias_;
};

// Columns whose partial sums one thread adds at once: 4096 columns are work for 16 threads.
constexpr int64_t kSlice = 256;

// At least 8 rows in a block, so that its partial sums are a small part of the traffic, and at most 128 blocks.
int64_t row_blocks(int64_t rows) { return std::min<int64_t>((rows + 7) / 8, 128); }

// Scratch memory of one call. Up to 8 MiB a thread keeps it for the next: given back, it would be mapped again page by
// page, which at 64 rows of 4096 took as long as the arithmetic. Larger scratch is the call's own.
char* workspace(int64_t bytes, std::unique_ptr<char[]>& own) {
  constexpr int64_t kKept = int64_t(8) << 20;
  static thread_local std::unique_ptr<char[]> kept;
  static thread_local int64_t kept_bytes = 0;
  if (bytes > kKept) {
    own.reset(new char[bytes]);
    return own.get();
  }
  if (bytes > kept_bytes) {
    kept.reset(new char[bytes]);
    kept_bytes = bytes;
  }
  return kept.get();
}

class Backward : Rows {
 public:
  Backward(const NormBackward& a, Exec exec, bool centred)
      : Rows(a.rows, a.cols, exec), a_(a), centred_(centred), compute_(compute_dtype(a.x_dtype)),
        dtype_(a.out_dtype == a.x_dtype ? a.x_dtype : compute_),
        kernels_(centred ? norm_table().layer[int(dtype_)] : norm_table().rms[int(dtype_)]),
        blocks_(row_blocks(a.rows)), saved_{a.saved, a.saved_stride, a.from_output ? a.out_dtype : a.x_dtype, dtype_},
        grad_out_{a.grad_out, a.grad_out_stride, a.out_dtype, dtype_},
        grad_summed_{a.grad_summed, a.grad_summed_stride, a.x_dtype, dtype_},
        grad_x_{a.grad_x, a.cols, a.x_dtype, dtype_}, grad_cast_{a.grad_cast, a.cols, a.cast_dtype, dtype_},
        streaming_(!a.grad_cast && grad_x_.streams(a.rows)),
        weight_(a.weight, a.weight_dtype, compute_, a.weight_offset, 1, a.cols, threads),
        bias_(a.bias, a.weight_dtype, compute_, 0, 0, centred && a.from_output ? a.cols : 0, threads) {
    if (a.grad_weight || a.grad_bias) partials_ = workspace(blocks_ * 2 * cols * size_of(compute_), own_);
  }

  void run() {
    if (share_rows(blocks_)) {
      parallel_for(threads, blocks_, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          for (int64_t c = 0; c < chunks; ++c) clear(block, c);
          rows_of(block, [&](int64_t row, int count) {
            GradSums totals[kRowsAtOnce] = {};
            for (int i = 0; i < count; ++i)
              for (int64_t c = 0; c < chunks; ++c) totals[i] = combine(totals[i], sums(row + i, c));
            for (int64_t c = 0; c < chunks; ++c) apply(block, row, count, c, totals);
          });
        }
        store_fence();
      });
    } else {
      std::vector<GradSums> parts(rows * chunks), totals(rows);
      parallel_for(threads, rows * chunks, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) parts[i] = sums(i / chunks, i % chunks);
      });
      for (int64_t i = 0; i < rows * chunks; ++i) totals[i / chunks] = combine(totals[i / chunks], parts[i]);
      parallel_for(threads, blocks_ * chunks, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          int64_t block = i / chunks, c = i % chunks;
          clear(block, c);
          rows_of(block, [&](int64_t row, int count) { apply(block, row, count, c, &totals[row]); });
        }
        store_fence();
      });
    }
    reduce();
  }

 private:
  static GradSums combine(GradSums left, GradSums right) { return {left.g + right.g, left.g_xhat + right.g_xhat}; }

  // Calls body(row, count) on the rows of a block, a few at once.
  template <class Body>
  void rows_of(int64_t block, Body body) const {
    int64_t last = rows * (block + 1) / blocks_;
    for (int64_t row = rows * block / blocks_; row < last; row += kRowsAtOnce)
      body(row, int(std::min<int64_t>(kRowsAtOnce, last - row)));
  }

  char* partial(int64_t block, int which, int64_t begin) const {
    return partials_ + ((block * 2 + which) * cols + begin) * size_of(compute_);
  }

  void clear(int64_t block, int64_t c) const {
    if (!partials_) return;
    std::memset(partial(block, 0, begin(c)), 0, size(c) * size_of(compute_));
    if (centred_) std::memset(partial(block, 1, begin(c)), 0, size(c) * size_of(compute_));
  }

  NormGradChunk chunk(int64_t c) const {
    return {weight_.chunk(begin(c)),
            centred_ && a_.from_output ? bias_.chunk(begin(c)) : nullptr,
            size(c),
            a_.from_output,
            nullptr,
            nullptr,
            streaming_};
  }

  NormGradRow row_of(int64_t row, int64_t c, Scratch& saved, Scratch& grad_out) const {
    NormGradRow part{};
    part.grad_out = grad_out_.chunk(row, begin(c), size(c), grad_out);
    part.saved = saved_.chunk(row, begin(c), size(c), saved);
    part.mean = centred_ && !a_.from_output ? stored_value(a_.mean, row, compute_) : 0;
    part.rstd = stored_value(a_.rstd, row, compute_);
    return part;
  }

  GradSums sums(int64_t row, int64_t c) const {
    Scratch saved, grad_out;
    return kernels_.grad_sums(chunk(c), row_of(row, c, saved, grad_out));
  }

  void apply(int64_t block, int64_t row, int count, int64_t c, const GradSums* totals) const {
    Scratch saved[kRowsAtOnce], grad_out[kRowsAtOnce], grad_summed[kRowsAtOnce], grad_x[kRowsAtOnce];
    NormGradRow parts[kRowsAtOnce];
    for (int i = 0; i < count; ++i) {
      parts[i] = row_of(row + i, c, saved[i], grad_out[i]);
      parts[i].grad_x = grad_x_.chunk(row + i, begin(c), grad_x[i]);
      if (a_.grad_summed) parts[i].grad_summed = grad_summed_.chunk(row + i, begin(c), size(c), grad_summed[i]);
      int64_t next = std::min(row + i + count, rows - 1);
      parts[i].next_grad_out = grad_out_.ahead(next, begin(c), parts[i].grad_out);
      parts[i].next_saved = saved_.ahead(next, begin(c), parts[i].saved);
      parts[i].mean_g = totals[i].g / double(cols);
      parts[i].mean_g_xhat = totals[i].g_xhat / double(cols);
    }
    NormGradChunk chunk = this->chunk(c);
    if (partials_) {
      chunk.grad_weight = partial(block, 0, begin(c));
      chunk.grad_bias = partial(block, 1, begin(c));
    }
    kernels_.grad_apply(chunk, parts, count);
    for (int i = 0; i < count; ++i) {
      grad_x_.commit(row + i, begin(c), size(c), parts[i].grad_x);
      if (a_.grad_cast) grad_cast_.commit(row + i, begin(c), size(c), parts[i].grad_x);
    }
  }

  // Adds the blocks' partial sums in their order, in groups of 16 so that no sum is long, and converts once.
  void reduce() const {
    struct {
      void* grad;
      int which;
    } wanted[2];
    int64_t kinds = 0;
    if (a_.grad_weight) wanted[kinds++] = {a_.grad_weight, 0};
    if (centred_ && a_.grad_bias) wanted[kinds++] = {a_.grad_bias, 1};
    Add add = convert_table().add[int(compute_)];
    int64_t slices = (cols + kSlice - 1) / kSlice;
    parallel_for(useful_threads(threads, kinds * blocks_ * cols), kinds * slices, [&](int64_t first, int64_t last) {
      alignas(64) char sum[kSlice * sizeof(double)], part[kSlice * sizeof(double)];
      for (int64_t i = first; i < last; ++i) {
        auto [grad, which] = wanted[i / slices];
        int64_t begin = i % slices * kSlice, n = std::min(kSlice, cols - begin);
        std::memset(sum, 0, sizeof sum);
        for (int64_t group = 0; group < blocks_; group += 16) {
          std::memset(part, 0, sizeof part);
          for (int64_t block = group; block < std::min(group + 16, blocks_); ++block)
            add(part, part, partial(block, which, begin), n);
          add(sum, sum, part, n);
        }
        char* to = static_cast<char*>(grad) + begin * size_of(a_.weight_dtype);
        convert_table().convert[int(a_.weight_dtype)][int(compute_)](to, sum, n);
      }
    });
  }

  const NormBackward& a_;
  bool centred_;
  DType compute_, dtype_;
  NormKernels kernels_;
  int64_t blocks_;
  Source saved_, grad_out_, grad_summed_;
  Sink grad_x_, grad_cast_;
  bool streaming_;
  Affine weight_, bias_;
  std::unique_ptr<char[]> own_;
  char* partials_ = nullptr;  // (blocks, 2, cols)
};

}  // namespace

void layer_norm_forward(const NormForward& args, Exec exec) { Forward(args, exec, true).run(); }
void rms_norm_forward(const NormForward& args, Exec exec) { Forward(args, exec, false).run(); }
void layer_norm_backward(const NormBackward& args, Exec exec) { Backward(args, exec, true).run(); }
void rms_norm_backward(const NormBackward& args, Exec exec) { Backward(args, exec, false).run(); }

int64_t norm_backward_blocks(int64_t, int64_t, Exec) { return 0; }

}  // namespace bigmodel::cpu
