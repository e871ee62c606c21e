// Moving averages on CUDA; formula in ops/ema.h, the kernel in multi_tensor.cuh. Bytes per element in float32: 12.
#include "../ops/ema.h"
#include "multi_tensor.cuh"

namespace bigmodel::cuda {
namespace {

struct EmaOp {
  static constexpr int kStreams = kEmaStreams, kFormats = kEmaStreams, kColumns = kEmaStreams;
  static constexpr int kDeciding = kEmaStreams, kStep = -1;
  static constexpr bool kQuantisable = false, kRounds = false;
  BIGMODEL_SHARED static constexpr Use use(int stream) {
    constexpr Use uses[kStreams] = {{true, true}, {true, false}};  // average, value
    return uses[stream];
  }
  struct Args : Ema {
    GradControl control{};
    void* scratch = nullptr;
  };

  double share;

  __device__ EmaOp(const Args& a, const double*, bool) : share(1 - a.decay) {}
  __device__ bool idle() const { return share == 0; }

  template <class C>
  __device__ void operator()(C (&x)[kStreams], uint32_t) const {
    x[kEmaAverage] = fma(C(share), x[kEmaValue] - x[kEmaAverage], x[kEmaAverage]);
  }
};

}  // namespace

void ema(const Ema& args, Exec exec) { run<EmaOp>(args.table, {args}, exec, "ema"); }

}  // namespace bigmodel::cuda
