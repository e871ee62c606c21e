// Exponential moving averages of many tensors.
//
//   ema = ema + (1 - decay) * (value - ema)
//
// Arithmetic is in float32, in float64 where either is float64.
#pragma once

#include "../table.h"

namespace bigmodel {

enum EmaStream { kEmaAverage, kEmaValue, kEmaStreams };

struct Ema {
  Table table;
  double decay;
};

namespace cpu {
void ema(const Ema& args, Exec exec);
}  // namespace cpu

namespace cuda {
void ema(const Ema& args, Exec exec);
}  // namespace cuda

}  // namespace bigmodel
