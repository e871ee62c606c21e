"""Before there is a measurement: GPU-hours and memory of a training run from published formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bigmodel.schedule.series import MOST

GIB = 2**30

# Dense bfloat16 (float16 where a device has no bfloat16) TFLOP/s and memory in GiB, from the vendors' data sheets.
DEVICES = {
    "v100": (125.0, 32),
    "a100": (312.0, 80),
    "a100-40": (312.0, 40),
    "l4": (121.0, 24),
    "l40s": (362.0, 48),
    "h100": (989.0, 80),
    "h200": (989.0, 141),
    "b200": (2250.0, 180),
    "mi300x": (1307.0, 192),
    "tpu-v4": (275.0, 32),
    "tpu-v5e": (197.0, 16),
    "tpu-v5p": (459.0, 95),
}
USABLE = 0.9  # of a device's memory; the rest is the framework's, and fragmentation

# Bytes per parameter on each of d devices, mixed-precision Adam: 2 weights, 2 gradients, 4 + 4 + 4 of float32 weights
# and both moments. Source: Rajbhandari et al., ZeRO (2020), section 3.1 and figure 1.
SETUPS = {
    "data parallel": ("2 + 2 + 12", lambda d: 16.0),
    "ZeRO-1": ("2 + 2 + 12/d", lambda d: 4 + 12 / d),
    "ZeRO-2": ("2 + 14/d", lambda d: 2 + 14 / d),
    "ZeRO-3, FSDP": ("16/d", lambda d: 16 / d),
    "LoRA": ("2 (weights frozen; adapters below 1 %)", lambda d: 2.0),
}


@dataclass(frozen=True)
class Estimate:
    """hours: device-hours. setups: (formula, GiB of state on one device, smallest count that fits or None) by name.

    activations: GiB per device, with every layer's inputs kept, and with each layer recomputed.
    """

    device: str
    flops: float
    hours: float
    layers: int
    hidden: int
    activations: dict[str, float]
    setups: dict[str, tuple[str, float, int | None]]
    lines: tuple[str, ...]

    def table(self) -> str:
        return "\n".join(self.lines)


def estimate(
    params: float,
    tokens: float,
    device: str,
    mfu: float = 0.4,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    sequence: int = 2048,
    micro_batch: int = 1,
    most_devices: int = 4096,
) -> Estimate:
    """Device-hours, memory per device and the smallest device count that fits, for training a dense transformer.

    Args:
        params, tokens: of the model and the run. device: a key of DEVICES. mfu: model FLOP utilisation, 0 to 1.
        layers, hidden: of the model; None derives both from params = 12 x layers x hidden^2 with hidden = 128 x layers.
        sequence, micro_batch: tokens per sequence and sequences per device at once.

    Raises:
        ValueError: an argument out of range, naming it.
    """
    given = {"params": params, "tokens": tokens, "sequence": sequence, "micro_batch": micro_batch}
    shape = {name: value for name, value in (("layers", layers), ("hidden", hidden)) if value is not None}
    for name, value in (given | shape | {"mfu": mfu, "most_devices": most_devices}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise ValueError(f"estimate: {name} must be a number, got {value!r}.")
    for name, value in (given | shape).items():
        if not 0 < value <= MOST:
            raise ValueError(f"estimate: {name} is {value}; it must be finite, above 0 and at most {MOST:g}.")
    if not 0 < mfu <= 1:
        raise ValueError(f"estimate: mfu is {mfu}; it must be above 0 and at most 1.")
    if not isinstance(device, str) or device not in DEVICES:
        raise ValueError(f"estimate: device is {device!r}; known are {', '.join(DEVICES)}.")
    peak, memory = DEVICES[device]
    layers = layers or max(1, round((params / (12 * 128**2)) ** (1 / 3)))
    hidden = hidden or round(math.sqrt(params / (12 * layers)))
    flops = 6.0 * params * tokens
    hours = flops / (peak * 1e12 * mfu) / 3600
    per_layer = sequence * micro_batch * hidden / GIB
    activations = {"kept": 34 * per_layer * layers, "recomputed": 2 * per_layer * layers + 34 * per_layer}
    setups = {}
    for name, (formula, per_param) in SETUPS.items():
        count = _fits(params, per_param, activations["recomputed"], memory * USABLE, most_devices)
        setups[name] = (formula, params * per_param(1) / GIB, count)
    lines = tuple(
        _lines(params, tokens, device, mfu, flops, hours, layers, hidden, sequence, micro_batch, activations, setups)
    )
    return Estimate(device, flops, hours, layers, hidden, activations, setups, lines)


def _fits(params: float, per_param, activations: float, usable: float, most: int) -> int | None:
    """The least of 1, 2, 4, 8, 16, 24, ... devices whose memory holds state and recomputed activations."""
    for count in (1, 2, 4, *range(8, most + 1, 8)):
        if params * per_param(count) / GIB + activations <= usable:
            return count
    return None


def _lines(params, tokens, device, mfu, flops, hours, layers, hidden, sequence, micro_batch, activations, setups):
    peak, memory = DEVICES[device]
    yield f"compute      6 x {params:g} x {tokens:g} = {flops:.3g} FLOP  [Kaplan et al. 2020; Hoffmann et al. 2022]"
    yield f"time         FLOP / ({peak:g} TFLOP/s x {mfu:g}) = {hours:,.0f} {device}-hours  [data sheet; MFU assumed]"
    yield f"shape        {layers} layers of {hidden}, from params = 12 x layers x hidden^2  [Kaplan et al. 2020]"
    yield (
        f"activations  34 x {sequence} x {micro_batch} x hidden bytes per layer = {activations['kept']:.1f} GiB; "
        f"layers recomputed: {activations['recomputed']:.1f} GiB  [Korthikanti et al. 2022, no attention scores]"
    )
    usable = f"{memory} GiB per {device}, {USABLE:.0%} of it usable"
    yield f"memory       {usable}; state in bytes per parameter  [Rajbhandari et al. 2020]"
    for name, (formula, state, count) in setups.items():
        fits = "does not fit on any count tried"
        if count:
            each = memory_needed(params, name, count, activations["recomputed"])
            fits = f"fits on {count} x {device}, {each:.1f} GiB on each with layers recomputed"
        yield f"  {name:<14} {formula:<40} {state:8.1f} GiB on one device; {fits}"


def memory_needed(params: float, setup: str, devices: int, activations: float) -> float:
    """GiB per device of a set-up on `devices` devices, activations included."""
    if setup not in SETUPS:
        raise ValueError(f"estimate: set-up is {setup!r}; known are {', '.join(SETUPS)}.")
    return params * SETUPS[setup][1](devices) / GIB + activations
