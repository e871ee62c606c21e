"""What a user reads who imports a part of apex that is not mirrored here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_ROOT = "bigmodel.compat.apex"
_PROVIDED = (
    "normalization, normalization.fused_layer_norm, contrib.layer_norm, optimizers, transformer.layers, "
    "transformer.enums and transformer.functional.fused_softmax"
)
_INSTEAD = {
    "amp": "torch.amp",
    "fp16_utils": "torch.amp",
    "parallel": "torch.nn.parallel.DistributedDataParallel and torch.nn.SyncBatchNorm",
    "optimizers.FusedSGD": "bigmodel.optim.SGD",
    "optimizers.FusedAdagrad": "bigmodel.optim.Adagrad",
    "contrib.optimizers": "optimizers.FusedAdam",
    "contrib.clip_grad": "bigmodel.clip_grad_norm_",
    "contrib.xentropy": "torch.nn.functional.cross_entropy",
    "contrib.group_norm": "torch.nn.GroupNorm",
}


def _message(name: str) -> str:
    instead = f" (use {_INSTEAD[name]})" if name in _INSTEAD else ""
    return f"{_ROOT} has no '{name}'{instead}; it provides {_PROVIDED}."


def attributes_of(module: str) -> Callable[[str], Any]:
    """The module-level `__getattr__` for a mirrored module: AttributeError naming what exists."""
    path = module.removeprefix(_ROOT).removeprefix(".")

    def missing(name: str) -> Any:
        raise AttributeError(_message(f"{path}.{name}" if path else name))

    return missing


class _AbsentFinder:
    """Last on sys.meta_path: an import below this package that no other finder resolved.

    A module-level `__getattr__` alone cannot do this: `from package import name` drops the message of its
    AttributeError, and raising ImportError from it would break `hasattr`. For the same reason the error carries no
    `name`: the import system swallows a ModuleNotFoundError whose `name` is the module it was looking for.
    """

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.startswith(_ROOT + "."):
            raise ModuleNotFoundError(_message(fullname.removeprefix(_ROOT + ".")))


sys.meta_path.append(_AbsentFinder)  # type: ignore[arg-type]  # a finder may be a class with a static find_spec
