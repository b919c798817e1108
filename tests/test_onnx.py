"""ONNX: exported networks and steps give in onnxruntime what they give here; skipped without the extra `onnx`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from test_streaming import Piece
from trellisnet import TrellisNet
from trellisnet.models import TrellisLanguageModel

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter


def exported(module, arguments, path, **options):
    """Export, and return the program as a function of tensors."""
    with torch.no_grad():
        torch.onnx.export(module, arguments, path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tensors):
        names = [argument.name for argument in session.get_inputs()]
        outputs = session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return run


def test_a_network_of_dynamic_batch_and_length(tmp_path):
    net = TrellisNet(3, 8, 4, dilation=(1, 2), output_size=5, weight_norm=True, hidden_dropout=0.5).eval()
    shapes = {"x": {0: torch.export.Dim("N"), 1: torch.export.Dim("L", min=2)}}
    run = exported(net, (torch.randn(2, 9, 3),), tmp_path / "net.onnx", dynamic_shapes=shapes)
    for x in (torch.randn(2, 9, 3), torch.randn(5, 40, 3)):
        out = net(x)
        assert_close(run(x), [out.output.detach(), *(s.detach() for s in out.state)])


SLOW_HEADS = [pytest.param(options, marks=pytest.mark.slow) for options in ({"n_experts": 2}, {"cutoffs": [8]})]


@pytest.mark.parametrize("options", [{}, *SLOW_HEADS], ids=["softmax", "mixture", "split"])
def test_probabilities_and_losses_of_a_language_model(tmp_path, options):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = TrellisLanguageModel(20, 4, 6, 3, output_size=4, **options)

        def forward(self, tokens, targets):
            output = self.model(tokens).output
            return self.model.head.log_prob(output), self.model.loss(output, targets)

    scores, batch = Scores().eval(), torch.randint(20, (2, 3, 7))
    run = exported(scores, tuple(batch), tmp_path / "scores.onnx")
    assert_close(run(*batch), [part.detach() for part in scores(*batch)])


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"activation": "gru", "dilation": (1, 2), "kernel_size": 3}, marks=pytest.mark.slow)],
    ids=["plain", "gru"],
)
def test_a_step_of_a_stream(tmp_path, options):
    net, x = TrellisNet(3, 8, 3, output_size=5, **options).eval(), torch.randn(2, 9, 3)
    stream = net.init_stream(2)
    state = [stream.x, *stream.h, *stream.c]
    run = exported(Piece(net, "step"), (x[:, 0], *state), tmp_path / "step.onnx")
    for t in range(9):
        output, *state = run(x[:, t], *state)
        assert_close(output, net(x[:, : t + 1]).output[:, -1].detach())


def test_fused_says_that_onnx_does_not_have_it(monkeypatch):
    for module, name in ((torch.compiler, "is_compiling"), (torch.onnx, "is_in_onnx_export")):
        monkeypatch.setattr(module, name, lambda: True)
    with pytest.raises(ValueError, match="^backend: fused cannot run this, ONNX does not have it; expected auto or"):
        TrellisNet(3, 4, 2, backend="fused")(torch.randn(2, 9, 3))
