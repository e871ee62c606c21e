"""The names of libraries whose users can move here; each mirrors the other library's module paths and signatures."""

from bigmodel.compat import apex

__all__ = ["apex"]
