// Adagrad on CUDA; formulas in ops/adagrad.h, the kernel in multi_tensor.cuh. Bytes per parameter in float32: 20.
#include "../ops/adagrad.h"
#include "multi_tensor.cuh"

namespace bigmodel::cuda {
namespace {

struct AdagradOp {
  static constexpr int kStreams = kAdagradStep, kFormats = kAdagradStreams, kColumns = kAdagradStreams;
  static constexpr int kDeciding = 1, kStep = kAdagradStep;
  static constexpr bool kQuantisable = false, kRounds = false;
  BIGMODEL_SHARED static constexpr Use use(int stream) {
    constexpr Use uses[kStreams] = {{true, true}, {true, false}, {true, true}};  // param, grad, sum
    return uses[stream];
  }
  using Args = Adagrad;

  const Adagrad& a;
  double factor, rate;

  // scratch: lr / (1 + (step - 1) * lr_decay)
  static __device__ void prepare(const Adagrad& a, void* address, int format, double* scratch) {
    scratch[0] = value_of(a.lr) / (1 + (advance(address, format) - 1) * a.lr_decay);
  }

  __device__ AdagradOp(const Adagrad& a, const double* scratch, bool)
      : a(a), factor(gradient_factor(a.control)), rate(scratch[0]) {}
  __device__ bool idle() const { return false; }

  template <class C>
  __device__ void operator()(C (&x)[kStreams], uint32_t) const {
    C g = x[kAdagradGrad] * C(factor);
    if (a.weight_decay != 0) g = fma(C(a.weight_decay), x[kAdagradParam], g);
    x[kAdagradSum] = fma(g, g, x[kAdagradSum]);
    x[kAdagradParam] -= C(rate) * (g / (sqrt(x[kAdagradSum]) + C(a.eps)));
  }
};

}  // namespace

void adagrad(const Adagrad& args, Exec exec) { run<AdagradOp>(args.table, args, exec, "adagrad"); }

}  // namespace bigmodel::cuda
