"""examples/train_language_model.py, in small."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_language_model as demo  # noqa: E402

SMALL = {"hidden": 32, "layers": 2, "heads": 2, "batch": 4, "length": 64, "learning_rate": 1e-2}
LLAMA = demo.Setting("llama", "float32", "cpu", steps=8, **SMALL)
GPT2 = demo.Setting("gpt2", "bfloat16", "cpu", steps=8, **SMALL)
TEXT = b"def add(a, b):\n    return a + b\n\n\n" * 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(exit code, folder, printed text) of a whole run on a file of the user's."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").write_bytes(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "default_settings", lambda device, seed, steps: [LLAMA, GPT2])
        printed = []
        patch.setattr("builtins.print", lambda *what, **_: printed.extend(map(str, what)))
        code = demo.main(["--data", str(folder / "text"), "--out", str(folder / "out"), "--device", "cpu"])
    return code, folder / "out", "\n".join(printed)


@pytest.fixture(scope="module")
def figures(finished):
    return json.loads((finished[1] / "figures.json").read_text())["settings"]


def test_the_fused_models_train_like_the_stock_ones(finished, figures):
    assert finished[0] == 0
    for setting in figures:
        losses = setting["loss"]
        assert losses["stock"][-1] < 0.8 * losses["stock"][0]
        assert losses["fused"] == pytest.approx(losses["stock"], abs=1e-4 if "float32" in str(setting) else 0.1)
        assert setting["agrees"] is True
    llama = figures[0]["loss"]
    assert llama["reordered"] == pytest.approx(llama["stock"], abs=1e-4)
    assert llama["reordered"] != llama["stock"]


def test_the_norms_are_found_and_measured(figures):
    for setting in figures:
        assert setting["norms"] == 2 * SMALL["layers"] + 1
        assert all(0 < share < 1 for share in setting["norm_share"].values())
        assert all(seconds > 0 for seconds in setting["step_seconds"].values())
        assert setting["speed_up"] == setting["step_seconds"]["stock"] / setting["step_seconds"]["fused"]
    # The unfused RMS norm keeps its normalised rows besides its input.
    kept = figures[0]["saved_for_backward"]
    assert kept["fused"] < kept["stock"]


def test_the_results_are_shown_and_written(finished):
    _, folder, printed = finished
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "training on the CPU" in printed
    assert printed.count("|fused - stock|") == 2
    for row in ("time per step", "speed-up", "norms' share", "was won", "peak memory", "kept for backward"):
        assert row in printed
    written = json.loads((folder / "figures.json").read_text())
    assert written["device"] == "cpu" and written["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("setting", [LLAMA, GPT2], ids=lambda setting: setting.family)
def test_variants_start_from_the_same_weights_and_see_the_same_rows(setting):
    stock, fused, reordered = (demo.Run(setting, variant, TEXT) for variant in demo.VARIANTS)
    for other in (fused, reordered):
        assert all(map(torch.equal, stock.model.state_dict().values(), other.model.state_dict().values()))
    rows, permuted = next(stock._batches(permuted=False)), next(reordered._batches(permuted=True))
    assert not torch.equal(rows, permuted)
    assert sorted(rows.tolist()) == sorted(permuted.tolist())
    assert stock.fused_norms() == [] and len(fused.fused_norms()) == 5


def test_another_seed_trains_another_model():
    one, two = (demo.Run(dataclasses.replace(LLAMA, seed=seed), "stock", TEXT).train(1) for seed in (0, 1))
    assert one[0].loss != two[0].loss


def result(fused):
    stock = [5.0, 4.0, 3.0]
    return demo.Result(
        setting=LLAMA,
        parameters=1,
        norms=1,
        loss={"stock": stock, "fused": fused, "reordered": [5.0, 4.0 + 1e-5, 3.0 - 2e-5]},
        step_seconds=dict.fromkeys(demo.VARIANTS, 1.0),
        norm_share={"stock": 0.1, "fused": 0.01},
        peak_memory={"stock": 1, "fused": 1},
        saved_for_backward={"stock": 1, "fused": 1},
    )


@pytest.mark.parametrize(
    "fused, agrees, verdict",
    [
        ([5.0, 4.0, 3.0], True, "losses agree: fused is 0.0e+00 from stock, stock with its sums reordered 1.0e-05"),
        ([5.0, 4.0 + 8e-5, 3.0 + 8e-5], True, "losses agree: fused is 8.0e-05 from stock"),
        ([5.0, 4.0 + 8e-4, 3.0 + 8e-4], False, "losses do NOT agree"),
    ],
)
def test_losses_are_held_against_the_yardstick(fused, agrees, verdict, monkeypatch, tmp_path, capsys):
    assert result(fused).agrees is agrees
    assert verdict in demo.loss_table(result(fused))
    monkeypatch.setattr(demo, "compare", lambda setting, text: result(fused))
    assert demo.main(["--device", "cpu", "--out", str(tmp_path)]) == (0 if agrees else 1)
    assert ("differ grossly" in capsys.readouterr().err) is not agrees


def test_a_gpu_gets_larger_models_in_bfloat16():
    small, large = (demo.default_settings(device, 0, None) for device in ("cpu", "cuda"))
    assert {setting.dtype for setting in small} == {"float32", "bfloat16"}
    assert {setting.dtype for setting in large} == {"bfloat16"}
    assert min(setting.hidden for setting in large) > max(setting.hidden for setting in small)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "path 'nowhere' cannot be read: No such file or directory."),
        (["--data", "short"], "text has 5 bytes; one window of length 256 needs 256."),
        (["--out", "short"], "File exists"),
        (["--steps", "2"], "--steps is 2; it must be at least 3."),
        (["--seed", "-1"], "--seed is -1; it must not be negative."),
        pytest.param(
            ["--device", "cuda"],
            "--device is cuda, but torch sees no GPU; use --device cpu.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short").write_bytes(b"short")
    try:
        code = demo.main(["--device", "cpu", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "Traceback" not in last
