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
    "min.f32": lambda a, b: np.where((a == b) & np.signbit(b), b, np.where(a == b, a, np.fmin(a, b))),
    "max.f32": lambda a, b: np.where((a == b) & ~np.signbit(b), b, np.where(a == b, a, np.fmax(a, b))),
    "copysign.f32": lambda a, b: np.copysign(b, a),
}


@pytest.mark.parametrize("opcode", FLOAT)
def test_floats(execute, opcode):
    for a, b in every_pair(FLOATS):
        with np.errstate(all="ignore"):
            expected = FLOAT[opcode](a, b)
        out = execute(f"{opcode} %f0, %f1, %f2; mov.b32 %r0, %f0;", a, b).view(np.float32)
        number = ~np.isnan(expected)
        assert np.array_equal(np.isnan(out), ~number)
        assert np.array_equal(out.view(np.int32)[number], expected.view(np.int32)[number])


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
    assert np.array_equal(out, np.clip(np.trunc(np.nan_to_num(FLOATS.astype(float), nan=2**31)), 0, 2**32 - 1))
    out = execute("cvt.rzi.s32.f32 %r0, %f1;")[: len(FLOATS)]
    assert np.array_equal(out, np.clip(np.trunc(np.nan_to_num(FLOATS, nan=0).astype(float)), -(2**31), 2**31 - 1))


def test_a_signalling_nan_loses_against_a_number(execute):
    signalling, one = np.uint32([0x7F800001]), np.float32([1])
    for opcode in ("min.f32", "max.f32"):
        for a, b in ((signalling, one), (one, signalling)):
            assert execute(f"{opcode} %f0, %f1, %f2; mov.b32 %r0, %f0;", a, b)[0] == one.view(np.int32)[0]


def test_fields_and_wide_products(execute):
    body = "bfi.b32 %r0, %r1, %r2, 8, 12;"
    for a, b in every_pair(INTEGERS):
        assert np.array_equal(execute(body, a, b).view(np.uint32), (b & 0xFFF000FF) | (a & 0xFFF) << 8)
        wide = a.astype(np.int32).astype(np.int64) * b.astype(np.int32)
        out = execute("mul.wide.s32 %rd5, %r1, %r2; shr.s64 %rd5, %rd5, 32; cvt.u32.u64 %r0, %rd5;", a, b)
        assert np.array_equal(out, (wide >> 32).astype(np.int32))
        narrow = a.astype(np.int16).astype(np.int32) * b.astype(np.int16)
        out = execute("cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; mul.wide.s16 %r0, %h1, %h2;", a, b)
        assert np.array_equal(out, narrow)


@pytest.mark.parametrize(("bits", "shift"), [(16, 15), (16, 16), (16, 40), (64, 31), (64, 63), (64, 64), (64, 100)])
def test_shifts_of_other_widths(execute, bits, shift):
    """The word is the lower or upper half of 64 bits, or 16 of it are taken."""
    dtype, signed_dtype = (np.uint16, np.int16) if bits == 16 else (np.uint64, np.int64)
    words = INTEGERS.astype(np.uint64) * (1 if bits == 16 else 2**32 + 1)
    value = words.astype(dtype)
    wanted = {
        "shl.b": value << dtype(shift) if shift < bits else np.zeros_like(value),
        "shr.u": value >> dtype(shift) if shift < bits else np.zeros_like(value),
        "shr.s": value.view(signed_dtype) >> signed_dtype(min(shift, bits - 1)),
    }
    for opcode, expected in wanted.items():
        if bits == 16:
            body = f"cvt.u16.u32 %h1, %r1; {opcode}16 %h1, %h1, {shift}; cvt.u32.u16 %r0, %h1;"
            assert np.array_equal(execute(body, INTEGERS)[:16], expected.view(np.uint16).astype(np.int32))
            continue
        body = f"mov.b64 %rd5, {{%r1, %r1}}; {opcode}64 %rd5, %rd5, {shift}; "
        halves = expected.view(np.uint32).reshape(-1, 2)  # the lower one first
        assert np.array_equal(execute(body + "mov.b64 {%r0, %r3}, %rd5;", INTEGERS)[:16].view(np.uint32), halves[:, 0])
        assert np.array_equal(execute(body + "mov.b64 {%r3, %r0}, %rd5;", INTEGERS)[:16].view(np.uint32), halves[:, 1])


@pytest.mark.parametrize(("kind", "dtype"), [("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16)])
def test_loads_of_parts_of_a_word(execute, kind, dtype):
    values = np.uint32([0x80FF7F01, 0x1234F0F0, 0xFFFFFFFF])
    expected = values.astype(dtype).astype(np.int64).astype(np.int32)
    assert np.array_equal(execute(f"ld.global.{kind} %r0, [%rd2];", values)[:3], expected)
    bits = 8 * np.dtype(dtype).itemsize
    upper = (values >> bits).astype(dtype).astype(np.int64).astype(np.int32)
    assert np.array_equal(execute(f"ld.global.{kind} %r0, [%rd2+{bits // 8}];", values)[:3], upper)


def test_a_signed_word_fills_64_bits(execute):
    values = np.int32([-1, 5, -(2**31)])
    out = execute("ld.global.s32 %rd5, [%rd2]; shr.s64 %rd5, %rd5, 32; cvt.u32.u64 %r0, %rd5;", values)
    assert np.array_equal(out[:3], [-1, 0, -1])


def test_the_reciprocal_of_a_double_has_its_upper_half_only(execute):
    body = "cvt.f64.f32 %d1, %f1; rcp.approx.ftz.f64 %d2, %d1; mov.b64 {%r3, %r4}, %d2; "
    values = np.float32([3, -7, 1e-30, 123456])
    assert not execute(body + "mov.u32 %r0, %r3;", values)[:4].any()
    upper = (1 / values.astype(np.float64)).view(np.uint64) >> np.uint64(32)
    assert np.array_equal(execute(body + "mov.u32 %r0, %r4;", values)[:4].view(np.uint32), upper)


@pytest.mark.parametrize(
    ("opcode", "c", "source"),
    [
        ("bfly", 0x1F, lambda lane: lane ^ 5),
        ("bfly", 0x181F, lambda lane: np.where((lane ^ 5) <= (lane & 24 | 7), lane ^ 5, lane)),
        ("down", 0x181F, lambda lane: np.where(lane % 8 + 5 < 8, lane + 5, lane)),
        ("up", 0x1800, lambda lane: np.where(lane % 8 >= 5, lane - 5, lane)),
        ("idx", 0x181F, lambda lane: lane & 24 | 5),
    ],
)
def test_shuffles_in_segments_of_a_warp(execute, opcode, c, source):
    lane = np.arange(THREADS) % 32
    values = np.arange(THREADS, dtype=np.int32) * 3 + 7
    body = f"shfl.sync.{opcode}.b32 %r0|%p1, %r1, 5, {c}, -1; @!%p1 add.s32 %r0, %r0, 1000;"
    expected = values[np.arange(THREADS) // 32 * 32 + source(lane)] + np.where(source(lane) == lane, 1000, 0)
    if opcode == "idx":
        expected = values[np.arange(THREADS) // 32 * 32 + source(lane)]
    assert np.array_equal(execute(body, values), expected)


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
        ("L: L: mov.u32 %r0, 1;", r"a second label `L` in one function"),
        ("setp.lt.s32 %p1|%p2, %r1, %r2;", r"`setp.lt.s32` is not known with operands of these .*: 211"),
        ("mul.lo.s32 %r0, %r1;", r"not known with operands of these numbers of registers: 11"),
        ("mov.b64 {%h1, %h2, %h3, %h0}, %rd5;", r"not known with operands of these numbers of registers: 41"),
        ("mov.b64 {_, %r0}, %rd5;", r"`_` is no register"),
        ("cp.async.ca.shared.global [%r1], [%rd2+4], 4;", r"not known with an offset"),
        ("mov.f32 %f0, 1.5;", r"the number `1.5` is not known"),
        ("mov.u32 %r0, 0b11;", r"the number `0b11` is not known"),
        ("{ .param .b32 a; st.param.b32 [a+4], %r1; }", r"not known for a parameter of a call"),
        ("{ .param .b32 a; ld.param.s8 %r0, [a]; }", r"not known for a parameter of a call"),
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


CALL = """{ .param .b32 a; .param .b32 b;
  st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r0, [b]; }"""
TWICE = """.func (.param .b32 result) twice(.param .b32 given)
{
  .reg .b32 %r<3>;
  .reg .pred %p<2>;
  ld.param.u32 %r1, [given];
  setp.eq.s32 %p1, %r1, 0;
  @%p1 ret;
  add.s32 %r2, %r1, %r1;
  st.param.b32 [result], %r2;
  ret;
}
"""


def test_calls(execute, module):
    declared = TEXT.replace(".visible", TWICE.split("{")[0] + ";\n.visible")
    values = np.int32([1, 5, -3])
    assert np.array_equal(execute(CALL, values, text=declared + TWICE)[:3], 2 * values)
    with pytest.raises(module.Violation, match="`entry` calls a function that is not defined"):
        execute(CALL + "//", values, text=declared)


def test_an_address_of_another_space_is_refused(execute, module):
    shared = TEXT.replace(".const", ".shared .align 4 .b8 slot[256];\n.const", 1)
    body = "mov.u64 %rd5, slot; cvta.shared.u64 %rd5, %rd5; st.global.u32 [%rd5], %r1; mov.u32 %r0, 1;"
    with pytest.raises(module.Violation, match=r"takes an address in shared memory .* for one in global memory"):
        execute(body, text=shared)
    with pytest.raises(module.Violation, match=r"takes an address outside shared memory .* for one in it"):
        execute("mov.u32 %r5, -4096; ld.shared.u32 %r0, [%r5];", text=shared)
