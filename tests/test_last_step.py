"""The last time step alone: exactly the layer-steps it depends on, and the results of the full computation."""

import pytest
import torch
from torch.testing import assert_close

from test_ops import random_inputs, trellis
from trellisnet import TrellisNet, ops
from trellisnet.ops import fused
from trellisnet.regularization import Masks

BACKENDS = ["reference", "fused"]
IMAGE = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COUNTS = [(11, 784, 1571), (11, 1024, 2047), (16, 784, 4831), (16, 1024, 6222)]


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def both(inputs, *, hidden_scale=None, backend="reference", **options):
    """Return output, state and gradients at the last step, in full and alone; and the layer-steps of the latter."""
    inputs = dict(inputs)
    if hidden_scale is not None and backend == "reference":
        inputs["hidden_scale"] = hidden_scale
    else:
        options["hidden_scale"] = hidden_scale
    tensors = [t.detach().requires_grad_() for t in inputs.values()]
    inputs = dict(zip(inputs, tensors, strict=True))
    state = (inputs.pop("h0"), inputs.pop("c0"))
    output, full_state, *_ = trellis(**inputs, state=state, **options, backend="reference")
    full = (output[:, -1:], *full_state)
    start = inputs["x"].size(1) - 1
    output, last_state, _, layer_steps = trellis(**inputs, state=state, **options, start=start, backend=backend)
    last = (output, *last_state)
    results = []
    for outs in (full, last):
        generator = torch.Generator().manual_seed(9)
        grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
        # allow_unused stays False: every argument is part of the graph, as in the full computation.
        results.append((*outs, *torch.autograd.grad(outs, tensors, grads)))
    return *results, layer_steps


def check(inputs, *, num_layers, dilation, **options):
    full, last, layer_steps = both(inputs, num_layers=num_layers, dilation=dilation, **options)
    for a, b in zip(last, full, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)
    length, k = inputs["x"].size(1), inputs["weight_h"].size(2)
    assert layer_steps == sum(map(len, ops.dependencies(length, num_layers, dilation, k)))
    return layer_steps


def test_dependencies_by_hand():
    assert ops.dependencies(1, 1, (1,), 2) == [[0]]
    assert ops.dependencies(1, 3, (4,), 2) == [[0], [0], [0]]
    assert ops.dependencies(5, 3, (1,), 2) == [[2, 3, 4], [3, 4], [4]]
    assert ops.dependencies(3, 4, (1,), 2) == [[0, 1, 2], [0, 1, 2], [1, 2], [2]]
    assert ops.dependencies(8, 3, (1, 2, 4), 2) == [[1, 3, 5, 7], [3, 7], [7]]
    assert ops.dependencies(8, 4, (3, 1), 2) == [[2, 3, 4, 5, 6, 7], [3, 4, 6, 7], [6, 7], [7]]
    assert ops.dependencies(6, 2, (1, 2), 3) == [[1, 3, 5], [5]]
    assert ops.dependencies(6, 2, (1, 2), 1) == [[3, 5], [5]]  # the cell path reads t - d


@pytest.mark.parametrize(("num_layers", "length", "count"), COUNTS)
def test_dependencies_of_an_image(num_layers, length, count):
    positions = ops.dependencies(length, num_layers, IMAGE, 2)
    assert sum(map(len, positions)) == count
    module = TrellisNet(1, 3, num_layers, dilation=IMAGE)
    assert module.layer_steps(length, last_only=True) == count
    assert module.layer_steps(length) == num_layers * length


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dilation", [(1,), (1, 2, 4), (1, 1, 2, 4, 8, 16), (3, 1)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_full_computation(backend, k, dilation, carried, masked):
    scale = torch.tensor([[1.5, 0, 1.5, 0], [0, 1.5, 1.5, 1.5]], dtype=torch.float64)[:, :, None] if masked else None
    for num_layers, output_size in ((1, 4), (2, 1), (4, 3), (7, 2)):
        for length in (1, 2, 3, 4, 5, 8, 13, 27, 40):
            inputs = random_inputs(k, length)
            if not carried:
                inputs["h0"].zero_(), inputs["c0"].zero_()
            options = {"output_size": output_size, "hidden_scale": scale, "backend": backend}
            check(inputs, num_layers=num_layers, dilation=dilation, **options)


@pytest.mark.parametrize(("k", "dilation", "length"), [(2, (1, 2), 6), (3, (2, 1), 4), (2, (4,), 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_exact(backend, k, dilation, length):
    inputs = random_inputs(k, length, channels=2, hidden=3, requires_grad=True)
    scale = torch.tensor([2.0, 0, 1.5], dtype=torch.float64).repeat(2, 1)[:, :, None]
    if backend == "reference":
        inputs["hidden_scale"] = scale.requires_grad_()

    def run(*tensors):
        named = {"hidden_scale": scale} | dict(zip(inputs, tensors, strict=True))
        state = (named.pop("h0"), named.pop("c0"))
        options = {"num_layers": 3, "dilation": dilation, "output_size": 2, "start": length - 1, "backend": backend}
        output, state, *_ = trellis(**named, state=state, **options)
        return output, *state

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize(("num_layers", "length", "count"), COUNTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_takes_the_layer_steps_it_needs(backend, num_layers, length, count):
    inputs = random_inputs(2, length, channels=1, hidden=6)
    assert check(inputs, num_layers=num_layers, dilation=IMAGE, output_size=6, backend=backend) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_precision_agrees(backend):
    inputs = {name: t.float() for name, t in random_inputs(2, 64, channels=1, hidden=6).items()}
    full, last, _ = both(inputs, num_layers=7, dilation=IMAGE, output_size=6, backend=backend)
    for a, b in zip(last, full, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "dilation", "largest"),
    [
        (5, (1, 2, 4, 8, 16), 2 * 1000),  # S_1 has 16 positions, so x itself is the largest
        (11, IMAGE, 2 * 1000 * 24),  # S_1 has all positions
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_memory_is_taken_for_pruned_positions(backend, num_layers, dilation, largest):
    inputs = {name: t.requires_grad_() for name, t in random_inputs(2, 1000, channels=1, hidden=6).items()}
    state = (inputs.pop("h0"), inputs.pop("c0"))
    with Watch() as watch:
        options = {"num_layers": num_layers, "dilation": dilation, "output_size": 6, "start": 999, "backend": backend}
        output, *_ = trellis(**inputs, state=state, **options)
        output.sum().backward()
    if backend == "fused":  # gradients of several layers are collected, of the remaining positions
        sizes = [2 * len(positions) for positions in ops.dependencies(1000, num_layers, dilation, 2)]
        largest = max(largest, 24 * sum(-(-size // fused.BUCKET) * fused.BUCKET for size in sizes))
    assert 0 < watch.largest <= largest


def image_net(**options):
    torch.manual_seed(3)
    module = TrellisNet(3, 5, 4, output_size=2, dilation=(1, 1, 2, 4), dtype=torch.float64, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module, torch.randn(2, 13, 3, dtype=torch.float64), tuple(torch.randn(2, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_through_the_module(weight_norm, with_state):
    module, x, state = image_net(weight_norm=weight_norm, hidden_dropout=0.4, weight_dropout=0.3)
    masks = Masks(
        weight_x=torch.rand(20, 3, 1) > 0.3, weight_h=torch.rand(20, 5, 1) > 0.3, hidden=torch.rand(2, 5, 1) > 0.4
    )
    module.train()
    for explicit in (masks, Masks()):
        full, last = (module(x, state if with_state else None, last_only=v, masks=explicit) for v in (False, True))
        assert last.output.shape == (2, 1, 2)
        assert last.aux == []
        assert_close(last.output, full.output[:, -1:], atol=1e-12, rtol=0)
        for a, b in zip(last.state, full.state, strict=True):
            assert_close(a, b, atol=1e-12, rtol=0)
        parameters = list(module.parameters())
        ours = torch.autograd.grad(last.output.sum(), parameters)
        theirs = torch.autograd.grad(full.output[:, -1].sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_an_empty_batch():
    module, x, _ = image_net()
    assert module(x[:0], last_only=True).output.shape == (0, 1, 2)


def test_the_same_masks_are_drawn():
    module, x, state = image_net(hidden_dropout=0.4, weight_dropout=0.3)
    outputs = []
    for last_only in (False, True):
        torch.manual_seed(1)
        outputs.append(module(x, state, last_only=last_only).output[:, -1:])
    assert_close(*outputs, atol=1e-12, rtol=0)


def test_a_pass_in_inference_mode_leaves_training_possible():
    """Calls share cached indices; inference tensors among them would break the next backward pass."""
    module, x, _ = image_net()
    with torch.inference_mode():
        module(x, last_only=True)
    module(x, last_only=True).output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_bad_input_is_named():
    module, x, _ = image_net()
    with pytest.raises(ValueError, match="aux_every: expected None with last_only, got 2"):
        module(x, aux_every=2, last_only=True)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        module.layer_steps(0)
    inputs = random_inputs(2, 3)
    state = (inputs.pop("h0"), inputs.pop("c0"))
    with pytest.raises(ValueError, match="backend: expected one of"):
        trellis(**inputs, state=state, num_layers=1, dilation=(1,), output_size=4, start=2, backend="fast")
