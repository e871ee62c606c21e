"""An object in a process of its own, so that runs can take turns without sharing memory or random state."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any


def preload(modules: Sequence[str]) -> None:
    """Imports modules once for all later Remotes, whose processes are then forked with them loaded.

    To be called before the first Remote is made; importing a module here must start no threads.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


class Remote:
    """Builds ``factory(*args)`` in a new process and calls its methods there; a context manager.

    Args:
        name: what errors call it.
        factory: importable by name; it, its arguments, and what the methods take and return are pickled.
        args: the factory's arguments.

    Raises:
        RuntimeError: from here or from ``call``, when the factory or the method raised, which ends the process, or
            when the process died.
    """

    def __init__(self, name: str, factory: Callable[..., Any], *args: Any) -> None:
        self._name = name
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args), name=name, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """The result of the object's method, run in its process while this one waits."""
        self._connection.send((method, args))
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            succeeded, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"{self._name}: its process ended with exit code {self._process.exitcode}.") from None
        if not succeeded:
            raise RuntimeError(f"{self._name}: {value}")
        return value


def _serve(connection: Connection, factory: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        served = factory(*args)
        connection.send((True, None))
        while True:
            method, arguments = connection.recv()
            connection.send((True, getattr(served, method)(*arguments)))
    except EOFError:
        return
    except Exception as error:
        connection.send((False, "".join(traceback.format_exception_only(error)).strip()))
