"""What the optimizers share: torch.optim's protocol around one multi-tensor call per parameter group and device."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel import _check, _registry
from bigmodel.ops import TableCache, grad_clip
from bigmodel.optim import _batches, _state, _total
from bigmodel.optim._batches import Batch, Rows
from bigmodel.optim._distributed import all_plain, device_of, is_dtensor, spread_of, whole

_NO_STATE: dict[str, Any] = {}
# Settings of groups that torch has not and some optimizers here have.
EXTRAS = ("ema_decay", "state_dtype", "master_weights", "stochastic_rounding")


class Control(NamedTuple):
    """GradControl of csrc/table.h: scalars on one device."""

    factor: Tensor | None
    grad_scale: Tensor | None
    skip: Tensor | None

    def on(self, device: torch.device) -> dict[str, Any]:
        moved = [None if scalar is None else scalar.to(device, non_blocking=True) for scalar in self]
        return dict(zip(("grad_factor", "grad_scale", "found_inf"), moved, strict=True))


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before an optimizer of torch.optim, whose arguments, groups and checkpoints it keeps.

    Attributes:
        max_grad_norm: the global norm that gradients are clipped to in the step, or None.
        skip_nonfinite: whether a step with a gradient that is infinite or NaN changes nothing.
        grad_norm: the norm in the last step, of unscaled gradients before clipping: a scalar tensor, float32 (float64
            for float64 gradients). None before the first step and without max_grad_norm or skip_nonfinite.
        skipped_steps: how many steps changed nothing, for an infinite or NaN norm or for GradScaler: a float32 scalar
            on the device of the first parameter. It counts for this object, and is not in the state_dict.
    """

    # torch.amp.GradScaler sets grad_scale and found_inf on the instance for the time of a step.
    _step_supports_amp_scaling = True
    # Settings that a group only has where they are on, so that checkpoints without them have torch's own keys.
    _extras: tuple[str, ...] = ()
    # Settings of groups that are bools, and that are numbers of at least 0.
    _flags: tuple[str, ...] = ("maximize", "differentiable")
    _least_0: tuple[str, ...] = ("weight_decay",)

    max_grad_norm: float | None
    skip_nonfinite: bool
    grad_norm: Tensor | None
    skipped_steps: Tensor

    # --- construction ---------------------------------------------------------------------------------------------

    def _configure(
        self, differentiable: bool, max_grad_norm: float | None, skip_nonfinite: bool, **extras: Any
    ) -> None:
        """Before torch's constructor, which calls `add_param_group`."""
        self._refuse_differentiable(differentiable)
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self._check_clipping()
        self._given = {name: value for name, value in extras.items() if value is not None and value is not False}
        self._fresh()

    def _refuse_differentiable(self, differentiable: Any) -> None:
        if differentiable:
            _check.flag(self._name(), "differentiable", differentiable)
            raise ValueError(
                f"{self._name()}: differentiable is True; the fused update has no gradient, use torch.optim's."
            )

    def _check_clipping(self) -> None:
        if self.max_grad_norm is not None and not _check.real(self._name(), "max_grad_norm", self.max_grad_norm) > 0:
            raise ValueError(f"{self._name()}: max_grad_norm is {self.max_grad_norm}; it must be positive, or None.")
        _check.flag(self._name(), "skip_nonfinite", self.skip_nonfinite)

    def _fresh(self) -> None:
        self._rows: dict[Any, Rows] = defaultdict(Rows)
        self._whole: dict[int, Rows] = {}  # of groups that were one batch in the last step
        self._seen: tuple[list, list] = [], []  # keys and values of `state` in the last step
        self._totals: dict[Any, TableCache] = {}
        self._started = False
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("skipped_steps", torch.zeros((), dtype=torch.float32, device="cpu"))

    @classmethod
    def _name(cls) -> str:
        return f"bigmodel.optim.{cls.__name__}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the same parameter twice is refused, in one group too: its rows would be written at once.

        So are settings that have no effect in a group.
        """
        self.defaults.update(self._given)
        super().add_param_group(param_group)
        params = param_group["params"]
        try:
            if len(set(params)) != len(params):
                raise ValueError(f"{self._name()}: a parameter group has the same parameter twice; list it once.")
            self._check_group(param_group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """TypeError, ValueError for settings that a group may not have; in every step, since they may be set."""
        for name in ("max_grad_norm", "skip_nonfinite"):
            if name in group:
                raise ValueError(
                    f"{self._name()}: a parameter group has {name}, which is one for all groups; give it to the "
                    "optimizer."
                )
        for name in EXTRAS:
            if name in group and name not in self._extras:
                raise ValueError(f"{self._name()}: a parameter group has {name}, which only Adam and AdamW take.")
        for name in self._flags:
            if type(group.get(name, False)) is not bool:
                _check.flag(self._name(), name, group[name])
        self._refuse_differentiable(group.get("differentiable"))
        for name in self._least_0:
            value = group[name]
            if not isinstance(value, Tensor) and not _check.real(self._name(), name, value) >= 0:
                raise ValueError(f"{self._name()}: {name} is {value}; it must be at least 0.")

    # --- step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all groups.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: settings that were wrong in the constructor and have been set since, but for the
                learning rate, whose sign is not looked at.
        """
        return self._step(closure)

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._check_step()
        self._check_clipping()
        for group in self.param_groups:
            self._check_group(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches, idle, sharded = self._gather()
        if not batches and not sharded:
            return loss
        parts = self._parts(batches, sharded)
        if not self._started and self._only_initialises(parts):
            for batch in batches:
                self._ready(batch)
            return loss
        self._started = True
        control = self._control(parts, batches)
        for batch in batches:
            self._update(self._ready(batch), control.on(batch.key[1]))
            if batch.params is not batch.owners:
                torch.autograd.graph.increment_version([p for p in batch.owners if is_dtensor(p)])
        self._update_idle(idle, control)
        return loss

    def _check_step(self) -> None:
        """RuntimeError where a step must not be taken now."""

    def _gather(self) -> tuple[list[Batch], list[tuple[dict, Tensor]], list[Tensor]]:
        """Batches, parameters without gradients with their groups, and parameters that are DTensors."""
        batches: list[Batch] = []
        idle: list[tuple[dict, Tensor]] = []
        sharded: list[Tensor] = []
        seen = _registry._C.same_items(self.state, *self._seen)
        if not seen:
            for kept in self._rows.values():
                kept.batch = None  # and the states that left, before there are new ones
        for index, group in enumerate(self.param_groups):
            rows = self._whole.pop(index, None)
            if seen and rows is not None and (batch := rows.as_before(group, self._settings(group))) is not None:
                self._whole[index] = rows
                batches.append(batch)
                continue
            params = group["params"]
            if not all_plain(params):
                sharded += [p for p in params if p.requires_grad and is_dtensor(p)]
            grads = [p.grad for p in params]
            if not all([g is not None for g in grads]):  # noqa: C419, a generator takes twice the time
                idle += [(group, p) for p, g in zip(params, grads, strict=True) if g is None]
                params = [p for p, g in zip(params, grads, strict=True) if g is not None]
                grads = [g for g in grads if g is not None]
            if not params:
                continue
            if not _batches.strided(grads):
                raise RuntimeError(self._sparse_message())
            states = [self.state[p] for p in params] if self._stateful(group) else [_NO_STATE] * len(params)
            if _batches.one_device(params, grads):
                batches.append(Batch((index, params[0].device, None), group, params, params, grads, states))
            else:
                batches += _batches.split(index, group, params, grads, states)
        self._seen = list(self.state), list(self.state.values())
        return batches, idle, sharded

    def _sparse_message(self) -> str:
        name = type(self).__name__
        return f"{name} does not support sparse gradients, please use torch.optim.SparseAdam or make them dense"

    @staticmethod
    def _parts(batches: list[Batch], sharded: list[Tensor]) -> _total.Parts:
        """The gradients by where they are; with empty lists for shards whose gradients only other processes have."""
        parts: _total.Parts = {(device_of(p), spread_of(p)): [] for p in sharded}
        for batch in batches:
            parts.setdefault(batch.key[1:], []).extend(batch.grads)
        return parts

    def _only_initialises(self, parts: _total.Parts) -> bool:
        """Whether this is the step with lr 0 and zero gradients with which torch.distributed.checkpoint makes states.

        Anything but the states is then left as it is. Looking at the gradients waits for the device, which only a first
        step with lr 0 has to.
        """
        for group in self.param_groups:
            lr = group["lr"]
            if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0:
                return False
        if any(state and state.get("step", 1) != 0 for state in self.state.values()):
            return False
        home = next(iter(parts))[0]
        return bool(_total.total(parts, math.inf, home) == 0)

    def _control(self, parts: _total.Parts, batches: list[Batch]) -> Control:
        """Everything that the gradients are multiplied by, or that forbids to write; nothing waits for the device."""
        home = next(iter(parts))[0]
        grad_scale = self._scalar("grad_scale", home)
        found_inf = self._scalar("found_inf", home)
        if self.skipped_steps.device != home:
            self.skipped_steps = self.skipped_steps.to(home)
        if self.max_grad_norm is None and not self.skip_nonfinite:
            if found_inf is not None:
                self.skipped_steps += found_inf.ne(0).view(())
            return Control(None, grad_scale, found_inf)
        clip = grad_clip(
            _total.total(parts, 2.0, home, self._totals),
            math.inf if self.max_grad_norm is None else self.max_grad_norm,
            grad_scale=grad_scale,
            found_inf=found_inf,
            skip_nonfinite=self.skip_nonfinite,
            skipped=self.skipped_steps,
            norm_dtype=_total.norm_dtype(parts),
        )
        self.grad_norm = clip.norm
        factor = None if self.max_grad_norm in (None, math.inf) else clip.factor
        return Control(factor, grad_scale, clip.skip if found_inf is not None or self.skip_nonfinite else None)

    def _scalar(self, name: str, home: torch.device) -> Tensor | None:
        value = getattr(self, name, None)
        return None if value is None else whole(value).to(home, torch.float32, non_blocking=True)

    # --- what a subclass does -------------------------------------------------------------------------------------

    def _update(self, batch: Batch, control: dict[str, Any]) -> None:
        """One call of the op."""
        raise NotImplementedError

    def _update_idle(self, idle: list[tuple[dict, Tensor]], control: Control) -> None:
        """What a step does to parameters without gradients."""

    def _stateful(self, group: dict[str, Any]) -> bool:
        """Whether parameters of the group have a state."""
        return True

    def _columns(self, group: dict[str, Any]) -> dict[str, str]:
        """Under which key a state has what the op takes in which argument."""
        raise NotImplementedError

    def _settings(self, group: dict[str, Any]) -> Any:
        """What `_complete` and `_columns` depend on beside states and parameters."""

    def _complete(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Adds what the state of a parameter lacks, and brings what it has into the format that the group asks for."""

    def _ready(self, batch: Batch) -> Batch:
        """The batch with its table's cache, its states complete and looked up."""
        if batch.cache is not None:
            return batch
        rows, settings, names = self._rows[batch.key], self._settings(batch.group), self._columns(batch.group)
        ready = batch._replace(columns=_batches.columns_of(batch.states, names), cache=rows.cache)
        described = _batches.described(ready)
        if not rows.complete(settings, ready, described):
            for param, state in zip(batch.owners, batch.states, strict=True):
                self._complete(param, state, batch.group)
            ready = ready._replace(columns=_batches.columns_of(batch.states, names))
            described, rows.versions = _batches.described(ready), None
        rows.keep(settings, ready, names, described)
        if batch.whole:
            self._whole[batch.key[0]] = rows
        return ready

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but saved states keep their dtypes.

        Settings that the saved groups lack keep the values that they have here; states that are missing or in another
        format than the settings ask for are made, or converted, in the next step.
        """
        saved: dict[str, Any] = {}

        def last_hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(state_dict)
            return {**state_dict, "state": {}}

        handle = self.register_load_state_dict_pre_hook(last_hook)
        self._saved = saved
        try:
            with torch.no_grad():
                super().load_state_dict(state_dict)
        finally:
            handle.remove()
            del self._saved
        missing = {
            name
            for group in self.param_groups
            for param in group["params"]
            if self.state.get(param)
            for name in self._missing(param, self.state[param], group)
        }
        if missing:
            warnings.warn(
                f"{self._name()}: what is loaded has no {' and no '.join(sorted(missing))}; the settings ask for it, "
                "and the next step starts it from the parameters.",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_saved" in self.__dict__:
            state = self._loaded(self._saved, state["param_groups"])
        self._given = state.get("_given", self.__dict__.get("_given", {}))
        super().__setstate__(state)
        self._fresh()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "skip_nonfinite", "grad_norm", "skipped_steps", "_given")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def _loaded(self, saved: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = dict(zip(ids, chain.from_iterable(group["params"] for group in groups), strict=True))
        states: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for key, values in saved["state"].items():
            if key not in params:
                states[key] = values
                continue
            # torch.distributed.checkpoint has an empty dictionary for what the saved optimizer did not have
            present = {name: value for name, value in values.items() if value != {}} if values else {}
            states[params[key]] = {name: _state.restored(params[key], name, v) for name, v in present.items()}
        for own, group in zip(self.param_groups, groups, strict=True):
            for name in (*self.defaults, *self._extras):
                if name in own:
                    group.setdefault(name, own[name])
        return {"state": states, "param_groups": groups}

    def _missing(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[str]:
        """Which copies of the parameter a loaded state lacks."""
        return []
