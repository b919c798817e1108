"""The softmax heads."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from trellisnet import heads
from trellisnet.heads import LinearSoftmax, MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.ops import cross_entropy


@pytest.fixture
def in_chunks(monkeypatch):
    """Set the number of logits per chunk, with no minimum of rows."""

    def call(logits):
        monkeypatch.setattr(heads, "CHUNK_LOGITS", logits)
        for name, value in {"CHUNK": logits, "ROWS": 1, "BUCKET": 1}.items():
            monkeypatch.setattr(cross_entropy, name, value)

    return call


def head():
    torch.manual_seed(0)
    module = LinearSoftmax(6, 11, dtype=torch.float64)
    nn.init.normal_(module.bias)
    return module, torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(11, (2, 5))


def test_log_prob_is_a_distribution_over_the_classes():
    module, x, _ = head()
    expected = torch.log_softmax(x @ module.weight.T + module.bias, dim=-1)
    assert_close(module.log_prob(x), expected)
    assert_close(module.log_prob(x).exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_loss_is_minus_the_targets_log_prob():
    module, x, target = head()
    expected = -module.log_prob(x).gather(-1, target[..., None])[..., 0]
    assert_close(module.loss(x, target, reduction="none"), expected)
    assert_close(module.loss(x, target, reduction="sum"), expected.sum())
    assert_close(module.loss(x, target), expected.mean())


def test_parameters_passed_in_are_shared():
    embedding = nn.Embedding(11, 6)
    module = LinearSoftmax(6, 11, weight=embedding.weight)
    assert module.weight is embedding.weight
    assert module.bias.abs().sum() == 0


def test_bad_input_is_named():
    module, x, target = head()
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none, got 'max'"):
        module.loss(x, target, reduction="max")
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 5\), got \(2, 4\)"):
        module.loss(x, target[:, :4])
    with pytest.raises(ValueError, match=r"weight: expected shape \(11, 6\), got \(11, 5\)"):
        LinearSoftmax(6, 11, weight=nn.Parameter(torch.zeros(11, 5)))


def mixture(n_experts=3, **options):
    torch.manual_seed(0)
    module = MixtureOfSoftmaxes(6, 11, n_experts, 4, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.7)
    return module, torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(11, (2, 5))


def by_definition(module, x):
    prior = (x @ module.prior.weight.T + module.prior.bias).softmax(-1)
    z = (x @ module.latent.weight.T + module.latent.bias).tanh().unflatten(-1, (module.n_experts, -1))
    return (prior[..., None] * (z @ module.weight.T + module.bias).softmax(-1)).sum(-2)


@pytest.mark.parametrize("chunk", [1, 100, 2**23])
def test_the_mixture_equals_its_definition(in_chunks, chunk):
    in_chunks(chunk)
    module, x, target = mixture()
    expected = by_definition(module, x).log()
    assert_close(module.log_prob(x), expected)
    assert_close(module.log_prob(x).exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))
    nll = -expected.gather(-1, target[..., None])[..., 0]
    assert_close(module.loss(x, target, reduction="none"), nll)
    assert_close(module.loss(x, target, reduction="sum"), nll.sum())
    assert_close(module.loss(x, target), nll.mean())
    with torch.no_grad():
        assert_close(module.loss(x, target), nll.mean())
    parameters = list(module.parameters())
    ours = torch.autograd.grad(module.loss(x, target), parameters)
    theirs = torch.autograd.grad(-by_definition(module, x).log().gather(-1, target[..., None]).mean(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_one_expert_is_a_single_softmax():
    module, x, _ = mixture(n_experts=1)
    plain = LinearSoftmax(4, 11, weight=module.weight, bias=module.bias)
    assert_close(module.log_prob(x), plain.log_prob(torch.tanh(module.latent(x))))


@pytest.mark.parametrize("chunk", [40, 2**23])
def test_the_mixtures_gradients_are_exact(in_chunks, chunk):
    in_chunks(chunk)
    module, x, target = mixture(log_epsilon=1e-3)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *tensors):
        call = lambda method, *args: torch.func.functional_call(  # noqa: E731
            _Method(module, method), dict(zip([f"module.{n}" for n in names], tensors, strict=True)), args
        )
        return call("log_prob", x), call("loss", x, target)

    inputs = [x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(run, inputs)


class _Method(nn.Module):
    def __init__(self, module, method):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args):
        return getattr(self.module, self.method)(*args)


def test_epsilon_enters_log_prob_and_loss_alike():
    module, x, target = mixture(log_epsilon=1e-2)
    p = by_definition(module, x)
    assert_close(module.log_prob(x), (p + 1e-2).log())
    assert_close(module.loss(x, target), -(p + 1e-2).log().gather(-1, target[..., None]).mean())


def test_improbable_words_keep_their_precision_in_log_space():
    module, x, _ = mixture()
    with torch.no_grad():
        module.bias[3] -= 900.0  # a probability that underflows even in float64
    log_p = module.log_prob(x)
    assert torch.isfinite(log_p).all()
    assert (log_p[..., 3] < -800).all()


def test_latent_dropout_has_one_mask_per_sequence_and_precedes_the_tanh():
    module, x, target = mixture(dropout=0.5)
    mask = torch.randint(2, (2, 1, 12))
    z = (module.latent(x) * mask / 0.5).tanh().unflatten(-1, (3, 4))
    prior = module.prior(x).softmax(-1)[..., None]
    expected = (prior * (z @ module.weight.T + module.bias).softmax(-1)).sum(-2).log()
    for mode in (module.train(), module.eval()):
        assert_close(mode.log_prob(x, latent_mask=mask), expected)
        expected_loss = -expected.gather(-1, target[..., None]).mean()
        assert_close(mode.loss(x, target, latent_mask=mask), expected_loss)
    module.train()
    assert not torch.equal(module.log_prob(x), module.log_prob(x))
    assert torch.equal(module.log_prob(x, draw=False), module.eval().log_prob(x))
    state = torch.get_rng_state()
    module.loss(x, target)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_settings_of_the_mixture_are_named():
    module, x, target = mixture(dropout=0.5)
    with pytest.raises(ValueError, match=r"latent_mask: expected shape \(2, 1, 12\), got \(2, 12\)"):
        module.log_prob(x, latent_mask=torch.ones(2, 12))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        module.loss(x, target, reduction="max")
    with pytest.raises(ValueError, match="n_experts: expected at least 1, got 0"):
        mixture(n_experts=0)
    with pytest.raises(ValueError, match=r"weight: expected shape \(11, 4\), got \(11, 6\)"):
        mixture(weight=nn.Parameter(torch.zeros(11, 6)))


@pytest.mark.slow
def test_the_mixture_of_the_paper_needs_less_than_300_megabytes():
    """Forward and backward pass at N·L = 832, K = 15, V = 10,000, where all logits at once take 500 MB per copy."""
    code = """
import torch
from trellisnet.heads import MixtureOfSoftmaxes
from trellisnet.training.runlog import peak_memory  # getrusage would count the process that started this one
torch.manual_seed(0)
head = MixtureOfSoftmaxes(480, 10_000, 15, 280, dropout=0.29).train()
x, target = torch.randn(16, 52, 480, requires_grad=True), torch.randint(10_000, (16, 52))
small = MixtureOfSoftmaxes(8, 50, 2, 8)
small.loss(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)).backward()  # makes torch load its lazy parts
before = peak_memory(x.device)
head.loss(x, target).backward()
print((peak_memory(x.device) - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"peak {float(done.stdout):.0f} MB")
    assert 30 < float(done.stdout) < 300


def split(cutoffs=(3, 7, 15), n_classes=23):
    torch.manual_seed(0)
    module = SplitSoftmax(6, n_classes, cutoffs, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.7)
    return module, torch.randn(4, 9, 6, dtype=torch.float64), torch.randint(n_classes, (4, 9))


def test_a_split_softmax_is_a_distribution_over_the_vocabulary():
    module, x, target = split()
    log_p = module.log_prob(x)
    assert log_p.shape == (4, 9, 23)
    assert_close(log_p.exp().sum(-1), torch.ones(4, 9, dtype=torch.float64))
    expected = -log_p.gather(-1, target[..., None])[..., 0]
    assert_close(module.loss(x, target, reduction="none"), expected)
    assert_close(module.loss(x, target, reduction="sum"), expected.sum())
    assert_close(module.loss(x, target), expected.mean())


def test_band_entries_are_in_reversed_order():
    """Band i of the head softmax is the vector −i, as in the authors' code."""
    module, x, _ = split()
    head = torch.cat([module.weight[:3], module.tail_vectors]), torch.cat([module.bias[:3], module.tail_bias])
    log_head = torch.log_softmax(x @ head[0].T + head[1], dim=-1)
    log_p = module.log_prob(x)
    for i, (low, high) in enumerate([(3, 7), (7, 15), (15, 23)], 1):
        assert_close(log_p[..., low:high].logsumexp(-1), log_head[..., -i])


@pytest.mark.parametrize("chunk", [1, 40, 2**22])
@pytest.mark.parametrize("words", [(0, 23), (0, 3), (3, 7), (15, 23), (22, 23)])
def test_the_loss_of_a_split_softmax_has_the_gradients_of_its_table(in_chunks, chunk, words):
    in_chunks(chunk)
    module, x, _ = split()
    target = torch.randint(*words, (4, 9))
    inputs = [x.requires_grad_(), *module.parameters()]
    table = -module.log_prob(x).gather(-1, target[..., None]).mean()
    expected = torch.autograd.grad(table, inputs)
    for ours, theirs in zip(torch.autograd.grad(module.loss(x, target), inputs), expected, strict=True):
        assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(module.loss(x, target), table)


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [7, 3], [5, 23], [30]])
def test_cutoffs_that_do_not_increase_below_the_vocabulary_are_refused(cutoffs):
    with pytest.raises(ValueError, match="cutoffs: expected increasing numbers between 0 and 23, got"):
        SplitSoftmax(6, 23, cutoffs)


def test_a_split_softmax_shares_parameters_and_starts_with_equal_bands():
    embedding = nn.Embedding(11, 6)
    module = SplitSoftmax(6, 11, [4, 8], weight=embedding.weight)
    assert module.weight is embedding.weight
    assert module.tail_vectors.shape == (2, 6)
    assert module.tail_bias.tolist() == [0, 0]
    assert not module.tail_vectors.any()
    with pytest.raises(ValueError, match=r"target: expected shape \(2,\), got \(3,\)"):
        module.loss(torch.randn(2, 6), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("make", [head, mixture, split])
def test_losses_of_several_features_equal_the_individual_ones(make):
    module, x, target = make()
    x = torch.stack([x, 2 * x, -x]).requires_grad_()
    weights = [1.0, 0.3, 0.0]
    total, each = module.losses(x, target, weights)
    expected = torch.stack([module.loss(features, target) for features in x])
    assert_close(each, expected)
    assert_close(total, expected @ torch.tensor(weights, dtype=x.dtype))
    for ours, theirs in [(total, expected @ torch.tensor(weights, dtype=x.dtype)), (each[2], expected[2])]:
        inputs = [x, *module.parameters()]
        pairs = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (ours, theirs))
        for a, b in zip(*pairs, strict=True):
            assert_close(a, b)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, .*, 6\), got \(3, "):
        module.losses(x, target, weights[:2])


def test_loss_and_margin_together_give_label_smoothing():
    module, x, target = head()
    tensors = [x.requires_grad_(), module.weight, module.bias]
    smoothed = module.loss(x, target) + 0.1 * module.margin(x, target).mean()
    expected = nn.functional.cross_entropy(module.logits(x).flatten(0, 1), target.flatten(), label_smoothing=0.1)
    assert_close(smoothed, expected)
    for a, b in zip(torch.autograd.grad(smoothed, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert_close(a, b)
