"""bigmodel.convert and revert: what survives, what the probe may not disturb, what is left, and the report.

Which classes are norms: test_convert_classes.py. Real models: test_convert_models.py.
"""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bigmodel

WIDTH = 16
calls = []


class SpyNorm(nn.Module):
    """An RMS norm that tells on whoever runs it."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.eps = eps

    def forward(self, hidden_states):
        calls.append(self)
        eps = torch.full((), self.eps, dtype=hidden_states.dtype)
        return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + eps)


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


def model():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.RMSNorm(WIDTH), SpyNorm())


def fused(module):
    return [name for name, child in module.named_modules() if "fused by bigmodel" in child.extra_repr()]


def left(module):
    """The single reason for which a single norm is left, and that it was."""
    cls = type(module)
    report = bigmodel.convert(module)
    assert not report.replaced and type(module) is cls
    (entry,) = report.left
    return entry.reason


# --- what survives ----------------------------------------------------------------------------------------------------


def test_modules_parameters_flags_and_attributes_stay_the_same_objects():
    net = model().eval()
    net[3].weight.requires_grad_(False)
    net[1].note = ["kept"]
    before = dict(net.named_modules()), dict(net.named_parameters()), list(net.state_dict()), net[1].note
    report = bigmodel.convert(net)
    assert [entry[:2] for entry in report.replaced] == [("1", "LayerNorm"), ("3", "RMSNorm"), ("4", "SpyNorm")]
    modules, parameters, keys, note = before
    assert all(dict(net.named_modules())[name] is module for name, module in modules.items())
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert list(net.state_dict()) == keys
    assert net[1].note is note
    assert not any(module.training for module in net.modules())
    assert isinstance(net[1], nn.LayerNorm) and isinstance(net[3], nn.RMSNorm) and isinstance(net[4], SpyNorm)
    assert not net[3].weight.requires_grad


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_go_on_firing():
    norm, seen = SpyNorm(), []
    norm.register_forward_pre_hook(lambda m, args, kwargs: seen.append(("pre", list(kwargs))), with_kwargs=True)
    norm.register_forward_hook(lambda m, args, out: seen.append("forward") or out + 1)
    norm.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    norm.register_state_dict_post_hook(lambda m, *rest: seen.append("state"))
    stock, input = copy.deepcopy(norm), torch.randn(3, WIDTH, requires_grad=True)
    bigmodel.convert(norm)
    assert seen == []
    out = norm(hidden_states=2 * input)
    out.sum().backward()
    norm.state_dict()
    assert seen == [("pre", ["hidden_states"]), "forward", "backward", "state"]
    torch.testing.assert_close(out, stock(2 * input))


def test_tied_and_shared_modules():
    shared, tied = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    tied.weight = shared.weight
    net = nn.ModuleDict({"first": nn.Sequential(shared), "again": nn.Sequential(shared), "tied": tied})
    report = bigmodel.convert(net)
    assert [entry.name for entry in report.replaced] == ["first.0", "tied"] and not report.left
    assert net["first"][0] is net["again"][0] and net["tied"].weight is shared.weight
    assert len(bigmodel.revert(net).replaced) == 2


def test_copies_and_pickles_stay_converted_and_independent():
    net = model()
    bigmodel.convert(net)
    input = torch.randn(3, WIDTH)
    pickled = [pickle.loads(pickle.dumps(net, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for copied in (copy.deepcopy(net), *pickled):
        assert fused(copied) == fused(net) == ["1", "3", "4"]
        assert torch.equal(copied(input), net(input))
        assert type(copied[1]) is type(net[1]) and copied[1].weight is not net[1].weight
        with torch.no_grad():
            copied[1].weight.zero_()
        assert not torch.equal(copied(input), net(input))
    shallow = copy.copy(net[1])
    assert type(shallow) is type(net[1]) and shallow.weight is net[1].weight


def test_a_pickle_opens_in_a_process_that_has_not_imported_bigmodel(tmp_path):
    norm = nn.LayerNorm(WIDTH)
    bigmodel.convert(norm)
    torch.save(norm, tmp_path / "norm.pt")
    script = f"""
import torch
norm = torch.load({str(tmp_path / "norm.pt")!r}, weights_only=False)
assert "fused by bigmodel" in repr(norm)
import bigmodel
assert len(bigmodel.revert(norm).replaced) == 1 and len(bigmodel.convert(norm).replaced) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("first", ("import bigmodel.convert", "from bigmodel import revert"))
def test_the_function_is_callable_however_it_was_imported(first):
    script = f"{first}\nimport bigmodel, torch\nassert bigmodel.convert(torch.nn.LayerNorm(4), norms=True).replaced"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_moving_and_casting_afterwards():
    net = model()
    bigmodel.convert(net)
    assert net.double()(torch.randn(2, WIDTH).double()).dtype is torch.float64
    assert net.bfloat16()(torch.randn(2, WIDTH).bfloat16()).dtype is torch.bfloat16
    with torch.device("meta"):
        assert net.to("meta")(torch.randn(2, WIDTH).bfloat16()).is_meta


def test_compiled_in_one_graph():
    net = model()
    bigmodel.convert(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    input = torch.randn(3, WIDTH, requires_grad=True)
    results = []
    for run in (net, compiled):
        out = run(input)
        results.append((out, *torch.autograd.grad(out.square().sum(), [input, *net.parameters()])))
    torch.testing.assert_close(results[1], results[0])


# --- what the probe may not disturb -----------------------------------------------------------------------------------


def test_the_live_module_never_runs_and_no_hook_fires():
    net, seen = nn.Sequential(SpyNorm(), nn.LayerNorm(WIDTH)), []
    for module in net:
        module.register_forward_hook(lambda *args: seen.append("module"))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append("global"))
    parameters = [(parameter.clone(), parameter._version) for parameter in net.parameters()]
    try:
        bigmodel.convert(net)
    finally:
        handle.remove()
    assert seen == [] and calls and net[0] not in calls
    for parameter, (value, version) in zip(net.parameters(), parameters, strict=True):
        assert torch.equal(parameter, value) and parameter._version == version and parameter.grad is None


def test_a_class_is_probed_once_for_each_setting():
    bigmodel.convert(SpyNorm())
    once = len(calls)
    calls.clear()
    assert len(bigmodel.convert(nn.Sequential(*(SpyNorm() for _ in range(20)))).replaced) == 20
    assert len(calls) == once
    calls.clear()
    assert len(bigmodel.convert(nn.Sequential(SpyNorm(1e-6), SpyNorm(1e-5), SpyNorm(1e-5))).replaced) == 3
    assert len(calls) == 2 * once


class DitheredNorm(SpyNorm):
    def forward(self, x):
        warnings.warn("dithering", stacklevel=2)
        return super().forward(x) + torch.rand_like(x)


def test_random_numbers_and_warnings_stay_inside(recwarn):
    norm, state = DitheredNorm(), torch.get_rng_state()
    assert "two calls" in left(norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert not recwarn.list


@pytest.mark.parametrize(
    "surroundings",
    (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ),
)
def test_the_caller_s_modes_change_nothing(surroundings):
    net = model()
    with surroundings():
        assert len(bigmodel.convert(net).replaced) == 3


def test_the_caller_s_default_dtype_changes_nothing():
    net = model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert len(bigmodel.convert(net).replaced) == 3
    finally:
        torch.set_default_dtype(torch.float32)


# --- what is left whatever it computes --------------------------------------------------------------------------------


def test_meta_parameters_are_left():
    assert "meta device" in left(nn.LayerNorm(WIDTH, device="meta"))


def test_offloaded_modules_are_left():
    norm = SpyNorm()
    norm._hf_hook, norm.forward = object(), norm.forward
    assert "offloading" in left(norm)


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    net = accelerate.cpu_offload(nn.Sequential(nn.LayerNorm(WIDTH)), execution_device="cpu")
    report = bigmodel.convert(net)
    assert not report.replaced and "offloading" in report.left[0].reason


def test_a_forward_set_on_the_instance_is_left():
    norm = SpyNorm()
    norm.forward = lambda hidden_states: hidden_states
    assert "replaced on the instance" in left(norm)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float8_e4m3fn, torch.complex64))
def test_weights_of_other_dtypes_are_left(dtype):
    norm = nn.LayerNorm(WIDTH, bias=False)
    norm.weight = nn.Parameter(torch.ones(WIDTH).to(dtype), requires_grad=False)
    assert left(norm) == f"its weight is {dtype}".replace("torch.", "")


def test_tensor_subclasses_are_left():
    class Quantised(torch.Tensor):
        pass

    norm = SpyNorm()
    norm.weight = nn.Parameter(torch.ones(WIDTH).as_subclass(Quantised))
    assert left(norm) == "its weight is a Quantised"


def test_lazy_empty_and_mixed_parameters_are_left():
    norm = SpyNorm()
    norm.weight = nn.UninitializedParameter()
    assert "UninitializedParameter" in left(norm)
    norm.weight = nn.Parameter(torch.ones(0))
    assert "empty" in left(norm)
    norm = nn.LayerNorm(WIDTH)
    norm.bias = nn.Parameter(norm.bias.bfloat16())
    assert "differ in dtype" in left(norm)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_norms_are_left_and_converted_ones_can_be_parametrized():
    norm = nn.LayerNorm(WIDTH)
    parametrize.register_parametrization(norm, "weight", Doubled())
    assert "parametrized" in left(norm)

    norm, input = nn.LayerNorm(WIDTH), torch.randn(3, WIDTH)
    expected = 2 * norm(input)
    bigmodel.convert(norm)
    parametrize.register_parametrization(norm, "weight", Doubled())
    torch.testing.assert_close(norm(input), expected)
    report = bigmodel.revert(norm)
    assert not report.replaced and "parametrized" in report.left[0].reason
    parametrize.remove_parametrizations(norm, "weight")
    assert len(bigmodel.revert(norm).replaced) == 1 and type(norm) is nn.LayerNorm


def test_old_style_weight_norm_is_left():
    with pytest.warns(FutureWarning):
        norm = nn.utils.weight_norm(nn.LayerNorm(WIDTH))
    assert left(norm)


def test_modules_of_bigmodel_are_left():
    from bigmodel.compat.apex.normalization import FusedRMSNorm

    for norm in (bigmodel.nn.LayerNorm(WIDTH), bigmodel.nn.RMSNorm(WIDTH), FusedRMSNorm(WIDTH)):
        assert left(norm) == "it is fused already"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_scripted_parts_are_left():
    compiled = torch.compile(nn.Sequential(nn.LayerNorm(WIDTH)))
    traced = torch.jit.trace(nn.RMSNorm(WIDTH), torch.ones(2, WIDTH))
    net = nn.ModuleDict({"compiled": compiled, "traced": traced, "plain": nn.LayerNorm(WIDTH)})
    report = bigmodel.convert(net)
    assert [entry.name for entry in report.replaced] == ["plain"]
    assert [(entry.name, entry.cls) for entry in report.left] == [
        ("compiled._orig_mod.0", "LayerNorm"),
        ("traced", "RMSNorm"),
    ]
    assert "before torch.compile" in report.left[0].reason and "before torch.jit" in report.left[1].reason
    for sealed in (compiled, traced):
        with pytest.raises(ValueError, match="convert: model cannot be changed, it is"):
            bigmodel.convert(sealed)


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("convert_first", (True, False))
@pytest.mark.parametrize("wrapper", ("ddp", "fsdp2"))
def test_before_or_after_a_wrapper(one_process, wrapper, convert_first):
    stock, input = model(), torch.randn(3, WIDTH)
    net = copy.deepcopy(stock)
    if convert_first:
        bigmodel.convert(net)
    if wrapper == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        net = torch.distributed.fsdp.fully_shard(net, mesh=mesh)
    if not convert_first:
        bigmodel.convert(net)
    assert len(fused(net)) == 3
    for run in (net, stock):
        run(input).square().sum().backward()
    for got, expected in zip(net.parameters(), stock.parameters(), strict=True):
        grad = got.grad.full_tensor() if wrapper == "fsdp2" else got.grad
        torch.testing.assert_close(grad, expected.grad, rtol=1e-4, atol=1e-4)


# --- report, revert, bad input ----------------------------------------------------------------------------------------


def test_the_report_is_readable(capsys):
    net = nn.ModuleDict({"layers": nn.ModuleList(model() for _ in range(12)), "head": nn.BatchNorm1d(WIDTH)})
    report = bigmodel.convert(net, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == str(report).splitlines()
    assert lines[0] == "36 replaced, 1 left"
    assert [line.split()[:4] for line in lines[1:]] == [
        ["replaced", "12", "layers.*.*", "LayerNorm"],
        ["replaced", "12", "layers.*.*", "RMSNorm"],
        ["replaced", "12", "layers.*.*", "SpyNorm"],
        ["left", "1", "head", "BatchNorm1d"],
    ]
    assert lines[1].endswith("layer_norm, returns the input's dtype")
    assert "it has buffers: running_mean" in lines[4]


def test_converting_twice_changes_nothing():
    net = model()
    bigmodel.convert(net)
    classes = [type(module) for module in net.modules()]
    report = bigmodel.convert(net)
    assert report.replaced == [] and {entry.reason for entry in report.left} == {"it is fused already"}
    assert [type(module) for module in net.modules()] == classes


def test_norms_false_and_models_without_norms(capsys):
    net = model()
    assert bigmodel.convert(net, norms=False) == bigmodel.ConvertReport() and fused(net) == []
    assert str(bigmodel.convert(nn.Linear(2, 2), verbose=True)) == "0 replaced, 0 left"
    assert capsys.readouterr().out == "0 replaced, 0 left\n"


def test_revert_restores_the_bits():
    net, input = model(), torch.randn(64, WIDTH)
    classes, expected = [type(module) for module in net.modules()], net(input)
    bigmodel.convert(net)
    assert len(fused(net)) == 3
    report = bigmodel.revert(net)
    assert [entry.name for entry in report.replaced] == ["1", "3", "4"] and not report.left
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net(input), expected)
    assert bigmodel.revert(net) == bigmodel.ConvertReport()


@pytest.mark.parametrize("function", (bigmodel.convert, bigmodel.revert))
@pytest.mark.parametrize("thing", ({}, None, nn.LayerNorm))
def test_only_modules_are_taken(function, thing):
    name = function.__name__.rpartition(".")[2]
    with pytest.raises(TypeError, match=rf"^{name}: model must be a torch.nn.Module, got {type(thing).__name__}\.$"):
        function(thing)
