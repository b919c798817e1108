"""Names, signatures and shapes that other code relies on."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import trellisnet
from trellisnet.data.corpus import batchify
from trellisnet.heads import MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.regularization import Masks
from trellisnet.theorem1 import from_lstm, from_rnn
from trellisnet.training.tasks import LanguageModeling
from trellisnet.weights import load_weights, parameter_map, save_weights

N, L, C, E, H, OUT, LAYERS, V, K = 2, 5, 3, 4, 6, 4, 4, 11, 3
MASKS = "embedding, input, weight_x, weight_h, hidden, output, aux, latent, latent_aux"
# Parameters beyond these must have defaults.
SIGNATURES = [
    (
        trellisnet.TrellisNet,
        "input_size, hidden_size, num_layers, *, output_size=None, kernel_size=2, dilation=(1,), weight_norm=True, "
        "hidden_dropout=0.0, weight_dropout=0.0, temporal_weight_dropout=True, activation='lstm', kernel_groups=None, "
        "inject_every=1, recompute=False, backend='auto', device=None, dtype=None",
    ),
    (
        trellisnet.TrellisNet.forward,
        "self, x, state=None, *, aux_every=None, last_only=False, num_layers=None, masks=None",
    ),
    (trellisnet.TrellisNet.init_stream, "self, batch_size, *, num_layers=None"),
    (trellisnet.TrellisNet.stream, "self, x, stream"),
    (trellisnet.TrellisNet.step, "self, x_t, stream"),
    (
        TrellisLanguageModel,
        "vocab_size, embedding_size, hidden_size, num_layers, *, output_size, tied=True, n_experts=0, cutoffs=None, "
        "embedding_dropout=0.0, input_dropout=0.0, output_dropout=0.0, latent_dropout=0.0, log_epsilon=0.0, "
        "freeze_last_embedding=False, **options",
    ),
    (TrellisLanguageModel.forward, "self, tokens, state=None, *, aux_every=None, masks=None"),
    (TrellisLanguageModel.log_prob, "self, output, *, latent_mask=None"),
    (TrellisLanguageModel.loss, "self, output, target, *, latent_mask=None, reduction='mean'"),
    (
        TrellisClassifier,
        "input_size, num_classes, hidden_size, num_layers, *, output_size=None, input_dropout=0.0, "
        "output_dropout=0.0, **options",
    ),
    (TrellisClassifier.forward, "self, x, state=None, *, lengths=None, masks=None"),
    (
        MixtureOfSoftmaxes,
        "in_features, n_classes, n_experts, embedding_size, *, weight=None, bias=None, dropout=0.0, log_epsilon=0.0",
    ),
    (SplitSoftmax, "in_features, n_classes, cutoffs, *, weight=None, bias=None"),
    (SplitSoftmax.log_prob, "self, x"),
    (SplitSoftmax.loss, "self, x, target, reduction='mean', **latent"),
    (Masks, ", ".join(f"{name}=None" for name in MASKS.split(", "))),
    (
        LanguageModeling,
        "model, *, horizon, seq_len=0, repackage=False, aux_weight=0.0, aux_every=None, alpha=0.0, beta=0.0",
    ),
    (LanguageModeling.windows, "self, rows, training=True"),
    (LanguageModeling.loss, "self, inputs, targets, state=None, masks=None"),
    (LanguageModeling.evaluate, "self, rows"),
    (batchify, "ids, batch_size"),
    (load_weights, "model, path, *, init_tail=False"),
    (save_weights, "model, path, *, legacy=False"),
    (parameter_map, "model"),
    (from_lstm, "lstm, horizon"),
    (from_rnn, "rnn, horizon"),
]


@pytest.mark.parametrize(("function", "promised"), SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES])
def test_signature(function, promised):
    ours = inspect.signature(function).parameters
    promised = inspect.signature(eval(f"lambda {promised}: None")).parameters
    positional = [name for name, p in promised.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, parameter in promised.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    required = {name for name, p in ours.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    assert required <= promised.keys()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def core(**options):
    return trellisnet.TrellisNet(C, H, LAYERS, output_size=OUT, **options)


def language_model(**options):
    return TrellisLanguageModel(V, E, H, LAYERS, output_size=OUT, **options)


@pytest.mark.parametrize(("activation", "gates"), [("lstm", 4), ("gru", 3), ("tanh", 1)])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_parameters_of_the_core(activation, gates, weight_norm):
    shapes = {
        name: tuple(p.shape) for name, p in core(activation=activation, weight_norm=weight_norm).named_parameters()
    }
    GH = gates * H
    kernels = {"weight_x": (GH, C, 2), "weight_h": (GH, H, 2)}
    if weight_norm:
        kernels = {f"{n}_v": s for n, s in kernels.items()} | dict.fromkeys(("weight_x_g", "weight_h_g"), (GH, 1, 1))
    assert shapes == kernels | {"bias": (GH,)}


def test_forward():
    net, x = core(hidden_dropout=0.5), torch.randn(N, L, C)
    masks = Masks(hidden=torch.ones(N, H, 1))
    output, state, aux = net(x, None, aux_every=2, masks=masks)
    assert [tuple(t.shape) for t in (output, *state, *aux)] == [(N, L, OUT), (N, H), (N, H), (N, L, OUT), (N, L, OUT)]
    assert_close(aux[-1], output)
    assert output.requires_grad
    assert state[0].requires_grad
    last = net(x, last_only=True, masks=masks)
    assert_close(last.output, output[:, -1:])
    assert_close(last.state, state)
    assert net(x).aux == []
    deep = net(x, state, num_layers=7)
    assert deep.output.shape == (N, L, OUT)
    with pytest.raises(ValueError, match=f"expected .*{C}.*got"):
        net(torch.randn(N, L, C + 1))
    grouped = trellisnet.TrellisNet(C, H, LAYERS, kernel_groups=2)
    assert grouped(x).output.shape == (N, L, H)


def test_streams():
    net, x = core().eval(), torch.randn(N, L, C)
    first, stream = net.stream(x[:, :3], net.init_stream(N))
    y, stream = net.step(x[:, 3], stream)
    rest, _ = net.stream(x[:, 4:], stream)
    assert y.shape == (N, OUT)
    assert_close(torch.cat([first, y.unsqueeze(1), rest], 1), net(x).output)


HEADS = {"tied": {}, "untied": {"tied": False}, "mixture": {"n_experts": K}, "split": {"cutoffs": [4, 7]}}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_language_model(options, tmp_path):
    model = language_model(output_dropout=0.5, **options).eval()
    assert {name for name, _ in model.named_children()} >= {"embedding", "core", "head"}
    tokens = torch.randint(V, (N, L))
    output, raw_output, state, aux = model(tokens, aux_every=2)
    assert output.shape == raw_output.shape == aux[0].shape == (N, L, OUT)
    log_prob = model.log_prob(output)
    assert_close(log_prob.exp().sum(-1), torch.ones(N, L))
    losses = -log_prob.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    for reduction, expected in {"mean": losses.mean(), "sum": losses.sum(), "none": losses}.items():
        assert_close(model.loss(output, tokens, reduction=reduction), expected)
    assert model(tokens, state).output.shape == (N, L, OUT)

    names = parameter_map(model)
    assert {id(p) for p in names.values()} == {id(p) for p in model.parameters()}
    assert all(
        n.startswith(("encoder.", "decoder.", "tnet.module.full_conv.", "mixsoft.", "criterion.")) for n in names
    )
    for legacy in (False, True):
        save_weights(model, tmp_path / "w.pkl", legacy=legacy)
        other = language_model(**options).eval()
        assert load_weights(other, tmp_path / "w.pkl") == []
        assert_close(other(tokens).output, output)


def test_masks_of_a_language_model():
    """They act in evaluation too, scaled by the model's rates; None drops nothing."""
    rates = dict.fromkeys(("embedding_dropout", "input_dropout", "output_dropout", "latent_dropout"), 0.5)
    model = language_model(n_experts=K, hidden_dropout=0.5, weight_dropout=0.5, **rates).eval()
    tokens = torch.randint(V, (N, L))
    GH = 4 * H
    ones = Masks(
        embedding=torch.ones(V, 1), input=torch.ones(N, 1, E), weight_x=torch.ones(GH, E, 1),
        weight_h=torch.ones(GH, H, 1), hidden=torch.ones(N, H, 1), output=torch.ones(N, 1, OUT),
        aux=torch.ones(N, 2, 1, OUT), latent=torch.ones(N, 1, K * E), latent_aux=torch.ones(N, 2, 1, K * E),
    )  # fmt: skip
    assert not torch.equal(model(tokens, masks=ones).output, model(tokens).output)
    assert_close(model.train()(tokens, masks=Masks()).output, model.eval()(tokens).output)
    output = model(tokens).output
    assert model.log_prob(output, latent_mask=ones.latent).shape == (N, L, V)
    assert model.loss(output, tokens, latent_mask=ones.latent).ndim == 0
    task = LanguageModeling(model.train(), horizon=2, seq_len=L, aux_weight=0.1, aux_every=2)
    first, second = (task.loss(tokens, tokens, masks=ones)[0]["loss"] for _ in range(2))
    assert torch.equal(first, second)  # nothing is drawn


def test_split_softmax_without_tail_vectors(tmp_path):
    model = language_model(cutoffs=[4, 7])
    assert [*parameter_map(model)][-2:] == ["criterion.tail_vectors", "criterion.tail_bias"]
    save_weights(language_model(), tmp_path / "w.pkl")
    with pytest.raises(ValueError, match="another split"):
        load_weights(model, tmp_path / "w.pkl")
    state = torch.load(tmp_path / "w.pkl", weights_only=True)
    torch.save(dict(state), tmp_path / "w.pkl")  # as in the authors' files, without metadata
    with pytest.raises(ValueError, match=r"has no criterion\.tail_vectors"):
        load_weights(model, tmp_path / "w.pkl")
    assert load_weights(model, tmp_path / "w.pkl", init_tail=True)


def test_heads():
    x, target = torch.randn(N, L, E), torch.randint(V, (N, L))
    weight, bias = nn.Parameter(torch.randn(V, E)), nn.Parameter(torch.zeros(V))
    mixture = MixtureOfSoftmaxes(E, V, K, E, weight=weight, bias=bias, dropout=0.5, log_epsilon=1e-8)
    split = SplitSoftmax(E, V, [4, 7], weight=weight, bias=bias)
    assert all(head.weight is weight and head.bias is bias for head in (mixture, split))
    assert (tuple(split.tail_vectors.shape), tuple(split.tail_bias.shape)) == ((2, E), (2,))
    mask = torch.ones(N, 1, K * E)
    for log_prob, loss in (
        (mixture.log_prob(x, latent_mask=mask), mixture.loss(x, target, latent_mask=mask, reduction="none")),
        (split.log_prob(x), split.loss(x, target, reduction="none")),
    ):
        assert_close(-log_prob.gather(-1, target.unsqueeze(-1)).squeeze(-1), loss)


def test_classifier(tmp_path):
    model = TrellisClassifier(C, K, H, LAYERS, output_size=OUT, input_dropout=0.5, output_dropout=0.5).eval()
    x = torch.randn(N, L, C)
    logits, state = model(x)
    assert (tuple(logits.shape), tuple(state[0].shape)) == ((N, K), (N, H))
    assert_close(model(x, lengths=torch.tensor([3, L])).logits[0], model(x[:1, :3]).logits[0])
    masks = Masks(input=torch.ones(N, L, C), output=torch.ones(N, K))
    assert_close(model(x, masks=masks).logits, 2 * model(2 * x).logits)
    save_weights(model, tmp_path / "w.pkl")
    other = TrellisClassifier(C, K, H, LAYERS, output_size=OUT).eval()
    load_weights(other, tmp_path / "w.pkl")
    assert_close(other(x).logits, logits)
    assert all(name.startswith(("network.0.module.full_conv.", "linear.")) for name in parameter_map(model))


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        # (start, length) of every window of rows of 20 tokens, 19 of which have a target
        ({"horizon": 4, "seq_len": 9}, [(0, 9), (5, 9), (10, 9)], [(0, 9), (5, 9), (10, 9)]),
        ({"horizon": 8, "repackage": True}, [(0, 8), (8, 8), (16, 3)], [(0, 8), (8, 8), (16, 3)]),
    ],
)
def test_windows(options, training, evaluation):
    task, rows = LanguageModeling(language_model(), **options), batchify(torch.arange(41) % V, 2)
    assert rows.shape == (2, 20)
    for mode, expected in ((True, training), (False, evaluation)):
        windows = list(task.windows(rows, mode))
        assert [(start, inputs.size(1)) for start, inputs, _ in windows] == expected
        for start, inputs, targets in windows:
            assert torch.equal(inputs, rows[:, start : start + inputs.size(1)])
            assert torch.equal(targets, rows[:, start + 1 : start + 1 + inputs.size(1)])


@pytest.mark.parametrize("repackage", [True, False])
def test_language_modeling(repackage):
    options = {"horizon": 4, "seq_len": 0 if repackage else 9, "repackage": repackage}
    task = LanguageModeling(language_model(), aux_weight=0.1, aux_every=2, alpha=1.0, beta=1.0, **options)
    rows = batchify(torch.arange(41) % V, 2)
    _, inputs, targets = next(iter(task.windows(rows)))
    losses, state = task.loss(inputs, targets)
    assert losses.keys() == {"loss", "raw", "aux", "alpha", "beta"}
    assert all(term.ndim == 0 for term in losses.values())
    assert_close(losses["loss"], sum(losses[name] for name in ("raw", "aux", "alpha", "beta")))
    assert (state is not None) == repackage
    if repackage:
        assert not state[0].requires_grad
        losses, _ = task.loss(inputs, targets, state)
    losses["loss"].backward()
    assert task.model.core.bias.grad.abs().sum() > 0
    scores = task.evaluate(rows)
    assert scores["tokens"] == (19 - (0 if repackage else 4)) * 2
    assert scores["loss"] == pytest.approx(2.4, abs=0.3)  # ln 11
    assert task.model.training


def test_theorem_1():
    x = torch.randn(N, L, C)
    for kind, convert in ((nn.LSTM, from_lstm), (nn.RNN, from_rnn)):
        rnn = kind(C, H, num_layers=2, bias=False, batch_first=True)
        trellis = convert(rnn, L)
        assert isinstance(trellis, trellisnet.TrellisNet)
        assert trellis.output_size == H
        assert_close(trellis(x).output, rnn(x)[0])
