"""HiGHS in a process of its own, so that Ctrl-C and time limits hold whatever it is doing.

milp has no callback, and on Ctrl-C it waits for its limit and loses its incumbent (measured: 11 s). The process is
started once, ignores the terminal's signals, and is killed when a call overstays.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import struct
import subprocess
import sys
import time
from typing import Any, BinaryIO

_GRACE = 0.4  # seconds that a call may overstay its own limit before the process is killed
_HEADER = struct.Struct("<Q")


class Overdue(Exception):
    """The call was cut off at its limit and has no answer."""


class Lost(RuntimeError):
    """The process ended in the middle of a call: killed from outside, or out of memory."""


class Worker:
    """One child process, started by the first call and again after a kill."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._ticket = 0
        self._inbox = b""
        self._spared = False

    def call(self, kind: str, arguments: dict[str, Any], limit: float) -> dict[str, Any]:
        """Runs "linprog" or "milp" for at most `limit` seconds; its answer's fields as a dict.

        Raises:
            Overdue: no answer in time. Lost: the process ended. RuntimeError: the solver failed; its own words.
        """
        end = time.monotonic() + limit
        self.begin(kind, arguments, limit)
        return self.finish(end - time.monotonic())

    def begin(self, kind: str, arguments: dict[str, Any], limit: float) -> None:
        """Sends a call off; `finish` waits for its answer. If not taken within `limit` seconds it is overdue there."""
        self._ticket += 1
        try:
            self._send((self._ticket, kind, arguments), time.monotonic() + max(limit, 0.0) + _GRACE)
        except Overdue:
            self.kill()
        except BaseException:
            self.kill()
            raise

    def finish(self, limit: float) -> dict[str, Any]:
        """The answer to the last `begin`; raises as `call`."""
        if self._child is None:  # it never took the call
            raise Overdue
        end = time.monotonic() + max(limit, 0.0) + _GRACE
        try:
            ticket, answer = self._receive(end)
            while ticket != self._ticket:  # an answer that nobody waited for
                ticket, answer = self._receive(end)
        except Overdue:
            # Starting takes longer than a short limit on a busy machine: that child is given one more call.
            if self._spared:
                self.kill()
            self._spared = True
            raise
        except BaseException:
            self.kill()
            raise
        if "error" in answer:
            raise RuntimeError(f"solver: {answer['error']}")
        return answer

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None
        self._spared = False

    def _send(self, message: Any, end: float) -> None:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "bigmodel.schedule.worker"]
            path = [os.path.dirname(os.path.dirname(os.path.dirname(__file__))), os.environ.get("PYTHONPATH", "")]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            )
            os.set_blocking(self._child.stdin.fileno(), False)  # type: ignore[union-attr]
            self._inbox = b""
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        data = memoryview(_HEADER.pack(len(payload)) + payload)
        assert self._child.stdin is not None and self._child.stdout is not None
        sink, source = self._child.stdin.fileno(), self._child.stdout.fileno()
        while data:
            # An answer that nobody waited for is read meanwhile: two full pipes would wait for each other for ever.
            readable, writable, _ = select.select([source], [sink], [], max(0.0, end - time.monotonic()))
            if not (readable or writable):
                raise Overdue
            if readable:
                self._inbox += self._part(source)
            if writable:
                data = data[os.write(sink, data) :]

    def _part(self, source: int) -> bytes:
        part = os.read(source, 1 << 20)
        if not part:
            raise Lost("the solver's process ended without an answer (killed from outside, or out of memory)")
        self._spared = True  # it has started
        return part

    def _receive(self, end: float) -> tuple[int, dict[str, Any]]:
        (size,) = _HEADER.unpack(self._read(_HEADER.size, end))
        return pickle.loads(self._read(size, end))

    def _read(self, size: int, end: float) -> bytes:
        assert self._child is not None and self._child.stdout is not None
        source = self._child.stdout.fileno()
        while len(self._inbox) < size:
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise Overdue
            self._inbox += self._part(source)
        data, self._inbox = self._inbox[:size], self._inbox[size:]
        return data


_shared: Worker | None = None


def shared() -> Worker:
    """The process's one worker; it ends with the process."""
    global _shared
    if _shared is None:
        _shared = Worker()
        atexit.register(_shared.kill)
    return _shared


def _answer(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from scipy import optimize

    if kind == "linprog":
        found = optimize.linprog(**arguments)
        rows = found.ineqlin.marginals if found.status == 0 else np.zeros(0)
        return {"status": found.status, "x": found.x, "value": found.fun, "marginals": rows, "message": found.message}
    matrix, low, high = arguments.pop("rows")
    options = dict(arguments.pop("options"))  # milp changes the dict that it is given
    found = optimize.milp(
        constraints=optimize.LinearConstraint(matrix, low, high),
        bounds=optimize.Bounds(*arguments.pop("bounds")),
        options=options,
        **arguments,
    )
    bound = getattr(found, "mip_dual_bound", None)
    return {"status": found.status, "x": found.x, "value": found.fun, "bound": bound, "message": found.message}


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _reply(sink, (0, {}))  # it has started
    while header := source.read(_HEADER.size):
        ticket, kind, arguments = pickle.loads(source.read(_HEADER.unpack(header)[0]))
        try:
            answer = _answer(kind, arguments)
        except MemoryError:
            return  # whoever asked finds the process gone
        except Exception as error:  # whatever it is, the caller is the one to hear it
            answer = {"error": f"{type(error).__name__}: {error}"}
        _reply(sink, (ticket, answer))


def _reply(sink: BinaryIO, message: tuple[int, dict[str, Any]]) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sink.write(_HEADER.pack(len(data)) + data)
    sink.flush()


if __name__ == "__main__":
    main()
