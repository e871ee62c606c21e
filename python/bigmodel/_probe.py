"""Recognises a normalisation by what its class computes, never by its name: the eyes of `bigmodel.convert`.

The live module is only looked at. What runs is a float32 copy of it on the CPU: the same class and plain attributes
with random parameters, made without __init__ and called as `cls.forward(copy, input)`, so that no hook fires. Its rows
tell apart what a model's own activations might not:

    scale 1e-3, 1e-6 and sqrt(eps)    the eps, and whether it is added to the variance inside the root
    mean 10 and -10                   layer_norm (centred) from rms_norm
    scale 1e4, zeros, one outlier     clamps, and norms other than the root mean square

The gradient is compared too (a detached statistic has the same values), and so are 3-D and 4-D inputs, a NaN,
evaluation without a gradient, and an eps attribute that is moved. An input of twice the width must be refused: what
takes it normalises groups, or has a scalar weight, and only looks like a norm at the width of its weight. At last the
four mixes of float32 and bfloat16 give the rule for the dtype returned.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

CONSTANT_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)  # what forwards have written in
_MOVED_EPS = 0.05
_PLAIN_ROWS = 6
# (scale, mean)
_ROWS = [(1.0, 0.0)] * _PLAIN_ROWS + [(1e-3, 0.0), (1e-6, 0.0), (1.0, 10.0), (1.0, -10.0), (1e4, 0.0), (0.0, 0.0)]
_TOLERANCE = 1e-5  # of a row's largest value: float32 sums in another order; an unbiased variance is off by 1 / 2 cols
_LOOSE_TOLERANCE = 1e-3  # for a variance of 1 around a mean of 10, and for gradients
_LOW_TOLERANCE = 0.05  # bfloat16 throughout, statistics included
_INTERNAL = frozenset(vars(Module()))
_STOCK = (torch.nn.functional.layer_norm, torch.nn.functional.rms_norm, torch.layer_norm, torch.rms_norm)


class Rule(NamedTuple):
    """How a module's forward maps onto an op. Names are those of the module's own attributes."""

    op: str  # "layer_norm" or "rms_norm"
    argument: str  # of forward
    weight: str | None
    bias: str | None
    eps: str | float  # the attribute that holds it, or the constant written into forward
    weight_offset: float
    out_dtype: str  # a key of OUT_DTYPES, or "stock": the input's, returned by torch's own function (autocast)


# The dtype returned for an input and a weight of these dtypes; the first rule that fits the probed mixes is taken.
OUT_DTYPES: dict[str, Callable[[torch.dtype, torch.dtype], torch.dtype]] = {
    "input": lambda input, weight: input,
    "float32": lambda input, weight: torch.float32,
    "promoted": torch.promote_types,
    "weight": lambda input, weight: weight,
}


class NotRecognised(Exception):
    """The module is no norm that an op computes; the message is the reason."""


class Recogniser:
    """Finds the Rule of modules; modules of one class with equal attributes are probed once."""

    def __init__(self, model: Module) -> None:
        # A deepcopy that meets a part of the model takes an ellipsis for it: nothing large is copied, and the attribute
        # that holds it compares unequal afterwards.
        self._not_copied = {id(part): ... for part in (*model.modules(), *model.parameters(), *model.buffers())}
        self._known: dict[type, list[tuple[dict, Rule | NotRecognised]]] = {}

    def recognise(self, module: Module) -> Rule:
        """The module's Rule. Raises NotRecognised with the reason."""
        key = {"shapes": _shapes(module), "attributes": _attributes(module)}
        known = self._known.setdefault(type(module), [])
        verdict = next((verdict for seen, verdict in known if _equal(seen, key)), None)
        if verdict is None:
            try:
                with _laboratory():
                    verdict = _Probe(module, self._not_copied).rule()
            except NotRecognised as reason:
                verdict = reason
            except Exception as error:
                verdict = NotRecognised(f"probing its class raised {_describe(error)}")
            known.append((key, verdict))
        if isinstance(verdict, NotRecognised):
            raise verdict
        return verdict


def is_eps(name: str) -> bool:
    """Whether an attribute is called like an eps: eps, layer_norm_eps, variance_epsilon, but not steps."""
    return re.search(r"(^|_)eps", name.lower()) is not None


def normalized_shape(module: Module, weight: Tensor | None) -> tuple[int, ...]:
    """The trailing dimensions that the module would normalise over. Raises NotRecognised if it does not tell."""
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        if weight is None:
            raise NotRecognised("it has no weight, so its width is unknown")
        if weight.dim() != 1:
            raise NotRecognised(f"its weight has {weight.dim()} dimensions")
        return tuple(weight.shape)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if weight is not None and tuple(weight.shape) != shape:
        raise NotRecognised(f"its weight has shape {tuple(weight.shape)}, but its normalized_shape is {shape}")
    return shape


class _Probe:
    def __init__(self, module: Module, not_copied: dict[int, Any]) -> None:
        self.module, self.cls = module, type(module)
        self.argument = _only_argument(self.cls)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.copy = self._fresh_copy(not_copied)
        self.parameters = [name for name, parameter in self.copy._parameters.items() if parameter is not None]
        if len(self.parameters) > 2:
            raise NotRecognised(f"it has {len(self.parameters)} parameters")
        self.shape = normalized_shape(module, next(self.copy.parameters(), None))
        if any(parameter.shape != self.shape for parameter in self.copy.parameters()):
            raise NotRecognised("its weight and bias differ in shape")
        self.dims = tuple(range(-len(self.shape), 0))

    def rule(self) -> Rule:
        input = self._input()
        before = [parameter._version for parameter in self.copy.parameters()]
        rule = self._match(input)
        self._compare_gradients(rule, input)
        self._compare_circumstances(rule, input)
        rule = rule._replace(out_dtype=self._out_dtype(rule, input))
        if before != [parameter._version for parameter in self.copy.parameters()]:
            raise NotRecognised("its forward writes to its parameters")
        if (
            _shapes(self.copy) != _shapes(self.module)
            or self.copy._modules or self.copy._buffers
            or not _equal(_attributes(self.copy), _attributes(self.module))
        ):  # fmt: skip
            raise NotRecognised("its forward changes its attributes, or they cannot be compared")
        return rule

    def _fresh_copy(self, not_copied: dict[int, Any]) -> Module:
        fresh = Module.__new__(self.cls)
        Module.__init__(fresh)
        try:
            attributes = copy.deepcopy(_attributes(self.module), dict(not_copied))
        except Exception as error:
            raise NotRecognised(f"its attributes cannot be copied for a probe: {_describe(error)}") from error
        vars(fresh).update(attributes)
        for name, parameter in self.module._parameters.items():
            fresh._parameters[name] = None if parameter is None else torch.nn.Parameter(self._random(parameter.shape))
        return fresh

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _input(self) -> Tensor:
        eps = next((value for name, value in self._eps_attributes() if is_eps(name) and value), 1e-6)
        rows = torch.tensor([*_ROWS, (math.sqrt(abs(eps)), 0.0), (1e-2, 0.0)], dtype=torch.float32, device="cpu")
        scale, mean = rows.reshape(len(rows), 2, *[1] * len(self.shape)).unbind(1)
        input = self._random((len(rows), *self.shape)) * scale + mean
        input[-1].view(-1)[0] = 50.0  # the outlier
        return input

    def _run(self, input: Tensor) -> Tensor:
        version = input._version
        try:
            out = self.cls.forward(self.copy, input)
        except Exception as error:
            raise NotRecognised(f"its forward raises on a {input.dim()}-D input: {_describe(error)}") from error
        if not isinstance(out, Tensor) or out.shape != input.shape:
            raise NotRecognised("its forward does not return one tensor of the input's shape")
        if input._version != version or out is input:
            raise NotRecognised("its forward writes to its input or returns it")
        return out

    def _eps_attributes(self) -> list[tuple[str, float | None]]:
        """Attributes that may hold eps: floats of any name; integers and None where the name says eps."""
        names = {name: None for cls in reversed(self.cls.__mro__) for name in vars(cls)} | vars(self.copy)
        found = []
        for name in names:
            value = inspect.getattr_static(self.copy, name, "")
            named = is_eps(name) and (value is None or type(value) is int)
            if (isinstance(value, float) and math.isfinite(value) or named) and name.isidentifier():
                found.append((name, value))
        return found

    def _candidates(self) -> Iterator[Rule]:
        sources: list[str | float] = [*(name for name, _ in self._eps_attributes()), *CONSTANT_EPS]
        ops = ("layer_norm",) if len(self.parameters) == 2 else ("rms_norm", "layer_norm")
        offsets = (0.0, 1.0) if self.parameters else (0.0,)
        for order in itertools.permutations(self.parameters):
            weight, bias, *_ = *order, None, None
            for op, offset, eps in itertools.product(ops, offsets, sources):
                yield Rule(op, self.argument, weight, bias, eps, offset, "input")

    def _match(self, input: Tensor) -> Rule:
        out = self._run(input).detach()
        if not torch.allclose(out, self._run(input), rtol=0, atol=0, equal_nan=True):
            raise NotRecognised("two calls on the same input differ")
        for rule in self._candidates():
            if self._agrees(rule, out, input) and self._follows_eps(rule, input):
                return rule
        raise NotRecognised("it computes neither layer_norm nor rms_norm over its last dimensions")

    def _follows_eps(self, rule: Rule, input: Tensor) -> bool:
        if not isinstance(rule.eps, str):
            return True
        own = dict(vars(self.copy))
        vars(self.copy)[rule.eps] = _MOVED_EPS
        agrees = self._agrees(rule, self._run(input), input)
        vars(self.copy).clear()
        vars(self.copy).update(own)
        return agrees

    def _agrees(self, rule: Rule, out: Tensor, input: Tensor, tolerance: float | None = None) -> bool:
        """Whether out is the rule's output, up to a share of each row's largest value."""
        expected, x = self._reference(rule, input), input.double()
        centred = x.mean(self.dims).abs() <= 2 * x.std(self.dims, correction=0)
        share = torch.where(centred, _TOLERANCE, _LOOSE_TOLERANCE) if tolerance is None else tolerance
        return self._within(out.detach(), expected, share * self._largest(expected))

    def _reference(self, rule: Rule, input: Tensor) -> Tensor:
        normed = self._centred(rule, input) * self._rstd(rule, input)
        bias = 0.0 if rule.bias is None else getattr(self.copy, rule.bias).double()
        return normed * self._scale(rule) + bias

    def _centred(self, rule: Rule, input: Tensor) -> Tensor:
        x = input.double()
        return x - x.mean(self.dims, keepdim=True) if rule.op == "layer_norm" else x

    def _rstd(self, rule: Rule, input: Tensor) -> Tensor:
        eps = getattr(self.copy, rule.eps) if isinstance(rule.eps, str) else rule.eps
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return (self._centred(rule, input).square().mean(self.dims, keepdim=True) + eps).rsqrt()

    def _scale(self, rule: Rule) -> Tensor | float:
        return 1.0 if rule.weight is None else getattr(self.copy, rule.weight).double() + rule.weight_offset

    def _largest(self, tensor: Tensor) -> Tensor:
        return tensor.abs().amax(self.dims)

    def _within(self, got: Tensor, expected: Tensor, allowed: Tensor) -> bool:
        """Whether each row is, with NaN in the same places."""
        error = self._largest((got - expected).masked_fill(expected.isnan(), 0))
        return torch.equal(got.isnan(), expected.isnan()) and bool((error <= allowed.nan_to_num()).all())

    def _compare_gradients(self, rule: Rule, input: Tensor) -> None:
        input = input[:_PLAIN_ROWS].clone().requires_grad_()
        wanted = [input, *self.copy.parameters()]
        grad_out = self._random(input.shape)
        out = self._run(input)
        if not out.requires_grad:
            raise NotRecognised("its forward gives no gradient")
        grads = torch.autograd.grad(out, wanted, grad_out, allow_unused=True)
        expected = torch.autograd.grad(self._reference(rule, input), wanted, grad_out.double())
        terms = grad_out * self._scale(rule) * self._rstd(rule, input)  # at width 1 they cancel in the sum
        sizes = [self._largest(terms), *[grad_out.abs().sum(0).max()] * len(self.parameters)]
        for grad, right, size in zip(grads, expected, sizes, strict=True):
            if grad is None or not self._within(grad, right, _LOOSE_TOLERANCE * size):
                raise NotRecognised("its gradient differs from the op's")

    def _compare_circumstances(self, rule: Rule, input: Tensor) -> None:
        with torch.no_grad():
            for training in (False, True):
                self.copy.training = training
                if not self._agrees(rule, self._run(input), input):
                    raise NotRecognised("its result depends on training or on whether gradients are wanted")
            self.copy.training = self.module.training
            for leading in ((2, 7), (7, 2, 1)):
                reshaped = input.view(*leading, *self.shape)
                if not self._agrees(rule, self._run(reshaped), reshaped):
                    raise NotRecognised(f"it computes something else for a {len(leading) + 1}-D input")
            poisoned = input.clone()
            poisoned.view(-1)[0] = math.nan
            if not self._agrees(rule, self._run(poisoned), poisoned):
                raise NotRecognised("a NaN does not spread in it as in the op")
            try:
                self._run(torch.cat((input, input), -1))
            except NotRecognised:
                return
        raise NotRecognised("it also takes inputs wider than its weight")

    def _out_dtype(self, rule: Rule, input: Tensor) -> str:
        with _ReturnsStock() as stock, torch.no_grad():
            returns_stock = self._run(input) is stock.result
        dtypes = torch.float32, torch.bfloat16
        mixes = {}
        parameters = dict(self.copy._parameters)
        for mix in itertools.product(dtypes, dtypes if self.parameters else dtypes[:1]):
            mixes[mix] = self._returned(rule, input[:_PLAIN_ROWS], *mix)
        self.copy._parameters.update(parameters)
        for name, returns in OUT_DTYPES.items():
            if all(returned in (None, returns(*mix)) for mix, returned in mixes.items()):
                return "stock" if returns_stock and name == "input" else name
        listed = ", ".join(f"{mixes[mix]} for {mix[0]} with a {mix[1]} weight" for mix in mixes if mixes[mix])
        raise NotRecognised(f"no rule gives the dtypes that it returns: {listed}".replace("torch.", ""))

    def _returned(self, rule: Rule, input: Tensor, input_dtype: torch.dtype, weight_dtype: torch.dtype):
        """The dtype returned for this mix, None where forward refuses it."""
        input = input.to(input_dtype)
        for name in self.parameters:
            self.copy._parameters[name] = torch.nn.Parameter(getattr(self.copy, name).to(weight_dtype))
        try:
            out = self._run(input)
        except NotRecognised:
            return None
        if not self._agrees(rule, out, input, _LOW_TOLERANCE):
            mix = f"{input_dtype} with a {weight_dtype} weight".replace("torch.", "")
            raise NotRecognised(f"it computes something else for {mix}")
        return out.dtype


# --- surroundings -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _laboratory() -> Iterator[None]:
    """Eager float32 on the CPU with gradients, whatever the caller has set; his random state stays."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _ReturnsStock(TorchFunctionMode):
    """Keeps the last result of torch's own layer_norm or rms_norm."""

    result: Any = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _STOCK:
            self.result = out
        return out


def _only_argument(cls: type[Module]) -> str:
    """The name of the one argument of cls.forward."""
    arguments = list(inspect.signature(cls.forward).parameters.values())[1:]
    single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(arguments) != 1 or arguments[0].kind not in single:
        raise NotRecognised(f"its forward takes ({', '.join(map(str, arguments))}) instead of one tensor")
    return arguments[0].name


def _shapes(module: Module) -> dict[str, tuple[int, ...] | None]:
    return {name: None if p is None else tuple(p.shape) for name, p in module._parameters.items()}


def _attributes(module: Module) -> dict[str, Any]:
    """What the module keeps besides parameters, buffers, children and hooks."""
    return {name: value for name, value in vars(module).items() if name not in _INTERNAL}


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except Exception:  # tensors and arrays compare elementwise
        return False


def _describe(error: Exception) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
