"""Padding of a batch with `lengths` has no influence, and packed sequences are refused."""

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from test_ops import trellis
from trellisnet import TrellisNet
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseStack
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import hide_padding

LENGTHS = [3, 7, 1]
MODELS = {
    "fused": {},
    "recompute": {"recompute": True},
    "dilated": {"dilation": (1, 2), "kernel_size": 3},
    "reference": {"backend": "reference"},
    "gru": {"activation": "gru"},
    "grouped": {"kernel_groups": 2},
    "dropout": {"input_dropout": 0.5},
    "tcn": {"core": TCN},
}


def padded(x, value):
    return hide_padding(x.detach(), torch.tensor(LENGTHS), value).requires_grad_(x.is_floating_point())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_classifier_does_not_see_padding(options, value):
    torch.manual_seed(0)
    model = TrellisClassifier(2, 5, 6, 4, **options).train()
    results = []
    for fill in (0, value):
        x = padded(torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0)), fill)
        torch.manual_seed(1)
        out = model(x, lengths=LENGTHS)
        loss = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 2]))
        results.append([loss, *out, *torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)])
    assert_close(*results, rtol=0, atol=0)
    gradient = results[1][3]
    assert torch.equal(gradient, hide_padding(gradient, torch.tensor(LENGTHS)))
    assert gradient[0, 2].abs().max() > 0


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_core_and_operator_do_not_see_padding(backend):
    torch.manual_seed(0)
    core = TrellisNet(2, 4, 3, backend=backend, weight_norm=False)
    kernels, options = (core.weight_x, core.weight_h, core.bias), {"num_layers": 3, "dilation": (1,), "output_size": 4}
    x, lengths = torch.randn(3, 7, 2), torch.tensor(LENGTHS)
    states, gradients = [], []
    for fill in (0, math.nan):
        filled = padded(x, fill)
        out = core(filled, lengths=lengths, aux_every=2)
        counts = [hide_padding(part, lengths) for part in (out.output, *out.aux)]
        assert all(part.isfinite().all() for part in (out.output, *out.aux))
        gradients.append(torch.autograd.grad(sum(part.square().sum() for part in (*counts, *out.state)), kernels))
        states.append(trellis(filled, *kernels, None, lengths=lengths, backend=backend, **options).state)
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("given", [LENGTHS, tuple(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)])
@pytest.mark.parametrize("core", [TrellisNet, TCN])
def test_lengths_may_be_a_list(given, core):
    model, x = TrellisClassifier(2, 5, 6, 4, core=core), torch.randn(3, 7, 2)
    logits = model(x, lengths=given).logits
    for row, n in enumerate(LENGTHS):
        assert_close(logits[row], model(x[row : row + 1, :n]).logits[0])
    with pytest.raises(ValueError, match=r"lengths: expected integers from 1 to 7, got \[3, 8, 1\]"):
        model(x, lengths=[3, 8, 1])
    with pytest.raises(ValueError, match=r"lengths: expected integers from 1 to 7, got \[3.0, 7.0, 1.0\]"):
        model(x, lengths=[3.0, 7.0, 1.0])
    with pytest.raises(ValueError, match=r"lengths: expected shape \(3,\), got \(2,\)"):
        model(x, lengths=[3, 7])


CORES = {"trellis": TrellisNet, "awd-lstm": AWDLSTM, "rhn": RHN, "tcn": TCN, "sparse": SparseStack}


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_a_packed_sequence_is_refused_in_one_line(core):
    packed = pack_padded_sequence(torch.randn(3, 7, 4), torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    message = "expected a padded tensor, got a PackedSequence; unpack it with torch.nn.utils.rnn.pad_packed_sequence"
    language = TrellisLanguageModel(5, 4, 4, 2, output_size=4, core=core)
    for module in (core(4, 4, 2), TrellisClassifier(4, 3, 4, 2, input_dropout=0.5, core=core)):
        with pytest.raises(TypeError, match=f"^x: {message}"):
            module(packed)
        with pytest.raises(TypeError, match="^x: expected a tensor, got list$"):
            module([[1.0]])
    with pytest.raises(TypeError, match=f"^tokens: {message}"):
        language(packed)
    if core is TrellisNet:
        core, stream = language.core, language.init_stream(3)
        for name, call in (
            ("x", core.stream),
            ("x_t", core.step),
            ("tokens", language.stream),
            ("tokens", language.step),
        ):
            with pytest.raises(TypeError, match=f"^{name}: {message}"):
                call(packed, stream)
