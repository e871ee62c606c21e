"""bigmodel: fused training ops for PyTorch, and a planner for GPU-hours.

Public names are resolved on first use (PEP 562), so that `import bigmodel.schedule` needs no torch.
"""

from importlib import import_module as _import_module

_HOMES = {
    "layer_norm": "bigmodel.ops",
    "rms_norm": "bigmodel.ops",
    "add_layer_norm": "bigmodel.ops",
    "add_rms_norm": "bigmodel.ops",
    "clip_grad_norm_": "bigmodel.optim",
    "attention_softmax": "bigmodel.ops",
    "softmax": "bigmodel.ops",
    "log_softmax": "bigmodel.ops",
    "attention": "bigmodel._attention",
    "convert": "bigmodel.convert",
    "revert": "bigmodel.convert",
    "ConvertReport": "bigmodel.convert",
    "release_memory": "bigmodel._memory",
}
_MODULES = ("compat", "nn", "ops", "optim", "schedule")

__version__ = "0.1.0"
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(_import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = _import_module(f"bigmodel.{name}")
    else:
        raise AttributeError(f"module 'bigmodel' has no attribute '{name}'")
    globals()[name] = value  # the next access, in somebody's training loop, finds it without coming here
    return value


def __dir__():
    return sorted(__all__)
