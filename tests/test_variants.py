"""Other gates, mixed groups, sparse injection: an independent formulation, exact derivatives, causality, weights."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from test_ops import trellis
from trellisnet import TrellisNet, weights
from trellisnet.errors import UserError
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import mixed_group
from trellisnet.regularization import Masks

GATES = {"lstm": 4, "gru": 3, "tanh": 1}
VARIANTS = [
    pytest.param(activation, groups, inject, id=f"{activation}-{groups or 'dense'}-{inject}")
    for activation, groups, inject in itertools.product(GATES, (None, 1, 3), (1, 2, 5))
]
GEOMETRIES = [(2, (1,)), (3, (1, 2)), (2, (1, 1, 2, 4))]
H, C, LAYERS = 6, 2, 6


def net(activation, groups, inject, **options):
    torch.manual_seed(5)
    options = {"weight_norm": False, "dtype": torch.float64, "num_layers": LAYERS} | options
    module = TrellisNet(
        C, H, options.pop("num_layers"), activation=activation, kernel_groups=groups, inject_every=inject, **options
    )
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module


def inputs(length=9, n=2):
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(*shape, generator=generator).double() for shape in ((n, length, C), (n, H), (n, H))]


def blocks(module):
    """Write out Eq. 5: for every tap the matrices from x and h to each gate, {gate: (H, C), (H, H)}."""
    k, G, groups = module.kernel_size, GATES[module.activation], module.kernel_groups
    width = H // (groups or 1)
    taps = []
    for tap in range(k):
        gates = []
        for gate in range(G):
            W_x, W_h = torch.zeros(H, C).double(), torch.zeros(H, H).double()
            for group in range(groups or 1):
                here = slice(group * width, (group + 1) * width)
                rows = slice((group * G + gate) * width, (group * G + gate + 1) * width)
                if group == 0:
                    W_x[here] = module.weight_x[rows, :, tap]
                if groups is None:
                    W_h[here] = module.weight_h[rows, :, tap]
                elif tap < k - 1:
                    W_h[here, here] = module.weight_h_past[rows, :, tap]
                elif group > 0:
                    below = slice((group - 1) * width, group * width)
                    rows = slice(rows.start - G * width, rows.stop - G * width)  # the first group has no block
                    W_h[here, below] = module.weight_h_below[rows, :, 0]
            gates.append((W_x, W_h))
        taps.append(gates)
    bias = module.bias.view(groups or 1, G, width).transpose(0, 1).reshape(G, H)
    return taps, bias


@torch.no_grad()
def by_loops(module, x, h0, c0, scale=None):
    """Compute unit by unit, with cells as in torch's documentation."""
    taps, bias = blocks(module)
    G, k, (n, length, _) = len(bias), module.kernel_size, x.shape
    h = {t: torch.zeros(n, H).double() for t in range(length)}
    c = dict(h)
    for layer in range(module.num_layers):
        d = module.dilation[layer % len(module.dilation)]
        new_h, new_c = {}, {}
        for t in range(length):
            from_x, from_h = [b.expand(n, H) for b in bias], [torch.zeros(n, H).double()] * G
            for tap, gate in itertools.product(range(k), range(G)):
                past = t - (k - 1 - tap) * d
                W_x, W_h = taps[tap][gate]
                seen = h[past] if past >= 0 else h0
                from_h[gate] = from_h[gate] + (seen if scale is None else seen * scale) @ W_h.T
                if past >= 0 and layer % module.inject_every == 0:
                    from_x[gate] = from_x[gate] + x[:, past] @ W_x.T
            before = c[t - d] if t >= d else c0
            z = [a + b for a, b in zip(from_x, from_h, strict=True)]
            if module.activation == "lstm":
                i, o, g, f = z
                new_c[t] = f.sigmoid() * before + i.sigmoid() * g.tanh()
                new_h[t] = o.sigmoid() * new_c[t].tanh()
            elif module.activation == "gru":
                r, u = z[0].sigmoid(), z[1].sigmoid()
                new_h[t] = new_c[t] = (1 - u) * (from_x[2] + r * from_h[2]).tanh() + u * before
            else:
                new_h[t] = new_c[t] = z[0].tanh()
        h, c = new_h, new_c
    return torch.stack(list(h.values()), dim=1), h[length - 1], c[length - 1]


@pytest.mark.parametrize(("kernel_size", "dilation"), GEOMETRIES)
@pytest.mark.parametrize(("activation", "groups", "inject"), VARIANTS)
def test_equals_the_equation_unit_by_unit(activation, groups, inject, kernel_size, dilation):
    module = net(activation, groups, inject, kernel_size=kernel_size, dilation=dilation, hidden_dropout=0.5)
    x, h0, c0 = inputs()
    mask = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 0, 1]])
    for scale in (None, mask / 0.5):
        masks = Masks() if scale is None else Masks(hidden=mask[:, :, None])
        output, h, c = by_loops(module, x, h0, c0, scale)
        full = module(x, (h0, c0), masks=masks)
        assert_close(full.output, output, atol=1e-13, rtol=0)
        assert_close(full.state, (h, c), atol=1e-13, rtol=0)
        last = module(x, (h0, c0), masks=masks, last_only=True)
        assert_close(last.output, output[:, -1:], atol=1e-13, rtol=0)
        assert_close(last.state, (h, c), atol=1e-13, rtol=0)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("activation", "groups", "inject"), VARIANTS)
def test_gradients_are_exact(activation, groups, inject, last_only):
    module = net(activation, groups, inject, num_layers=4, dilation=(1, 2), weight_norm=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x, h0, c0, *values):
        out = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (x, (h0, c0)), {"last_only": last_only}
        )
        return out.output, *out.state

    arguments = [t.requires_grad_() for t in inputs(4, n=1)]
    # Along random directions; the tests of the operators compare every single number.
    assert torch.autograd.gradcheck(run, (*arguments, *parameters), fast_mode=True)


@pytest.mark.parametrize(("activation", "groups", "inject"), VARIANTS)
def test_the_future_changes_no_bit_of_the_past(activation, groups, inject):
    module, (x, *_) = net(activation, groups, inject, dilation=(1, 2)), inputs(12)
    changed = x.clone()
    changed[:, 8:] = 100.0
    before, after = module(x, aux_every=1), module(changed, aux_every=1)
    for a, b in zip([before.output, *before.aux], [after.output, *after.aux], strict=True):
        assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.equal(before.output[:, 8:], after.output[:, 8:])


@pytest.mark.parametrize(
    ("groups", "output_size", "kernel_size", "dilation", "field"),
    [
        (1, 6, 2, (1,), 7),
        (3, 2, 2, (1,), 5),  # two of the six layers lift x to the third group
        (3, 3, 2, (1,), 6),  # the output includes a channel of the second group
        (3, 6, 2, (1,), 7),
        (3, 2, 3, (1, 2), 15),  # x reaches furthest if lifted where the dilation is smallest
        (6, 1, 2, (4, 1), 5),  # x enters through the first layer, with dilation 4
    ],
)
def test_receptive_field_of_groups(groups, output_size, kernel_size, dilation, field):
    module = net("lstm", groups, 1, output_size=output_size, kernel_size=kernel_size, dilation=dilation)
    assert module.receptive_field == field
    x = inputs(20, n=1)[0].requires_grad_()
    module(x).output[:, -1].sum().backward()
    assert 20 - x.grad.abs().sum(dim=(0, 2)).nonzero().min() == field
    shallow = net("lstm", 3, 1, num_layers=2, output_size=2)
    assert shallow.receptive_field == 0
    assert shallow(x.detach()).output.var(dim=1).max() > 0  # varies over time, but only because of bias and padding
    assert torch.equal(shallow(x.detach()).output, shallow(-x.detach()).output)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_stored_weight_of_a_mixed_group_kernel_is_trained(groups, weight_norm):
    module, (x, *_) = net("lstm", groups, 1, weight_norm=weight_norm), inputs()
    module(x).output.square().sum().backward()
    width = H // groups
    kernel = 4 * width * C * 2 + 4 * H * width + 4 * (H - width) * width
    g = 4 * width + 4 * H if weight_norm else 0
    assert sum(p.numel() for p in module.parameters()) == kernel + g + 4 * H
    for name, p in module.named_parameters():
        assert (p.grad != 0).all(), name


def test_gru_is_torchs_gru():
    torch.manual_seed(0)
    gru = nn.GRU(C, H, bias=False, batch_first=True, dtype=torch.float64)
    x, h0, _ = inputs()
    module = net("gru", 1, 1, num_layers=9)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.weight_x[:, :, 1] = gru.weight_ih_l0
        module.weight_h_past[:, :, 0] = gru.weight_hh_l0
    expected, h = gru(x, h0[None])
    out = module(x, (h0, h0))
    assert_close(out.output, expected, atol=1e-13, rtol=0)
    assert_close(out.state, (h[0], h[0]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("activation", GATES)
def test_drop_connect_and_weight_norm_act_on_rows_of_groups(activation):
    G = GATES[activation]
    module = net(activation, 3, 1, weight_norm=True, weight_dropout=0.5)
    mask = torch.rand(G * H, 2, 1, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[: 2 * G, 0] = True  # the only hidden weight of this row
    kernel = module.effective_weight("weight_h", Masks(weight_h=mask))
    assert kernel.shape == (G * H, 2, 2)
    assert_close(kernel.norm(dim=(1, 2))[:, None, None], module.weight_h_g.abs(), atol=1e-12, rtol=0)
    assert torch.equal(kernel[..., :1] != 0, mask)
    assert (kernel[: 2 * G, :, 1] == 0).all()  # the first group has none below
    assert (kernel[2 * G :, :, 1] != 0).all()
    torch.manual_seed(0)
    fresh = TrellisNet(C, H, 2, activation=activation, kernel_groups=3, dtype=torch.float64)
    expected = torch.cat([fresh.weight_h_past_v[2 * G :], fresh.weight_h_below_v], dim=2)
    assert_close(fresh.effective_weight("weight_h")[2 * G :], expected)


def test_dense_kernels_equal_grouped_ones():
    module, (x, h0, c0) = net("lstm", 3, 1), inputs()
    kernels = (module.effective_weight("weight_x"), module.effective_weight("weight_h"), module.bias)
    dense = mixed_group.dense(*kernels, 3, 4)
    assert [tuple(t.shape) for t in dense] == [(24, C, 2), (24, H, 2), (24,)]
    assert (dense[1] != 0).sum() == 24 * 2 + 16 * 2
    options = {"num_layers": LAYERS, "dilation": (1,), "output_size": H}
    output, state, *_ = trellis(x, *dense, (h0, c0), **options)
    expected, expected_state, *_ = trellis(x, *kernels, (h0, c0), **options, kernel_groups=3)
    assert_close((output, state), (expected, expected_state), atol=1e-13, rtol=0)


def language_model(**options):
    torch.manual_seed(2)
    return TrellisLanguageModel(11, 3, 6, 3, output_size=3, **options)


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize(("activation", "groups", "inject"), [("gru", None, 1), ("lstm", 2, 1), ("tanh", 1, 2)])
def test_weights_of_variants_are_saved_and_loaded(tmp_path, activation, groups, inject, weight_norm):
    options = {"activation": activation, "kernel_groups": groups, "inject_every": inject, "weight_norm": weight_norm}
    model, other = language_model(**options), language_model(**options)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert len(weights.parameter_map(model)) == len(list(model.parameters()))
    weights.save_weights(model, tmp_path / "w.pkl")
    weights.load_weights(other, tmp_path / "w.pkl")
    tokens = torch.arange(8)[None]
    assert torch.equal(model.eval()(tokens).output, other.eval()(tokens).output)


ANOTHER_KIND = [
    (
        {"activation": "gru"},
        {},
        "was trained with another kind of layer; pass activation='gru'$",
        "pass activation='gru'$",
    ),
    ({}, {"activation": "tanh"}, "pass activation='lstm'$", "pass activation='lstm'$"),
    ({"kernel_groups": 2}, {"kernel_groups": 3}, "pass kernel_groups=2$", "another model"),
    ({}, {"kernel_groups": 3}, "holds a dense kernel; pass kernel_groups=None$", "pass kernel_groups=None$"),
    ({"kernel_groups": 2}, {}, "holds a mixed group convolution; pass kernel_groups=2$", "pass kernel_groups=2$"),
    ({"inject_every": 2}, {}, "pass inject_every=2$", None),
    ({"activation": "gru", "inject_every": 2}, {}, "pass activation='gru', inject_every=2$", "pass activation='gru'$"),
]


@pytest.mark.parametrize(("saved", "built", "message", "without_metadata"), ANOTHER_KIND)
def test_weights_of_another_variant_are_refused(tmp_path, saved, built, message, without_metadata):
    weights.save_weights(language_model(**saved), tmp_path / "w.pkl")
    with pytest.raises(UserError, match=message):
        weights.load_weights(language_model(**built), tmp_path / "w.pkl")
    # A file without metadata: names and shapes must suffice.
    torch.save(dict(torch.load(tmp_path / "w.pkl", weights_only=True)), tmp_path / "plain.pkl")
    weights.load_weights(language_model(**saved), tmp_path / "plain.pkl")
    if without_metadata:
        with pytest.raises(UserError, match=without_metadata):
            weights.load_weights(language_model(**built), tmp_path / "plain.pkl")


def test_metadata_of_another_type_are_ignored(tmp_path):
    state = weights.authors_state_dict(language_model())
    state._metadata = {"trellisnet": {"activation": "lstm", "mixed_group": torch.ones(2), "inject_every": "x\ny"}}
    torch.save(state, tmp_path / "w.pkl")
    weights.load_weights(language_model(), tmp_path / "w.pkl")


def test_weights_of_another_width_name_the_size_whatever_the_gates(tmp_path):
    torch.manual_seed(0)
    weights.save_weights(TrellisClassifier(1, 2, 6, 3, output_size=2, activation="gru"), tmp_path / "w.pkl")
    with pytest.raises(UserError, match=r"pass hidden_size=6$"):
        weights.load_weights(TrellisClassifier(1, 2, 9, 3, output_size=2, activation="gru"), tmp_path / "w.pkl")
