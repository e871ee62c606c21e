// The dynamic 8-bit code of ops/adam.h as arithmetic instead of a search, for every device.
//
// Let u be a code's distance from the code of 0 (plus 1 if unsigned). The 2^d values of a decade are the u in
// [2^d, 2^(d+1)), so d is the exponent of float(u), and
//
//   value = 10^(d - D) * (0.1 + 0.9 * (u - 2^d + 0.5) / 2^d),    D = 6 signed, 7 unsigned
//
// is linear in u. Back, the decade is the number of borders that lie below the value, and u the integer part of the
// inverse line, up to the decade's last: the border to the next decade lies above the last step of this one.
#pragma once

namespace bigmodel {

constexpr int kDecades = 7;

// Entries 0 ... 6 are the decades from the lowest on, entry 7 is the code of 1.
struct DynamicCode {
  float slope[8], offset[8];   // value = slope * u + offset
  float inverse[8], shift[8];  // u = floor(inverse * value + shift)
  float last[8];               // the largest u
  float border[8];             // a value above border[i] belongs to entry i or higher, one below border[0] to 0
  int zero;                    // the code of 0
  int first;                   // what u is there
};

constexpr DynamicCode dynamic_code(bool is_signed) {
  DynamicCode code{};
  code.zero = is_signed ? 127 : 0;
  code.first = is_signed ? 0 : 1;
  double below = 0, unit = 1e-6;
  for (int i = 0; i < kDecades; ++i, unit *= 10) {
    const double size = double(1 << (i + code.first));
    code.slope[i] = float(unit * 0.9 / size);
    code.offset[i] = float(unit * (0.1 - 0.9 + 0.45 / size));
    code.inverse[i] = float(size / (0.9 * unit));
    code.shift[i] = float(size - size / 9);
    code.last[i] = float(2 * size - 1);
    code.border[i] = float((below + unit * (0.1 + 0.45 / size)) / 2);
    below = unit * (1 - 0.45 / size);
  }
  code.offset[7] = 1;
  code.shift[7] = code.last[7] = is_signed ? 128 : 256;
  code.border[7] = float((below + 1) / 2);
  return code;
}

}  // namespace bigmodel
