"""Text as bytes: a vocabulary of 256 that needs no tokenizer, and a corpus that every Python carries."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

from bigmodel import _check

# Installed packages and the test suite are no part of what every machine has.
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests"}


def load_text(path: str | os.PathLike[str] | None = None) -> bytes:
    """The bytes of a file, or of the Python standard library's source.

    Args:
        path: a file of any encoding; None takes every ``.py`` file of the running Python's standard library in the
            order of their names, without its tests (about 12 MB).

    Returns:
        The text, one byte per token.

    Raises:
        ValueError: the file cannot be read, or it (or the standard library) is empty.
    """
    if path is not None:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"load_text: path {os.fspath(path)!r} cannot be read: {error.strerror}.") from None
        if not text:
            raise ValueError(f"load_text: path {os.fspath(path)!r} is an empty file; give one with text.")
        return text
    root = Path(sysconfig.get_path("stdlib"))
    sources = sorted(p for p in root.rglob("*.py") if not _NOT_CORPUS.intersection(p.relative_to(root).parts))
    text = b"".join(source.read_bytes() for source in sources)
    if not text:
        raise ValueError(f"load_text: no Python source lies under {str(root)!r}; give path a file of your own.")
    return text


def sample_batch(text: bytes, *, batch: int, length: int, seed: int, step: int) -> torch.Tensor:
    """Random windows of a text, a function of its arguments alone, so that every run can see the same batches.

    Args:
        text: the corpus.
        batch: number of windows.
        length: bytes per window.
        seed: picks the sequence of batches.
        step: picks the batch of that sequence, from 0.

    Returns:
        (batch, length) int64 tensor on the CPU, values 0 to 255.

    Raises:
        TypeError: the text is no bytes, or another argument no int.
        ValueError: the text is shorter than one window, or a size is not positive.
    """
    if not isinstance(text, (bytes, bytearray)):
        raise TypeError(f"sample_batch: text must be bytes, got {_check.kind(text)}; encode it first.")
    for name, value in (("batch", batch), ("length", length), ("seed", seed), ("step", step)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"sample_batch: {name} must be an int, got {_check.kind(value)}.")
    if batch < 1 or length < 1:
        raise ValueError(f"sample_batch: batch and length are {batch} and {length}; both must be at least 1.")
    if len(text) < length:
        raise ValueError(f"sample_batch: text has {len(text)} bytes; one window of length {length} needs {length}.")
    generator = torch.Generator().manual_seed(torch.iinfo(torch.int32).max * seed + step)
    starts = torch.randint(len(text) - length + 1, (batch,), generator=generator)
    return torch.tensor([list(text[start : start + length]) for start in starts.tolist()])
