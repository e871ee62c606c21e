// Adam on CUDA; formulas in ops/adam.h, the kernel in multi_tensor.cuh.
//
// Bytes that must move per parameter: 28 in float32 (param, exp_avg and exp_avg_sq read and written, grad read), 8 more
// with an EMA or amsgrad; 28 with a bfloat16 parameter and gradient and a float32 master. Arithmetic is a square root
// and a division per element, hidden behind them. Everything that a step needs to know (step, learning rate, clipping,
// scale, found_inf) is read on the device, so a step can be captured in a graph and never waits for the host. The bias
// corrections take two powers in float64 per tensor: a launch of one thread per tensor before the update.
#include "../ops/adam.h"
#include "multi_tensor.cuh"

namespace bigmodel::cuda {
namespace {

struct AdamOp {
  static constexpr int kStreams = kAdamStep, kFormats = kAdamStep + 1, kColumns = kAdamStreams;
  static constexpr int kDeciding = 1, kStep = kAdamStep;
  static constexpr bool kQuantisable = true, kRounds = true;
  BIGMODEL_SHARED static constexpr Use use(int stream) {
    constexpr Use uses[kStreams] = {
        {true, true, -1, false, true},            // param
        {true, false},                            // grad
        {true, true, kAdamExpAvgScale, true},     // exp_avg
        {true, true, kAdamExpAvgSqScale, false},  // exp_avg_sq
        {true, true},                             // max_exp_avg_sq
        {true, true},                             // master
        {true, true},                             // ema
    };
    return uses[stream];
  }
  using Args = Adam;

  const Adam& a;
  double factor, decay, step_size, root_scale, step;

  // scratch: lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), step
  static __device__ void prepare(const Adam& a, void* address, int format, double* scratch) {
    const double step = advance(address, format);
    scratch[0] = value_of(a.lr) / (1 - pow(a.beta1, step));
    scratch[1] = 1 / sqrt(1 - pow(a.beta2, step));
    scratch[2] = step;
  }

  __device__ AdamOp(const Adam& a, const double* scratch, bool)
      : a(a), factor(gradient_factor(a.control)), decay(a.decoupled ? 1 - value_of(a.lr) * a.weight_decay : 1),
        step_size(scratch[0]), root_scale(scratch[1]), step(scratch[2]) {}
  __device__ bool idle() const { return false; }
  __device__ bool rounds(DType dtype) const { return a.stochastic && size_of(dtype) == 2; }
  __device__ uint64_t key(int64_t row, int64_t high) const { return random_key(a.seed, row, int64_t(step), high); }

  template <class C>
  __device__ void operator()(C (&x)[kStreams], uint32_t present) const {
    const auto has = [&](int stream) { return (present >> stream & 1) != 0; };
    C w = has(kAdamMaster) ? x[kAdamMaster] : x[kAdamParam], g = x[kAdamGrad] * C(factor);
    if (!a.decoupled && a.weight_decay != 0) g = fma(C(a.weight_decay), w, g);
    C &m = x[kAdamExpAvg], &v = x[kAdamExpAvgSq], &largest = x[kAdamMaxExpAvgSq], &ema = x[kAdamEma];
    m = fma(C(1 - a.beta1), g - m, m);
    v = fma(C(1 - a.beta2), g * g, C(a.beta2) * v);
    C s = v;
    if (has(kAdamMaxExpAvgSq)) s = largest = largest < v || v != v ? v : largest;
    w = w * C(decay) - C(step_size) * (m / (sqrt(s) * C(root_scale) + C(a.eps)));
    ema = fma(C(1 - a.ema_decay), w - ema, ema);
    x[kAdamMaster] = x[kAdamParam] = w;
  }
};

}  // namespace

void adam(const Adam& args, Exec exec) { run<AdamOp>(args.table, args, exec, "adam"); }

}  // namespace bigmodel::cuda
