"""Higher derivatives, against the reference and finite differences, through every interface of torch."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from test_ops import SHAPES, random_inputs, trellis
from trellisnet import TrellisNet
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseStack
from trellisnet.heads import LinearSoftmax, MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops.cross_entropy import cross_entropy
from trellisnet.ops.gates import FUNCTIONS

MASK = torch.tensor([[1.5, 0, 1.5, 0], [0, 1.5, 1.5, 1.5]], dtype=torch.float64)[:, :, None]
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def trellisnet(backend="fused", **options):
    """Make a network with large weights, so that a missing derivative is noticed."""
    torch.manual_seed(0)
    net = TrellisNet(4, 8, 5, backend=backend, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(30)
    return net, torch.randn(1, 3, 4, dtype=torch.float64)


def second(outputs, wanted, generator, dtype=torch.float64):
    """Return the first derivatives of a curved function of the outputs, then those of a curved function of these."""

    def curved(tensors):
        each = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]
        return sum((t * (t + r)).sum() for t, r in zip(tensors, each, strict=True))

    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(curved(outputs), wanted, create_graph=True, **options)
    return [*first, *torch.autograd.grad(curved(first), wanted, **options)]


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("carried", [False, True])
def test_the_fused_operator_agrees_with_the_equation(recompute, k, dilation, length, activation, carried):
    inputs = random_inputs(k, length)
    if activation == "tanh":
        inputs |= {name: inputs[name][:4].clone() for name in ("weight_x", "weight_h", "bias")}
    lengths = torch.tensor([1, length])
    for num_layers, inject_every, settings in (
        (4, 1, {}),
        (4, 2, {"start": length // 2, "aux_every": 2, "hidden_scale": MASK}),
        (3, 2, {"start": length - 1}),
        (3, 1, {"lengths": lengths, "aux_every": 1}),
    ):
        options = {"num_layers": num_layers, "dilation": dilation, "output_size": 3, "activation": activation}
        options |= {"inject_every": inject_every, **settings}
        derivatives = []
        for backend in ("fused", "reference"):
            tensors = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
            state = tuple(tensors.pop(name) for name in ("h0", "c0")) if carried else None
            tensors = {name: t for name, t in tensors.items() if name not in ("h0", "c0")}
            again = {"recompute": recompute} if backend == "fused" else {}
            out = trellis(**tensors, state=state, backend=backend, **options, **again)
            wanted = [*tensors.values(), *(state or ())]
            outputs = [out.output, *out.state, *out.aux]
            derivatives.append(second(outputs, wanted, torch.Generator().manual_seed(1)))
        for a, b in zip(*derivatives, strict=True):
            assert_close(a, b, **EXACT)


def gradgradcheck(module, call, *inputs):
    """Check second derivatives against finite differences, in all parameters and inputs."""
    torch.manual_seed(0)
    names = [f"module.{name}" for name, _ in module.named_parameters()]
    parameters = [torch.randn_like(p).mul_(0.7).requires_grad_() for p in module.parameters()]

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return call(self.module, *inputs)

    def run(*tensors):
        named = dict(zip(names, tensors[: len(names)], strict=True))
        return torch.func.functional_call(Called(), named, tensors[len(names) :])

    tensors = [*parameters, *(t.requires_grad_() for t in inputs)]
    assert torch.autograd.gradgradcheck(run, tensors, gen_non_contig_grad_outputs=True, fast_mode=True)


CORES = {
    "fused": {},
    "fused-tanh": {"activation": "tanh", "dilation": (1, 2)},
    "fused-k3": {"kernel_size": 3, "dilation": (1, 2), "weight_norm": False, "recompute": True},
    "reference": {"backend": "reference"},
    "reference-gru": {"activation": "gru"},
    "reference-grouped": {"kernel_groups": 3},
}


@pytest.mark.parametrize("options", CORES.values(), ids=CORES)
@pytest.mark.parametrize("call", [{"start": 1}, {"last_only": True}, {"aux_every": 2, "lengths": torch.tensor([3, 2])}])
def test_cores_are_exact(options, call):
    core = TrellisNet(2, 3, 3, dtype=torch.float64, output_size=2, **options)

    def run(core, x, h, c):
        out = core(x, (h, c), **call)
        return out.output.sum(1), *out.state, *(aux[:, 0] for aux in out.aux)

    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 2), (2, 3), (2, 3)))
    gradgradcheck(core, run, x, h, c)


HEADS = {
    "plain": lambda: LinearSoftmax(3, 7, dtype=torch.float64),
    "mixture": lambda: MixtureOfSoftmaxes(3, 5, 2, 2, log_epsilon=1e-2, dtype=torch.float64),
    "split": lambda: SplitSoftmax(3, 7, [2, 4], dtype=torch.float64),
}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_are_exact(make, reduction):
    target = torch.tensor([[0, 3, 4], [1, 2, 4]])
    gradgradcheck(make(), lambda head, x: head.loss(x, target, reduction), torch.randn(2, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_weighted_losses_and_probabilities_are_exact(make, monkeypatch):
    monkeypatch.setattr("trellisnet.heads.CHUNK_LOGITS", 20)  # a mixture then recomputes some chunks
    target = torch.tensor([[0, 3, 4]])
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    gradgradcheck(make(), lambda head, x: head.losses(x, target, (1.0, 0.3)), x)
    gradgradcheck(make(), lambda head, x: head.log_prob(x[0, 0]).sum(1), x)


def test_total_and_losses_together_are_exact():
    torch.manual_seed(0)
    x, weight, bias, prior = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 2, 3), (5, 3), (5,), (4, 2))
    )
    target, scale = torch.randint(5, (4,)), torch.rand(4, dtype=torch.float64)

    def run(x, weight, bias, prior):
        return cross_entropy(x, weight, bias, target, scale, log_prior=prior.log_softmax(1), log_epsilon=1e-2)

    assert torch.autograd.gradgradcheck(run, (x, weight, bias, prior), fast_mode=True)
    with pytest.raises(ValueError, match="scale: cross_entropy has no gradient for it"):
        cross_entropy(x, weight, bias, target, scale.requires_grad_())


KINDS = {"tied": {}, "untied": {"tied": False}, "mixture": {"n_experts": 2}, "split": {"cutoffs": [3]}}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_language_models_are_exact(kind, backend):
    """With tied weights the embedding reaches the loss by two paths."""
    options = {"core": TrellisNet, "backend": backend, "dtype": torch.float64, "hidden_dropout": 0.3}
    options |= {"weight_dropout": 0.3, "input_dropout": 0.2, "output_dropout": 0.2} | kind
    model = TrellisLanguageModel(5, 2, 4, 3, output_size=2, **options)
    torch.manual_seed(1)
    masks = model.draw_masks(1)
    tokens, target = torch.tensor([[0, 3, 4]]), torch.tensor([[3, 4, 1]])

    def run(model):
        out = model(tokens, masks=masks, aux_every=2)
        return model.losses([out.output, *out.aux], target, (1.0, 0.5), draw=False)[0], *out.state

    gradgradcheck(model, run)


BASELINES = {"awd-lstm": AWDLSTM, "rhn": RHN, "tcn": TCN, "sparse": SparseStack}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_exact(name):
    options = {"mode": "sparse_all", "fraction": 0.7} if name == "sparse" else {}
    core = BASELINES[name](4, 4, 2, dtype=torch.float64, **options)
    gradgradcheck(core, lambda core, x: core(x).output.sum(1), torch.randn(1, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_classifier_is_exact(backend):
    model = TrellisClassifier(2, 3, 4, 3, dilation=(1, 2), backend=backend, dtype=torch.float64)
    lengths, target = [3, 2], torch.tensor([0, 2])

    def run(model, x):
        return nn.functional.cross_entropy(model(x, lengths=lengths).logits, target), *model(x).logits

    gradgradcheck(model, run, torch.randn(2, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"vectorize": True}])
@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_a_hessian(backend, options):
    net, x = trellisnet(backend)
    hessian = torch.autograd.functional.hessian(lambda z: net(z).output.square().sum(), x, **options)
    assert hessian.abs().sum().item() == pytest.approx(2.9027, abs=5e-5)


def test_many_gradients_at_once():
    net, x = trellisnet()
    each, together = (
        torch.autograd.functional.jacobian(lambda z: net(z).output, x, vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert_close(together, each, **EXACT)
    logits = torch.randn(6, 8, dtype=torch.float64)
    head = LinearSoftmax(8, 5, dtype=torch.float64)
    target = torch.arange(6) % 5
    for reduction in ("none", "mean"):
        each, together = (
            torch.autograd.functional.jacobian(lambda z: head.loss(z, target, reduction), logits, vectorize=vectorize)  # noqa: B023
            for vectorize in (False, True)
        )
        assert_close(together, each, **EXACT)


def check_gradients(function, parameters):
    """Check the gradients of all parameters against central differences along two directions each."""
    generator, step = torch.Generator().manual_seed(2), 1e-6
    function().backward()
    for p in parameters:
        for _ in range(2):
            direction, values = torch.randn(p.shape, generator=generator, dtype=p.dtype), []
            for sign in (1, -2, 1):  # forwards, to the other side, and back
                with torch.no_grad():
                    p.add_(direction, alpha=sign * step)
                values.append(function().item())
            expected = (values[0] - values[1]) / (2 * step)
            assert abs(expected) > 1e-5
            assert (p.grad * direction).sum().item() == pytest.approx(expected, abs=1e-7, rel=1e-5)


def test_a_gradient_penalty():
    net, x = trellisnet(weight_norm=False)
    x.requires_grad_()

    def penalty():
        (grad,) = torch.autograd.grad(net(x).output.sum(), x, create_graph=True)
        return (grad.norm() - 1).square()

    check_gradients(penalty, net.parameters())


@pytest.mark.parametrize("head", ["plain", "mixture", "split"])
def test_a_step_of_maml(head):
    """Differentiate through a step of gradient descent to the loss on other data after it."""
    torch.manual_seed(0)
    kind = {"mixture": {"n_experts": 2}, "split": {"cutoffs": [2]}}.get(head, {})
    model = TrellisLanguageModel(5, 3, 4, 3, output_size=3, dtype=torch.float64, **kind)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    parameters = dict(model.named_parameters())

    def loss(named, tokens):
        class Loss(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return self.model.loss(self.model(tokens[:, :-1]).output, tokens[:, 1:])

        return torch.func.functional_call(Loss(), {f"model.{name}": p for name, p in named.items()})

    def outer():
        inner = loss(parameters, torch.tensor([[0, 3, 1, 4]]))
        grads = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        fast = {name: p - 0.5 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
        return loss(fast, torch.tensor([[2, 4, 0, 1]]))

    check_gradients(outer, parameters.values())


def test_third_derivatives():
    derivatives = []
    for backend in ("fused", "reference"):
        net, x = trellisnet(backend)
        grad = x.requires_grad_()
        value = net(x).output.square().sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.square().sum()
        derivatives.append(torch.autograd.grad(value, x)[0])
    assert_close(*derivatives, **EXACT)
    assert derivatives[0].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_they_are_as_good_as_in_float32(dtype):
    """So are first derivatives, with create_graph or without."""
    torch.manual_seed(0)
    model = TrellisLanguageModel(20, 8, 16, 6, output_size=8)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    tokens = torch.randint(20, (3, 9))

    def gradients(model, enabled, create_graph):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = model.loss(model(tokens[:, :-1]).output, tokens[:, 1:])
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
        if not create_graph:
            return first
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))

    low = gradients(model, dtype != torch.float32, create_graph=True)
    first = gradients(model, dtype != torch.float32, create_graph=False)
    exact = gradients(model.double(), False, create_graph=True)
    scale = 1e-4 if dtype == torch.float32 else 5e-2
    for ours, truth in zip((low[0], first, low[1]), (exact[0], exact[0], exact[1]), strict=True):
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= scale * b.norm() + 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns of its own code
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_torch_func(kind):
    """`auto` and the heads fall back to the reference."""
    torch.manual_seed(0)
    model = TrellisLanguageModel(5, 2, 4, 3, output_size=2, dtype=torch.float64, **kind)
    tokens, bias = torch.tensor([[0, 3, 4, 2]]), model.core.bias.detach().clone()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.loss(self.model(tokens[:, :-1]).output, tokens[:, 1:])

    def loss(bias):
        return torch.func.functional_call(Loss(), {"model.core.bias": bias})

    assert_close(torch.func.hessian(loss)(bias), torch.autograd.functional.hessian(loss, bias), **EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_per_sequence(kind):
    torch.manual_seed(0)
    model = TrellisLanguageModel(5, 2, 4, 3, output_size=2, dtype=torch.float64, **kind)
    tokens, targets = torch.randint(5, (2, 3, 4))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, targets):
            return self.model.loss(self.model(tokens[None]).output, targets[None])

    parameters = dict(Loss().named_parameters())

    def loss(parameters, *batch):
        return torch.func.functional_call(Loss(), parameters, batch)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, tokens, targets)
    for i in range(3):
        one = torch.autograd.grad(Loss()(tokens[i], targets[i]), list(parameters.values()))
        assert_close([gradient[i] for gradient in each.values()], list(one), **EXACT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"last_only": True}, {"start": 1}, {"lengths": [1, 3]}, {"aux_every": 2}])
def test_transforms_of_a_core(options):
    net, _ = trellisnet("auto")
    x = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    expected = torch.stack([net(one, **options).output for one in x])
    assert_close(torch.func.vmap(lambda one: net(one, **options).output)(x), expected, **EXACT)
    value, tangent = torch.func.jvp(lambda one: net(one, **options).output, (x[0],), (x[1],))
    jacobian = torch.autograd.functional.jacobian(lambda one: net(one, **options).output, x[0])
    assert_close((value, tangent), (expected[0], (jacobian * x[1]).sum((-3, -2, -1))), **EXACT)


def test_a_transform_that_cannot_be_says_so_in_one_sentence():
    net, x = trellisnet("auto")
    stream = net.init_stream(1)
    for call in (lambda z: net.stream(z, stream)[0], lambda z: net.step(z[:, 0], stream)[0]):
        with pytest.raises(ValueError, match="^stream: torch.func cannot transform it; call the network on whole"):
            torch.func.vmap(call)(x[None])
    net, x = trellisnet("auto", recompute=True)
    with pytest.raises(ValueError, match="torch.func cannot transform it; turn recompute off"):
        torch.func.grad(lambda z: net(z).output.sum())(x)


def test_python_code_that_records_operations_or_carries_them_out_sees_all_of_them():
    """In float32, because gate kernels in C write into memory unseen; tensors may have none."""
    torch.manual_seed(0)
    net, (x, other) = TrellisNet(4, 8, 5, init_gain=2), torch.randn(2, 2, 3, 4)
    parameters, stream = list(net.parameters()), net.init_stream(2)

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), parameters)

    for call in (lambda z: net.step(z[:, 0], stream)[0], lambda z: gradients(net(z).output)):
        assert_close(make_fx(call)(x)(other), call(other))

    def kept(*_, **__):
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, kept)
    output, *_ = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
    assert_close(gradients(output), gradients(net(x).output))
    with FakeTensorMode():
        for options in ({}, {"backend": "fused"}):
            net = TrellisNet(4, 8, 5, **options)
            net(torch.empty(2, 3, 4)).output.sum().backward()
            assert net.step(torch.empty(2, 4), net.init_stream(2))[0].shape == (2, 8)
    net, two = TrellisNet(4, 8, 5, init_gain=2), TwoTensor(x.clone(), other.clone())
    assert_close(net(two).output.b, net(other).output)
    h, c = net(other).state
    state = (TwoTensor(h, 2 * h), TwoTensor(c, 2 * c))
    assert_close(net(x, state).output.b, net(x, (2 * h, 2 * c)).output)
    for read in (lambda: net.step(two[:, 0], net.init_stream(2)), lambda: net.stream(two, net.init_stream(2))):
        with pytest.raises(ValueError, match="x: a stream cannot read tensors of class TwoTensor; pass plain tensors"):
            read()
    with pytest.raises(ValueError, match="fused: cannot run on tensors of class TwoTensor; take backend='reference'"):
        TrellisNet(4, 8, 5, backend="fused")(two)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_missing_kinds_of_derivatives_name_the_reference():
    net, x = trellisnet("fused")
    with pytest.raises(ValueError, match="fused cannot run this, torch.func cannot transform it; expected auto or ref"):
        torch.func.hessian(lambda z: net(z).output.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(
            NotImplementedError, match='fused has no forward-mode derivatives; take backend="reference"'
        ):
            net(dual)
        assert torch.autograd.forward_ad.unpack_dual(trellisnet("reference")[0](dual).output).tangent.abs().max() > 1e-2


def test_ordinary_and_differentiable_backward_passes_in_any_order():
    net, x = trellisnet()
    head = LinearSoftmax(8, 5, dtype=torch.float64)
    wanted = [x.requires_grad_(), *net.parameters(), *head.parameters()]
    loss = head.loss(net(x).output, torch.tensor([[0, 3, 1]]))
    results = [
        torch.autograd.grad(loss, wanted, retain_graph=True, create_graph=create_graph)
        for create_graph in (True, False, False, True)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(a, b, **EXACT)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in results[i]), wanted, retain_graph=True) for i in (0, 3)
    ]
    for a, b in zip(*seconds, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [False, True])
def test_no_extra_memory_is_stored_for_them(low):
    """The rows of x, from which x̃ can be recomputed, share the memory that torch's own product stores."""
    net, saved = TrellisNet(3, 4, 5, gemm="mm"), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(7, 11, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=low):
        net(x).output.sum().backward()
    rows = [t for t in saved if t.numel() == 11 * 7 * 6]
    kernels = [t for t in saved if tuple(t.shape) in ((16, 6), (6, 16))]
    for same in (rows, kernels):
        assert len(same) == 2
        assert len({t.untyped_storage().data_ptr() for t in same}) == 1
        assert same[0].dtype == (torch.bfloat16 if low else torch.float32)


def test_an_ordinary_backward_pass_does_not_recompute(monkeypatch):
    def refused(*args):
        raise AssertionError("not the hand-written pass")

    monkeypatch.setattr("trellisnet.ops.higher_order.gradients", refused)
    model = TrellisLanguageModel(5, 3, 4, 3, output_size=3)
    model.loss(model(torch.tensor([[1, 2]])).output, torch.tensor([[2, 3]])).backward()
    assert all(p.grad is not None for p in model.parameters())
