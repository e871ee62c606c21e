"""The benchmark as an instrument: what it counts, what it leaves out of the timed region, what it admits."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from benchmark_cases import SMALL, make_report, measurement, timing

import bigmodel
from bigmodel import info
from bigmodel.benchmarks import GROUPS, harness, load_group, norm, report, run, softmax
from bigmodel.benchmarks.goals import DEFAULT_PAGES, HUGE_PAGES, Goal, Verdict, judge
from bigmodel.benchmarks.harness import COPY, OURS, Case, Contender, CpuTimer, Effort, Measurement, Workload

BRIEF = Effort(seconds=0.0, min_rounds=2, max_rounds=2)


def case_of(makers, expected, dtype=torch.float32):
    """A case whose contenders are built by the functions `makers`."""
    workload = Workload(lambda name: makers[name](), expected)
    return Case("op", "forward", dtype, (1, 4), 32, tuple(makers), lambda device: workload)


# --- the harness ------------------------------------------------------------------------------------------------------


def test_gradients_are_reset_outside_the_timed_region(monkeypatch):
    now = 0
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: now)
    leaf = torch.zeros(2, requires_grad=True)
    seen = []

    def spend(nanoseconds):
        nonlocal now
        now += nanoseconds

    def call():
        seen.append(leaf.grad)
        leaf.grad = torch.ones(2)
        spend(7)

    contender = Contender(call, leaves=[leaf], prepare=partial(spend, 1000))
    assert CpuTimer().sample(contender, 5) == pytest.approx(7e-9)
    assert seen == [None] * 5


def test_back_to_back_calls_are_averaged(monkeypatch):
    ticks = iter([100, 400])
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(ticks))
    assert CpuTimer().sample(Contender(lambda: None), 3) == pytest.approx(100e-9)


def test_rounds_run_every_contender_once_in_changing_order():
    class Recorder(CpuTimer):
        def __init__(self):
            self.order = []

        def sample(self, contender, calls):
            self.order.append(contender.call())
            return 1.0

    timer = Recorder()
    contenders = {name: Contender(lambda name=name: name) for name in "abcd"}
    times = harness.interleave(contenders, timer, Effort(seconds=0.0, min_rounds=9, max_rounds=50))
    rounds = [timer.order[i : i + 4] for i in range(len(timer.order) - 36, len(timer.order), 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert all(each.samples == 9 and each.median == each.min == each.max == 1.0 for each in times.values())


def test_collecting_garbage_is_off_only_while_timing():
    states = []
    contender = Contender(lambda: states.append(harness.gc.isenabled()))
    harness.interleave({"a": contender}, CpuTimer(), BRIEF)
    assert states[-1] is False and harness.gc.isenabled()


def test_copy_moves_the_bytes_it_is_asked_for():
    contender = harness.copy_contender(4096, torch.device("cpu"))
    target = contender.call()
    assert 2 * target.nbytes == 4096
    assert (target == 1).all()


@pytest.mark.parametrize(
    "got, fragment",
    [
        ([torch.ones(3)], None),
        ([torch.tensor([1.0, 1.0, 1.1])], "disagrees with float64: result 0 by 1.0e-01"),
        ([torch.tensor([1.0, 1.0, float("nan")])], "disagrees"),
        ([torch.ones(2)], "result 0 is (2,), not (3,)"),
        ([None], "result 0 is None"),
    ],
)
def test_disagreement_is_put_into_words(got, fragment):
    found = harness.disagreement(got, [torch.ones(3, dtype=torch.float64)], 1e-5)
    assert found is None if fragment is None else fragment in found


def test_a_wrong_peer_is_timed_and_noted_and_a_failing_one_left_out():
    def fail():
        raise RuntimeError("no such kernel\nat line 3")

    right, wrong = torch.ones(4), torch.zeros(4)
    makers = {OURS: lambda: Contender(lambda: right), "wrong": lambda: Contender(lambda: wrong), "broken": fail}
    row = harness.measure(case_of(makers, [torch.ones(4).double()]), CpuTimer(), BRIEF)
    assert set(row.times) == {OURS, "wrong", COPY}
    assert "disagrees" in row.notes["wrong"]
    assert row.notes["broken"] == "not timed: RuntimeError: no such kernel"
    assert OURS not in row.notes


def test_a_failure_of_the_library_itself_ends_the_run():
    def fail():
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        harness.measure(case_of({OURS: fail}, [torch.ones(4).double()]), CpuTimer(), BRIEF)


def test_a_copy_of_many_bytes_keeps_its_buffers_small(monkeypatch):
    monkeypatch.setattr(harness, "COPY_BYTES", 4096)
    contender = harness.copy_contender(10_000, torch.device("cpu"))
    target = contender.call()
    assert 2 * target.nbytes <= 4096 and (target == 1).all()
    assert 3 * 2 * target.nbytes == pytest.approx(10_000, rel=0.01)  # in three turns


# --- the norm group ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_goal_belongs_to_a_measured_case(group, device):
    module = load_group(group)
    cases = {case.name: case for case in module.cases(device, sweep=device == "cuda")}
    goals = module.goals(device)
    assert goals
    for goal in goals:
        assert goal.against in (*cases[goal.case].contenders, COPY)
        assert goal.pages in run.ENVIRONMENTS


@pytest.mark.parametrize("group", GROUPS)
def test_case_names_are_unique_and_quick_is_a_part(group):
    module = load_group(group)
    names = [case.name for case in module.cases("cpu", sweep=True)]
    assert len(names) == len(set(names))
    quick = [case.name for case in module.cases("cpu", quick=True)]
    assert 0 < len(quick) < len(names) and set(quick) < set(names)


@pytest.mark.parametrize(
    "case, against, pages, needed",
    [
        ("rms_norm forward+backward bfloat16 8192x4096", "stock", DEFAULT_PAGES, ">= 30x"),
        ("rms_norm forward+backward float32 64x4096", "stock", DEFAULT_PAGES, ">= 10x"),
        ("layer_norm forward+backward bfloat16 8192x4096", "stock", HUGE_PAGES, ">= 2.5x"),
        ("layer_norm forward+backward float32 8192x4096", "compile", HUGE_PAGES, ">= 3x"),
        ("layer_norm backward kernel bfloat16 8192x4096", COPY, DEFAULT_PAGES, ">= 90 %"),
        ("layer_norm forward float32 1x64", "stock", DEFAULT_PAGES, "<= 1.5x its time"),
    ],
)
def test_goals_say_what_was_promised(case, against, pages, needed):
    found = [g for g in norm.goals("cpu") if (g.case, g.against, g.pages) == (case, against, pages)]
    assert [goal.needed for goal in found] == [needed]


def test_bytes_are_those_of_the_tensors():
    rows, cols, size = 5, 48, 2
    matrix, vector, column = rows * cols * size, cols * size, rows * 4
    count = partial(norm.bytes_moved, dtype=torch.bfloat16, shape=(rows, cols))
    assert count("rms_norm", norm.FORWARD) == 2 * matrix + vector
    assert count("layer_norm", norm.FORWARD_KERNEL) == 2 * matrix + 2 * vector + 2 * column
    assert count("rms_norm", norm.BACKWARD_KERNEL) == 3 * matrix + 2 * vector + column
    assert count("layer_norm", norm.BOTH) == 5 * matrix + 5 * vector + 4 * column
    assert count("add_rms_norm", norm.BOTH) == 8 * matrix + 3 * vector + 2 * column
    wide = norm.bytes_moved("layer_norm", norm.BACKWARD, torch.float64, (rows, cols))
    assert wide == 8 * (3 * rows * cols + 3 * cols + 2 * rows)


@pytest.mark.parametrize("dtype", [*harness.FLOATS, *harness.FURTHER])
@pytest.mark.parametrize("mode", [norm.FORWARD, norm.BACKWARD, norm.BOTH, norm.FORWARD_KERNEL, norm.BACKWARD_KERNEL])
@pytest.mark.parametrize("op", norm.OPS)
def test_contenders_agree_with_float64(op, mode, dtype):
    case = norm._case("cpu", op, mode, dtype, SMALL)
    case = dataclasses.replace(case, contenders=tuple(name for name in case.contenders if name != "compile"))
    row = harness.measure(case, CpuTimer(), BRIEF)
    assert row.notes == {}
    assert set(row.times) == {*case.contenders, COPY}
    assert row.bytes == norm.bytes_moved(op, mode, dtype, SMALL)


@pytest.mark.parametrize("dtype", [*harness.FLOATS, *harness.FURTHER])
def test_contenders_of_softmax_agree_with_float64(dtype):
    case = softmax._case("cpu", softmax.PLAIN, softmax.BOTH, dtype, SMALL)
    row = harness.measure(dataclasses.replace(case, contenders=(OURS, "stock")), CpuTimer(), BRIEF)
    assert row.notes == {} and set(row.times) == {OURS, "stock", COPY}


def test_torch_compile_is_a_contender():
    row = harness.measure(norm._case("cpu", "layer_norm", norm.BOTH, torch.float32, SMALL), CpuTimer(), BRIEF)
    assert row.notes == {}
    assert set(row.times) == {OURS, "stock", "compile", COPY}


def test_a_wrong_kernel_is_found_out(monkeypatch):
    monkeypatch.setattr(bigmodel, "rms_norm", lambda *args: norm.STOCK["rms_norm"](*args) * 1.01, raising=False)
    case = dataclasses.replace(norm._case("cpu", "rms_norm", norm.FORWARD, torch.float32, SMALL), contenders=(OURS,))
    assert "disagrees" in harness.measure(case, CpuTimer(), BRIEF).notes[OURS]


# --- goals ------------------------------------------------------------------------------------------------------------


def verdict(limit, at_most=False, against="stock", times=None, notes=None):
    row = measurement(times=times, notes=notes)
    goal = Goal("text", DEFAULT_PAGES, row.case, against, limit, at_most)
    return judge([goal], {DEFAULT_PAGES: [row], HUGE_PAGES: []})[0]


def test_speed_and_time_are_judged_in_their_own_direction():
    assert verdict(4.0).reached
    assert not verdict(4.1).reached
    assert verdict(0.25, at_most=True).reached
    assert not verdict(0.24, at_most=True).reached
    assert verdict(0.5, against=COPY).reached
    assert not verdict(0.51, against=COPY).reached


def test_a_near_miss_is_not_rounded_up():
    near = verdict(0.9, against=COPY, times={OURS: 1.0, COPY: 0.8999})
    assert not near.reached and near.goal.show(near.value) == "89.9 %"
    near = verdict(4, times={OURS: 1.0, "stock": 3.999, COPY: 1.0})
    assert not near.reached and near.goal.show(near.value) == "3.99x"
    near = verdict(1.5, at_most=True, times={OURS: 1.501, "stock": 1.0, COPY: 1.0})
    assert not near.reached and near.goal.show(near.value) == "1.51x its time"


def test_a_wrong_result_reaches_nothing():
    assert not verdict(2.0, notes={OURS: "disagrees"}).reached
    assert verdict(2.0, notes={"stock": "disagrees"}).reached


def test_only_what_was_measured_is_judged():
    row = measurement()
    goals = [
        Goal("other case", DEFAULT_PAGES, "elsewhere", "stock", 1),
        Goal("other process", HUGE_PAGES, row.case, "stock", 1),
        Goal("no such peer", DEFAULT_PAGES, row.case, "liger", 1),
    ]
    assert judge(goals, {DEFAULT_PAGES: [row], HUGE_PAGES: []}) == []


# --- reports ----------------------------------------------------------------------------------------------------------


def test_json_gives_back_what_was_measured():
    row = measurement(notes={"stock": "disagrees"})
    record = json.loads(make_report({DEFAULT_PAGES: [row]}, [verdict(5)]).to_json())
    assert [Measurement.from_dict(each) for each in record["measurements"][DEFAULT_PAGES]] == [row]
    assert record["goals"][0]["reached"] is False and record["goals"][0]["value"] == pytest.approx(4)
    assert record["machine"]["cpu"]["threads"] == torch.get_num_threads()
    assert {"transparent_hugepage", "torch", "version"} <= set(record["machine"])


def test_markdown_shows_figures_goals_and_notes():
    row = measurement(notes={"stock": "disagrees with float64"})
    text = make_report({DEFAULT_PAGES: [row]}, [verdict(5), verdict(3)]).to_markdown()
    line = next(line for line in text.splitlines() if line.startswith(f"| {row.case}*"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2:] == [
        "500 us (450-550)",
        "1.00 ms (0.90-1.10)",
        "1.0",
        "50 %",
        "4.00 ms (3.60-4.40)",
        "4.00",
    ]
    assert f"- {row.case}: stock: disagrees with float64" in text
    assert "what fits a CPU's caches stays in them, and may be far above 100 %" in text
    states = [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| text")]
    assert states == ["missed", "reached"]
    assert f"transparent huge pages: {info.transparent_hugepage()}" in text


def test_a_busy_machine_is_told():
    quiet = measurement()
    busy = dataclasses.replace(quiet, times={**quiet.times, "stock": dataclasses.replace(timing(4e-3), min=2e-3)})
    assert "not quiet" not in make_report({DEFAULT_PAGES: [quiet]}).to_markdown()
    assert "not quiet**: in 1 of 6 timings" in make_report({DEFAULT_PAGES: [quiet, busy]}).to_markdown()


def test_goals_of_one_text_share_a_line_that_shows_the_worst():
    goal = Goal("text", DEFAULT_PAGES, "case a", "stock", 2)
    verdicts = [Verdict(goal, 3.0, True), Verdict(dataclasses.replace(goal, case="case b"), 1.5, True)]
    line = report.goal_table(verdicts).splitlines()[-1]
    assert "1.50x, case b" in line and "missed in part (1 of 2)" in line


def test_columns_of_a_markdown_table_line_up():
    lines = report.markdown_table(["a", "long header"], [["wide cell", "1"], ["b", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.count("|") for line in lines] == [3] * 4


def test_plot_draws_the_sweep(tmp_path):
    pytest.importorskip("matplotlib")
    from bigmodel.benchmarks import plot

    rows = [measurement(f"case {cols}", sweep=True, shape=(8, cols)) for cols in (256, 512)]
    plot.save(make_report({DEFAULT_PAGES: rows, HUGE_PAGES: rows}), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no sweep"):
        plot.save(make_report({DEFAULT_PAGES: [measurement()]}), tmp_path / "none.png")
