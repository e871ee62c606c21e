// Softmax over a part of a row, for one instruction set. Formulas: csrc/ops/softmax.h.
//
// A row is read from memory by the first kernel and found in the cache by the others: the largest score, then exp and
// its sum, then the product with 1 / sum. Keeping a running maximum would save the first of these and pay with a second
// exp for every step that raises it.
#include "math.h"
#include "softmax_columns.isa.h"
#include "softmax_kernels.h"

namespace bigmodel::cpu::BIGMODEL_ISA {
namespace {

template <class T> BIGMODEL_INLINE void fetch_ahead(Ahead ahead, int64_t i) {
  const char* from = static_cast<const char*>(ahead.base) + i / kStep<T> * ahead.bytes;
  for (int64_t byte = 0; byte < ahead.bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

// A product that no compiler fuses with what follows. The peak is a rounded product, and a fused difference from it is
// off by half an ulp of the score, which beyond 1e9 is more than exp can take.
template <class T> BIGMODEL_INLINE Pack<T> rounded(Pack<T> v) {
#if defined(__x86_64__)
  asm("" : "+x"(v.lo), "+x"(v.hi));
#else
  asm("" : "+w"(v.lo), "+w"(v.hi));
#endif
  return v;
}

template <class T> struct Largest {
  Pack<T> part[2] = {splat(-kInfinity<T>), splat(-kInfinity<T>)};
  BIGMODEL_INLINE double value() const {
    Pack<T> both = greater(part[0], part[1]);
    return greatest_lane<T>(greater(both.lo, both.hi));
  }
};

template <class S, bool scaled>
double peak_of(const S* scores, int64_t n, Compute<S> scale_) {
  using T = Compute<S>;
  Pack<T> scale = splat(scale_);
  Largest<T> largest;
  resweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int k) {
    Pack<T> v = at.load(scores + i);
    if constexpr (scaled) v *= scale;
    largest.part[k] = greater(keep_least(at, v), largest.part[k]);
  });
  return largest.value();
}

// Rounding keeps the order: the largest product is that of the largest score, unless the scale turns the order round.
template <class S>
double peak(const void* scores_, int64_t n, double scale_) {
  auto* scores = static_cast<const S*>(scores_);
  const auto scale = Compute<S>(scale_);
  return scale > 0 ? Compute<S>(peak_of<S, false>(scores, n, scale)) * scale : peak_of<S, true>(scores, n, scale);
}

template <class S, bool added>
double prepare_of(void* z_, const SoftmaxScores& c) {
  using T = Compute<S>;
  auto* z = static_cast<T*>(z_);
  auto* scores = static_cast<const S*>(c.scores);
  auto* add = static_cast<const T*>(c.added);
  const bool cap = c.softcap != 0, slope = c.slope != 0;
  Pack<T> scale = splat(T(c.scale)), by_cap = splat(cap ? T(c.scale / c.softcap) : T(0)), softcap = splat(T(c.softcap));
  Pack<T> minus_slope = splat(T(-c.slope));
  const T least = -kInfinity<T>;
  Largest<T> largest;
  resweep<T>(c.n, BIGMODEL_BODY(int64_t i, auto at, int k) {
    Pack<T> v = at.load(scores + i);
    if (cap) v = tanh(v * by_cap) * softcap;
    else v *= scale;
    if constexpr (added) {
      Pack<T> a = at.load(add + i);
      v = {a.lo == least ? least - Vec<T>{} : v.lo + a.lo, a.hi == least ? least - Vec<T>{} : v.hi + a.hi};
    }
    if (slope) {
      Pack<T> away = splat(T(c.distance - i)) - lane_numbers<T>();
      v += Pack<T>{away.lo < 0 ? -away.lo : away.lo, away.hi < 0 ? -away.hi : away.hi} * minus_slope;
    }
    at.store(z + i, v);
    largest.part[k] = greater(keep_least(at, v), largest.part[k]);
  });
  return largest.value();
}

template <class S>
double prepare(void* z, const SoftmaxScores& c) {
  return c.added ? prepare_of<S, true>(z, c) : prepare_of<S, false>(z, c);
}

template <class S, bool fetching>
double exp_sum_of(void* e_, const void* scores_, int64_t n, double scale_, double peak_, Ahead ahead) {
  using T = Compute<S>;
  auto* e = static_cast<T*>(e_);
  auto* scores = static_cast<const S*>(scores_);
  Pack<T> scale = splat(T(scale_)), peak = splat(T(peak_));
  double sum = 0;
  pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> total;
    resweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      if constexpr (fetching) fetch_ahead<T>(ahead, begin + i);
      Pack<T> v = exp(rounded<T>(at.load(scores + begin + i) * scale) - peak);
      at.store(e + begin + i, v);
      total.part[k] += at.keep(v);
    });
    sum += total_of(total);
  });
  return sum;
}

template <class S>
double exp_sum(void* e, const void* scores, int64_t n, double scale, double peak, Ahead ahead) {
  return ahead.bytes ? exp_sum_of<S, true>(e, scores, n, scale, peak, ahead)
                     : exp_sum_of<S, false>(e, scores, n, scale, peak, ahead);
}

// The factor is taken in two parts, so that it rounds no digit of the product away.
template <class S>
void finish(void* out_, const void* e_, const void* factors_, int64_t n, double factor) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(out_);
  auto *e = static_cast<const T*>(e_), *factors = static_cast<const T*>(factors_);
  Pack<T> high = splat(T(factor)), low = splat(T(factor - double(T(factor))));
  if (factors) {
    resweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) {
      Pack<T> v = at.load(e + i);
      at.store(out + i, (v * high + v * low) * at.load(factors + i));
    });
  } else {
    resweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) {
      Pack<T> v = at.load(e + i);
      at.store(out + i, v * high + v * low);
    });
  }
}

template <class S>
void finish_streaming(void* out_, const void* e_, int64_t n, double factor) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(out_);
  auto* e = static_cast<const T*>(e_);
  Pack<T> high = splat(T(factor)), low = splat(T(factor - double(T(factor))));
  for (int64_t i = 0; i < n; i += kStep<T>) {
    Pack<T> v = load_whole(e + i);
    put<true>(out + i, v * high + v * low);
  }
}

template <class S>
void finish_log(void* out_, const void* scores_, int64_t n, double scale_, double peak_, double log_sum_) {
  using T = Compute<S>;
  auto* out = static_cast<S*>(out_);
  auto* scores = static_cast<const S*>(scores_);
  Pack<T> scale = splat(T(scale_)), peak = splat(T(peak_)), log_sum = splat(T(log_sum_));
  sweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) { at.store(out + i, (at.load(scores + i) * scale - peak) - log_sum); });
}

template <class S>
double grad_dot(const void* grad_out_, const void* y_, int64_t n) {
  using T = Compute<S>;
  auto *grad_out = static_cast<const S*>(grad_out_), *y = static_cast<const S*>(y_);
  double sum = 0;
  pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> total;
    resweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) {
      total.part[k] += at.keep(at.load(grad_out + begin + i) * at.load(y + begin + i));
    });
    sum += total_of(total);
  });
  return sum;
}

template <class S, bool fetching>
void grad_apply_of(void* grad_, const void* grad_out_, const void* y_, int64_t n, double dot_, double scale_,
                   Ahead ahead, Ahead also) {
  using T = Compute<S>;
  auto* grad = static_cast<S*>(grad_);
  auto *grad_out = static_cast<const S*>(grad_out_), *y = static_cast<const S*>(y_);
  Pack<T> dot = splat(T(dot_)), scale = splat(T(scale_));
  resweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) {
    if constexpr (fetching) {
      fetch_ahead<T>(ahead, i);
      fetch_ahead<T>(also, i);
    }
    at.store(grad + i, at.load(y + i) * (at.load(grad_out + i) - dot) * scale);
  });
}

template <class S>
void grad_apply(void* grad, const void* grad_out, const void* y, int64_t n, double dot, double scale, Ahead ahead,
                Ahead also) {
  ahead.bytes ? grad_apply_of<S, true>(grad, grad_out, y, n, dot, scale, ahead, also)
              : grad_apply_of<S, false>(grad, grad_out, y, n, dot, scale, ahead, also);
}

template <class S>
void grad_apply_streaming(void* grad_, const void* grad_out_, const void* y_, int64_t n, int64_t keys, double dot_,
                          double scale_, Ahead ahead, Ahead also) {
  using T = Compute<S>;
  auto* grad = static_cast<S*>(grad_);
  auto *grad_out = static_cast<const S*>(grad_out_), *y = static_cast<const S*>(y_);
  Pack<T> dot = splat(T(dot_)), scale = splat(T(scale_));
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    fetch_ahead<T>(ahead, i);
    fetch_ahead<T>(also, i);
    return load(y + i) * (load(grad_out + i) - dot) * scale;
  };
  int64_t i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) put<true>(grad + i, at(i));
  if (i < n) {
    constexpr Vec<T> zero{};
    const Pack<T> v = at(i), lane = lane_numbers<T>();
    const T rest = T(n - i);
    put<true>(grad + i, Pack<T>{lane.lo < rest ? v.lo : zero, lane.hi < rest ? v.hi : zero});
    i += kStep<T>;
  }
  for (; i < keys; i += kStep<T>) put<true>(grad + i, Pack<T>{});
}

template <class S>
double sum(const void* values_, int64_t n) {
  using T = Compute<S>;
  auto* values = static_cast<const S*>(values_);
  double sum = 0;
  pieces<T>(n, BIGMODEL_BODY(int64_t begin, int64_t count) {
    Accumulator<T> total;
    resweep<T>(count, BIGMODEL_BODY(int64_t i, auto at, int k) { total.part[k] += at.keep(at.load(values + begin + i)); });
    sum += total_of(total);
  });
  return sum;
}

template <class S>
void grad_log(void* grad_, const void* grad_out_, const void* out_, int64_t n, double sum_) {
  using T = Compute<S>;
  auto* grad = static_cast<S*>(grad_);
  auto *grad_out = static_cast<const S*>(grad_out_), *out = static_cast<const S*>(out_);
  Pack<T> sum = splat(T(sum_));
  resweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) { at.store(grad + i, at.load(grad_out + i) - exp(at.load(out + i)) * sum); });
}

template <class S>
void grad_scores(void* grad_, const void* scores_, int64_t n, double scale_, double softcap) {
  using T = Compute<S>;
  auto* grad = static_cast<S*>(grad_);
  auto* scores = static_cast<const S*>(scores_);
  Pack<T> scale = splat(T(scale_)), by_cap = splat(softcap != 0 ? T(scale_ / softcap) : T(0));
  sweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) {
    Pack<T> v = at.load(grad + i) * scale;
    if (softcap != 0) {
      Pack<T> t = tanh(at.load(scores + i) * by_cap), w = v - v * t * t;
      v = {v.lo == 0 ? v.lo : w.lo, v.hi == 0 ? v.hi : w.hi};  // an excluded score may be NaN
    }
    at.store(grad + i, v);
  });
}

template <class S>
void multiply(void* values_, const void* by_, int64_t n) {
  using T = Compute<S>;
  auto* values = static_cast<S*>(values_);
  auto* by = static_cast<const T*>(by_);
  sweep<T>(n, BIGMODEL_BODY(int64_t i, auto at, int) { at.store(values + i, at.load(values + i) * at.load(by + i)); });
}

template <class S>
void dropout(void* factors_, int64_t n, uint64_t seed, uint64_t counter, uint32_t threshold, double kept) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<float>;
  auto* factors = static_cast<T*>(factors_);
  const U32 bits = bit_cast<U32>(float(kept) - F32{});
  for (int64_t i = 0; i < n; i += 2 * lanes) {
    Words words = philox(seed, counter + uint64_t(i / 4));
    if constexpr (sizeof(T) == sizeof(float)) {
      store_vector(factors + i, bit_cast<U32>(words.first >= threshold) & bits);
      store_vector(factors + i + lanes, bit_cast<U32>(words.second >= threshold) & bits);
    } else {
      for (int j = 0; j < lanes; ++j) {
        factors[i + j] = words.first[j] >= threshold ? kept : 0;
        factors[i + lanes + j] = words.second[j] >= threshold ? kept : 0;
      }
    }
  }
}

template <class S>
void spread(void* added_, const void* live_, int64_t n) {
  using T = Compute<S>;
  auto* added = static_cast<T*>(added_);
  auto* live = static_cast<const uint8_t*>(live_);
  for (int64_t i = 0; i < n; ++i) added[i] = live[i] ? T(0) : -kInfinity<T>;
}

template <class S>
constexpr SoftmaxKernels kernels{kStep<Compute<S>>,
                                 peak<S>,
                                 prepare<S>,
                                 exp_sum<S>,
                                 finish<S>,
                                 finish_streaming<S>,
                                 finish_log<S>,
                                 grad_dot<S>,
                                 grad_apply<S>,
                                 grad_apply_streaming<S>,
                                 sum<S>,
                                 grad_log<S>,
                                 grad_scores<S>,
                                 multiply<S>,
                                 dropout<S>,
                                 spread<S>};

}  // namespace

const SoftmaxTable softmax_table = {kernels<float>, kernels<BFloat16>, kernels<Float16>, kernels<double>};

}  // namespace bigmodel::cpu::BIGMODEL_ISA
