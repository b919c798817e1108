"""The operator: the equation as explicit loops, exact derivatives, and the dispatcher."""

import re
from dataclasses import fields, replace

import pytest
import torch
from torch.testing import assert_close

from trellisnet import ops

SHAPES = [
    pytest.param(2, (1,), 5, id="k2"),
    pytest.param(2, (1, 2, 4), 9, id="k2-dilated"),
    pytest.param(3, (1,), 5, id="k3"),
    pytest.param(3, (2, 1), 3, id="k3-dilation-longer-than-segment"),
    pytest.param(2, (4,), 1, id="one-step"),
]


def random_inputs(k, length, *, n=2, channels=3, hidden=4, requires_grad=False):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_(requires_grad)

    return {
        "x": draw(n, length, channels),
        "weight_x": draw(4 * hidden, channels, k),
        "weight_h": draw(4 * hidden, hidden, k),
        "bias": draw(4 * hidden),
        "h0": draw(n, hidden),
        "c0": draw(n, hidden),
    }


def trellis(x, weight_x, weight_h, bias, state, *, activation="lstm", recompute=0, **options):
    """Call `ops.trellis` with the fields of its spec and execution as keywords; `recompute` is `recompute_every`."""
    names = {field.name for field in fields(ops.TrellisSpec)} & options.keys()
    spec = {"activation": ops.ACTIVATIONS[activation], "kernel_size": weight_h.size(2)}
    spec |= {name: options.pop(name) for name in names}
    names = {field.name for field in fields(ops.Execution)} & options.keys()
    execution = {"recompute": recompute > 0, "recompute_every": recompute or None}
    execution |= {name: options.pop(name) for name in names}
    weights, execution = (weight_x, weight_h, bias), ops.Execution(**execution)
    return ops.trellis(x, weights, state, ops.TrellisSpec(**spec), execution=execution, **options)


def call(inputs, **options):
    inputs = dict(inputs)
    state = (inputs.pop("h0"), inputs.pop("c0"))
    return trellis(**inputs, state=state, **{"backend": "reference", **options})[:3]


def by_loops(x, weight_x, weight_h, bias, h0, c0, *, num_layers, dilation, scale=None):
    """Compute Eq. 19 and the gated activation unit by unit, as drawn in the paper's Figure 3."""
    n, length, _ = x.shape
    hidden, k = h0.size(1), weight_h.size(2)
    h = {t: torch.zeros(n, hidden, dtype=x.dtype) for t in range(length)}
    c = dict(h)
    for layer in range(num_layers):
        d = dilation[layer % len(dilation)]
        new_h, new_c = {}, {}
        for t in range(length):
            z = bias
            for tap in range(k):
                past = t - (k - 1 - tap) * d
                seen = h[past] if past >= 0 else h0
                z = z + (seen if scale is None else seen * scale) @ weight_h[:, :, tap].T
                if past >= 0:
                    z = z + x[:, past] @ weight_x[:, :, tap].T
            i, o, g, f = z.chunk(4, dim=1)
            before = c[t - d] if t - d >= 0 else c0
            new_c[t] = f.sigmoid() * before + i.sigmoid() * g.tanh()
            new_h[t] = o.sigmoid() * new_c[t].tanh()
        h, c = new_h, new_c
    return torch.stack(list(h.values()), dim=1), (h[length - 1], c[length - 1])


@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_equation_unit_by_unit(k, dilation, length, masked):
    inputs = random_inputs(k, length)
    scale = torch.tensor([[1.5, 0, 1.5, 0], [0, 1.5, 1.5, 1.5]], dtype=torch.float64) if masked else None
    output, state, _ = call(
        inputs, num_layers=6, dilation=dilation, output_size=4, hidden_scale=scale[:, :, None] if masked else None
    )
    expected, expected_state = by_loops(**inputs, num_layers=6, dilation=dilation, scale=scale)
    assert_close(output, expected, atol=1e-14, rtol=0)
    assert_close(state[0], expected_state[0], atol=1e-14, rtol=0)
    assert_close(state[1], expected_state[1], atol=1e-14, rtol=0)


@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
def test_gradients_are_exact(k, dilation, length):
    inputs = random_inputs(k, min(length, 4), requires_grad=True)
    scale = torch.tensor([2.0, 0, 2.0, 2.0], dtype=torch.float64).expand(2, 4)[:, :, None]

    def run(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        output, state, aux = call(
            named, num_layers=3, dilation=dilation, output_size=2, aux_every=2, hidden_scale=scale
        )
        return output, *state, *aux

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_output_is_the_last_channels_and_aux_counts_from_the_bottom():
    inputs = random_inputs(2, 5)
    full, state, aux = call(inputs, num_layers=6, dilation=(1,), output_size=4, aux_every=2)
    part, _, none = call(inputs, num_layers=6, dilation=(1,), output_size=3)
    assert torch.equal(part, full[:, :, 1:])
    assert none == []
    assert len(aux) == 3
    assert torch.equal(aux[-1], full)  # 6 is a multiple of 2
    shallow, _, _ = call(inputs, num_layers=4, dilation=(1,), output_size=4)
    assert torch.equal(aux[1], shallow)
    assert torch.equal(state[0], full[:, -1])


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend: expected one of auto, reference, fused, triton, got 'fast'"):
        call(random_inputs(2, 3), num_layers=1, dilation=(1,), output_size=4, backend="fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"num_layers": 2.0}, "num_layers: expected an integer, got 2.0"),
        ({"num_layers": True}, "num_layers: expected an integer, got True"),
        ({"dilation": (1, 1.5)}, "dilation: expected a sequence of integers ≥ 1, got (1, 1.5)"),
        ({"kernel_size": 3}, "weights: expected kernels of 3 taps, got 2"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(options, message):
    options = {"num_layers": 2, "dilation": (1,), "output_size": 4} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        call(random_inputs(2, 3), **options)


def test_a_spec_lists_the_dilation_of_every_layer():
    spec = ops.TrellisSpec(5, 1, ops.ACTIVATIONS["tanh"], dilation=[1, 4], inject_every=2)
    assert (spec.dilation, spec.dilations) == ((1, 4), (1, 4, 1, 4, 1))
    assert [spec.injected(layer) for layer in range(5)] == [True, False, True, False, True]
    assert replace(spec, num_layers=2).dilations == (1, 4)
    assert hash(spec) == hash(replace(spec))
    assert spec != replace(spec, num_layers=2)


def test_a_segment_is_about_the_root_of_the_depth():
    assert ops.Execution(recompute_every=3).segment(58) == 58
    assert ops.Execution(recompute=True, recompute_every=3).segment(58) == 3
    assert [ops.Execution(recompute=True).segment(n) for n in (1, 2, 9, 58)] == [1, 1, 3, 8]
