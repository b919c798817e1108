"""`num_layers` of one call: the result equals that of a module of that depth with the same weights."""

import copy

import pytest
import torch
from torch.testing import assert_close

from trellisnet import TrellisNet
from trellisnet.baselines import RHN
from trellisnet.models import TrellisClassifier, TrellisLanguageModel

EXACT = {"atol": 1e-12, "rtol": 1e-12}
OWN = 5
VARIANTS = {
    "fused": {},
    "fused-tanh": {"activation": "tanh"},
    "fused-k3": {"kernel_size": 3, "inject_every": 2, "weight_norm": False},
    "recompute": {"recompute": True},
    "reference": {"backend": "reference"},
    "reference-gru": {"activation": "gru"},
    "reference-grouped": {"kernel_groups": 3},
}
CALLS = [{}, {"last_only": True}, {"start": 4, "aux_every": 2}, {"lengths": [9, 5]}]
DEPTHS = (1, 3, 8)


def pair(make, depth):
    """Make a module of `OWN` layers, and one of another depth with the same weights."""
    torch.manual_seed(0)
    module, built = make(OWN).double(), make(depth).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    built.load_state_dict(copy.deepcopy(module.state_dict()))
    return module, built


def core(options):
    settings = {"output_size": 4, "dilation": (1, 2), "hidden_dropout": 0.3, "weight_dropout": 0.3, **options}
    return lambda num_layers: TrellisNet(3, 6, num_layers, **settings)


def results(module, outputs, *inputs):
    """Return outputs, then their gradients in all parameters and inputs."""
    wanted = [*module.parameters(), *inputs]
    grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted, allow_unused=True)
    return [*outputs, *grads]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_call_equals_a_module_of_this_depth(options, depth):
    for call in CALLS:
        module, built = pair(core(options), depth)
        x, h, c = (
            torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 9, 3), (2, 6), (2, 6))
        )
        outcomes = []
        for runner, layers in ((module, {"num_layers": depth}), (built, {})):
            torch.manual_seed(1)  # the same masks
            out = runner(x, (h, c), **call, **layers)
            assert len(out.aux) == (depth // 2 if "aux_every" in call else 0)
            outcomes.append(results(runner, [out.output, *out.state, *out.aux], x, h, c))
        assert_close(*outcomes, **EXACT)
        assert module.num_layers == OWN
        torch.manual_seed(1)
        assert not torch.equal(module(x, (h, c), **call).output, outcomes[0][0])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_one_pass_from_a_zero_state_holds_every_depth(options):
    for start in (0, 4):
        module, deep = pair(core(options), 8)
        x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)  # the same masks
        outputs = deep(x, start=start, aux_every=1).aux
        assert len(outputs) == 8
        for depth, output in enumerate(outputs, start=1):
            torch.manual_seed(1)
            own = module(x, start=start, num_layers=depth).output
            ours = torch.autograd.grad(output.square().sum(), [x, *deep.parameters()], retain_graph=True)
            theirs = torch.autograd.grad(own.square().sum(), [x, *module.parameters()])
            assert_close([output, *ours], [own, *theirs], **EXACT)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_streams_have_their_own_depth(options, depth):
    module, built = pair(core(options), depth)
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = built.eval()(x).output
    stream = module.init_stream(2, num_layers=depth)
    own, _ = module.stream(x, module.init_stream(2))  # a stream of the module's own depth beside it
    outputs, stream = module.stream(x[:, :7], stream)
    last = []
    for t in range(7, 12):
        y, stream = module.step(x[:, t], stream)
        last.append(y)
    assert_close(torch.cat([outputs, torch.stack(last, dim=1)], dim=1), expected, **EXACT)
    assert_close(own, module.eval()(x).output.detach(), **EXACT)


@pytest.mark.parametrize("depth", DEPTHS)
def test_models_pass_the_depth_on(depth):
    def language(num_layers):
        return TrellisLanguageModel(11, 4, 6, num_layers, output_size=4)

    model, built = pair(language, depth)
    tokens, targets = torch.randint(11, (2, 9)), torch.randint(11, (2, 9))
    outcomes = []
    for runner, layers in ((model, {"num_layers": depth}), (built, {})):
        out = runner(tokens, aux_every=1, **layers)
        outcomes.append(results(runner, [runner.loss(out.output, targets), *out.state, *out.aux]))
    assert_close(*outcomes, **EXACT)
    features, _ = model.stream(tokens, model.init_stream(2, num_layers=depth))
    assert_close(features, built.eval()(tokens).output.detach(), **EXACT)

    model, built = pair(lambda num_layers: TrellisClassifier(2, 5, 6, num_layers, dilation=(1, 2)), depth)
    x = torch.randn(3, 9, 2, dtype=torch.float64)
    for lengths in (None, [9, 2, 4]):
        outcomes = []
        for runner, layers in ((model, {"num_layers": depth}), (built, {})):
            outcomes.append(results(runner, runner(x, lengths=lengths, **layers)[:1]))
        assert_close(*outcomes, **EXACT)


def test_layer_steps_of_a_depth():
    module = core({})(OWN)
    assert module.layer_steps(9, num_layers=3, start=4) == core({})(3).layer_steps(9, start=4)
    module.num_layers = 3  # for all calls
    assert module.layer_steps(9) == 27
    assert module.receptive_field == core({})(3).receptive_field


@pytest.mark.parametrize(("value", "message"), [(0, "at least 1, got 0"), (2.5, "an integer, got 2.5")])
def test_an_impossible_depth_is_refused(value, message):
    module, model = core({})(2), TrellisLanguageModel(11, 4, 6, 2, output_size=4)
    for call in (
        lambda: module(torch.zeros(1, 2, 3), num_layers=value),
        lambda: module.init_stream(1, num_layers=value),
        lambda: module.layer_steps(2, num_layers=value),
        lambda: setattr(module, "num_layers", value),
        lambda: model(torch.zeros(1, 2, dtype=torch.int64), num_layers=value),
        lambda: model.init_stream(1, num_layers=value),
        lambda: TrellisClassifier(3, 5, 6, 2)(torch.zeros(1, 2, 3), num_layers=value),
    ):
        with pytest.raises(ValueError, match=f"^num_layers: expected {message}$"):
            call()
    assert module.num_layers == 2


def test_other_cores_have_one_depth():
    message = "^num_layers: only a TrellisNet runs at any depth; expected None, got 3$"
    with pytest.raises(ValueError, match=message):
        TrellisLanguageModel(11, 6, 6, 2, output_size=6, core=RHN)(torch.zeros(1, 2, dtype=torch.int64), num_layers=3)
    with pytest.raises(ValueError, match=message):
        TrellisClassifier(3, 5, 6, 2, core=RHN)(torch.zeros(1, 2, 3), num_layers=3)
