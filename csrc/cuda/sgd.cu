// SGD on CUDA; formulas in ops/sgd.h, the kernel in multi_tensor.cuh. Bytes per parameter in float32: 12, with momentum
// 20.
#include "../ops/sgd.h"
#include "multi_tensor.cuh"

namespace bigmodel::cuda {
namespace {

struct SgdOp {
  static constexpr int kStreams = kSgdStarted, kFormats = kSgdStreams, kColumns = kSgdStreams;
  static constexpr int kDeciding = 1, kStep = kSgdStarted;
  static constexpr bool kQuantisable = false, kRounds = false;
  BIGMODEL_SHARED static constexpr Use use(int stream) {
    constexpr Use uses[kStreams] = {{true, true}, {true, false}, {true, true}};  // param, grad, momentum
    return uses[stream];
  }
  using Args = Sgd;

  const Sgd& a;
  double factor, lr, kept, added;

  // scratch: whether this is the first step
  static __device__ void prepare(const Sgd&, void* address, int, double* scratch) {
    auto* started = static_cast<float*>(address);
    scratch[0] = started && *started == 0;
    if (started) *started = 1;
  }

  __device__ SgdOp(const Sgd& a, const double* scratch, bool prepared)
      : a(a), factor(gradient_factor(a.control)), lr(value_of(a.lr)) {
    const bool first = prepared && scratch[0] != 0;
    kept = first ? 0 : a.momentum;
    added = first ? 1 : 1 - a.dampening;
  }
  __device__ bool idle() const { return false; }

  template <class C>
  __device__ void operator()(C (&x)[kStreams], uint32_t present) const {
    C g = x[kSgdGrad] * C(factor);
    if (a.weight_decay != 0) g = fma(C(a.weight_decay), x[kSgdParam], g);
    if (present >> kSgdMomentum & 1) {
      C buffer = C(added) * g;
      if (kept != 0) buffer = fma(C(kept), x[kSgdMomentum], buffer);  // in the first step it may hold anything
      x[kSgdMomentum] = buffer;
      g = a.nesterov ? fma(C(a.momentum), buffer, g) : buffer;
    }
    x[kSgdParam] -= C(lr) * g;
  }
};

}  // namespace

void sgd(const Sgd& args, Exec exec) { run<SgdOp>(args.table, args, exec, "sgd"); }

}  // namespace bigmodel::cuda
