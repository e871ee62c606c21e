"""What a run is shown as: the table of every group, the page, the comparison of two runs, the charts."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_cases import make_report, measurement

from bigmodel import cli
from bigmodel.benchmarks import GROUPS, adam, compare, norm, page, report, run
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal, judge
from bigmodel.benchmarks.harness import COPY, OURS, Timing


def row(case="op forward float32 8x16", scale=1.0, **options):
    times = {OURS: 1e-3 * scale, "stock": 4e-3, "compile": 2e-3, COPY: 0.5e-3}
    return measurement(case, times=times, **options)


def two_kinds():
    return make_report({DEFAULT_PAGES: [row(), row("other", 2)], HUGE_PAGES: [row(scale=0.5)]})


def cells(text, case):
    line = next(line for line in text.splitlines() if line.startswith(f"| {case}"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


# --- without a group --------------------------------------------------------------------------------------------------


def test_the_overview_has_a_line_for_each_case():
    first = dataclasses.replace(
        two_kinds(), left=[f"late, {DEFAULT_PAGES}", f"late, {HUGE_PAGES}", f"other, {HUGE_PAGES}"]
    )
    second = dataclasses.replace(make_report({DEFAULT_PAGES: [row("third")], HUGE_PAGES: []}), failed={"x": "broke"})
    text = report.overview([first, second])
    shown = cells(text, "op forward")
    assert shown[1:] == ["1.00 ms", "1.0", "50 %", "4.00 ms", "4.00", "8.00", "2.00 ms", "2.00"]
    assert cells(text, "other")[5:7] == ["2.00", ""]
    assert cells(text, "third")
    assert "- **failed**: x: broke" in text
    assert text.rstrip().endswith("Not measured, for want of time: late.")


def test_stock_is_what_the_case_has():
    fused = measurement(times={OURS: 1e-3, "fused": 3e-3, "foreach": 9e-3, COPY: 1e-3})
    shown = cells(report.overview([make_report({DEFAULT_PAGES: [fused]})]), "op forward")
    assert shown[4:6] == ["3.00 ms", "3.00"]


def test_no_group_measures_something_of_every_group_in_bounded_time(monkeypatch, capsys, tmp_path):
    asked = {}

    def fake_run(groups, **options):
        asked.update(options, groups=groups)
        return [two_kinds()]

    monkeypatch.setattr(run, "run_groups", fake_run)
    out = tmp_path / "page.html"
    assert cli.main(["bench", "--report", str(out)]) == 0
    assert asked["groups"] == GROUPS
    assert asked["seconds"] == run.OVERVIEW_SECONDS and asked["quick"] and not asked["sweep"]
    assert "| op forward float32 8x16 |" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert cli.main(["bench", "--all", "--stop-after", "9"]) == 0
    assert asked == {"groups": run.ALL, "device": None, "quick": False, "sweep": True, "seconds": 9}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["norm", "--all"], "--all takes no group"),
        (["--stop-after", "0"], "--stop-after is 0, it must be positive"),
        (["--plot", "x.png"], "--plot draws row lengths: name a group, or give --all"),
        (["norm", "--compare", "a.json", "b.json"], "--compare takes no group"),
        (["--compare", "a.json", "b.json", "--json", "c.json"], "--compare takes no --json"),
        (["plan", "--report", "x.html"], "plan takes no --report"),
        (["--throughput", "--stop-after", "3"], "--throughput takes no --stop-after"),
        (["norm", "--size", "20x3x48"], "norm takes no --size"),
        (["norm", "--report", "absent/x.html"], "the folder of absent/x.html does not exist"),
        (["--throughput", "--json", "absent/x.json"], "the folder of absent/x.json does not exist"),
        (["plan", "--size", "9"], "--size 9 is none of"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(run, "run_groups", lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bigmodel bench: ") and words in line


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Its text, its addresses, and whether each element that is opened is closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.words, self.addresses = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "circle", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_every_figure_and_needs_nothing_else():
    goals = [Goal("a <goal>", DEFAULT_PAGES, row().case, "stock", 5)]
    sweep = [row(f"op forward float32 8x{n}", sweep=True, shape=(8, n)) for n in (256, 512, 1024)]
    measured = {DEFAULT_PAGES: [row(notes={"stock": "disagrees & more"}), *sweep]}
    given = dataclasses.replace(
        make_report(measured, judge(goals, measured)), failed={"broken case": "RuntimeError: a < b"}, left=["late case"]
    )
    found = Page(page.to_html([given]))
    text = " ".join(found.words)
    assert found.open == [] and all(address.startswith("#") for address in found.addresses)
    for words in (
        "1.00 ms",
        "4.00",
        "50 %",
        "1 GB/s",
        "disagrees & more",
        "RuntimeError: a < b",
        "late case",
        "a <goal>",
    ):
        assert words in text
    assert given.facts["cpu"]["model"] in text and "How each figure was measured" in text
    source = page.to_html([given])
    assert source.count("<svg") == 2 and 'class="roof"' in source
    assert not re.search(r"https?:|@import|url\(", source)


def test_one_row_length_is_told_and_not_drawn():
    point = row("op forward float64 8x256", sweep=True, shape=(8, 256))
    source = page.to_html([make_report({DEFAULT_PAGES: [point]})])
    assert "<svg" not in source and point.case in source


def test_dots_lie_at_their_share_of_the_copy():
    (circle, *_), roof = (
        re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="6"', page._dots([row(scale=0.5)])),
        re.search(r'class="roof" x1="([\d.]+)"', page._dots([row(scale=0.5)]))[1],
    )
    assert circle == roof  # as fast as the copy


@pytest.mark.parametrize(
    "names",
    [
        ("stock", "compile", *norm.PEERS),
        ("fused", "foreach", "compile", "apex", "transformer_engine"),
        ("fused", "foreach", "bitsandbytes", "deepspeed", adam.TOUCH),
    ],
)
def test_contenders_of_a_group_are_told_apart(names):
    assert len({page._colour(name) for name in (OURS, COPY, *names)}) == len(names) + 2


def test_a_gpu_is_named(monkeypatch):
    given = make_report({DEFAULT_PAGES: [row()]})
    cuda = {**given.facts["cuda"], "driver": "580.1", "devices": [{"name": "NVIDIA H100"}]}
    given = dataclasses.replace(given, device="cuda", facts={**given.facts, "cuda": cuda})
    assert "NVIDIA H100" in page.to_html([given]) and "time on a GPU" in page.to_html([given])
    assert "NVIDIA H100; driver 580.1" in report.overview([given])


# --- two runs ---------------------------------------------------------------------------------------------------------


def written(tmp_path, name, *reports):
    path = tmp_path / name
    path.write_text(report.to_json(reports))
    return str(path)


def test_compare_tells_what_moved_beyond_noise(tmp_path, capsys):
    """Ranges are 10 % around each median."""
    a = [row("same"), row("slower"), row("faster"), row("gone")]
    b = [row("same", 1.15), row("slower", 1.5), row("faster", 0.25), row("new")]
    b[0].times["stock"] = Timing(1e-3, 0.9e-3, 1.1e-3, 7, 1)
    paths = (
        written(tmp_path, "a.json", make_report({DEFAULT_PAGES: a})),
        written(tmp_path, "b.json", make_report({DEFAULT_PAGES: b}), make_report({HUGE_PAGES: [row("same")]})),
    )
    assert cli.main(["bench", "--compare", *paths]) == 0
    text = capsys.readouterr().out
    moved, still = text.split("## Within noise")
    assert "## Moved: 2 of 3 cases" in moved
    assert cells(moved, "slower")[3:] == ["0.67", "1.00", "slower"]
    assert cells(moved, "faster")[3:] == ["4.00", "1.00", "faster"]
    assert moved.index("| slower") < moved.index("| faster")
    assert cells(still, "same")[-1] == "noise"
    assert cells(still.split("## Other")[1], "same")[1:] == [
        "stock",
        "4.00 ms (3.60-4.40)",
        "1.00 ms (0.90-1.10)",
        "4.00",
    ]
    assert f"Only in {paths[0]}: gone, {DEFAULT_PAGES}." in text
    assert f"Only in {paths[1]}: new, {DEFAULT_PAGES}; same, {HUGE_PAGES}." in text


def test_the_verdict_is_symmetrical():
    slow, fast, between = Timing(3, 2.5, 3.5, 7, 1), Timing(1, 0.5, 1.5, 7, 1), Timing(2, 1.5, 2.5, 7, 1)
    assert compare.verdict(slow, fast) == "faster" and compare.verdict(fast, slow) == "slower"
    assert {compare.verdict(slow, between), compare.verdict(between, fast)} == {"noise"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is no JSON"),
        ("[]", "holds no measurements"),
        ('{"stages": {"test": {"done": {"a": {"outcome": "passed"}}}}}', "holds no measurements"),
        ('{"measurements": {"default pages": [{"case": "x"}]}}', "is not as bigmodel writes it"),
        ('{"stages": ["build"]}', "is not as bigmodel writes it"),
        ('{"stages": {"bench-norm": {"done": {"a": {"row": {}}}}}}', "is not as bigmodel writes it"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, content, words):
    (tmp_path / "a.json").write_text(content)
    good = written(tmp_path, "b.json", two_kinds())
    assert cli.main(["bench", "--compare", str(tmp_path / "a.json"), good]) == 1
    assert words in capsys.readouterr().err


def test_several_groups_are_written_together(tmp_path):
    path = written(tmp_path, "all.json", two_kinds(), make_report({DEFAULT_PAGES: [row("third")]}))
    assert len(json.loads(Path(path).read_text())["reports"]) == 2
    assert len(compare.load(path).cases) == 4


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_chart_that_time_cut_short_is_drawn(tmp_path):
    """Seven panels in rows of four, one of them with one point."""
    pytest.importorskip("matplotlib")
    from bigmodel.benchmarks import plot

    rows = [
        dataclasses.replace(row(f"{op} {n}", sweep=True, shape=(8, n)), op=op)
        for op in "abcdefg" for n in ((256, 512) if op != "g" else (256,))
    ]  # fmt: skip
    plot.save(make_report({DEFAULT_PAGES: rows}), tmp_path / "chart.png")
    plot.save_bars(make_report({DEFAULT_PAGES: [row(), row("b"), row("c"), row("d")]}), tmp_path / "bars.png")
    for name in ("chart.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
