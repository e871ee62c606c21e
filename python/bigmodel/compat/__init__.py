"""The names of libraries whose users can move here; each mirrors the other library's module paths and signatures."""

from bigmodel.compat import apex, deepspeed

__all__ = ["apex", "deepspeed"]
