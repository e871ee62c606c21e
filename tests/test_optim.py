"""bigmodel.optim beside torch.optim: the same trajectories, arguments, messages and protocol."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from conftest import assert_accurate
from optim_cases import SHAPES, clones, gradient, parameters, same_state, same_values, steps
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

import bigmodel
from bigmodel.optim import SGD, Adagrad, Adam, AdamW

PAIRS = {AdamW: optim.AdamW, Adam: optim.Adam, SGD: optim.SGD, Adagrad: optim.Adagrad}
each_class = pytest.mark.parametrize("cls", PAIRS, ids=lambda c: c.__name__)

# --- a thousand steps -------------------------------------------------------------------------------------------------

ADAM = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay, **more}
    for amsgrad in (False, True)
    for maximize in (False, True)
    for decay, more in ((0.0, {"betas": (0.5, 0.95), "eps": 1e-3}), (0.1, {}))
]
CASES = [(cls, options) for cls in (AdamW, Adam) for options in ADAM]
CASES += [(SGD, {"momentum": m, **o}) for m in (0, 0.9) for o in ({"weight_decay": 0.1}, {"maximize": True})]
CASES += [(SGD, {"momentum": 0.9, "dampening": 0.3}), (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1})]
CASES += [(Adagrad, {"lr_decay": 0.01, "weight_decay": 0.1, "maximize": m}) for m in (False, True)]
CASES += [(Adagrad, {"initial_accumulator_value": 0.5, "eps": 1e-3})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls, options", CASES, ids=lambda c: c.__name__ if isinstance(c, type) else str(c))
def test_a_thousand_steps_are_as_accurate_as_torchs(cls, options, dtype):
    """The house's rule: max |ours - f64| <= 2 max |stock - f64| + 1e-6 max |f64|; float64 within 1e-11."""
    ours = parameters(((33, 5), (2, 3, 4, 4), ()), dtype)
    stock, exact = clones(ours), clones(ours, torch.float64)
    options = {"lr": 1e-3, **options}
    runs = [(cls, ours), (PAIRS[cls], stock)] + [(PAIRS[cls], exact)] * (dtype is torch.float32)
    pull = 0.0 if options.get("maximize") else 1.0  # uphill on a bowl, rounding would grow without bound
    for kind, params in runs:
        steps(kind(params, **options), 1000, pull=pull)
    a, b, c = (torch.cat([p.detach().flatten() for p in params]) for params in (ours, stock, exact))
    if dtype is torch.float32:
        assert_accurate(a, b, c)
    else:
        assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch casts gradients (2.6 does, 2.13 not)")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype_than_the_parameter(dtype, grad_dtype):
    """Arithmetic is float32: the step from these values in float64, rounded to the parameter's dtype once."""
    params = parameters(dtype=dtype)
    exact = clones(params, torch.float64)
    gradient(params, 0, dtype=grad_dtype)
    for p, q in zip(params, exact, strict=True):
        q.grad = p.grad.double()
    AdamW(params, lr=0.1).step()
    optim.AdamW(exact, lr=0.1).step()
    for p, q in zip(params, exact, strict=True):
        assert_close(p.double(), q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


# --- torch's arguments, messages and classes --------------------------------------------------------------------------


@each_class
def test_is_one_of_torchs_with_its_arguments_and_defaults(cls):
    import inspect

    stock = inspect.signature(PAIRS[cls]).parameters
    ours = inspect.signature(cls).parameters
    assert {n: (p.default, p.kind) for n, p in ours.items() if n in stock} == {
        n: (p.default, p.kind) for n, p in stock.items()
    }
    positional = [[n for n, p in names.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for names in (ours, stock)]
    assert positional[0] == positional[1]
    extras = [p for n, p in ours.items() if n not in stock]
    assert all(p.kind is p.KEYWORD_ONLY for p in extras)
    instance = cls(parameters())
    assert isinstance(instance, PAIRS[cls]) and isinstance(instance, optim.Optimizer)
    assert instance.param_groups[0].keys() == PAIRS[cls](parameters()).param_groups[0].keys()
    assert repr(instance) == repr(PAIRS[cls](parameters()))


@pytest.mark.parametrize(
    "cls, bad",
    [(c, {"lr": -1.0}) for c in PAIRS] + [(c, {"weight_decay": -1.0}) for c in PAIRS]
    + [(c, bad) for c in (AdamW, Adam) for bad in ({"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)})]
    + [(SGD, {"momentum": -1.0}), (SGD, {"nesterov": True}), (Adagrad, {"lr_decay": -1.0})]
    + [(c, {"lr": torch.ones(2)}) for c in PAIRS] + [(c, {"fused": True, "foreach": True}) for c in PAIRS],
)  # fmt: skip
def test_bad_hyperparameters_have_torchs_messages(cls, bad):
    raised = []
    for kind in (cls, PAIRS[cls]):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            kind(parameters(), **bad)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@each_class
def test_what_is_refused_says_why(cls):
    with pytest.raises(ValueError, match=f"bigmodel.optim.{cls.__name__}: differentiable is True"):
        cls(parameters(), differentiable=True)
    for norm in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm is .*; it must be positive, or None"):
            cls(parameters(), max_grad_norm=norm)
    p, q = parameters(((3,), (4,)))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        cls([{"params": [p]}, {"params": [q, p]}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="has the same parameter twice"):
            cls([p, p])
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        cls(p)


@pytest.mark.parametrize("cls", [AdamW, Adam])
def test_bad_settings_of_ours_are_refused_in_one_sentence(cls):
    p = parameters(((3,),))
    for bad in ({"ema_decay": 1.0}, {"ema_decay": -0.1}, {"state_dtype": "int4"}, {"state_dtype": torch.float16}):
        with pytest.raises(ValueError, match=f"^bigmodel.optim.{cls.__name__}: {next(iter(bad))} is [^.]*.*\\.$"):
            cls(p, **bad)
    with pytest.raises(ValueError, match="master_weights and stochastic_rounding are both True"):
        cls(p, master_weights=True, stochastic_rounding=True)
    optimizer = cls(p)
    with pytest.raises(ValueError, match="ema_decay is 2"):
        optimizer.add_param_group({"params": parameters(((2,),)), "ema_decay": 2})
    assert len(optimizer.param_groups) == 1, "a refused group must not stay"


@each_class
def test_sparse_gradients_are_refused(cls):
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = cls(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support sparse gradients.*please"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}, {"fused": False}])
@each_class
def test_fused_and_foreach_change_nothing_and_are_kept_for_torch(cls, options):
    plain, flagged = parameters(), parameters()
    steps(cls(plain), 3)
    optimizer = cls(flagged, **options)
    steps(optimizer, 3)
    assert same_values(plain, flagged)
    (name, value), *_ = options.items()
    assert optimizer.param_groups[0][name] is value and optimizer.defaults[name] is value


@pytest.mark.parametrize("cls", [AdamW, Adam])
def test_tensor_lr_and_betas(cls):
    plain, tensors = parameters(), parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    first, second = cls(plain, lr=0.1), cls(tensors, lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.999)))
    steps(first, 2)
    steps(second, 2)
    for p, q in zip(plain, tensors, strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7)  # the betas are float32 there
    lr.fill_(0.0)
    second.param_groups[0]["weight_decay"] = 0.0
    before = clones(tensors)
    steps(second, 1)
    assert same_values(tensors, before), "lr has to be read in each step"


# --- the protocol -----------------------------------------------------------------------------------------------------


@each_class
def test_hooks_are_called_once_and_in_order(cls):
    optimizer, called = cls(parameters()), []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: called.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: called.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *a: called.append("pre"))
    optimizer.register_step_post_hook(lambda *a: called.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *a: called.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: called.append(len(sd["param_groups"])))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    try:
        steps(optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["global pre", "pre", "post", "global post", "save", 1, "loaded"]
    assert not [h for h in optimizer._optimizer_load_state_dict_pre_hooks.values() if h.__name__ == "last_hook"]


@each_class
def test_a_load_hook_may_change_what_is_loaded(cls):
    optimizer = cls(parameters())
    steps(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: {**sd, "state": {}})
    optimizer.load_state_dict(saved)
    assert not any(optimizer.state.values())


@each_class
def test_closure_is_evaluated_with_gradients_and_its_loss_returned(cls):
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and not torch.equal(p.detach(), torch.ones(3))
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)),  # begins with lr 0
        lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    ],
    ids=["one_cycle", "warmup", "cosine"],
)
@each_class
def test_lr_schedulers(cls, scheduler):
    options = {"momentum": 0.9} if cls is SGD else {}
    ours, theirs = parameters(), parameters()
    for kind, params in ((cls, ours), (PAIRS[cls], theirs)):
        optimizer = kind(params, lr=0.05, **options)
        try:
            schedule = scheduler(optimizer)
        except (ValueError, KeyError):  # OneCycleLR cycles a momentum or betas; Adagrad has neither
            schedule = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
        for step in range(12):
            steps(optimizer, 1, first=step)
            schedule.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_class
def test_groups_have_their_own_settings_and_can_be_added(cls):
    if cls is Adagrad and torch.__version__ < "2.7":
        pytest.skip("torch 2.6's own Adagrad raises KeyError for a group that is added later")
    ours, theirs = parameters(), parameters()
    for kind, params in ((cls, ours), (PAIRS[cls], theirs)):
        optimizer = kind([{"params": params[:1], "lr": 0.3}, {"params": params[1:3], "weight_decay": 0.5}], lr=0.01)
        steps(optimizer, 2)
        optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        steps(optimizer, 2, first=2)
        optimizer.param_groups[0]["lr"] = 0.0
        steps(optimizer, 1, first=4)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6)


@each_class
def test_named_parameters_keep_their_names(cls):
    model = nn.Linear(3, 2)
    optimizer = cls(model.named_parameters())
    steps(optimizer, 1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@each_class
def test_frozen_and_missing_gradients_are_left_alone(cls):
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = cls(params)
    optimizer.step()
    assert same_values(params, parameters()) and not any(v for k, v in optimizer.state.items() if cls is not Adagrad)
    gradient(params, 0)
    params[0].grad = params[1].grad = None
    optimizer.step()
    assert same_values(params[:2], parameters()[:2])
    assert not torch.equal(params[2], parameters()[2])
    assert cls is Adagrad or not optimizer.state.get(params[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@each_class
def test_a_copy_goes_on_as_the_original(cls, duplicate):
    params = parameters()
    optimizer = cls(params, max_grad_norm=1.0, skip_nonfinite=True)
    steps(optimizer, 2)
    other = duplicate(optimizer)
    others = other.param_groups[0]["params"]
    assert other.max_grad_norm == 1.0 and other.skip_nonfinite and other._step_supports_amp_scaling
    steps(optimizer, 2, first=2)
    steps(other, 2, first=2)
    assert same_values(params, others) and same_state(optimizer, other)


@each_class
def test_zero_grad_sees_both_ways(cls):
    params = parameters(((3,),))
    optimizer = cls(params)
    steps(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(params[0].grad, torch.zeros(3))
    optimizer.zero_grad()
    assert params[0].grad is None


@each_class
def test_a_tensor_saved_for_backward_and_then_stepped_raises(cls):
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1)
    loss = p.square().sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_class
def test_a_whole_training_step_compiles_around_it(cls):
    stepped = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = cls(model.parameters(), lr=0.1)

        def train(x, model=model, optimizer=optimizer):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        train = torch.compile(train, backend="eager") if compiled else train
        for _ in range(2):
            train(torch.ones(2, 4))
        stepped.append(model)
    for p, q in zip(*[m.parameters() for m in stepped], strict=True):
        assert_close(p, q)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9, "amsgrad": True}], ids=str)
@pytest.mark.parametrize("cls", [AdamW, Adam])
def test_capturable_under_cuda_graphs(cls, options):
    eager, captured = ([p.detach().cuda().requires_grad_() for p in parameters(((33, 5), (7,)))] for _ in range(2))
    first = cls(eager, lr=torch.tensor(0.1, device="cuda"), capturable=True, **options)
    second = cls(captured, lr=torch.tensor(0.1, device="cuda"), capturable=True, **options)
    for params in (eager, captured):
        for p in params:
            p.grad = torch.ones_like(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second.step()
    for _ in range(3):
        graph.replay()
    steps_ = [first.step() for _ in range(4)]  # noqa: F841
    assert same_values(eager, captured) and same_state(first, second)
    uncapturable = cls([captured[0]])
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        uncapturable.step()


@each_class
def test_a_default_dtype_of_float64_changes_no_state(cls):
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = cls(parameters(((7,), (5000,))), max_grad_norm=1.0)
        steps(optimizer, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} <= {torch.float32}


def test_public_names():
    assert bigmodel.optim.AdamW is AdamW and bigmodel.clip_grad_norm_ is bigmodel.optim.clip_grad_norm_
    assert set(bigmodel.optim.__all__) == {"AdamW", "Adam", "SGD", "Adagrad", "EMA", "clip_grad_norm_"}


def test_shapes_of_these_tests_have_what_they_should():
    assert () in SHAPES and any(0 in shape for shape in SHAPES)
    assert not parameters()[4].is_contiguous()


@pytest.mark.parametrize("kind", ["float32", "float64", "int64"])
@each_class
def test_numbers_of_numpy(cls, kind):
    """Schedulers and sweeps hand them over; 1 is a number that all of them hold."""
    numpy = pytest.importorskip("numpy")
    value = numpy.dtype(kind).type(1)
    names = {SGD: ("lr", "momentum", "dampening", "weight_decay"), Adagrad: ("lr", "lr_decay", "eps", "weight_decay")}
    chosen = names.get(cls, ("lr", "eps", "weight_decay"))
    ours, plain = parameters(), parameters()
    steps(cls(ours, max_grad_norm=value, **dict.fromkeys(chosen, value)), 2)
    steps(cls(plain, max_grad_norm=1.0, **dict.fromkeys(chosen, 1.0)), 2)
    assert same_values(ours, plain)
