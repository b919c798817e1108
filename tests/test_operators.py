"""The fused trellis and the heads' losses as operators: compiled, exported, and against the direct calls."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trellisnet import Bidirectional, TrellisLSTM, TrellisNet
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import cross_entropy as losses
from trellisnet.ops import fused, operators

OPS = torch.ops.trellisnet
TRELLIS = OPS.trellis.default
COMPUTE = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
LENGTHS = torch.tensor([3, 9, 1])
TORCH_2_6 = torch.__version__.startswith("2.6.")
RECOMPILE_LIMIT = "cache_size_limit" if TORCH_2_6 else "recompile_limit"
NETS = {
    "plain": {},
    "dilated": {"dilation": (1, 2, 4), "output_size": 5},
    "taps": {"kernel_size": 3},
    "tanh": {"activation": "tanh"},
    "recompute": {"recompute": True},
    "recompute tanh": {"recompute": True, "recompute_every": 4, "activation": "tanh"},
    "sparse input": {"inject_every": 2, "hidden_dropout": 0.5},
}
CALLS = {
    "all": {},
    "last": {"last_only": True},
    "start": {"start": 4, "aux_every": 3},
    "padded": {"lengths": LENGTHS, "aux_every": 2},
}


def example(net, compute, carried):
    """Make a network and the arguments of a call, all of which require gradients."""
    torch.manual_seed(0)
    net = TrellisNet(3, 16, 6, **NETS[net])
    tensors = [torch.randn(3, 9, 3), *(torch.randn(3, 16) for _ in range(2 * carried))]
    if compute == "float64":
        net, tensors = net.double(), [t.double() for t in tensors]
    x, *state = (t.requires_grad_() for t in tensors)
    return net, x, tuple(state) or None


def results(net, x, state, compute, **options):
    """Return outputs and gradients; dropout is drawn from the same seed."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
        out = net(x, state, **options)
    outputs = [out.output, *out.state, *out.aux]
    gradients = torch.autograd.grad(
        sum((t * t).sum() for t in outputs), [x, *(state or ()), *net.parameters()], materialize_grads=True
    )
    return [*outputs, *gradients]


@pytest.fixture
def as_operator(monkeypatch):
    """Let eager calls go through the operator; returns the arguments of its calls."""
    calls, run = [], OPS.trellis

    def spy(*arguments):
        calls.append(arguments)
        return run(*arguments)

    def switch():
        monkeypatch.setattr(fused, "trellis", operators.trellis)
        monkeypatch.setattr(OPS, "trellis", spy)
        return calls

    yield switch
    monkeypatch.undo()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("net", NETS)
def test_the_operator_equals_the_direct_call(net, call, compute, as_operator):
    examples = [example(net, compute, carried) for carried in (False, True)]
    expected = [results(*arguments, compute, **CALLS[call]) for arguments in examples]
    assert not as_operator()
    for arguments, theirs in zip(examples, expected, strict=True):
        ours = results(*arguments, compute, **CALLS[call])
        if compute != "bfloat16":
            assert_close(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert (a - b).norm() <= 0.02 * b.norm()
    assert len(as_operator()) == 2


@pytest.mark.parametrize("net", ["dilated", "recompute", "tanh"])
@pytest.mark.parametrize("call", CALLS)
def test_its_second_derivatives_equal_those_of_the_direct_call(net, call, as_operator):
    def second():
        network, x, state = example(net, "float64", carried=True)
        out = network(x, state, **CALLS[call])
        wanted = [x, *state, network.bias]
        options = {"create_graph": True, "materialize_grads": True}
        first = torch.autograd.grad((out.output**3).sum() + (out.state[1] ** 3).sum(), wanted, **options)
        return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), wanted, materialize_grads=True)]

    expected = second()
    as_operator()
    assert_close(second(), expected, rtol=1e-9, atol=1e-9)


CHECKED = [
    ("plain", "all", "float32"),
    ("dilated", "last", "float64"),
    ("taps", "start", "bfloat16"),
    ("recompute", "all", "float32"),
    ("recompute tanh", "padded", "bfloat16"),
    ("sparse input", "start", "float32"),
    ("tanh", "padded", "float64"),
]


@pytest.mark.parametrize(
    ("net", "call", "compute"), [CHECKED[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CHECKED[1:])]
)
@pytest.mark.filterwarnings("ignore")
def test_torch_accepts_the_trellis_operator(net, call, compute, as_operator, monkeypatch):
    for carried in (False, True):
        network, x, state = example(net, compute, carried)
        calls = as_operator()
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            network(x, state, **CALLS[call])
        monkeypatch.undo()
        arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in calls[-1]]
        for t in arguments[:6]:
            if t is not None:
                t.requires_grad_()
        torch.library.opcheck(TRELLIS, tuple(arguments))


# -- losses ------------------------------------------------------------------------------------------------------------


def of_losses(K, dtype, epsilon=0.0, scaled=True, within=None):
    torch.manual_seed(0)
    shapes = [(37, K, 6), (50, 6), (50,), (37, K)]
    x, weight, bias, prior = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes)
    target, scale = torch.randint(50, (37,)), torch.rand(37, dtype=dtype) if scaled else None
    prior = prior.detach().log_softmax(1).requires_grad_() if K > 1 else None
    return (
        x,
        weight,
        bias,
        target,
        prior,
        scale,
        within,
        epsilon,
        str(dtype).removeprefix("torch."),
        "auto",
        *[True] * 3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_the_operator_of_losses_equals_the_direct_call(K, dtype, order):
    arguments = of_losses(K, dtype, epsilon=1e-3)
    x, weight, bias, target, prior, scale = arguments[:6]
    wanted = [t for t in (x, weight, bias, prior) if t is not None]
    for function in (
        lambda total, _: 2 * total,
        lambda _, each: each.square().sum(),
        lambda total, each: total + each.square().sum(),
    ):
        pairs = []
        for total, each in (
            losses.cross_entropy(x, weight, bias, target, scale, log_prior=prior, log_epsilon=1e-3),
            OPS.cross_entropy(*arguments)[:2],
        ):
            grads = torch.autograd.grad(function(total, each), wanted, create_graph=order == 2)
            if order == 2:
                grads = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
            pairs.append([total, each, *grads])
        assert_close(*pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("K", [1, 3])
def test_torch_accepts_the_operator_of_losses(K, scaled):
    for within in (None, torch.arange(37) % 3 == 0):
        torch.library.opcheck(OPS.cross_entropy.default, of_losses(K, torch.float32, 1e-3, scaled, within))


# -- compiled ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Backend of torch.compile that runs the graphs as they are, and lists our operators in each."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append([n.target for n in graph.graph.nodes if "trellisnet" in str(n.target)])
        return graph.forward

    def compile(self, function, **options):
        torch._dynamo.reset()
        return torch.compile(function, backend=self, fullgraph=True, **options)

    @property
    def names(self):
        return [[str(target).removeprefix("trellisnet.").removesuffix(".default") for target in g] for g in self.graphs]


HEADS = {"softmax": {}, "mixture": {"n_experts": 3}, "split": {"cutoffs": [40, 70]}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["auto", "fused"])
@pytest.mark.parametrize("head", HEADS)
def test_a_training_step_is_one_graph_with_the_operators(head, backend):
    torch.manual_seed(0)
    model = TrellisLanguageModel(100, 8, 12, 4, output_size=8, backend=backend, **HEADS[head])
    tokens, targets = torch.randint(100, (2, 4, 9))

    def step(tokens, targets):
        output, _, _, aux = model(tokens, aux_every=2)
        return model.losses([output, *aux], targets, [1.0, 0.2, 0.1])[0]

    recorder, parameters = Recorder(), list(model.parameters())
    ours = recorder.compile(step)(tokens, targets)
    theirs = step(tokens, targets)
    assert_close([ours, *torch.autograd.grad(ours, parameters)], [theirs, *torch.autograd.grad(theirs, parameters)])
    assert recorder.names == [["trellis", *["cross_entropy"] * (3 if head == "split" else 1)]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(TORCH_2_6, reason="the compiler of PyTorch 2.6 cannot store lists of tensors")
@pytest.mark.parametrize("autocast", [False, True])
def test_aot_autograd_keeps_them_in_both_passes(autocast):
    from torch._dynamo.backends.common import aot_autograd

    torch.manual_seed(0)
    model, x = TrellisClassifier(3, 5, 8, 4, hidden_dropout=0.0), torch.randn(2, 9, 3)
    forwards, backwards = Recorder(), Recorder()
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=forwards, bw_compiler=backwards)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pair = [net(x).logits for net in (compiled, model)]
    gradients = [torch.autograd.grad(logits.square().sum(), list(model.parameters())) for logits in pair]
    assert_close(*pair)
    assert_close(*gradients, **({"rtol": 2e-2, "atol": 1e-3} if autocast else {}))
    assert (forwards.names, backwards.names) == ([["trellis"]], [["trellis_backward"]])


class Around(nn.Module):
    """A user's model."""

    def __init__(self, core):
        super().__init__()
        self.first, self.core, self.last = nn.Linear(3, 4), core, nn.LazyLinear(2)

    def forward(self, x, **options):
        return self.last(self.core(self.first(x), **options)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: TrellisNet(4, 8, 3, hidden_dropout=0.1, weight_dropout=0.1), 1),
        (lambda: Bidirectional(TrellisNet, 4, 8, 3), 2),
        (lambda: TrellisLSTM(4, 8, 3, batch_first=True, bidirectional=True), 2),
    ],
    ids=["core", "bidirectional", "lstm"],
)
def test_a_users_model_is_one_graph(make, count):
    torch.manual_seed(0)
    model, x, recorder = Around(make()), torch.randn(2, 7, 3), Recorder()
    model(x)
    model.eval()
    options = {} if isinstance(model.core, TrellisLSTM) else {"lengths": torch.tensor([7, 4])}
    assert_close(recorder.compile(model)(x, **options), model(x, **options))
    assert recorder.names == [["trellis"] * count]


@pytest.mark.filterwarnings("ignore")
def test_the_length_is_dynamic_if_all_outputs_are_wanted_and_fixed_otherwise():
    net = TrellisNet(3, 4, 3, dilation=(1, 2)).eval()
    for options, graphs in (({}, 1), ({"last_only": True}, 3)):
        recorder = Recorder()
        compiled = recorder.compile(net, dynamic=True)
        for length in (9, 12, 30):
            x = torch.randn(2, length, 3)
            assert_close(compiled(x, **options).output, net(x, **options).output)
        assert (recorder.names, len(recorder.names)) == ([["trellis"]] * graphs, graphs)


@pytest.mark.filterwarnings("ignore")
@torch._dynamo.config.patch({RECOMPILE_LIMIT: 99})
def test_a_compiled_network_follows_its_dtype_its_mode_and_its_call():
    torch.manual_seed(0)
    net, x = TrellisNet(3, 8, 4, hidden_dropout=0.5, weight_dropout=0.3), torch.randn(2, 7, 3)
    compiled, parameters = Recorder().compile(net), list(net.parameters())

    def same(x, *wanted, **options):
        pairs = []
        for call in (compiled, net):
            torch.manual_seed(1)  # of the dropout masks
            out = call(x, **options)
            gradients = torch.autograd.grad(out.output.square().sum(), wanted) if wanted else []
            pairs.append([out.output, out.state, out.aux, gradients])
        assert_close(*pairs)
        assert pairs[0][0].requires_grad == bool(wanted)

    same(x, *parameters)
    assert not torch.equal(compiled(x).output, compiled(x).output)
    net.eval()
    for dtype in (torch.float64, torch.float32):
        net.to(dtype)
        same(x.to(dtype), *parameters)
    with torch.no_grad():
        same(x)
        state = net(x).state
    with torch.inference_mode():
        same(x)
    for options in (
        {"state": state, "start": 3}, {"start": 4}, {"lengths": torch.tensor([1, 7])},
        {"lengths": torch.tensor([2, 3])}, {"aux_every": 2, "num_layers": 2},
    ):  # fmt: skip
        same(x, *parameters, **options)
    leaf = x.clone().requires_grad_()
    same(leaf, leaf, *parameters)
    net.requires_grad_(False)
    same(leaf, leaf)
    same(x)


@pytest.mark.filterwarnings("ignore")
def test_transforms_within_a_compiled_program_take_the_reference():
    net, x = TrellisNet(3, 4, 2, dtype=torch.float64), torch.randn(2, 2, 5, 3, dtype=torch.float64)
    for function in (
        torch.func.vmap(lambda z: net(z).output),
        torch.func.grad(lambda z: net(z[0]).output.square().sum()),
        lambda z: torch.func.jvp(lambda z: net(z[0]).output, (z,), (z + 1,)),
    ):
        recorder = Recorder()
        assert_close(recorder.compile(function)(x), function(x))
        assert recorder.names == [[]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_inductor(options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = TrellisNet(3, 16, 6), torch.randn(3, 9, 3)
    compiled = torch.compile(net, fullgraph=True)
    pair = [call(x, **options) for call in (compiled, net)]
    gradients = [torch.autograd.grad(out.output.square().sum(), list(net.parameters())) for out in pair]
    assert_close(*pair)
    assert_close(*gradients)


# -- exported ----------------------------------------------------------------------------------------------------------


def nodes(program):
    return [str(n.target) for n in program.graph.nodes if "trellisnet" in str(n.target)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"last_only": True}, {"lengths": torch.tensor([9, 4])}, {"aux_every": 2}])
def test_export_keeps_the_operator_and_decomposes_it_on_request(options):
    torch.manual_seed(0)
    net, x = TrellisNet(3, 8, 4, dilation=(1, 2), output_size=5, hidden_dropout=0.5).eval(), torch.randn(2, 9, 3)
    dynamic = {} if options else {"dynamic_shapes": {"x": {0: torch.export.Dim("N"), 1: torch.export.Dim("L", min=2)}}}
    with torch.no_grad():
        program = torch.export.export(net, (x,), options, **dynamic)
    plain = program.run_decompositions(operators.DECOMPOSITIONS)
    assert (nodes(program), nodes(plain)) == (["trellisnet.trellis.default"], [])
    for exported, example in itertools.product((program, plain), [x] if options else [x, torch.randn(3, 20, 3)]):
        expected = net(example, **options)
        out = exported.module()(example, **options)
        assert_close((out.output, out.state, out.aux), (expected.output, expected.state, expected.aux))


class Loss(nn.Module):
    def __init__(self, **head):
        super().__init__()
        self.model = TrellisLanguageModel(100, 8, 12, 2, output_size=8, **head)

    def forward(self, tokens, targets):
        return self.model.loss(self.model(tokens).output, targets)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_exported_losses_can_be_trained_and_decomposed_however_they_were_exported(head, grad_mode):
    torch.manual_seed(0)
    loss, batch = Loss(**HEADS[head]), torch.randint(100, (2, 4, 9))
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(loss, tuple(batch))
    plain = program.run_decompositions(operators.DECOMPOSITIONS)
    kept = ["trellisnet.trellis.default", *["trellisnet.cross_entropy.default"] * (3 if head == "split" else 1)]
    assert (nodes(program), nodes(plain)) == (kept, [])
    assert_close(plain.module()(*batch), loss(*batch))
    module = program.module()
    module(*batch).backward()
    loss(*batch).backward()
    theirs = dict(module.named_parameters())
    assert_close([theirs[name].grad for name in theirs], [loss.get_parameter(name).grad for name in theirs])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad_mode", [True, False])
def test_an_exported_program_has_the_gradient_of_an_input_that_needed_none_then(grad_mode):
    model, x = TrellisClassifier(3, 5, 8, 2), torch.randn(2, 9, 3)
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(model, (x,))
    x.requires_grad_()
    ours, theirs = (torch.autograd.grad(call(x).logits.square().sum(), x) for call in (program.module(), model))
    assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_cannot_use_the_operator_says_so():
    with pytest.raises(ValueError, match="torch.jit cannot trace it; expected auto or reference"):
        torch.jit.trace(TrellisNet(3, 4, 2, backend="fused"), (torch.randn(2, 5, 3),))
