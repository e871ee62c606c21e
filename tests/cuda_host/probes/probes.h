// The test kernels by name: `kBroken` must fail, `kCorrect` must not.
#pragma once

namespace probe {

struct Probe {
  const char* name;
  void (*run)(float* out, const float* in, int n);
};

extern const Probe kBroken[];  // the last one has no name
extern const Probe kCorrect[];

}  // namespace probe
