"""Puts the fused norms and the fused attention into a model that exists, and takes them out again.

`convert` gives each recognised norm a new class and changes nothing else: the module object stays, and with it its
parameters, hooks, flags, name, sharing and place in wrappers such as DDP. The new class is made at run time and
derives from the module's own, so isinstance, state_dict and every other method hold; it keeps the name, since models
look at it (transformers initialises by `"RMSNorm" in type(module).__name__`), and replaces only `forward`, whose
argument keeps its name. `revert` assigns the old class again. The alternatives lose something: a new module loses
hooks and identity, and a `forward` on the instance is copied by `copy.deepcopy` still bound to the old module.

What is a norm is decided in `_probe`, by running a copy of its class. Attention is transformers' own to exchange:
`_transformers` registers a function with it and sets the configs.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import Module, Parameter

from bigmodel import _check, _transformers, ops
from bigmodel._native import DTYPE_CODES
from bigmodel._probe import NotRecognised, Recogniser, Rule, is_eps, normalized_shape

# --- the report -------------------------------------------------------------------------------------------------------


class Replaced(NamedTuple):
    name: str
    cls: str
    what: str


class Left(NamedTuple):
    name: str
    cls: str
    reason: str


@dataclass
class ConvertReport:
    """What `convert` or `revert` did: one entry per module, under the first of its names in the model.

    replaced: (name, cls, what), `what` being the op and its options, or for `revert` what came back.
    left: (name, cls, reason) of every module that looks like a norm, or has attention, and was not touched.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        """A table in which modules that differ only in numbers share a line: layers.*.norm."""
        rows: list[tuple[str, ...]] = []
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            counts: dict[tuple[str, str, str], int] = {}
            for name, cls, text in entries:
                key = re.sub(r"\d+", "*", name) or "(the model)", cls, text
                counts[key] = counts.get(key, 0) + 1
            rows += [(title, str(count), *key) for key, count in counts.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join(lines)


# --- the class of a converted module ----------------------------------------------------------------------------------

_OUT_DTYPES = {  # the source of out_dtype; the rules are those of _probe.OUT_DTYPES
    "stock": "None",
    "input": "{input}.dtype",
    "promoted": "promote_types({input}.dtype, weight.dtype)",
    "weight": "weight.dtype",
    "float32": "float32",
}
_RETURNS = {
    "stock": "the input's dtype",
    "input": "the input's dtype",
    "promoted": "the promoted dtype",
    "weight": "the weight's dtype",
    "float32": "float32",
}
# Generated, since the name of forward's argument is part of what must survive.
_FORWARD = """
def forward(self, {input}):
    weight = {weight}
    return {op}({input}, {shape}, weight, {rest}, weight_offset={offset}, out_dtype={out_dtype})
"""


class _Fused(Module):
    """First base of every converted module's class."""

    fused_from: type
    fused_by: Rule

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is not importable: a pickle or a deepcopy makes the original and changes its class again.
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        original = self.fused_from
        arguments = tuple(original if argument is type(self) else argument for argument in arguments)
        return _rebuild, (original, tuple(self.fused_by), function, arguments), *state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"fused by bigmodel.{self.fused_by.op}")))


def _rebuild(original: type, rule: tuple, function: Any, arguments: tuple) -> Module:
    module = function(*arguments)
    object.__setattr__(module, "__class__", _fused_class(original, Rule(*rule)))
    return module


@functools.cache
def _fused_class(original: type, rule: Rule) -> type:
    namespace: dict[str, Any] = {
        **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
        "fused_from": original,
        "fused_by": rule,
        "forward": _forward(rule),
    }
    try:
        return types.new_class(original.__name__, (_Fused, original), exec_body=lambda body: body.update(namespace))
    except Exception as error:
        raise NotRecognised(f"its class cannot be derived from: {error}") from error


def _forward(rule: Rule) -> Callable:
    eps = f"self.{rule.eps}" if isinstance(rule.eps, str) else repr(rule.eps)
    bias = f"self.{rule.bias}" if rule.bias else "None"
    source = _FORWARD.format(
        op=rule.op,
        input=rule.argument,
        weight=f"self.{rule.weight}" if rule.weight else "None",
        shape="weight.shape" if rule.weight else "self.normalized_shape",
        rest=f"{bias}, {eps}" if rule.op == "layer_norm" else eps,
        offset=rule.weight_offset,
        out_dtype=_OUT_DTYPES[rule.out_dtype].format(input=rule.argument),
    )
    scope: dict[str, Any] = {
        "layer_norm": ops.layer_norm,
        "rms_norm": ops.rms_norm,
        "promote_types": torch.promote_types,
        "float32": torch.float32,
    }
    exec(source, scope)
    return scope["forward"]


def _what(rule: Rule) -> str:
    offset = f", {rule.weight_offset:g} + {rule.weight}" if rule.weight_offset else ""
    return f"{rule.op}{offset}, returns {_RETURNS[rule.out_dtype]}"


# --- the walk ---------------------------------------------------------------------------------------------------------


def _walk(module: Module, name: str, sealed: str, seen: set[Module]) -> Iterator[tuple[str, Module, str]]:
    """(name, module, why everything in it must stay or ""), each module once."""
    if module in seen:
        return
    seen.add(module)
    sealed = sealed or _sealed(module)
    yield name, module, sealed
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, sealed, seen)


def _sealed(module: Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: convert the model before torch.jit"
    dynamo = sys.modules.get("torch._dynamo")  # not loaded: nothing is compiled
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "it is compiled: convert the model before torch.compile"
    return ""


def _looks_like_norm(module: Module) -> bool:
    """Decides what is probed and what the report speaks of, not what is replaced."""
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        return True
    named = "norm" in _class_name(module).lower()
    if module._modules:
        return named and (bool(module._parameters) or torch.nn.utils.parametrize.is_parametrized(module))
    scopes = vars(module), *(vars(cls) for cls in type(module).__mro__ if cls is not Module)
    return named or any(map(is_eps, itertools.chain.from_iterable(scopes)))


def _class_name(module: Module) -> str:
    return getattr(module, "original_name", type(module).__name__)  # original_name: of a ScriptModule


def _is_ours(module: Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "bigmodel" for cls in type(module).__mro__)


def _recognise(module: Module, recogniser: Recogniser) -> Rule:
    """The rule that replaces this module. Raises NotRecognised with the reason why it must stay."""
    if _is_ours(module):
        raise NotRecognised("it is fused already")
    if hasattr(module, "_hf_hook"):
        raise NotRecognised("accelerate moves its input or parameters (offloading)")
    if "forward" in vars(module):
        raise NotRecognised("its forward was replaced on the instance")
    if torch.nn.utils.parametrize.is_parametrized(module):
        raise NotRecognised("it is parametrized: convert the model before parametrizing it")
    if module._modules:
        raise NotRecognised("it has child modules")
    if module._buffers:
        raise NotRecognised(f"it has buffers: {', '.join(module._buffers)}")
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    for name, parameter in parameters.items():
        _check_parameter(name, parameter)
    if len({parameter.dtype for parameter in parameters.values()}) > 1:
        raise NotRecognised("its weight and bias differ in dtype")
    normalized_shape(module, next(iter(parameters.values()), None))
    return recogniser.recognise(module)


def _check_parameter(name: str, parameter: Parameter) -> None:
    if parameter.is_meta:
        raise NotRecognised(f"its {name} is on the meta device (not loaded yet, or offloaded)")
    tensors = sys.modules.get("torch.distributed.tensor")
    if type(parameter) is not Parameter and not (tensors and isinstance(parameter, tensors.DTensor)):
        raise NotRecognised(f"its {name} is a {type(parameter).__name__}")
    if parameter.dtype not in DTYPE_CODES:
        raise NotRecognised(f"its {name} is {parameter.dtype}".replace("torch.", ""))
    if not parameter.numel():
        raise NotRecognised(f"its {name} is empty (partitioned, or offloaded)")
    if not (parameter.is_cpu or parameter.is_cuda):
        raise NotRecognised(f"its {name} is on device '{parameter.device}'")
    try:
        _check.tensor("convert", f"its {name}", parameter)
    except (TypeError, ValueError) as error:
        raise NotRecognised(str(error)) from None


# --- attention --------------------------------------------------------------------------------------------------------


def _convert_attention(model: Module, report: ConvertReport) -> None:
    found = []
    configs = set()  # a model and its head share one, and one line of the report
    for name, module, sealed in list(_walk(model, "", "", set())):
        if _transformers.is_model(module) and id(module.config) not in configs:
            configs.add(id(module.config))
            found.append((name, module, sealed, _transformers.implementation(module)))
        elif isinstance(module, torch.nn.MultiheadAttention) and not _is_ours(module):
            reason = "it is torch's own: build the model with bigmodel.nn.MultiheadAttention, which has its state_dict"
            report.left.append(Left(name, _class_name(module), reason))
    for name, module, sealed, before in found:
        if not sealed and before != _transformers.NAME and _transformers.attend(module):
            report.replaced.append(Replaced(name, _class_name(module), f"attention, was {before}"))
            continue
        reason = "it does not take its attention from transformers' AttentionInterface"
        if sealed or before == _transformers.NAME:
            reason = sealed or "its attention is fused already"
        report.left.append(Left(name, _class_name(module), reason))
    if not found and not report.left:
        report.left.append(
            Left("", _class_name(model), "it holds no model of transformers, and no attention of torch's")
        )


def _revert_attention(model: Module, report: ConvertReport) -> None:
    configs = set()
    for name, module in model.named_modules():
        before = _transformers.recorded(module)
        if before is None:
            continue
        now = _transformers.implementation(module)
        _transformers.revert(module)
        if id(module.config) in configs:
            continue
        configs.add(id(module.config))
        if now == _transformers.NAME:
            report.replaced.append(Replaced(name, _class_name(module), f"its attention, {before}"))
        else:
            report.left.append(Left(name, _class_name(module), f"its attention was set to {now} after convert"))


# --- public functions -------------------------------------------------------------------------------------------------


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}.")


def convert(model: Module, *, norms: bool = True, attention: bool = False, verbose: bool = False) -> ConvertReport:
    """Replaces, in place, every normalisation of a model by bigmodel's fused one, and the attention of transformers'.

    Norms: replaced are torch.nn.LayerNorm and RMSNorm and every class that computes the same, with `weight` or
    `1 + weight`, such as those of transformers (Llama, Mistral, Qwen, Gemma, T5): leaf modules with one weight, perhaps
    a bias, an eps and one tensor argument, recognised by running a float32 copy of the class on the CPU. The parameters
    stay the same objects, so an optimizer made before goes on; hooks, argument names, device, dtype, flags, state_dict,
    isinstance, pickling and copy.deepcopy hold. A converted module returns the dtype that the original returned for
    the dtypes of its input and weight, and differs by rounding only: sums run in another order, and one rounding at
    the end replaces those in between.

    Attention: the models of transformers in it attend through `bigmodel.attention`, by transformers' own
    set_attn_implementation("bigmodel"): soft-capping, sinks, masks, sliding windows, caches, grouped heads and
    output_attentions as in their eager attention. Queries that may attend to nothing (padding on the left) get zeros,
    where eager attention gives the mean of all values. The name stays registered, so that
    from_pretrained(attn_implementation="bigmodel") works afterwards.

    Convert before torch.compile, torch.jit.script, parametrizing and accelerate's dispatch; before or after DDP and
    fully_shard. Calling it again changes nothing.

    Args:
        model: the module, changed in place; it may itself be a norm.
        norms: False leaves the norms.
        attention: True exchanges the attention too. torch.nn.MultiheadAttention is left, and listed.
        verbose: print the report.

    Returns:
        A ConvertReport: what was replaced and what was left, with the reason.

    Raises:
        TypeError: model is not a torch.nn.Module, or a flag is not a bool.
        ValueError: model is compiled or scripted.
        RuntimeError: attention is True and transformers is older than 5.
    """
    _check_model("convert", model)
    for name, flag in (("norms", norms), ("attention", attention), ("verbose", verbose)):
        if not isinstance(flag, bool):
            raise TypeError(f"convert: {name} must be a bool, got {type(flag).__name__}.")
    if sealed := _sealed(model):
        raise ValueError(f"convert: model cannot be changed, {sealed}.")
    report = ConvertReport()
    recogniser = Recogniser(model)
    for name, module, sealed in list(_walk(model, "", "", set())) if norms else ():
        if not _looks_like_norm(module):
            continue
        try:
            if sealed:
                raise NotRecognised(sealed)
            original: type = type(module)
            rule = _recognise(module, recogniser)
            fused = _fused_class(original, rule)
        except NotRecognised as reason:
            report.left.append(Left(name, _class_name(module), str(reason)))
            continue
        object.__setattr__(module, "__class__", fused)
        report.replaced.append(Replaced(name, _class_name(module), _what(rule)))
    if attention:
        _convert_attention(model, report)
    if verbose:
        print(report)
    return report


def revert(model: Module) -> ConvertReport:
    """Gives every module that `convert` changed its own class back, and models their attention.

    Results are then those of before, bit for bit.

    Returns:
        A ConvertReport: what was restored, and what was left because another class has been derived from the fused
        one since (parametrize and fully_shard do that), or another attention set.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model("revert", model)
    report = ConvertReport()
    for name, module in model.named_modules():
        if isinstance(module, _Fused):
            if "fused_from" in vars(type(module)):
                object.__setattr__(module, "__class__", module.fused_from)
                report.replaced.append(Replaced(name, _class_name(module), "its own forward"))
            else:
                reason = "parametrized or sharded after convert, which derived a class from the fused one"
                report.left.append(Left(name, _class_name(module), reason))
    _revert_attention(model, report)
    return report


class _CallableModule(types.ModuleType):
    """`import bigmodel.convert` binds this module to the name of the function; so calling it must do the same."""

    def __call__(self, model: Module, **options: bool) -> ConvertReport:
        return convert(model, **options)


sys.modules[__name__].__class__ = _CallableModule
