"""The fused operator against the equation: all outputs and gradients, in all dtypes and modes."""

import weakref
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from torch.testing import assert_close

from test_ops import SHAPES, random_inputs, trellis
from trellisnet import TrellisNet, ops
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import compiled, fused, gemm, pruning
from trellisnet.ops import gates as eager
from trellisnet.training import programs
from trellisnet.training.config import parse
from trellisnet.training.tasks import LanguageModeling

IMAGE = (1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MASK = torch.tensor([[1.5, 0, 1.5, 0], [0, 1.5, 1.5, 1.5]], dtype=torch.float64)[:, :, None]


def run(backend, inputs, *, carried=True, autocast=None, seed=9, **options):
    """Return all outputs, then all gradients; and the number of layer-steps."""
    tensors = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    state = tuple(tensors.pop(name) for name in ("h0", "c0"))
    if not carried:
        state = None
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = trellis(**tensors, state=state, backend=backend, **options)
    outs = [out.output, *out.state, *out.aux]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    wanted = [*tensors.values(), *(state or ())]
    gradients = torch.autograd.grad(outs, wanted, grads, allow_unused=True)  # the ungated equation reads no c0
    return [
        *outs,
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)),
    ], out.layer_steps


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("k", "dilation", "length"), [*SHAPES, pytest.param(1, (1, 2), 7, id="k1")])
@pytest.mark.parametrize("activation", eager.FUNCTIONS)
@pytest.mark.parametrize("inject_every", [1, 3])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_the_equation(k, dilation, length, activation, inject_every, carried):
    inputs = random_inputs(k, length)
    if activation == "tanh":
        inputs |= {name: inputs[name][:4].clone() for name in ("weight_x", "weight_h", "bias")}
    for num_layers, start, aux_every, scale in [
        (1, 0, None, None),
        (6, 0, 2, MASK),
        (6, length - 1, 3, None),
        (5, length // 2, 1, MASK),
        (9, length // 3, 9, MASK),
    ]:
        options = {
            "num_layers": num_layers, "dilation": dilation, "output_size": 3, "start": start, "aux_every": aux_every,
            "hidden_scale": scale, "activation": activation, "inject_every": inject_every, "carried": carried,
        }  # fmt: skip
        ours, layer_steps = run("fused", inputs, **options)
        theirs, _ = run("reference", inputs, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, atol=1e-12, rtol=1e-12)
        assert layer_steps == sum(map(len, ops.dependencies(length, num_layers, dilation, k, start)))


@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
@pytest.mark.parametrize("activation", eager.FUNCTIONS)
def test_gradients_are_exact(k, dilation, length, activation):
    inputs = random_inputs(k, min(length, 4), channels=2, requires_grad=True)
    if activation == "tanh":
        inputs |= {name: inputs[name][:4].detach().requires_grad_() for name in ("weight_x", "weight_h", "bias")}

    def call(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        state = (named.pop("h0"), named.pop("c0"))
        options = {"num_layers": 3, "dilation": dilation, "output_size": 2, "start": 1 if length > 1 else 0}
        options |= {"aux_every": 2, "hidden_scale": MASK, "activation": activation, "inject_every": 2}
        out = trellis(**named, state=state, backend="fused", **options)
        return out.output, *out.state, *out.aux

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("recompute", [1, 2, 4, 100])
@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
@pytest.mark.parametrize("activation", eager.FUNCTIONS)
@pytest.mark.parametrize("carried", [False, True])
def test_recomputation_changes_nothing(recompute, k, dilation, length, activation, carried):
    inputs = random_inputs(k, length)
    if activation == "tanh":
        inputs |= {name: inputs[name][:4].clone() for name in ("weight_x", "weight_h", "bias")}
    options = {"num_layers": 7, "dilation": dilation, "output_size": 3, "start": length // 2, "aux_every": 2}
    options |= {"hidden_scale": MASK, "activation": activation, "inject_every": 2, "carried": carried}
    stored, _ = run("fused", inputs, **options)
    again, _ = run("fused", inputs, recompute=recompute, **options)
    for a, b in zip(again, stored, strict=True):
        assert_close(a, b, atol=1e-13, rtol=1e-13)


def test_counts_of_the_paper():
    assert sum(map(len, ops.dependencies(110, 58, (1,), 2, 58))) == 4_669
    inputs = random_inputs(2, 110)
    _, layer_steps = run("fused", inputs, num_layers=58, dilation=(1,), output_size=4, start=58)
    assert layer_steps == 4_669
    assert TrellisNet(3, 4, 58).layer_steps(110, start=58) == 4_669
    for length, count in ((784, 1_571), (1024, 2_047)):
        inputs = random_inputs(2, length, channels=1)
        _, layer_steps = run("fused", inputs, num_layers=11, dilation=IMAGE, output_size=4, start=length - 1)
        assert layer_steps == count


@pytest.mark.parametrize("n", [1, 7, 63])
@pytest.mark.parametrize("hidden", [1, 7, 63])
@pytest.mark.parametrize("length", [1, 7, 63])
def test_odd_sizes_in_blocks_and_with_padding(monkeypatch, n, hidden, length):
    """Several blocks per layer, products padded to buckets, and uninitialised memory filled with NaN."""
    monkeypatch.setattr(eager, "BLOCK", 5 * n * hidden)
    monkeypatch.setattr(fused, "BUCKET", 16)
    poison = lambda *shape, dtype, device: torch.full(*shape, float("nan"), dtype=dtype, device=device)  # noqa: E731
    for module in (fused, eager):
        monkeypatch.setattr(module, "empty", poison)
    inputs = random_inputs(2, length, n=n, hidden=hidden)
    options = {"num_layers": 5, "dilation": (1, 3), "output_size": hidden, "start": length // 2, "aux_every": 2}
    for route, gates in (("mm", "eager"), ("auto", "eager"), ("auto", "auto")):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
            cast = {name: t.to(dtype) for name, t in inputs.items()}
            ours, _ = run("fused", cast, gemm=route, gates=gates, **options)
            theirs, _ = run("reference", inputs, **options)
            for a, b in zip(ours, theirs, strict=True):
                assert_close(a, b.to(dtype), atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize(("k", "dilation", "length", "start"), [(2, (1,), 40, 20), (3, (1, 2, 4), 63, 7)])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("p", [0, 0.25])
def test_errors_are_at_most_twice_those_of_the_reference(k, dilation, length, start, low, p):
    inputs = random_inputs(k, length, n=2, channels=24, hidden=40)
    inputs["weight_h"].mul_(0.3)  # as in a trained network; with larger weights the dynamics are chaotic
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(2, 40, 1, generator=generator, dtype=torch.float64) > p) / (1 - p)
    options = {"num_layers": 12, "dilation": dilation, "output_size": 40, "start": start, "aux_every": 5}
    options["hidden_scale"] = scale
    truth, _ = run("reference", inputs, **options)
    single = {name: t.float() for name, t in inputs.items()}
    options["hidden_scale"] = scale.float()
    for route, gates in (("mm", "eager"), ("auto", "eager"), ("auto", "auto")):
        ours, _ = run("fused", single, autocast=low, gemm=route, gates=gates, **options)
        theirs, _ = run("reference", single, autocast=low, **options)
        for a, b, exact in zip(ours, theirs, truth, strict=True):
            assert a.dtype == torch.float32
            assert relative(a, exact) <= 2 * relative(b, exact) + 1e-7
            assert relative(a, exact) < (1e-5 if low is None else 0.1)


@pytest.mark.parametrize(("k", "dilation", "length"), SHAPES)
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_compiled_gates_equal_eager_ones(k, dilation, length, low):
    if reason := compiled.reason_against(torch.device("cpu"), torch.float32, "lstm"):
        pytest.skip(f"compiled gates: {reason}")
    inputs = {name: t.float() for name, t in random_inputs(k, length, n=3, channels=5, hidden=300).items()}
    inputs["weight_h"].mul_(0.1)
    scale = (torch.rand(3, 300, 1, generator=torch.Generator().manual_seed(0)) > 0.2) / 0.8
    for num_layers, carried, start, inject_every in ((1, True, 0, 1), (5, False, length - 1, 1), (6, True, 0, 3)):
        options = {"num_layers": num_layers, "dilation": dilation, "output_size": 299, "start": start, "aux_every": 2}
        options |= {"hidden_scale": scale, "inject_every": inject_every, "carried": carried, "autocast": low}
        ours, theirs = (run("fused", inputs, gates=gates, **options)[0] for gates in ("compiled", "eager"))
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b.double()) < (2e-6 if low is None else 2e-2)


def test_functions_of_the_compiled_gates():
    """Sigmoid and tanh at all magnitudes, at infinities and NaN."""
    if reason := compiled.reason_against(torch.device("cpu"), torch.float32, "lstm"):
        pytest.skip(f"compiled gates: {reason}")
    sizes = torch.logspace(-30, 5, 5_000)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([sizes, -sizes, torch.linspace(-100, 100, 9_999), special])
    lstm = ops.ACTIVATIONS["lstm"]
    layer = pruning.plan(1, ops.TrellisSpec(1, 1, lstm), 0, torch.device("cpu")).layers[0]
    H = values.numel()
    cell = torch.empty(1, 1, H)
    for gate, function in enumerate((torch.sigmoid, torch.sigmoid, torch.tanh)):
        gates = torch.zeros(1, 1, 4 * H)
        x = torch.zeros(1, 1, 4 * H)
        x[..., gate * H : (gate + 1) * H] = values
        compiled.forward(eager.Step(lstm, layer, None, 0, gates, x, cell, None, None, None, None, None))
        ours, exact = gates[0, 0, gate * H : (gate + 1) * H], function(values.double())
        assert_close(ours[-1].isnan(), exact[-1].isnan())
        error = (ours.double() - exact).abs() - 4e-7 * exact.abs()
        assert error[:-1].max() < 1e-38


def test_compiled_gates_say_why_they_cannot_run(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert "float64" in compiled.reason_against(cpu, torch.float64, "lstm")
    assert "tanh" in compiled.reason_against(cpu, torch.float32, "tanh")
    assert "cuda" in compiled.reason_against(torch.device("cuda"), torch.float32, "lstm")
    with pytest.raises(ValueError, match="gates: compiled cannot run, it has no float64; expected auto or eager"):
        run("fused", random_inputs(2, 3), num_layers=2, dilation=(1,), output_size=4, gates="compiled")
    with pytest.raises(ValueError, match="gates: expected one of auto, compiled, triton, eager, got 'other'"):
        run("fused", random_inputs(2, 3), num_layers=2, dilation=(1,), output_size=4, gates="other")
    monkeypatch.setattr(compiled, "HERE", tmp_path)
    compiled._library.cache_clear()
    try:
        assert "has not been built" in compiled.reason_against(cpu, torch.float32, "lstm")
        compiled._library.cache_clear()
        (tmp_path / f"_compiled{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
        assert "cannot be loaded" in compiled.reason_against(cpu, torch.float32, "lstm")
    finally:
        compiled._library.cache_clear()


def test_non_contiguous_input():
    inputs = random_inputs(2, 9)
    options = {"num_layers": 4, "dilation": (1, 2), "output_size": 4, "start": 3}
    expected, _ = run("fused", inputs, **options)
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in inputs.items()}
    assert not strided["x"].is_contiguous()
    for a, b in zip(run("fused", strided, **options)[0], expected, strict=True):
        assert torch.equal(a, b)


def test_lengths():
    inputs, lengths = random_inputs(2, 9), torch.tensor([4, 9])
    options = {"num_layers": 4, "dilation": (1, 2), "output_size": 4, "lengths": lengths}
    ours, theirs = (run(backend, inputs, **options)[0] for backend in ("fused", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_the_scale_of_dropout_is_not_rounded():
    """In bfloat16 1/(1−0.25) would be 0.2 % too large, in every one of many layers."""
    inputs = {name: t.float() for name, t in random_inputs(2, 40, n=2, channels=24, hidden=40).items()}
    inputs["weight_h"].mul_(0.5)
    options = {"num_layers": 40, "dilation": (1,), "output_size": 40, "start": 39}
    shrunk = {name: t.clone() for name, t in inputs.items()}
    shrunk["weight_h"].div_(0.75)  # equals a scale of 1/0.75 on all hidden channels
    shrunk["h0"].zero_(), inputs["h0"].zero_()
    scaled, _ = run("fused", inputs, autocast=torch.bfloat16, hidden_scale=torch.full((2, 40, 1), 1 / 0.75), **options)
    plain, _ = run("fused", shrunk, autocast=torch.bfloat16, **options)
    for a, b in ((scaled[3], plain[3]), (scaled[4], plain[4])):  # gradients of x and weight_x
        projection = (a.double() * b.double()).sum() / b.double().square().sum()
        assert projection == pytest.approx(1, abs=0.02)


def test_a_backward_pass_may_run_inside_autocast_and_twice():
    inputs = random_inputs(2, 9, requires_grad=True)
    inputs = {name: t.detach().float().requires_grad_() for name, t in inputs.items()}
    state = (inputs.pop("h0"), inputs.pop("c0"))
    out = trellis(**inputs, state=state, num_layers=4, dilation=(1,), output_size=4, backend="fused")
    loss = out.output.square().sum()
    wanted = [*inputs.values(), *state]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        second = torch.autograd.grad(loss, wanted)
    for a, b in list(zip(first, second, strict=True))[2:]:  # x and its kernel are differentiated by torch
        assert torch.equal(a, b)


def test_float64_stays_float64_under_autocast():
    inputs = random_inputs(2, 5)
    options = {"num_layers": 3, "dilation": (1,), "output_size": 4}
    for a, b in zip(
        run("fused", inputs, autocast=torch.bfloat16, **options)[0], run("fused", inputs, **options)[0], strict=True
    ):
        assert a.dtype == torch.float64
        assert_close(a, b, atol=1e-12, rtol=0)


def test_a_scale_that_requires_a_gradient_falls_back_to_the_reference():
    inputs = random_inputs(2, 3)
    state = (inputs.pop("h0"), inputs.pop("c0"))
    scale = torch.ones(2, 4, 1, dtype=torch.float64, requires_grad=True)
    options = {"num_layers": 2, "dilation": (1,), "output_size": 4, "hidden_scale": scale}
    trellis(**inputs, state=state, **options).output.sum().backward()
    assert scale.grad.abs().sum() > 0
    for backend in ("fused", "triton"):
        with pytest.raises(ValueError, match=f"hidden_scale: {backend} has no gradient for it"):
            trellis(**inputs, state=state, backend=backend, **options)


def test_a_state_made_in_inference_mode_and_tensors_without_data():
    module, x = TrellisNet(3, 4, 3), torch.randn(2, 5, 3)
    with torch.inference_mode():
        state = module(x).state
    module(x, state).output.sum().backward()
    assert module.weight_h_v.grad is not None
    assert TrellisNet(3, 4, 3, device="meta")(torch.randn(2, 5, 3, device="meta")).output.shape == (2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_empty_batch_and_no_gradient(dtype):
    module = TrellisNet(3, 4, 5, output_size=2, dtype=dtype)
    out = module(torch.randn(0, 6, 3, dtype=dtype), aux_every=2)
    assert out.output.shape == (0, 6, 2)
    assert len(out.aux) == 2
    out.output.sum().backward()
    assert module.bias.grad.abs().max() == 0
    module.float()
    with torch.no_grad():
        assert not module(torch.randn(1, 6, 3)).output.requires_grad


def test_without_gradients_nothing_is_stored(monkeypatch):
    """Gates and cells are freed as soon as the layer above has read them."""
    tensors, most = [], 0

    def product(a, b):
        nonlocal most
        most = max(most, sum(tensor.numel() for ref in tensors if (tensor := ref()) is not None))
        tensors.append(weakref.ref(result := a @ b.t()))
        return result

    def watched(*shape, **options):
        tensors.append(weakref.ref(tensor := torch.empty(*shape, **options)))
        return tensor

    for module in (fused, eager):
        monkeypatch.setattr(module, "empty", watched)
    monkeypatch.setattr(fused.products, "resolve", lambda *_: product)
    module, x, peaks = TrellisNet(3, 16, 12), torch.randn(4, 64, 3), []
    for gradients in (False, True):
        tensors, most = [], 0
        with torch.set_grad_enabled(gradients):
            module(x)
        peaks.append(most)
    assert peaks[0] < peaks[1] / 3


def test_unsupported_settings_are_named():
    with pytest.raises(ValueError, match=r"backend: fused cannot run this, it has no gru gates; expected auto or ref"):
        TrellisNet(3, 4, 2, backend="fused", activation="gru")
    with pytest.raises(ValueError, match=r"backend: fused cannot run this, it has no mixed group convolution"):
        TrellisNet(3, 4, 2, backend="fused", kernel_groups=2)
    for options, backend in (
        ({}, "fused"),
        ({"activation": "tanh"}, "fused"),
        ({"activation": "gru"}, "reference"),
        ({"kernel_groups": 2}, "reference"),
        ({"backend": "reference"}, "reference"),
    ):
        core = TrellisNet(3, 4, 2, **options)
        assert ops.resolve(core.spec, core.execution) == backend


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"backend": "reference"}])
def test_the_equation_can_be_traced(options):
    torch.manual_seed(0)
    core = TrellisNet(3, 4, 4, dilation=(1, 2), output_size=3, **options).eval()
    classifier = TrellisClassifier(3, 5, 4, 4, **options).eval()
    language = TrellisLanguageModel(7, 3, 4, 4, output_size=3, **options).eval()
    x, tokens = torch.randn(2, 9, 3), torch.randint(7, (2, 9))
    for module, example, other in ((core, x, x[:1, :5]), (classifier, x, x[:1, :5]), (language, tokens, tokens[:, :4])):
        traced = torch.jit.trace(module, (example,))
        for sequence in (example, other):
            assert_close(traced(sequence)[0], module(sequence)[0])
    traced = torch.jit.trace_module(language.head, {"loss": (x, tokens)})
    assert_close(traced.loss(x[:1], tokens[:1]), language.head.loss(x[:1], tokens[:1]))


@pytest.mark.parametrize("options", [{}, {"aux_every": 2}, {"last_only": True}])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_network_can_be_compiled_and_exported(backend, options):
    torch._dynamo.reset()  # of the networks compiled before, which count towards a limit
    torch.manual_seed(0)
    module = TrellisNet(3, 4, 4, dilation=(1, 2), output_size=2, backend=backend).eval()
    x = torch.randn(2, 9, 3)
    expected = module(x, **options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(module, (x,), options).module()
    for other in (compiled(x, **options), exported(x, **options)):
        assert_close(other.output, expected.output)
        assert_close(other.state, expected.state)
        assert_close(other.aux, expected.aux)
    module.zero_grad()
    compiled(x, **options).output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def on_a_gpu(function):
    """Let a function of fused.py that takes the geometry decide as on a GPU."""

    def decide(*arguments):
        geometry = next(a for a in arguments if isinstance(a, fused._Geometry))
        device, geometry.device = geometry.device, torch.device("cuda")
        try:
            return function(*arguments)
        finally:
            geometry.device = device

    return decide


@pytest.mark.parametrize("arena", [1 << 30, 20_000, 0])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("inject_every", [1, 2])
def test_sums_over_layers_are_made_at_once_if_they_fit_into_the_arena(arena, carried, inject_every, monkeypatch):
    """As on a GPU, which has no buckets: the gradient of the kernel by one product, those of x̃ once per dilation."""
    inputs, products, sums, adding = random_inputs(2, 30), [], [], []
    options = {"num_layers": 12, "dilation": (1, 2, 2), "output_size": 3, "start": 20, "carried": carried, "gemm": "mm"}
    options |= {"inject_every": inject_every, "gates": "eager"}
    theirs, _ = run("fused", inputs, **options)
    total, sum_rows, backward = fused._LayerSums._sum, eager.sum_rows, eager.backward

    def counted(self):
        products.append(self.complete)
        total(self)

    def recorded(dx, dz, layers, add):
        sums.append((layers[0][0].dilation, len(layers)))
        sum_rows(dx, dz, layers, add)

    def noted(step):
        if step.layer.x is not None and step.dx is not None:
            adding.append(step.layer.dilation)
        backward(step)

    monkeypatch.setattr(fused, "BUCKET", 1)
    monkeypatch.setattr(fused, "ARENA", arena)
    monkeypatch.setattr(fused, "empty", lambda shape, **options: torch.full(shape, float("nan"), **options))
    for name in ("_layers_at_once", "_sums_x"):
        monkeypatch.setattr(fused, name, on_a_gpu(getattr(fused, name)))
    monkeypatch.setattr(fused._LayerSums, "_sum", counted)
    monkeypatch.setattr(eager, "sum_rows", recorded)
    monkeypatch.setattr(eager, "backward", noted)
    ours, _ = run("fused", inputs, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=1e-12, rtol=1e-12)
    # The gate kernels add for the first layer, whose dz does not cover all its positions, and where a dilation has only
    # one layer.
    assert adding == [1] * inject_every
    if arena > 1 << 20:
        steps = ops.dependencies(30, 12, (1, 2, 2), 2, 20)
        # The input of the first layer is zero, except for the state carried into its first step.
        assert products == [2 * sum(map(len, steps[1:])) + 2 * (carried and 0 in steps[0])]
        assert sums == ([(1, 3), (2, 8)] if inject_every == 1 else [(2, 4)])
    else:
        assert len(products) > 1
        assert len(sums) > len({dilation for dilation, _ in sums})


def test_products_in_a_wider_type_are_not_rounded(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(40, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    exact, mm = a.double() @ b.double().t(), gemm.ROUTES["mm"]
    assert not gemm.widens(torch.device("cpu"), torch.bfloat16)
    rounded = relative(gemm.product_in(torch.float32, a, b, mm), exact)
    monkeypatch.setattr(gemm, "widens", lambda *_: True)
    monkeypatch.setattr(gemm, "_wide", lambda a, b, dtype: a.to(dtype) @ b.to(dtype))
    assert relative(gemm.product_in(torch.float32, a, b, mm), exact) < 1e-6 < rounded
    total = torch.ones(40, 50)
    gemm.add_product(total, a, b, mm)
    assert relative(total, exact + 1) < 1e-6


def test_routes_of_products():
    a, b = torch.randn(5, 3), torch.randn(4, 3)
    cpu = torch.device("cpu")
    for route in gemm.GEMMS:
        if route != "onednn" or gemm.usable(route, cpu, torch.float32):
            assert_close(gemm.resolve(route, cpu, torch.float32)(a, b), a @ b.t())
    assert gemm.fastest(cpu, torch.float32, 64, 32, 16) in gemm.ROUTES
    for dtype in (torch.float32, torch.bfloat16):
        for route in (route for route in gemm.ROUTES if gemm.usable(route, cpu, dtype)):
            total = torch.ones(5, 4)
            gemm.add_product(total, a.to(dtype), b.to(dtype), gemm.ROUTES[route])
            assert_close(total, 1 + a @ b.t(), atol=0.05 if dtype == torch.bfloat16 else 1e-6, rtol=0.02)
    assert gemm.resolve("auto", cpu, torch.float64) is gemm.ROUTES["mm"]
    with pytest.raises(ValueError, match="gemm: expected one of auto, mm, onednn, got 'blas'"):
        gemm.resolve("blas", cpu, torch.float32)
    with pytest.raises(ValueError, match="gemm: onednn does not work with torch.float64 on cpu here"):
        gemm.resolve("onednn", cpu, torch.float64)


def test_a_route_that_does_not_work_is_not_taken(monkeypatch):
    def broken(a, b):
        raise RuntimeError

    gemm._works.cache_clear()
    monkeypatch.setitem(gemm.ROUTES, "onednn", broken)
    assert gemm.resolve("auto", torch.device("cpu"), torch.float32) is gemm.ROUTES["mm"]
    monkeypatch.setitem(gemm.ROUTES, "onednn", lambda a, b: torch.zeros(a.size(0), b.size(0)))
    gemm._works.cache_clear()
    assert gemm.resolve("auto", torch.device("cpu"), torch.float32) is gemm.ROUTES["mm"]
    gemm._works.cache_clear()


PROGRAMS = {task: programs.get(task) for task in programs.TASKS}
SMALL = {name: ["--nhid", "3", "--batch_size", "2"] for name in PROGRAMS}
SMALL |= {name: [*SMALL[name], "--emsize", "4", "--nout", "4"] for name in ("word_ptb", "char_ptb", "wt103")}


PRESETS = [  # of TrellisNet only
    (task, name)
    for task, program in PROGRAMS.items()
    for name, values in program.config_class.presets.items()
    if "model" not in values
]


@pytest.mark.parametrize(("task", "preset"), PRESETS)
def test_every_preset_of_every_task_takes_this_path(monkeypatch, task, preset):
    """With the preset's weight norm, DropConnect, masks and auxiliary losses, its depth and length, but narrower."""

    def refused(*args, **kwargs):
        raise AssertionError("not the fused operator")

    monkeypatch.setattr(ops.reference, "trellis", refused)
    monkeypatch.setattr(ops, "_last_step", refused)
    counted = []
    trellis = fused.trellis

    def count(*args, **kwargs):
        out = trellis(*args, **kwargs)
        counted.append(out[3])
        return out

    monkeypatch.setattr(fused, "trellis", count)
    torch.manual_seed(0)
    config, _ = parse(PROGRAMS[task].config_class, ["--preset", preset, *SMALL[task]])
    assert config.resolved(torch.device("cpu")).backend == "fused"
    if task in ("pmnist", "cifar10"):
        length, channels = (784, 1) if task == "pmnist" else (1024, 3)
        model = PROGRAMS[task].build_model(config, channels, 10).train()
        model(torch.randn(2, length, channels)).logits.sum().backward()
        expected = {11: {784: 1_571, 1024: 2_047}, 16: {784: 4_831, 1024: 6_222}}[config.nlevels][length]
    else:
        model = PROGRAMS[task].build_model(config, 30).train()
        aux_every = config.aux_freq if config.aux else None
        task_ = LanguageModeling(
            model, horizon=config.horizon, seq_len=config.task_seq_len(), repackage=config.repack,
            aux_weight=config.aux, aux_every=aux_every, alpha=config.alpha, beta=config.beta,
        )  # fmt: skip
        inputs, targets = task_.batches(torch.randint(30, (2, 200)))[0]
        losses, _ = task_.loss(inputs, targets)
        losses["loss"].backward()
        start = inputs.size(1) - task_.size((inputs, targets)) // 2
        expected = model.core.layer_steps(inputs.size(1), start=start)
        if (task, preset) == ("word_ptb", "default"):
            assert expected == 4_669
    assert counted == [expected]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_plans_are_shared_and_hold_no_inference_tensors():
    with torch.inference_mode():
        plan = pruning.plan(784, TrellisNet(1, 3, 16, dilation=IMAGE).spec, 783, torch.device("cpu"))
    indices = [read.rows for layer in plan.layers for read in (*layer.taps, layer.cell)]
    tensors = [index for index in indices if isinstance(index, torch.Tensor)]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)
    assert plan.layer_steps == sum(layer.size for layer in plan.layers) == 4_831
    again = TrellisNet(1, 3, 16, dilation=IMAGE).spec  # equal, but another object
    assert pruning.plan(784, again, 783, torch.device("cpu")) is plan


def test_the_default_device_has_no_influence():
    module, cpu = TrellisNet(1, 3, 11, dilation=IMAGE), torch.device("cpu")
    x = torch.randn(2, 784, 1)

    def found(default):
        pruning.plan.cache_clear()
        gemm._works.cache_clear()
        with torch.device(default):
            layers = pruning.plan(784, module.spec, 783, cpu).layers
            places = [pruning.places(*pair, cpu) for pair in zip(layers, [*layers[1:], None], strict=True)]
            readers = pruning.readers_of_x([(layers[1], 0), (layers[0], 9)], 784, 2, cpu)
            indices = [t for place in places for t in place if t is not None]
            return [*indices, readers, module(x, last_only=True).output], gemm.usable("onednn", cpu, x.dtype)

    expected, got = found("cpu"), found("meta")
    assert_close(got, expected, rtol=0, atol=0)
    assert {t.device for t in got[0]} == {cpu}
