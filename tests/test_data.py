import sysconfig
from pathlib import Path

import pytest
import torch

from bigmodel.data.text import load_text, sample_batch

TEXT = bytes(range(256)) * 4


def test_the_standard_library_is_the_text_by_default():
    text = load_text()
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "argparse.py").read_bytes() in text
    assert len(text) > 5e6
    assert text == load_text()


def test_a_file_is_read_as_bytes(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xff\x00not utf-8\r\n")
    assert load_text(path) == b"\xff\x00not utf-8\r\n"


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"load_text: path '.*/nowhere' cannot be read: No such file or directory\.$"):
        load_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"load_text: path '.*' cannot be read: Is a directory\.$"):
        load_text(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="'.*/empty' is an empty file"):
        load_text(str(tmp_path / "empty"))


def test_an_interpreter_without_source_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no Python source lies under"):
        load_text()


def test_batches_are_windows_of_the_text():
    batch = sample_batch(TEXT, batch=5, length=40, seed=0, step=0)
    assert batch.shape == (5, 40) and batch.dtype is torch.int64
    assert all(bytes(row.tolist()) in TEXT for row in batch)
    assert len({tuple(row.tolist()) for row in batch}) == 5


def test_a_batch_depends_on_seed_and_step_alone():
    def batch(seed, step):
        return sample_batch(TEXT, batch=4, length=16, seed=seed, step=step)

    torch.manual_seed(7)
    first = batch(0, 3)
    torch.manual_seed(8)
    assert torch.equal(batch(0, 3), first)
    assert not torch.equal(batch(0, 4), first)
    assert not torch.equal(batch(1, 3), first)


def test_every_window_can_be_drawn():
    drawn = {bytes(row.tolist()) for row in sample_batch(b"abcd", batch=64, length=3, seed=0, step=0)}
    assert drawn == {b"abc", b"bcd"}


@pytest.mark.parametrize(
    "text, sizes, message",
    [
        (b"short", {"batch": 1, "length": 6}, "text has 5 bytes; one window of length 6 needs 6"),
        (TEXT, {"batch": 0, "length": 6}, "batch and length are 0 and 6"),
        (TEXT, {"batch": 1, "length": 0}, "batch and length are 1 and 0"),
    ],
)
def test_impossible_batches_are_refused(text, sizes, message):
    with pytest.raises(ValueError, match=f"sample_batch: {message}"):
        sample_batch(text, seed=0, step=0, **sizes)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text": "abc" * 20}, "text must be bytes, got str; encode it first"),
        ({"text": None}, "text must be bytes, got NoneType; encode it first"),
        ({"batch": "2"}, "batch must be an int, got str"),
        ({"length": 2.0}, "length must be an int, got float"),
        ({"seed": None}, "seed must be an int, got NoneType"),
        ({"step": True}, "step must be an int, got bool"),
    ],
    ids=str,
)
def test_a_batch_of_what_is_no_text_is_refused(change, words):
    given = {"text": b"abc" * 20, "batch": 2, "length": 4, "seed": 0, "step": 0} | change
    with pytest.raises(TypeError, match=f"^sample_batch: {words}.$"):
        sample_batch(given.pop("text"), **given)
