"""The equilibrium of a trellis: the limit of many layers, its gradients, its exact state, and how training uses it."""

import json
import warnings

import pytest
import torch
from torch.testing import assert_close

import word_ptb.train
from trellisnet import TrellisNet
from trellisnet.equilibrium import WAYS, EquilibriumTrellisNet, NotConverged, anderson, iterate
from trellisnet.evaluation.generate import Reader
from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks

SIZES = (4, 12)  # C, H
OPTIONS = {"output_size": 5, "init_gain": 1.0, "hidden_dropout": 0.2, "weight_dropout": 0.2, "dtype": torch.float64}


@pytest.fixture(params=["reference", "fused"])
def backend(request):
    return request.param


def network(backend, depth=1, **settings):
    """A contractive network, and a TrellisNet of the given depth with its weights."""
    torch.manual_seed(0)
    settings = {"tolerance": 1e-12, "max_evaluations": 400, **settings}
    net = EquilibriumTrellisNet(*SIZES, **OPTIONS, **settings, backend=backend)
    deep = TrellisNet(*SIZES, depth, **OPTIONS, backend=backend)
    deep.load_state_dict(net.state_dict())
    return net, deep


def sequence(length=20):
    return torch.randn(3, length, SIZES[0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("evaluations", [1, 2, 7])
def test_evaluations_are_layers(backend, evaluations):
    net, deep = network(backend, evaluations, solver="iterate", tolerance=0.0, max_evaluations=evaluations)
    x, masks = sequence(), Masks(**net.draw_masks(3))
    state = torch.randn(2, 3, SIZES[1], dtype=torch.float64)
    with torch.no_grad(), pytest.warns(NotConverged):
        out = net(x, (*state, torch.zeros(3, SIZES[0], dtype=torch.float64)), masks=masks)
    with torch.no_grad():
        expected = deep(x, tuple(state), masks=masks)
    assert net.solved["forward"][1] == evaluations
    for got, want in zip((out.output, *out.state[:2]), (expected.output, *expected.state), strict=True):
        if backend == "reference":
            assert torch.equal(got, want)
        assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", WAYS)
def test_gradients_are_those_of_500_layers(backend, solver):
    net, deep = network(backend, 500, solver=solver)
    x, masks = sequence(), Masks(**net.draw_masks(3))
    direction = torch.randn(3, 15, 5, dtype=torch.float64)
    gradients = []
    for core in (net, deep):
        out = core(x, start=5, masks=masks)
        objective = (out.output * direction).sum() + out.state[0].square().sum() + out.state[1].sum()
        gradients.append(torch.autograd.grad(objective, [x, *core.parameters()]))
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert all(residual <= 1e-12 for residual, _ in net.solved.values())


def test_gradients_of_a_carried_state(backend):
    net, _ = network(backend)
    x = sequence(6).detach()
    state = tuple(
        torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (SIZES[1], SIZES[1], SIZES[0])
    )
    net.eval()

    def objective(*state):
        out = net(x, state)
        return out.output.square().sum() + out.state[1].sum()

    gradients, step = torch.autograd.grad(objective(*state), state), 1e-5
    with torch.no_grad():
        for index, gradient in enumerate(gradients):
            direction = torch.randn_like(gradient)
            ends = []
            for sign in (step, -step):
                moved = [part + sign * direction if i == index else part for i, part in enumerate(state)]
                ends.append(objective(*moved))
            assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-7)


def test_phantom_gradients_are_those_of_the_last_layers(backend):
    net, _ = network(backend, phantom=3)
    x, masks = sequence(), Masks(**net.draw_masks(3))
    loss = net(x, masks=masks).output.square().sum()
    gradient = torch.autograd.grad(loss, net.weight_h_v, create_graph=True)[0]
    assert torch.autograd.grad(gradient.sum(), net.weight_h_v)[0].isfinite().all()  # a second derivative exists
    net.phantom = 300
    many = torch.autograd.grad(net(x, masks=masks).output.square().sum(), net.weight_h_v)[0]
    net.phantom = 0
    out = net(x, masks=masks).output.square().sum()
    assert_close(torch.autograd.grad(out, net.weight_h_v)[0], many, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(gradient, many, rtol=1e-8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(net(x).output.sum(), net.weight_h_v, create_graph=True)


@pytest.mark.parametrize(
    ("solver", "length"), [("stepwise", 1), ("stepwise", 7), ("anderson", 7), ("iterate", 1), ("iterate", 64)]
)
def test_segments_are_one_pass(backend, solver, length):
    net, _ = network(backend, solver=solver, tolerance=1e-11)
    net.eval()
    x, state, outputs = sequence(66).detach(), None, []
    with torch.no_grad():
        whole = net(x)
        for part in x.split(length, dim=1):
            output, state, _ = net(part, state)
            outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), whole.output, rtol=0, atol=1e-9)
    for got, want in zip(state, whole.state, strict=True):
        assert_close(got, want, rtol=0, atol=1e-9)


def test_a_state_does_not_change_with_the_memory_of_input_and_output(backend):
    net, _ = network(backend)
    net.eval()
    x, stream = sequence(6).detach(), net.init_stream(3)
    buffer, at, outputs, steps = torch.empty_like(x[:, :3]), torch.empty_like(x[:, 0]), [], []
    with torch.no_grad():
        whole, state = net(x).output, None
        for part in x.split(3, dim=1):
            output, state, _ = net(buffer.copy_(part), state)
            outputs.append(output.clone())
            output.zero_()
        for step in x.unbind(1):
            output, stream = net.step(at.copy_(step), stream)
            steps.append(output.clone())
            output.zero_()
    assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-9)
    assert_close(torch.stack(steps, dim=1), whole, rtol=0, atol=1e-9)


def test_streams_read_without_dropout(backend):
    net, _ = network(backend)  # in training mode
    x = sequence(9).detach()
    piece, stream = net.stream(x[:, :4], net.init_stream(3))
    outputs = [piece]
    for t in range(4, 9):
        output, stream = net.step(x[:, t], stream)
        outputs.append(output.unsqueeze(1))
    assert_close(torch.cat(outputs, dim=1), net.eval()(x).output, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="batch_size"):
        net.init_stream(0)


def test_padding_has_no_influence(backend):
    net, _ = network(backend)
    net.eval()
    x, lengths = sequence(9).detach(), [9, 4, 1]
    padded = x.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = torch.nan
    out = net(padded, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = net(x[row : row + 1, :length])
        assert_close(out.output[row, :length], alone.output[0], rtol=0, atol=1e-9)
        for got, want in zip(out.state, alone.state, strict=True):
            assert_close(got[row], want[0], rtol=0, atol=1e-9)
    assert_close(net(x, last_only=True).output, net(x).output[:, -1:])


def test_anderson_solves_what_iteration_circles_around():
    matrix = torch.tensor([[0.0, -1.2], [1.2, 0.0]])  # eigenvalues ±1.2i

    def f(z):
        return torch.tanh(z @ matrix.t()) + torch.tensor([0.1, -0.2])

    start = torch.tensor([[0.5, 0.5], [-1.0, 0.3]])
    assert iterate(f, start, 1e-5, 200).residual > 0.1
    solution = anderson(f, start, 1e-5, 200)
    assert solution.residual <= 1e-5
    assert solution.evaluations < 40
    assert_close(f(solution.z), solution.z, rtol=1e-4, atol=1e-4)


def test_anderson_survives_a_row_that_is_solved_and_one_that_is_not_finite():
    def f(z):
        return z * torch.tensor([[0.0], [0.5], [torch.nan]])

    solution = anderson(f, torch.ones(3, 2), 1e-5, 30)
    assert solution.evaluations == 30
    assert torch.equal(solution.z[0], torch.zeros(2))
    assert solution.z[1].abs().max() < 1e-5


def test_a_solver_that_stops_early_says_so(backend):
    net, _ = network(backend, max_evaluations=2)
    with pytest.warns(NotConverged, match="forward solution above the tolerance after 2 evaluations"):
        out = net(sequence())
    with pytest.warns(NotConverged, match="backward"):
        out.output.sum().backward()
    assert net.solved["forward"][0] > 1e-12 < net.solved["backward"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 3}, "kernel_size: an equilibrium needs 2, got 3"),
        ({"dilation": (1, 2)}, "dilation"),
        ({"activation": "gru"}, "activation: an equilibrium needs lstm"),
        ({"recompute": True}, "recompute"),
        ({"solver": "newton"}, "solver: expected one of stepwise, iterate, anderson"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"max_evaluations": 0}, "max_evaluations"),
        ({"phantom": -1}, "phantom"),
    ],
)
def test_what_has_no_equilibrium_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EquilibriumTrellisNet(*SIZES, **settings)
    ((name, value),) = settings.items()
    if name != "activation":  # the others can be set later, which once changed nothing
        net = EquilibriumTrellisNet(*SIZES)
        setattr(net, name, value)
        with pytest.raises(ValueError, match=message):
            net(torch.randn(3, 5, 4))


def test_more_outputs_than_channels_are_refused():
    net = EquilibriumTrellisNet(*SIZES)
    net.output_size = 14  # of 12; a slice from 12 − 14 would be two channels
    with pytest.raises(ValueError, match="output_size: expected 1 to hidden_size = 12, got 14"):
        net(torch.randn(3, 5, 4))


def test_arguments_are_checked():
    net = EquilibriumTrellisNet(*SIZES)
    x = torch.randn(3, 5, 4)
    for arguments, message in [
        ({"num_layers": 3}, "no layers"),
        ({"aux_every": 1}, "no layers"),
        ({"start": 5}, "start"),
        ({"lengths": [1, 2, 3], "start": 1}, "lengths"),
        ({"state": (torch.zeros(3, 12), torch.zeros(3, 12))}, "state: expected .h, c, x., got 2 parts"),
        ({"state": (torch.zeros(3, 12), torch.zeros(3, 12), torch.zeros(3, 5))}, "state x: expected .3, 4., got"),
    ]:
        with pytest.raises(ValueError, match=message):
            net(x, **arguments)


def test_dtypes_and_programs_are_refused_in_our_words():
    net = EquilibriumTrellisNet(*SIZES)
    x = torch.randn(3, 5, 4)
    with pytest.raises(TypeError, match="x: expected float32"):
        net(x.double())
    with pytest.raises(TypeError, match="state h: expected float32"):
        net(x, tuple(part.double() for part in net.init_stream(3)))
    with pytest.raises(ValueError, match="torch cannot compile or transform an equilibrium"):
        torch.func.vmap(net)(x.unsqueeze(0))
    with pytest.raises(Exception, match="torch cannot compile or transform an equilibrium"):  # torch wraps the error
        torch.export.export(net, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """The input may come from a product in 16 bits; the solution is in the dtype of the weights."""
    torch.manual_seed(0)
    net = EquilibriumTrellisNet(*SIZES, init_gain=1.0, tolerance=1e-2)
    x = torch.randn(3, 20, 4)
    expected = net(x).output
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = net(x[:, :9].to(dtype))
        out = net(x[:, 9:].to(dtype), tuple(part.to(dtype) for part in out.state))
    out.output.sum().backward()
    assert {part.dtype for part in (out.output, *out.state)} == {torch.float32}
    assert_close(out.output, expected[:, 9:], rtol=0.1, atol=0.02)
    assert net.weight_h_v.grad.isfinite().all()


@pytest.mark.parametrize("solver", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_solved_in_single_precision(backend, solver, dtype):
    torch.manual_seed(0)
    options = {"init_gain": 1.0, "weight_norm": False, "solver": solver, "backend": backend, "tolerance": 1e-5}
    net, wide = EquilibriumTrellisNet(*SIZES, **options).to(dtype), EquilibriumTrellisNet(*SIZES, **options)
    wide.load_state_dict(net.state_dict())
    x = torch.randn(3, 9, 4).to(dtype)
    outs = []
    for core in (net, wide):
        first = core(x[:, :5].to(core.bias.dtype))
        state = tuple(part.to(dtype).to(core.bias.dtype) for part in first.state)
        outs.append(core(x[:, 5:].to(core.bias.dtype), state, lengths=[4, 2, 1]))
        outs[-1].output.square().sum().backward()
    assert net.solved["forward"][0] <= 1e-5 >= net.solved["backward"][0]
    for got, want in zip((outs[0].output, *outs[0].state), (outs[1].output, *outs[1].state), strict=True):
        assert torch.equal(got, want.to(dtype))
    for got, want in zip(net.parameters(), wide.parameters(), strict=True):
        assert_close(got.grad.float(), want.grad, rtol=0.02, atol=0.02 * want.grad.abs().max().item())
    output, _ = net.step(x[:, 0], net.init_stream(3))
    assert output.dtype == dtype


@pytest.mark.parametrize("solver", WAYS)
def test_an_empty_batch(backend, solver):
    net, _ = network(backend, solver=solver)
    out = net(torch.randn(0, 5, 4, dtype=torch.float64))
    out.output.sum().backward()
    assert out.output.shape == (0, 5, 5)
    assert net.bias.grad.abs().max() == 0


def test_language_models_read_what_they_score():
    torch.manual_seed(0)
    model = TrellisLanguageModel(11, 6, 12, 1, output_size=6, core=EquilibriumTrellisNet, tolerance=1e-6, init_gain=1.0)
    tokens = torch.randint(11, (2, 9))
    reader = Reader(model.eval(), 2)
    reader.read(tokens[:, :5])
    log_prob = [reader.read(tokens[:, t : t + 1]) for t in range(5, 9)][-1]
    with torch.no_grad():
        assert_close(log_prob, model.log_prob(model(tokens).output[:, -1]), rtol=1e-4, atol=1e-5)


FLAGS = (
    "--preset tiny --aux 0 --data synthetic --nhid 8 --emsize 8 --nout 8 --horizon 6 --batch_size 4 --no-cuda "
    "--max_eval_tokens 99"
).split()


@pytest.mark.filterwarnings("default::trellisnet.equilibrium.NotConverged")
def test_training(tmp_path, capsys):
    """Train unrolled, go on at the equilibrium, resume bit for bit, and score with and without it."""
    shallow = tmp_path / "shallow"
    assert word_ptb.train.main([*FLAGS, "--max_steps", "4", "--epochs", "1", "--out", str(shallow)]) == 0
    go_on = [*FLAGS, "--equilibrium", "--load_weight", str(shallow / "weights.pkl"), "--epochs", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert word_ptb.train.main([*go_on, "--max_steps", "4", "--out", str(whole)]) == 0
    assert word_ptb.train.main([*go_on, "--max_steps", "2", "--out", str(parts)]) == 0
    assert word_ptb.train.main(["--resume", str(parts / "last.pt"), "--max_steps", "4"]) == 0
    assert (whole / "weights.pkl").read_bytes() == (parts / "weights.pkl").read_bytes()
    *_, epoch, result = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for residual, evaluations, unsolved in (
        [result["test"][name] for name in ("residual", "evaluations", "unsolved")],
        [epoch[f"train_{name}"] for name in ("residual", "evaluations", "unsolved")],
    ):
        assert 0 < residual <= 1e-3
        assert 1 <= evaluations <= 60
        assert unsolved == 0
    capsys.readouterr()
    few = ["--run", str(whole), "--eval", "--max_evaluations", "1", "--metrics", str(tmp_path / "few.json")]
    assert word_ptb.train.main(few) == 0
    assert json.loads((tmp_path / "few.json").read_text())["test"]["unsolved"] == 1
    warning = "warning: forward solution above the tolerance after 1 evaluation: raise max_evaluations or tolerance"
    assert capsys.readouterr().err.splitlines().count(warning) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--equilibrium --ksize 3", "--equilibrium: needs --ksize 2"),
        ("--equilibrium --dilation 1 2", "--equilibrium: needs --dilation 1"),
        ("--equilibrium --aux 0.1 --aux_freq 2", "--equilibrium: needs --aux 0"),
        ("--equilibrium --horizon auto --seq_len 500", "--horizon auto: an equilibrium has no finite reach"),
        ("--equilibrium --recompute", "--recompute: has no effect with --equilibrium"),
        ("--equilibrium --grow 2:1 --epochs 3", "--grow: has no effect with --equilibrium"),
        ("--solver anderson", "--solver: has no effect without --equilibrium"),
        ("--phantom 3", "--phantom: has no effect without --equilibrium"),
        ("--model awd-lstm --equilibrium", "--equilibrium: has no effect on --model awd-lstm"),
    ],
)
def test_flags_that_contradict_are_refused(flags, message, capsys):
    assert word_ptb.train.main([*"--data synthetic --no-cuda --aux 0".split(), *flags.split()]) == 2
    assert message in capsys.readouterr().err
