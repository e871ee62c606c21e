"""The host executor's PTX: opcodes against numpy, and what is refused (tests/test_cuda_host.py has the checks)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_host import Executor, Matrix, build, executing_ptx, open_module
from cuda_host.executor import declare_ptx

FOLDER = build.HERE / "probes"
THREADS = 64
# Two 4-byte words of input for each thread, one word of output.
TEXT = """.version 9.0
.target sm_90
.address_size 64
.const .align 8 .b8 two[8] = {0, 0, 0, 0, 0, 0, 0, 64};
.visible .entry NAME(.param .u64 out, .param .u64 in, .param .u32 n)
.maxntid 64, 1, 1
{
  .reg .pred %p<4>;
  .reg .b16 %h<4>;
  .reg .b32 %r<10>;
  .reg .f32 %f<10>;
  .reg .b64 %rd<10>;
  .reg .f64 %d<10>;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd2, [in];
  mov.u32 %r9, %tid.x;
  mul.wide.u32 %rd3, %r9, 8;
  add.s64 %rd2, %rd2, %rd3;
  mad.lo.s32 %r8, %r9, 4, 0;
  cvt.u64.u32 %rd4, %r8;
  add.s64 %rd1, %rd1, %rd4;
  ld.global.u32 %r1, [%rd2];
  ld.global.u32 %r2, [%rd2+4];
  mov.b32 %f1, %r1;
  mov.b32 %f2, %r2;
  BODY
  st.global.u32 [%rd1], %r0;
  ret;
}
"""
FLOATS = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.5,
        2.5,
        3.5,
        1e-40,
        -1e-40,
        3e38,
        -3e38,
        1.5 * 2.0**126,
        2.0**127,
        np.inf,
        -np.inf,
        np.nan,
        7.0,
    ],
    np.float32,
)
INTEGERS = np.array(
    [0, 1, 2, 31, 32, 33, 63, 64, 255, 2**31 - 1, 2**31, 2**32 - 1, 12345, 2**16, 7, 2**32 - 7], np.uint32
)


@pytest.fixture(scope="module")
def module() -> Executor:
    sources = [FOLDER / "broken.cu", FOLDER / "correct.cu"]
    return Executor(open_module("_cuda_host_probes", sources, FOLDER / "module.cpp"), {})


@pytest.fixture
def execute(module, tmp_path):
    """execute(body, a, b): what a kernel of that PTX makes of two arrays of 64 words."""

    def run(body: str, a: np.ndarray = FLOATS, b: np.ndarray = FLOATS, text: str = TEXT) -> np.ndarray:
        a, b = (np.resize(x, THREADS).view(np.int32) for x in (a, b))
        path = tmp_path / f"{abs(hash(body))}.sm_90.ptx"
        names = {name: offset for offset, name in build.functions(module.path)}
        name = next(name for name in names if name.startswith("probe::(anonymous namespace)::warp_exchange("))
        path.write_text(text.replace("NAME", "entry").replace("BODY", body))
        declare_ptx(module, 90, path, {names[name]: "entry"})
        both = torch.from_numpy(np.stack([a, b], 1))
        out = torch.zeros(THREADS, dtype=torch.int32)
        buffers = [
            Matrix("out", "output", out.data_ptr(), 1, THREADS, 0),
            Matrix("in", "input", both.data_ptr(), 1, 2 * THREADS, 0),
        ]
        with executing_ptx(module, []):
            module.call(module.warp_exchange, buffers, out.data_ptr(), both.data_ptr(), THREADS)
        return out.numpy()

    return run


def every_pair(values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """All pairs of 16 values, 64 at a time."""
    a, b = np.repeat(values, len(values)), np.tile(values, len(values))
    return [(a[i : i + THREADS], b[i : i + THREADS]) for i in range(0, len(a), THREADS)]


def signed(words: np.ndarray) -> np.ndarray:
    return words.view(np.int32).astype(np.int64)


def clipped(shift: np.ndarray) -> np.ndarray:
    return np.minimum(shift, 63).astype(np.uint64)


INTEGER = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * b >> 32).astype(np.uint32),
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "div.u32": lambda a, b: np.where(b == 0, 2**32 - 1, a // np.maximum(b, 1)),
    "div.s32": lambda a, b: np.where(b == 0, -1, np.trunc(signed(a) / np.where(b == 0, 1, signed(b)))),
    "rem.u32": lambda a, b: np.where(b == 0, 2**32 - 1, a % np.maximum(b, 1)),
    "rem.s32": lambda a, b: np.where(b == 0, -1, np.fmod(signed(a), np.where(b == 0, 1, signed(b)))),
    "min.s32": lambda a, b: np.minimum(signed(a), signed(b)),
    "max.u32": lambda a, b: np.maximum(a, b),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: np.where(b < 32, a.astype(np.uint64) << clipped(b), 0),
    "shr.u32": lambda a, b: np.where(b < 32, a >> clipped(b), 0),
    "shr.s32": lambda a, b: signed(a) >> np.minimum(b, 31).astype(np.int64),
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integers(execute, opcode):
    for a, b in every_pair(INTEGERS):
        expected = np.asarray(INTEGER[opcode](a, b)).astype(np.int64).astype(np.int32)
        assert np.array_equal(execute(f"{opcode} %r0, %r1, %r2;", a, b), expected)


FLOAT = {
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "mul.f32": np.multiply,
    "div.rn.f32": np.divide,
    "min.f32": np.fmin,
    "max.f32": np.fmax,
    "copysign.f32": lambda a, b: np.copysign(b, a),
}


@pytest.mark.parametrize("opcode", FLOAT)
def test_floats(execute, opcode):
    for a, b in every_pair(FLOATS):
        with np.errstate(all="ignore"):
            expected = FLOAT[opcode](a, b)
        out = execute(f"{opcode} %f0, %f1, %f2; mov.b32 %r0, %f0;", a, b).view(np.float32)
        assert np.array_equal(out, expected, equal_nan=True)
        assert np.array_equal(np.signbit(out[out != 0]), np.signbit(expected[out != 0]))


COMPARISON = {
    "lt": np.less,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@pytest.mark.parametrize("comparison", COMPARISON)
def test_comparisons_of_floats(execute, comparison):
    for a, b in every_pair(FLOATS):
        body = f"setp.{comparison}.f32 %p1, %f1, %f2; selp.b32 %r0, 3, 4, %p1;"
        assert np.array_equal(execute(body, a, b), np.where(COMPARISON[comparison](a, b), 3, 4))


def test_rounding_downwards_and_saturation(execute):
    a, b = np.float32([1, -1, 0.1, 3, -0.5, np.nan]), np.float32([1e-10, 1e-10, 3, 7, 2, 1])
    out = execute("fma.rm.f32 %f0, %f1, %f2, 0f3F800000; mov.b32 %r0, %f0;", a, b).view(np.float32)[:5]
    exact = a.astype(np.float64)[:5] * b[:5] + 1
    nearest = exact.astype(np.float32)
    assert np.array_equal(out, np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest))
    out = execute("cvt.sat.f32.f32 %f0, %f1; mov.b32 %r0, %f0;").view(np.float32)[: len(FLOATS)]
    assert np.array_equal(out, np.clip(np.nan_to_num(FLOATS, nan=0), 0, 1))


def test_approximate_opcodes_are_as_wrong_as_they_may_be(execute):
    values = np.linspace(0.1, 20, THREADS, dtype=np.float32)
    exact = values.astype(np.float64)
    for body, result, ulps in (
        ("ex2.approx.ftz.f32 %f0, %f1;", 2**exact, 2),
        ("rcp.approx.ftz.f32 %f0, %f1;", 1 / exact, 1),
        ("div.approx.f32 %f0, 0f40400000, %f1;", 3 / exact, 2),
    ):
        out = execute(body + "mov.b32 %r0, %f0;", values).view(np.float32)
        errors = np.abs(out - result) / np.spacing(result.astype(np.float32))
        assert ulps - 0.5 <= errors.max() <= ulps + 0.5


def test_the_corners_of_approximate_opcodes(execute):
    nan, inf = np.nan, np.inf
    numerator, divisor = np.float32([1, -1, inf, 1, 4]), np.float32([2.0**127, 2.0**127, 2.0**127, inf, 2.0**126])
    out = execute("div.approx.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;", numerator, divisor).view(np.float32)[:4]
    assert np.array_equal(out, np.float32([0, -0.0, nan, 0]), equal_nan=True) and np.signbit(out[1])
    values = np.float32([1e-40, -1e-40, 2.0**127, inf, 0, 4])
    out = execute("rcp.approx.ftz.f32 %f0, %f1; mov.b32 %r0, %f0;", values).view(np.float32)[:6]
    assert np.array_equal(out, np.float32([inf, -inf, 0, 0, inf, 0.25]))
    out = execute("ex2.approx.ftz.f32 %f0, %f1; mov.b32 %r0, %f0;", np.float32([-127, 3, 128, -inf, nan])).view(
        np.float32
    )
    assert np.array_equal(out[:5], np.float32([0, 8, inf, 0, nan]), equal_nan=True)


def test_conversions(execute):
    with np.errstate(all="ignore"):
        halves = FLOATS.astype(np.float16).view(np.uint16)
    body = "{cvt.rn.f16x2.f32 %r0, %f1, %f2;}"
    out = execute(body, FLOATS, FLOATS).view(np.uint32)[: len(FLOATS)]
    number = ~np.isnan(FLOATS)
    assert np.array_equal((out >> 16)[number], halves[number]) and np.array_equal(
        (out & 0xFFFF)[number], halves[number]
    )
    bfloat = torch.from_numpy(FLOATS).bfloat16().view(torch.int16).numpy().view(np.uint16)
    out = execute("cvt.rn.bf16.f32 %h1, %f1; mov.b16 %h2, 0; mov.b32 %r0, {%h1, %h2};").view(np.uint32)[: len(FLOATS)]
    assert np.array_equal(out[number], bfloat[number])
    out = execute("cvt.f64.f32 %d1, %f1; cvt.rzi.u32.f64 %r0, %d1;").view(np.uint32)[: len(FLOATS)]
    assert np.array_equal(out, np.clip(np.trunc(np.nan_to_num(FLOATS.astype(float), nan=0)), 0, 2**32 - 1))


def test_halves_constants_and_predicates(execute):
    body = """mov.u64 %rd5, two; ld.const.f64 %d1, [%rd5]; cvt.f64.f32 %d2, %f1; mul.f64 %d3, %d1, %d2;
      mov.b64 {%r3, %r4}, %d3; mov.b64 %d4, {%r3, %r4}; cvt.rn.f32.f64 %f3, %d4; mov.b32 %r0, %f3;
      setp.gt.f32 %p1, %f1, 0f40000000; @!%p1 bra END; mov.u32 %r0, 9;
      END:"""
    values = np.float32([1, 2, 3, -4])
    expected = np.where(values > 2, np.int32(9), (2 * values).view(np.int32))
    assert np.array_equal(execute(body, values)[:4], expected)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("tanh.approx.f32 %f0, %f1;", r":27: the opcode `tanh.approx.f32` is not known"),
        ("ld.volatile.global.u32 %r0, [%rd2];", r"the opcode `ld.volatile.global.u32` is not known"),
        ("mov.u32 %r0, %clock;", r"the register `%clock` is not known"),
        ("bra NOWHERE;", r"no label `NOWHERE`"),
        ("mov.u32 %r0 %r1;", r"`%r1` where `,` should be"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(execute, module, body, words):
    with pytest.raises(module.Violation, match=words):
        execute(body)


def test_arguments_of_another_size_are_refused(execute, module):
    text = TEXT.replace(".param .u32 n", ".param .u64 n")
    with pytest.raises(module.Violation, match="gives 20 bytes of arguments, and the PTX has 24"):
        execute("mov.u32 %r0, 1;", text=text)


def test_a_device_without_ptx_is_refused(module):
    module.context = 1
    try:
        with executing_ptx(module, []), pytest.raises(module.Violation, match=r"no PTX of it was declared for sm_80"):
            module.call(module.warp_exchange, [], 0, 0, THREADS)
    finally:
        module.context = -1
