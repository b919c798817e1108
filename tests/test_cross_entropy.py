"""The chunked loss against its definition: values, gradients, precision, and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from trellisnet.heads import LinearSoftmax, MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.models import TrellisLanguageModel
from trellisnet.ops import cross_entropy as module
from trellisnet.ops.cross_entropy import cross_entropy, reference
from trellisnet.training.tasks import LanguageModeling

EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture
def in_chunks(monkeypatch):
    """Limit the rows of a product, and make them a multiple of `bucket`."""

    def call(rows, bucket=1):
        for name, value in {"CHUNK": 0, "ROWS": rows, "BUCKET": bucket}.items():
            monkeypatch.setattr(module, name, value)

    return call


def inputs(P, K, E=4, V=9, dtype=torch.float64):
    """Draw x, weight, bias, log_prior (None for one expert), all requiring gradients; then targets and weights."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((P, K, E), (V, E), (V,)))
    log_prior = torch.randn(P, K, dtype=dtype).log_softmax(1).requires_grad_() if K > 1 else None
    return (x, weight, bias, log_prior), torch.randint(V, (P,)), torch.rand(P, dtype=dtype)


def call(tensors, target, scale=None, **options):
    x, weight, bias, log_prior = tensors
    return cross_entropy(x, weight, bias, target, scale, log_prior=log_prior, **options)


def gradients(value, tensors, **options):
    return torch.autograd.grad(value, [t for t in tensors if t is not None], **options)


@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("K", "epsilon"), [(1, 0.0), (3, 0.0), (3, 1e-2)])
def test_values_and_gradients_equal_the_definition(in_chunks, rows, bucket, K, epsilon):
    in_chunks(rows, bucket)
    tensors, target, scale = inputs(23, K)

    def ours():
        return call(tensors, target, scale, log_epsilon=epsilon)

    def theirs():
        losses = reference(*tensors[:3], target, tensors[3], epsilon)
        return (scale * losses).sum(), losses

    for a, b in zip(ours(), theirs(), strict=True):
        assert_close(a, b, **EXACT)
    for function in (lambda total, _: 3 * total, lambda _, losses: losses.square().sum()):
        pairs = (gradients(function(*make()), tensors) for make in (ours, theirs))
        for a, b in zip(*pairs, strict=True):
            assert_close(a, b, **EXACT)
    expected = theirs()[1].detach()
    with torch.no_grad():
        assert_close(call(tensors, target, log_epsilon=epsilon)[1], expected, **EXACT)


def test_an_impossible_target_has_a_finite_loss():
    tensors, target, _ = inputs(5, 1)
    with torch.no_grad():
        tensors[2][target] -= 900.0  # probabilities that underflow even in float64
    assert_close(
        call(tensors, target)[1], -(tensors[0] @ tensors[1].T + tensors[2]).log_softmax(2)[range(5), 0, target]
    )


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(("K", "epsilon"), [(1, 0.0), (2, 1e-2)])
def test_gradients_of_sum_and_losses_are_exact(in_chunks, rows, K, epsilon):
    in_chunks(rows)
    tensors, target, scale = inputs(9, K, E=2, V=5)

    def run(x, weight, bias, log_prior=None):
        return cross_entropy(x, weight, bias, target, scale, log_prior=log_prior, log_epsilon=epsilon)

    assert torch.autograd.gradcheck(run, [t for t in tensors if t is not None])


def test_gradients_of_sum_and_losses_together():
    tensors, target, scale = inputs(9, 2)
    total, losses = call(tensors, target, scale)
    expected = reference(*tensors[:3], target, tensors[3])
    ours = gradients(2 * total + losses.square().sum(), tensors)
    for a, b in zip(ours, gradients(2 * scale @ expected + expected.square().sum(), tensors), strict=True):
        assert_close(a, b, **EXACT)


def test_a_second_backward_pass_equals_the_first():
    tensors, target, scale = inputs(9, 2)
    total, _ = call(tensors, target, scale)
    first = gradients(total / 3, tensors, retain_graph=True)
    copies = [g.clone() for g in first]
    for a, b, c in zip(first, gradients(total / 3, tensors), copies, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_unneeded_gradients_take_no_product(in_chunks):
    in_chunks(1000)
    for frozen in (0, 1):
        tensors, target, scale = inputs(9, 2)
        tensors[frozen].requires_grad_(False)
        with Watch() as seen:
            call(tensors, target, scale)[0].backward()
        assert seen.products == 2
        assert tensors[frozen].grad is None
        assert tensors[2].grad is not None
    with Watch() as seen, torch.no_grad():
        assert not call(tensors, target, scale)[0].requires_grad
    assert seen.products == 1


class Watch(TorchDispatchMode):
    """Records the largest tensor, the number of matrix products, and their numbers of rows."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0
        self.rows = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        name = function.name()
        if name.startswith(("aten::mm", "aten::addmm", "mkldnn::_linear")):
            self.products += 1
            self.rows.add(args[0].size(0))
        return out


def test_products_have_few_shapes(in_chunks):
    """Few, because oneDNN keeps a megabyte or more for every distinct number of rows."""
    in_chunks(32, bucket=16)
    seen = []
    for P in range(1, 60):
        tensors, target, scale = inputs(P, 1, E=4, V=5, dtype=torch.float32)
        with Watch() as watch:
            call(tensors, target, scale)[0].backward()
        seen.append(watch.rows)
    assert set.union(*seen[1:]) == {5, 16, 32}  # 5: the gradient of the matrix


V, E, P = 2000, 8, 600


def one_step(head, **latent):
    x = torch.randn(3, P // 3, head.in_features, requires_grad=True)
    head.loss(x, torch.randint(head.n_classes - 1, head.n_classes, (3, P // 3)), **latent).backward()


def single(head):
    x = torch.randn(3, P // 3, head.in_features, requires_grad=True)
    head.loss(x, torch.randint(V, (3, P // 3)), "none").square().sum().backward()


def auxiliary(head):
    kind = {MixtureOfSoftmaxes: {"n_experts": 3}, SplitSoftmax: {"cutoffs": [100, 300]}}.get(type(head), {})
    model = TrellisLanguageModel(V, E, 2 * E, 4, output_size=E, **kind)
    task = LanguageModeling(model, horizon=P // 3, repackage=True, aux_weight=0.1, aux_every=1)
    task.loss(torch.randint(V, (3, P // 3)), torch.randint(300, V, (3, P // 3)))[0]["loss"].backward()


@pytest.mark.parametrize("step", [one_step, single, auxiliary])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearSoftmax(E, V),
        lambda: MixtureOfSoftmaxes(E, V, 3, E, dropout=0.2, log_epsilon=1e-8),
        lambda: SplitSoftmax(E, V, [100, 300]),
    ],
    ids=["linear", "mixture", "split"],
)
def test_no_head_holds_all_logits(in_chunks, make, step):
    """No tensor of a forward and backward pass is larger than a chunk of logits or the features themselves."""
    in_chunks(24)
    torch.manual_seed(0)
    with Watch() as seen:
        step(make())
    features = 5 * P * 3 * E  # a model with five outputs, four of them auxiliary, and three experts
    core = 5 * 768 * 4 * 2 * E  # gates of five layers, collected for one product, rows rounded up
    assert seen.largest <= max(24 * V, features, core)
    assert seen.largest < P * V / 8


@pytest.mark.parametrize(("device", "logits"), [("cpu", 1 << 21), ("meta", 1 << 26)])  # meta: as on a GPU
@pytest.mark.parametrize(("K", "V"), [(1, 10_000), (15, 10_000), (15, 50)])
def test_a_chunk_has_as_many_logits_as_the_device_can_take(device, logits, K, V):
    x, weight = torch.empty(900, K, 280, device=device), torch.empty(V, 280, device=device)
    setting = module._setting(x, weight, torch.float32, "mm", 0.0, True)
    spare = (K + setting.bucket) * V  # of a position that is left out, and to fill up the last bucket
    assert logits - spare < setting.positions * K * V <= max(logits, module.ROWS * V) + spare


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_length_times_the_vocabulary():
    """Peak memory of a process at 600 and 8000 positions; all logits of the latter would take 128 or 256 MB."""
    code = """
import torch
from trellisnet.heads import LinearSoftmax, MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.ops import cross_entropy
torch.set_num_threads(1)
cross_entropy.CHUNK = 1 << 19
def peak(positions):
    for head in (LinearSoftmax(16, 4000), MixtureOfSoftmaxes(16, 4000, 2, 16), SplitSoftmax(16, 4000, [10])):
        x = torch.randn(positions, 16, requires_grad=True)
        head.loss(x, torch.randint(4000, (positions,))).backward()
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024
before = peak(600)
print(peak(8000) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30


@pytest.mark.parametrize("gemm", ["mm", "auto"])
@pytest.mark.parametrize("K", [1, 3])
def test_float32_is_as_good_as_the_definition_in_float32(K, gemm):
    exact, target, scale = inputs(300, K, E=16, V=700)
    single = [None if t is None else t.detach().float().requires_grad_() for t in exact]
    truth = gradients(scale @ reference(*exact[:3], target, exact[3]), exact)
    plain = gradients(scale.float() @ reference(*single[:3], target, single[3]), single)
    ours = gradients(call(single, target, scale.float(), gemm=gemm)[0], single)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - t).norm() <= 4 * (b - t).norm()


def test_in_bfloat16_only_products_are_rounded():
    """Bias, softmax and losses keep float32: with a weight of zero nothing is lost."""
    (x, _, bias, _), target, scale = inputs(50, 1, E=4, V=30, dtype=torch.float32)
    zero = torch.zeros(30, 4, requires_grad=True)
    outcomes = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, losses = cross_entropy(x, zero, bias, target, scale)
        assert (total.dtype, losses.dtype) == (torch.float32, torch.float32)
        outcomes.append((total, losses, *torch.autograd.grad(total, [bias])))
        total, _ = cross_entropy(x, zero, bias, target, scale)
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_in_bfloat16_gradients_do_not_suffer_from_chunks(in_chunks):
    """Sums over 128 chunks in bfloat16 would have ten times the error."""
    tensors, target, scale = inputs(1024, 1, E=16, V=50)
    truth = gradients(call(tensors, target, scale)[0], tensors)[1]
    single = [None if t is None else t.detach().float().requires_grad_() for t in tensors]
    errors = []
    for rows in (1024, 8):
        in_chunks(rows)
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = call(single, target, scale.float())
        dx, dweight, dbias = gradients(total, single)
        assert {dx.dtype, dweight.dtype, dbias.dtype} == {torch.float32}
        errors.append(((dweight - truth).norm() / truth.norm()).item())
    assert errors[1] < 1.5 * errors[0] < 0.01


@pytest.mark.parametrize("make", [LinearSoftmax, lambda *size, **o: SplitSoftmax(*size, [5, 8], **o)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_the_heads_are_exact(in_chunks, make, reduction):
    in_chunks(4)
    torch.manual_seed(0)
    head = make(3, 11, dtype=torch.float64)
    check(head, torch.randn(3, 3, 3, dtype=torch.float64), torch.arange(9).view(3, 3) + 2, reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_a_mixture_are_exact(in_chunks, reduction):
    in_chunks(4)
    torch.manual_seed(0)
    head = MixtureOfSoftmaxes(3, 5, 2, 2, dropout=0.5, log_epsilon=1e-2, dtype=torch.float64)
    x, mask = torch.randn(3, 3, 3, dtype=torch.float64), torch.tensor([[[1, 0, 1, 1]], [[0, 1, 1, 1]], [[1, 1, 1, 0]]])
    check(head, x, torch.randint(5, (3, 3)), reduction, latent_mask=mask)


def check(head, x, target, reduction, **latent):
    names = [f"head.{name}" for name, _ in head.named_parameters()]
    parameters = [torch.randn_like(p).requires_grad_() for p in head.parameters()]

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(Loss(head), named, (x, target, reduction), latent)

    assert torch.autograd.gradcheck(run, [x.requires_grad_(), *parameters])


class Loss(torch.nn.Module):
    """Module whose forward pass is the loss of a head, for `functional_call`."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *args, **latent):
        return self.head.loss(*args, **latent)
