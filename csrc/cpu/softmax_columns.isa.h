// Softmax down the columns of a strip, for one instruction set; part of softmax.isa.cpp. Formulas: csrc/ops/softmax.h.
//
// A strip is copied into scratch that the second-level cache holds, where the columns of one step lie together, row
// after row. Their largest elements and sums are registers there; and what was read stays, where in place elements of a
// column that lie a power of two apart push each other out of every cache.
#pragma once

#include "math.h"
#include "softmax_columns_kernels.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

// Calls body(column, access) for every step of the strip's columns.
template <class T, class Body> BIGMODEL_INLINE void each_step(int64_t width, Body body) {
  int64_t column = 0;
  for (; column + kStep<T> <= width; column += kStep<T>) body(column, Whole<T>{});
  if (column < width) body(column, Part<T>{int(width - column)});
}

template <class S, class T, class At> BIGMODEL_INLINE void put_at(const ColumnStrip& strip, At at, S* p, Pack<T> v) {
  if (strip.streaming) at.template put_at<true>(p, v);
  else at.template put_at<false>(p, v);
}

// Scratch: of each step `block` rows, and one to spare, so that the steps do not share their cache sets.
template <class T> struct ColumnBlock {
  T* base;
  int64_t block;

  BIGMODEL_INLINE T* at(int64_t column, int64_t row) const {
    return base + (column / kStep<T> * (block + 1) + row) * kStep<T>;
  }
  template <class S> BIGMODEL_INLINE void load(const S* from, int64_t rows, const ColumnStrip& strip) const {
    for (int64_t row = 0; row < rows; ++row)
      each_step<T>(strip.width, BIGMODEL_BODY(int64_t column, auto access) {
        put<false>(at(column, row), access.load(from + row * strip.stride + column));
      });
  }
};

// Of the columns of one step. No lane adds more than 64 terms in T, as in a row: longer sums go on in double.
template <class T> struct ColumnTotals {
  T peak[kStep<T>];                    // the largest element
  T factor[kStep<T>], rest[kStep<T>];  // 1 / sum in two parts, or the sum of a gradient, or with log that of a sum
  double sum[kStep<T>];

  template <class Term> BIGMODEL_INLINE void add(int64_t rows, Term term) {
    for (int64_t begin = 0; begin < rows; begin += 64) {
      const int64_t end = rows < begin + 64 ? rows : begin + 64;
      Pack<T> total{};
      for (int64_t row = begin; row < end; ++row) total += term(row);
      T lanes[kStep<T>];
      put<false>(lanes, total);
      for (int i = 0; i < kStep<T>; ++i) sum[i] += double(lanes[i]);
    }
  }

  // The sum of exp(z - peak), which is left in z if `kept`.
  BIGMODEL_INLINE void add_exp(T* z, int64_t rows, bool first, bool kept) {
    Pack<T> before = first ? splat(-kInfinity<T>) : load_whole(peak), largest = before;
    for (int64_t row = 0; row < rows; ++row) largest = greater(load_whole(z + row * kStep<T>), largest);
    put<false>(peak, largest);
    constexpr T least = -kInfinity<T>;
    constexpr Vec<T> zero{};
    const Pack<T> base{largest.lo == least ? zero : largest.lo, largest.hi == least ? zero : largest.hi};
    T moved[kStep<T>];
    put<false>(moved, exp(before - base));
    for (int i = 0; i < kStep<T>; ++i) sum[i] *= double(moved[i]);
    add(rows, BIGMODEL_BODY(int64_t row) {
      Pack<T> e = exp(load_whole(z + row * kStep<T>) - base);
      if (kept) put<false>(z + row * kStep<T>, e);
      return e;
    });
  }
};

template <class T> BIGMODEL_INLINE ColumnTotals<T>* clear_totals(T* where, int64_t steps) {
  auto* totals = reinterpret_cast<ColumnTotals<T>*>(where);
  for (int64_t i = 0; i < steps; ++i)
    for (int lane = 0; lane < kStep<T>; ++lane) totals[i].sum[lane] = 0;
  return totals;
}

template <class S>
void columns_forward(void* out_, const void* input_, const ColumnStrip& strip) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(out_);
  auto* input = static_cast<const S*>(input_);
  const int64_t steps = (strip.width + kStep<T> - 1) / kStep<T>;
  const ColumnBlock<T> z{static_cast<T*>(strip.scratch), strip.block};
  ColumnTotals<T>* totals = clear_totals(z.at(steps * kStep<T>, 0), steps);
  for (int64_t row = 0; row < strip.n; row += strip.block) {
    const int64_t rows = strip.n - row < strip.block ? strip.n - row : strip.block;
    z.load(input + row * strip.stride, rows, strip);
    for (int64_t i = 0; i < steps; ++i) totals[i].add_exp(z.at(i * kStep<T>, 0), rows, row == 0, !strip.log);
  }
  for (int64_t i = 0; i < steps; ++i) {
    for (int lane = 0; lane < kStep<T>; ++lane) {
      const double sum = totals[i].sum[lane], factor = strip.log ? __builtin_log(sum) : 1 / sum;
      totals[i].factor[lane] = T(factor);
      totals[i].rest[lane] = T(factor - double(T(factor)));
    }
  }
  const bool again = strip.n > strip.block;
  for (int64_t row = 0; row < strip.n; ++row) {
    each_step<T>(strip.width, BIGMODEL_BODY(int64_t column, auto at) {
      const int64_t place = row * strip.stride + column;
      const ColumnTotals<T>& total = totals[column / kStep<T>];
      const Pack<T> factor = load_whole(total.factor);
      Pack<T> v = again ? at.load(input + place) : load_whole(z.at(column, row));
      if (strip.log || again) v = v - load_whole(total.peak);
      if (strip.log) {
        v = v - factor;
      } else {
        if (again) v = exp(v);
        v = v * factor + v * load_whole(total.rest);  // in two parts, so that it rounds no digit of the product away
      }
      put_at(strip, at, out + place, v);
    });
  }
}

template <class S>
void columns_backward(void* grad_, const void* grad_out_, const void* out_, const ColumnStrip& strip) {
  using T = Compute<S>;
  auto* grad = static_cast<S*>(grad_);
  auto *grad_out = static_cast<const S*>(grad_out_), *out = static_cast<const S*>(out_);
  const int64_t steps = (strip.width + kStep<T> - 1) / kStep<T>;
  const ColumnBlock<T> g{static_cast<T*>(strip.scratch), strip.block};
  const ColumnBlock<T> y{g.at(steps * kStep<T>, 0), strip.block};
  ColumnTotals<T>* totals = clear_totals(y.at(steps * kStep<T>, 0), steps);
  for (int64_t row = 0; row < strip.n; row += strip.block) {
    const int64_t rows = strip.n - row < strip.block ? strip.n - row : strip.block;
    g.load(grad_out + row * strip.stride, rows, strip);
    y.load(out + row * strip.stride, rows, strip);
    for (int64_t i = 0; i < steps; ++i) {
      const T *of_g = g.at(i * kStep<T>, 0), *of_y = y.at(i * kStep<T>, 0);
      totals[i].add(rows, BIGMODEL_BODY(int64_t k) {
        const Pack<T> v = load_whole(of_g + k * kStep<T>);
        return strip.log ? v : v * load_whole(of_y + k * kStep<T>);
      });
    }
  }
  for (int64_t i = 0; i < steps; ++i)
    for (int lane = 0; lane < kStep<T>; ++lane) totals[i].factor[lane] = T(totals[i].sum[lane]);
  const bool again = strip.n > strip.block;
  for (int64_t row = 0; row < strip.n; ++row) {
    each_step<T>(strip.width, BIGMODEL_BODY(int64_t column, auto at) {
      const int64_t place = row * strip.stride + column;
      const Pack<T> sum = load_whole(totals[column / kStep<T>].factor);
      const Pack<T> dv = again ? at.load(grad_out + place) : load_whole(g.at(column, row));
      const Pack<T> v = again ? at.load(out + place) : load_whole(y.at(column, row));
      put_at(strip, at, grad + place, strip.log ? dv - exp(v) * sum : v * (dv - sum));
    });
  }
}

template <class S> constexpr ColumnKernels columns{kStep<Compute<S>>, columns_forward<S>, columns_backward<S>};

}  // namespace

const ColumnTable column_table = {columns<float>, columns<BFloat16>, columns<Float16>, columns<double>};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
