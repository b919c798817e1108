"""The baselines: published sizes and geometry, and what each computes."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import char_ptb.model
import pmnist.model
import word_ptb.model
import wt103.model
from trellisnet import serialization
from trellisnet.baselines import AWDLSTM, RHN, TCN, SparseEmbedding, SparseLSTM, SparseStack
from trellisnet.baselines.lstm import WeightDropLSTM
from trellisnet.baselines.sparse import _ratio, segments, staircase
from trellisnet.errors import UserError
from trellisnet.models import TrellisClassifier, TrellisLanguageModel, count_parameters
from trellisnet.regularization import Masks
from trellisnet.training.config import parse
from trellisnet.training.optim import Schedule
from trellisnet.training.passes import Passes
from trellisnet.training.tasks import LanguageModeling
from trellisnet.weights import load_weights, save_weights

CORES = {
    "awd-lstm": AWDLSTM,
    "tcn": functools.partial(TCN, kernel_size=3),
    "rhn": RHN,
    "sparse-lstm": functools.partial(SparseStack, mode="sparse_all", fraction=0.7),
}
RECURRENT = [name for name in CORES if name != "tcn"]


def size(core, *sizes, **options):
    return count_parameters(core(*sizes, device="meta", **options))


def model(name, **options):
    torch.manual_seed(0)
    return TrellisLanguageModel(40, 12, 12, 3, output_size=12, core=CORES[name], **options)


def tokens(n=3, length=14, seed=1):
    return torch.randint(40, (n, length), generator=torch.Generator().manual_seed(seed))


# -- published sizes ---------------------------------------------------------------------------------------------------

SIZES = [
    # task, command line, words or channels, parameters
    (word_ptb.model, "--model awd-lstm", 10_000, 24_221_600),
    (word_ptb.model, "--model awd-lstm", 33_278, 33_556_078),
    (char_ptb.model, "--model awd-lstm", 50, 13_787_650),
    (char_ptb.model, "--model awd-lstm", 51, 13_787_851),
    (word_ptb.model, "--model awd-lstm --preset mos", 10_000, 21_500_620),
    (word_ptb.model, "--model tcn", 10_000, 14_659_600),
    (char_ptb.model, "--model tcn", 50, 2_222_100),
    (char_ptb.model, "--model tcn", 49, 2_221_999),
    (pmnist.model, "--model tcn", 1, 66_910),
    (wt103.model, "--model tcn", 267_735, 150_073_938),
    # The authors have 400 parameters more (200 with half the width): the prior of a mixture of one softmax.
    (word_ptb.model, "--model sparse-lstm", 10_000, 23_823_300 - 400),
    (word_ptb.model, "--model sparse-lstm --sparse_mode direct --nhid 1150 --sparse_fract 1", 10_000, 24_222_000 - 400),
    (word_ptb.model, "--preset awd-lstm-recite --emsize 200 --nout 200 --nhid 575", 10_000, 7_068_500 - 200),
    (
        word_ptb.model,
        "--preset sparse-lstm-recite --sparse_mode sparse_hidden --sparse_fract .5 --emsize 200 --nout 200",
        10_000,
        7_068_504 - 200,
    ),
    (
        word_ptb.model,
        "--preset sparse-lstm-recite --sparse_mode sparse_all --sparse_fract .5 --emb_blocks 10 --emb_density .5",
        10_000,
        7_070_560 - 400,
    ),
    # Recurrent highway networks at every depth, with tied and untied weights.
    *(
        (word_ptb.model, f"--model rhn --preset depth-{depth}{untied}", 10_000, parameters)
        for depth, *both in (
            (1, 19_265_050, 32_015_050),
            (2, 20_169_120, 31_969_120),
            (3, 20_973_460, 32_073_460),
            (4, 21_543_400, 32_043_400),
            (5, 22_020_000, 32_020_000),
            (6, 22_523_920, 32_123_920),
            (7, 22_765_280, 31_965_280),
            (8, 23_182_040, 32_082_040),
            (9, 23_417_480, 32_017_480),
            (10, 23_482_400, 31_782_400),
        )
        for untied, parameters in zip(("", " --no-tied"), both, strict=True)
    ),
]


@pytest.mark.parametrize(("task", "argv", "vocabulary", "parameters"), SIZES)
def test_the_published_size(task, argv, vocabulary, parameters):
    config, _ = parse(task.Config, argv.split())
    with torch.device("meta"):
        built = task.build_model(config, vocabulary, *([10] if task is pmnist.model else []))
    assert count_parameters(built) == parameters


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    [(1, 1275, 6_505_050), (2, 1180, 8_359_120), (5, 1000, 12_010_000), (9, 860, 14_807_480), (10, 830, 15_172_400)],
)
def test_the_size_of_a_recurrent_highway_layer(depth, width, parameters):
    assert size(RHN, width, width, depth) == parameters


@pytest.mark.parametrize(("inputs", "parameters"), [(205, 45_994_730), (27, 45_152_256)])
def test_the_authors_large_character_models(inputs, parameters):
    """enwik8 and text8: an untied softmax, and an embedding as wide as the alphabet."""
    options = {"output_size": 1500, "tied": False, "core": RHN, "device": "meta"}
    assert count_parameters(TrellisLanguageModel(inputs, inputs, 1500, 10, **options)) == parameters


@pytest.mark.parametrize(("k", "layers", "seen"), [(3, 4, 61), (3, 3, 29), (7, 8, 3061)])
def test_the_receptive_field_of_a_tcn(k, layers, seen):
    assert TCN(1, 2, layers, kernel_size=k, device="meta").receptive_field == seen


@pytest.mark.parametrize("name", CORES)
def test_the_small_preset_has_the_size_of_trellisnets(name):
    def parameters(argv):
        config, _ = parse(word_ptb.model.Config, argv.split())
        with torch.device("meta"):
            return count_parameters(word_ptb.model.build_model(config, 10_000))

    assert parameters(f"--model {name} --preset small") == pytest.approx(parameters("--preset small"), rel=0.02)


# -- published geometry ------------------------------------------------------------------------------------------------

LAYERS = [
    # sizes, blocks and density or reductions; then density, segments of inputs, of outputs, parameters
    ((8, 6), {"blocks": 2, "density": 0.75}, 0.75, [(0, 6), (2, 8)], [(0, 3), (3, 6)], 264),
    ((10, 9), {"blocks": 3, "density": 0.5}, 0.5, [(0, 5), (2, 7), (5, 10)], [(0, 3), (3, 6), (6, 9)], 360),
    ((40, 60), (0.5, 0.5), 0.3, [(0, 12), (7, 19), (14, 26), (21, 33), (28, 40)], 5 * [12], 6_240),
    ((100, 100), (0.5, 0.5), 0.29, [(0, 29), (17, 46), (35, 64), (53, 82), (71, 100)], 5 * [20], 20_400),
    ((400, 1150), (1, 1), 1, [(0, 400)], [1150], 7_139_200),
    ((1150, 1150), (1, 1), 1, [(0, 1150)], [1150], 10_589_200),
    ((1150, 400), (1, 1), 1, [(0, 1150)], [400], 2_483_200),
    ((400, 1725), (1, 0.66666), 1, 3 * [(0, 400)], 3 * [575], 6_741_300),
    ((1725, 1725), (0.66666, 0.66666), 0.5551513, [(0, 957), (383, 1341), (767, 1725)], 3 * [575], 10_589_200),
    ((1725, 400), (0.66666, 1), 0.7826020, [(0, 1349), (375, 1725)], 2 * [200], 2_482_400),
    ((1725, 400), (2 / 3, 1), None, [(0, 1350), (374, 1725)], 2 * [200], 2_484_000),
    ((200, 1150), (1, 0.5), 0.495, [(0, 99), (33, 132), (67, 166), (101, 200)], [287, 288, 287, 288], 1_787_104),
    (
        (1150, 1150), (0.5, 0.5), 0.2991304, [(0, 344), (201, 545), (403, 747), (604, 948), (806, 1150)], 5 * [230],
        2_649_600,
    ),
    ((1150, 200), (0.5, 1), 0.5869565, [(0, 675), (475, 1150)], 2 * [100], 621_600),
    ((400, 1150), (0.5, 0.5), 0.39125, [(0, 156), (60, 217), (121, 278), (182, 339), (243, 400)], 5 * [230], 1_788_480),
    (
        (1150, 400), (0.5, 0.5), 0.2665217, [(0, 306), (210, 517), (421, 728), (632, 939), (843, 1150)], 5 * [80],
        622_080,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "how", "density", "inputs", "outputs", "parameters"), LAYERS)
def test_the_geometry_of_a_sparse_lstm(sizes, how, density, inputs, outputs, parameters):
    options = how if isinstance(how, dict) else dict(zip(("reduce_in", "reduce_out"), how, strict=True))
    layer = SparseLSTM(*sizes, device="meta", **options)
    assert layer.inputs == inputs
    if isinstance(outputs[0], int):
        assert [end - begin for begin, end in layer.outputs] == outputs
    else:
        assert layer.outputs == outputs
    assert density is None or layer.density == pytest.approx(density, abs=1e-7)
    assert count_parameters(layer) == parameters


def test_hidden_channels_are_divided_without_overlap():
    """Rounding once made 15 channels of 14 in 6 blocks."""
    for total in range(2, 120):
        for count in range(1, total + 1):
            spans = segments(total, count, 1 / count)
            assert [n for begin, end in spans for n in range(begin, end)] == list(range(total))
            assert {end - begin for begin, end in spans} <= {total // count, -(-total // count)}
    layer = SparseLSTM(30, 14, blocks=6, density=0.5)
    y, state = layer(torch.randn(2, 3, 30))
    assert [part.size(-1) for part in (y, *state)] == [14, 14, 14]


@pytest.mark.parametrize(
    ("sizes", "mode", "fraction", "parameters"),
    [
        ((400, 1150), "direct", 1, 20_211_600),
        ((400, 1725), "sparse_hidden", 0.66666, 19_812_900),
        ((400, 1725), "sparse_hidden", 2 / 3, 19_814_500),
        ((200, 575), "direct", 1, 5_058_300),
        ((200, 1150), "sparse_hidden", 0.5, 5_058_304),
        ((400, 1150), "sparse_all", 0.5, 5_060_160),
    ],
)
def test_the_size_of_a_stack(sizes, mode, fraction, parameters):
    assert size(SparseStack, *sizes, 3, output_size=sizes[0], mode=mode, fraction=fraction) == parameters


def test_which_layers_a_mode_reduces():
    def reductions(mode, layers):
        built = []
        stack = SparseStack(60, 80, layers, output_size=60, mode=mode, fraction=0.5, device="meta")
        for layer in stack.layers:
            built.append((layer.inputs != [(0, layer.input_size)], len(layer.parts)))
        return built

    dense = (False, 1)
    assert reductions("sparse_emb", 3)[1] == dense
    assert reductions("sparse_hidden", 1) == [dense]
    assert all(parts > 1 for _, parts in reductions("sparse_all", 3))
    first, *_, last = reductions("sparse_hidden", 4)
    assert first != dense != last


TABLES = [
    # V, E, density, blocks; then trainable rows of every block, widths, parameters
    ((12, 4, 0.75, 2), [12, 6], [2, 2], 36),
    ((20, 6, 0.5, 3), [20, 7, 3], 3 * [2], 60),
    ((100, 10, 0.5, 5), [100, 64, 41, 27, 18], 5 * [2], 500),
    ((15, 9, 0.5, 5), [15, 9, 7, 6, 6], [1, 1, 1, 1, 5], 67),
    (
        (1000, 20, 0.25, 20),
        [1000, 802, 643, 516, 414, 332, 266, 213, 171, 137, 110, 88, 71, 57, 46, 37, 31, 25, 21, 20],
        20 * [1],
        5_000,
    ),
    (
        (10_000, 400, 0.5, 10), [10_000, 8316, 6916, 5751, 4783, 3978, 3309, 2752, 2289, 1906], 10 * [40],
        2_000_000,
    ),
    ((10_000, 400, 0.5, 5), [10_000, 6444, 4153, 2677, 1726], 5 * [80], 2_000_000),
    (
        (10_000, 400, 0.75, 10), [10_000, 9340, 8724, 8149, 7612, 7111, 6643, 6206, 5798, 5417], 10 * [40],
        3_000_000,
    ),
    ((10_000, 400, 0.5, 2), [10_000, 0], 2 * [200], 2_000_000),
    ((7, 3, 1.0, 1), [7], [3], 21),
    ((7, 3, 1.0, 9), [7, 7, 7], [1, 1, 1], 21),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "rows", "widths", "parameters"), TABLES)
def test_the_geometry_of_a_sparse_embedding(settings, rows, widths, parameters):
    V, E, density, blocks = settings
    assert staircase(V, E, blocks, density) == list(zip(rows, widths, strict=True))
    assert size(SparseEmbedding, V, E, blocks=blocks, density=density) == parameters


@pytest.mark.parametrize(
    ("density", "blocks", "alpha"),
    [(0.75, 2, 0.5), (0.1, 20, 0.500001), (0.5, 5, 0.644471), (0.5, 10, 0.831656), (0.25, 20, 0.802451)],
)
def test_by_which_factor_the_rows_shrink(density, blocks, alpha):
    assert _ratio(density, blocks) == pytest.approx(alpha, abs=2e-6)


# -- what all cores have in common -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORES)
def test_a_core_has_the_interface_of_trellisnet(name):
    torch.manual_seed(0)
    core, x = CORES[name](5, 8, 2, output_size=8).eval(), torch.randn(3, 9, 5)
    output, _, aux = core(x)
    assert output.shape == (3, 9, 8)
    assert aux == []
    assert_close(core(x, start=4).output, output[:, 4:])
    assert_close(core(x, last_only=True).output, output[:, -1:])
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(core(changed).output[:, :5], output[:, :5])
    assert not torch.equal(core(changed).output[:, 5:], output[:, 5:])
    first = core(x[:, :4])
    assert all(part.size(0) == 3 for part in first.state)
    if name in RECURRENT:  # the carried state holds all of the past
        assert_close(torch.cat([first.output, core(x[:, 4:], first.state).output], dim=1), output)
    for bad, message in (
        ({"x": x[0]}, r"x: expected \(N, L ≥ 1, 5\), got \(9, 5\)"),
        ({"x": x, "start": 9}, "start: expected 0 to 8, got 9"),
        ({"x": x, "aux_every": 1}, "aux_every: expected None"),
        ({"x": x, "state": (x[:, 0],)}, "state: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            core(**bad)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("bad", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_sizes_below_one_are_refused(name, bad):
    with pytest.raises(ValueError, match="_size: expected|num_layers: expected at least 1|output_size"):
        CORES[name](*bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AWDLSTM(4, 4, 2, hidden_dropout=1.0), "hidden_dropout: expected a probability"),
        (lambda: AWDLSTM(4, 4, 2, weight_dropout=-0.1), "weight_dropout: expected a probability"),
        (lambda: AWDLSTM(4, 4, 2, output_size=0), "output_size: expected at least 1, got 0"),
        (lambda: TCN(4, 4, 2, kernel_size=1), "kernel_size: expected at least 2, got 1"),
        (lambda: TCN(4, 4, 31), "num_layers: expected at most 30"),
        (lambda: RHN(4, 4, 2, output_size=3), "output_size: the state is the output, expected 4, got 3"),
        (lambda: SparseStack(4, 4, 2, mode="sparse_last"), "mode: expected one of direct, sparse_hidden"),
        (lambda: SparseStack(8, 8, 2, mode="sparse_all", fraction=0.01), "leave too little of 8 inputs"),
        (lambda: SparseLSTM(4, 4), "expected either blocks and density or reduce_in and reduce_out"),
        (lambda: SparseLSTM(4, 4, blocks=2, reduce_in=0.5), "expected either blocks and density"),
        (lambda: SparseLSTM(4, 4, blocks=0, density=1.0), "blocks: expected at least 1, got 0"),
        (lambda: SparseLSTM(4, 4, blocks=2, density=0.3), "density: expected 1/2 to 1 for 2 segments, got 0.3"),
        (lambda: SparseLSTM(9, 3, blocks=4, density=0.5), "blocks: 4 are too many for 3 positions"),
        (lambda: SparseLSTM(4, 4, reduce_in=1.5, reduce_out=1), r"reduce_in: expected a fraction in \(0, 1\], got 1.5"),
        (lambda: SparseEmbedding(9, 4, blocks=2, density=0.4), "density: expected 1/2 to 1 for 2 blocks, got 0.4"),
        (lambda: SparseEmbedding(9, 4, blocks=0), "blocks: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", CORES)
def test_gradients_reach_every_parameter_in_training_and_after_an_evaluation(name):
    rates = {"hidden_dropout": 0.2} | ({"weight_dropout": 0.3} if "lstm" in name else {})
    module, ids = model(name, **rates), tokens()
    for _ in range(2):
        module.train().zero_grad()
        module.loss(module(ids).output, ids).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
        with torch.no_grad():
            first = module.eval()(ids).output
            assert torch.equal(first, module(ids).output)
    assert copy.deepcopy(module)(ids).output.shape == first.shape


@pytest.mark.parametrize("name", RECURRENT)
def test_explicit_masks_act_in_either_mode_and_nothing_else_is_drawn(name):
    rates = dict.fromkeys(("hidden_dropout", "input_dropout", "output_dropout", "embedding_dropout"), 0.4)
    module, ids = model(name, **rates, **({"weight_dropout": 0.4} if "lstm" in name else {})), tokens()
    masks = module.draw_masks(3)
    assert masks.hidden is not None
    drawn = torch.get_rng_state()
    trained, evaluated = module.train()(ids, masks=masks).output, module.eval()(ids, masks=masks).output
    assert torch.equal(trained, evaluated)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(evaluated, module(ids).output)
    # A mask of None drops nothing, as in evaluation.
    assert torch.equal(module.train()(ids, masks=Masks()).output, module.eval()(ids).output)


@pytest.mark.parametrize("name", CORES)
def test_products_in_bfloat16(name):
    module, ids = model(name), tokens()
    exact = module(ids).output
    with torch.autocast("cpu", torch.bfloat16):
        out = module(ids)
        loss = module.loss(out.output, ids)
        again = module(ids, None if name == "tcn" else out.state)
    loss.backward()
    assert loss.dtype == torch.float32
    assert again.output.shape == exact.shape
    assert (out.output.float() - exact).abs().max() < 0.02
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_highway_network_carries_its_state_in_the_dtype_of_the_weights():
    """Even if the input comes from a product in bfloat16: in 16 bits a slowly changing state would stand still."""
    torch.manual_seed(0)
    core, x = RHN(3, 8, 2), torch.randn(2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = core(x.bfloat16())
        out = core(x.bfloat16(), out.state)
    assert {part.dtype for part in (out.output, *out.state)} == {torch.float32}


def test_an_lstm_stays_in_float32_on_a_cpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr("trellisnet.ops.gemm.usable", lambda route, device, dtype: route == "mm")
    torch.manual_seed(0)
    layer, x = WeightDropLSTM(6, 5), torch.randn(2, 7, 6)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(x)
    assert y.dtype == h.dtype == c.dtype == torch.float32
    assert torch.equal(y, exact)


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"n_experts": 2}])
@pytest.mark.parametrize("name", ["trellisnet", *CORES])
def test_weights_survive_a_round_trip_even_with_a_sparse_embedding(tmp_path, name, options):
    def make(seed):
        torch.manual_seed(seed)
        sparse = functools.partial(SparseEmbedding, blocks=3, density=0.5)
        core = {} if name == "trellisnet" else {"core": CORES[name]}
        return TrellisLanguageModel(40, 12, 12, 3, output_size=12, embedding=sparse, **core, **options)

    one, two = make(1), make(2)
    save_weights(one, tmp_path / "w.pkl")
    assert load_weights(two, tmp_path / "w.pkl") == []
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# -- AWD-LSTM ----------------------------------------------------------------------------------------------------------


def test_without_weight_drop_a_stack_equals_torchs_lstm():
    torch.manual_seed(0)
    core, x = AWDLSTM(5, 7, 3, output_size=4), torch.randn(2, 9, 5)
    y, state = x, []
    for layer in core.layers:
        theirs = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True)
        theirs.load_state_dict(layer.state_dict())
        y, (h, c) = theirs(y)
        state += [h.squeeze(0), c.squeeze(0)]
    ours = core(x)
    assert_close(ours.output, y)
    for a, b in zip(ours.state, state, strict=True):
        assert_close(a, b)


def test_all_time_steps_share_one_mask_on_the_recurrent_matrix():
    torch.manual_seed(0)
    layer, x = WeightDropLSTM(4, 6, weight_dropout=0.5), torch.randn(2, 7, 4)
    mask = layer.draw_masks()
    assert mask.shape == (24, 6)
    theirs = nn.LSTM(4, 6, batch_first=True)
    theirs.load_state_dict(layer.state_dict())
    with torch.no_grad():
        theirs.weight_hh_l0 *= mask / 0.5
    ours = layer(x, None, Masks(weight_h=mask))[0]
    assert_close(ours, theirs(x)[0])
    ours.sum().backward()
    assert ((layer.weight_hh_l0.grad == 0) == (mask == 0)).all()
    torch.manual_seed(3)
    drawn = layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(drawn, layer(x)[0])
    assert not torch.equal(drawn, layer(x)[0])


def test_hidden_dropout_lies_between_layers_and_is_locked():
    torch.manual_seed(0)
    core, x = AWDLSTM(4, 6, 2, hidden_dropout=0.5), torch.randn(2, 5, 4)
    hidden = (torch.rand(2, 1, 6) < 0.5).float()
    below, _ = core.layers[0](x)
    expected, _ = core.layers[1](below * hidden / 0.5)
    assert_close(core(x, masks=Masks(hidden=(hidden,))).output, expected)
    with pytest.raises(ValueError, match=r"masks.hidden: expected shape \(2, 1, 6\), got \(2, 6\)"):
        core(x, masks=Masks(hidden=(hidden.squeeze(1),)))


# -- TCN ---------------------------------------------------------------------------------------------------------------


def test_a_tcn_equals_its_definition():
    torch.manual_seed(0)
    core, x = TCN(3, 5, 2, output_size=4, kernel_size=3), torch.randn(2, 11, 3)
    y = x.mT
    for block, dilation in zip(core.blocks, (1, 2), strict=True):
        z = y
        for convolution in block.convolutions:
            v, g = convolution.parametrizations.weight.original1, convolution.parametrizations.weight.original0
            weight = v * g / v.norm(dim=(1, 2), keepdim=True)
            both = F.conv1d(z, weight, convolution.bias, padding=2 * dilation, dilation=dilation)
            z = both[:, :, : -2 * dilation].relu()  # the authors' Chomp1d
        y = (z + block.fit(y)).relu()
    assert_close(core(x).output, y.mT)
    assert core.blocks[0].fit.weight.std() < 0.02


def test_the_receptive_field_of_a_tcn_is_what_it_reads():
    torch.manual_seed(0)
    core = TCN(1, 6, 3, kernel_size=3).double()
    x = torch.randn(1, 40, 1, dtype=torch.float64, requires_grad=True)
    core(x, last_only=True).output.abs().sum().backward()
    assert x.grad.nonzero()[:, 1].min() >= 40 - core.receptive_field == 11
    assert core.draw_masks(3) is None


def test_dropout_of_a_tcn_is_elementwise():
    torch.manual_seed(0)
    core = TCN(4, 4, 1, input_dropout=0.5).train()
    dropped = core(torch.ones(2, 30, 4)).output
    assert not torch.equal(dropped[:, 1:], dropped[:, 1:2].expand(-1, 29, -1))
    assert torch.equal(core(torch.ones(2, 30, 4), masks=Masks()).output, core.eval()(torch.ones(2, 30, 4)).output)


def test_a_tcn_classifies_padded_sequences_by_their_last_valid_step():
    torch.manual_seed(0)
    module, x = TrellisClassifier(2, 5, 6, 3, core=TCN), torch.randn(3, 12, 2)
    lengths = torch.tensor([12, 7, 4])
    together = module(x, lengths=lengths).logits
    for i, length in enumerate(lengths.tolist()):
        assert_close(together[i : i + 1], module(x[i : i + 1, :length]).logits)


# -- RHN ---------------------------------------------------------------------------------------------------------------


def carry_form(core, x, mask):
    """Compute the equations one by one, with one matrix on [x; s] in the first micro-step."""
    H, s, outputs = core.hidden_size, torch.zeros(x.size(0), core.hidden_size), []
    for t in range(x.size(1)):
        for step in range(core.num_layers):
            weight, inputs = core.weight_h[step], s * mask
            if step == 0:
                weight, inputs = torch.cat([core.weight_x, weight], dim=1), torch.cat([x[:, t], inputs], dim=1)
            z = inputs @ weight.T + core.bias[step]
            h, gate = z[:, :H].tanh(), z[:, H:].sigmoid()
            s = gate * h + (1 - gate) * s
        outputs.append(s)
    return torch.stack(outputs, 1)


def test_an_rhn_equals_its_carry_form_with_one_mask_for_all_steps():
    torch.manual_seed(0)
    core, x = RHN(3, 5, 4, hidden_dropout=0.5), torch.randn(2, 6, 3)
    nn.init.normal_(core.weight_h)
    assert_close(core.eval()(x).output, carry_form(core, x, torch.ones(2, 5)))
    mask = (torch.rand(2, 5) < 0.5).float()
    assert_close(core(x, masks=Masks(hidden=mask)).output, carry_form(core, x, mask / 0.5))
    torch.manual_seed(7)
    trained = core.train()(x).output
    torch.manual_seed(7)
    assert_close(trained, carry_form(core, x, F.dropout(torch.ones(2, 5), 0.5)))


def test_separate_masks_of_an_rhn_act_on_one_transform_each():
    torch.manual_seed(0)
    options = {"hidden_dropout": 0.5, "separate_masks": True, "input_dropout": 0.4}
    core, shared, x = RHN(3, 5, 4, **options), RHN(3, 5, 4, hidden_dropout=0.5), torch.randn(2, 6, 3)
    nn.init.normal_(core.weight_h)
    shared.load_state_dict(core.state_dict())
    assert_close(core.eval()(x).output, shared.eval()(x).output)
    on_x, on_s = (torch.rand(2, 3) < 0.6).float(), (torch.rand(2, 5) < 0.5).float()
    both = on_x.expand(2, 2, 3), on_s.expand(2, 2, 5)
    expected = shared(x * on_x.unsqueeze(1) / 0.6, masks=Masks(hidden=on_s)).output
    assert_close(core(x, masks=Masks(hidden=both)).output, expected)
    assert_close(core(x, masks=Masks()).output, core(x).output)

    single = RHN(3, 5, 1, **options)  # one micro-step, by hand
    s, masks = torch.randn(2, 5), single.draw_masks(2)["hidden"]
    assert [tuple(mask.shape) for mask in masks] == [(2, 2, 3), (2, 2, 5)]
    assert not torch.equal(masks[1][0], masks[1][1])
    z = [
        F.linear(x[:, 0] * masks[0][i] / 0.6, single.weight_x.chunk(2)[i], single.bias[0].chunk(2)[i])
        + F.linear(s * masks[1][i] / 0.5, single.weight_h[0].chunk(2)[i])
        for i in (0, 1)
    ]
    expected = torch.lerp(s, z[0].tanh(), z[1].sigmoid())
    assert_close(single(x[:, :1], (s,), masks=Masks(hidden=masks)).output[:, 0], expected)
    torch.manual_seed(3)
    trained = core.train()(x).output
    torch.manual_seed(3)
    assert torch.equal(trained, core(x).output)
    assert not torch.allclose(trained, core.eval()(x).output)
    with pytest.raises(ValueError, match="input_dropout: needs separate_masks"):
        RHN(3, 5, 1, input_dropout=0.1)


@pytest.mark.parametrize("preset", ["depth-10", "small", "depth-1"])
def test_an_rhn_takes_any_depth_on_any_preset(preset):
    config, _ = parse(word_ptb.model.Config, ["--model", "rhn", "--preset", preset, "--nlevels", "20"])
    with torch.device("meta"):
        core = word_ptb.model.build_model(config, 10_000).core
    n = config.nhid
    assert count_parameters(core) == 2 * n * n * 21 + 2 * n * 20


def test_the_carry_path_is_not_masked_and_a_closed_gate_keeps_the_state():
    torch.manual_seed(0)
    core, x = RHN(3, 5, 10), torch.randn(2, 4, 3)
    s = torch.randn(2, 5)
    with torch.no_grad():
        core.bias[:, 5:] = -math.inf
    nothing = Masks(hidden=torch.zeros(2, 5))
    assert torch.equal(core(x, (s,), masks=nothing).output, s.unsqueeze(1).expand(2, 4, 5))


def test_how_much_an_rhn_forgets_at_the_start():
    core = RHN(3, 5, 10)
    assert core.weight_h.abs().max() <= 0.04
    assert core.bias[:, :5].abs().max() <= 0.04
    assert (core.bias[:, 5:] == -2).all()
    with torch.no_grad():
        for p in (core.weight_x, core.weight_h, core.bias[:, :5]):
            p.zero_()
    output = core(torch.zeros(1, 1, 3), (torch.ones(1, 5),)).output
    assert_close(output, torch.full((1, 1, 5), 0.281034), atol=1e-6, rtol=0)
    assert (RHN(3, 5, 2, gate_bias=-4.0).bias[:, 5:] == -4).all()


def test_the_learning_rate_of_an_rhn():
    config, _ = parse(word_ptb.model.Config, ["--model", "rhn"])
    assert (config.lr, config.clip) == pytest.approx((7, 10 / 35))
    assert config.wdecay == pytest.approx(1e-7 / 35)
    schedule = Schedule(config.lr / 35, decay=config.decay, decay_from=config.decay_from)
    rates = [schedule.lr] + [schedule.step(epoch, 1.0) for epoch in range(1, 23)]
    assert rates[0] == rates[19] == pytest.approx(0.2)
    assert (rates[20], rates[21]) == pytest.approx((0.196078, 0.2 / 1.02**2), abs=1e-6)


def test_words_are_dropped_per_row_and_at_all_positions_of_it():
    module = model("rhn", embedding_dropout=0.5, embedding_dropout_per_row=True)
    ids = torch.arange(40).repeat(2, 3)  # every word three times per row
    mask = (torch.rand(2, 40) < 0.5).float()
    embedded = module.embed(ids, Masks(embedding=mask)).view(2, 3, 40, 12)
    expected = module.embedding.weight * mask[:, None, :, None] / 0.5
    assert torch.equal(embedded, expected.expand(2, 3, 40, 12))
    torch.manual_seed(0)
    survivors = (module.train().embed(ids).view(2, 3, 40, 12) != 0).any(3)  # (row, occurrence, word)
    assert torch.equal(survivors, survivors[:, :1].expand_as(survivors))
    assert not torch.equal(survivors[0], survivors[1])
    assert 0.2 < survivors.float().mean() < 0.8


# -- predefined sparseness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_sparse_lstm_equals_a_dense_one_with_zeros(rate):
    torch.manual_seed(0)
    layer = SparseLSTM(10, 9, blocks=3, density=0.5, weight_dropout=rate)
    dense, x = nn.LSTM(10, 9, batch_first=True), torch.randn(2, 6, 10)
    masks = layer.draw_masks()
    with torch.no_grad():
        for p in dense.parameters():
            p.zero_()
        for i, (part, (a, b), (c, d)) in enumerate(zip(layer.parts, layer.inputs, layer.outputs, strict=True)):
            recurrent = part.weight_hh_l0 if masks[i] is None else part.weight_hh_l0 * masks[i] / (1 - rate)
            dense.weight_ih_l0.view(4, 9, 10)[:, c:d, a:b] = part.weight_ih_l0.view(4, d - c, b - a)
            dense.weight_hh_l0.view(4, 9, 9)[:, c:d, c:d] = recurrent.view(4, d - c, d - c)
            dense.bias_ih_l0.view(4, 9)[:, c:d] = part.bias_ih_l0.view(4, d - c)
            dense.bias_hh_l0.view(4, 9)[:, c:d] = part.bias_hh_l0.view(4, d - c)
    state = torch.randn(2, 9), torch.randn(2, 9)
    y, (h, c) = layer(x, state, Masks(weight_h=masks) if rate else None)
    expected, (eh, ec) = dense(x, tuple(part.unsqueeze(0) for part in state))
    assert_close(y, expected)
    assert_close((h, c), (eh.squeeze(0), ec.squeeze(0)))


@pytest.mark.parametrize("name", ["awd-lstm", "sparse-lstm"])
def test_states_are_contiguous_as_cudnn_demands(name, monkeypatch):
    lstm, contiguous = torch.lstm, []

    def recorded(x, state, *arguments):
        contiguous.extend(part.is_contiguous() for part in state)
        return lstm(x, state, *arguments)

    monkeypatch.setattr(torch, "lstm", recorded)
    core = CORES[name](10, 12, 2, output_size=10)
    _, state, _ = core(torch.randn(3, 4, 10))
    core(torch.randn(3, 4, 10), state)
    assert len(contiguous) >= 8
    assert all(contiguous)


def test_a_sparse_embedding_equals_its_assembled_matrix_in_and_out():
    embedding = functools.partial(SparseEmbedding, blocks=3, density=0.5)
    module, ids = model("awd-lstm", embedding=embedding), tokens()
    matrix = module.embedding.weight
    assert matrix.shape == (40, 12)
    for block, (first, last) in zip(module.embedding.blocks, module.embedding.columns, strict=True):
        assert torch.equal(matrix[40 - block.size(0) :, first:last], block)
        assert not matrix[: 40 - block.size(0), first:last].any()
        assert block.abs().max() <= 0.1
    assert torch.equal(module.embed(ids), F.embedding(ids, matrix))
    output = module(ids).output
    assert_close(module.head.logits(output), output @ matrix.T + module.head.bias)
    assert module.head.weight_of is module.embedding
    module.loss(output, ids).backward()
    assert all(block.grad.abs().sum() > 0 for block in module.embedding.blocks)
    twin = copy.deepcopy(module)
    assert twin.head.weight_of is twin.embedding


def test_row_dropout_is_shared_by_the_blocks_and_spares_the_softmax():
    embedding = functools.partial(SparseEmbedding, blocks=3, density=0.6)
    module = model("awd-lstm", embedding=embedding, embedding_dropout=0.5).train()
    torch.manual_seed(1)
    embedded = module.embed(torch.arange(40).unsqueeze(0))[0]
    survivors = [(embedded[:, a:b] != 0).any(1) for a, b in module.embedding.columns]
    for block, each in zip(module.embedding.blocks, survivors, strict=True):
        there = torch.arange(40) >= 40 - block.size(0)
        assert torch.equal(each[there], survivors[0][there])
    assert 0 < survivors[0].sum() < 40
    assert_close(embedded[survivors[0]], 2 * module.embedding.weight[survivors[0]])


@pytest.mark.parametrize("options", [{"n_experts": 2}, {"cutoffs": [10, 25]}])
def test_every_head_shares_a_sparse_embedding(options):
    embedding = functools.partial(SparseEmbedding, blocks=2, density=0.75)
    module, ids = model("awd-lstm", embedding=embedding, **options), tokens()
    output = module(ids).output
    total = module.log_prob(output).exp().sum(-1)
    assert_close(total, torch.ones_like(total))
    nll = -module.log_prob(output).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert_close(module.loss(output, ids, reduction="none"), nll)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_windows_with_a_carried_state_equal_one_long_pass(name):
    module, rows = model(name), tokens(2, 71)
    whole = LanguageModeling(module, horizon=70, repackage=True).evaluate(rows)
    parts = LanguageModeling(module, horizon=9, repackage=True).evaluate(rows)
    assert parts["tokens"] == whole["tokens"] == 140
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_windows_of_random_length_scale_the_learning_rate():
    task = LanguageModeling(model("awd-lstm"), horizon=70, repackage=True, length_seed=5)
    rows = torch.arange(20_000).view(2, -1) % 40
    epochs = [task.batches(rows, epoch) for epoch in (0, 0, 1)]
    lengths = [[batch[0].size(1) for batch in epoch] for epoch in epochs]
    assert lengths[0] == lengths[1] != lengths[2]
    assert torch.equal(torch.cat([batch[0] for batch in epochs[0]], dim=1), rows[:, : sum(lengths[0])])
    assert all(torch.equal(batch[1][:, :-1], batch[0][:, 1:]) for batch in epochs[0])
    assert sum(lengths[0]) in (9998, 9999)
    long = [n for n in lengths[0] if n > 50]
    assert len(long) > 0.85 * len(lengths[0]) > len(lengths[0]) / 2
    assert sum(long) / len(long) == pytest.approx(69.5, abs=2)
    assert min(lengths[0][:-1]) >= 5
    batch = epochs[0][0]
    assert task.rate(batch) == batch[0].size(1) / 70
    assert LanguageModeling(task.model, horizon=70, repackage=True).rate(batch) == 1
    with pytest.raises(ValueError, match="length_seed: windows of random length need repackage and seq_len = 0"):
        LanguageModeling(task.model, horizon=5, seq_len=9, length_seed=5)


@pytest.mark.parametrize("name", ["trellisnet", *CORES])
def test_monte_carlo_dropout(name):
    core = {} if name == "trellisnet" else {"core": CORES[name]}
    module, rows = TrellisLanguageModel(40, 12, 12, 3, output_size=12, **core), tokens(2, 60)
    history = {"horizon": 7, "seq_len": 20} if name == "tcn" else {"horizon": 7, "repackage": True}
    task = LanguageModeling(module, **history)
    static, sampled = task.evaluate(rows), task.evaluate_mc(rows, passes=2)
    assert sampled["loss"] == pytest.approx(static["loss"], rel=1e-6)  # nothing is dropped
    assert (sampled["tokens"], sampled["passes"]) == (static["tokens"], 2)
    module.input_dropout = module.output_dropout = module.core.hidden_dropout = 0.5
    for block in getattr(module.core, "blocks", ()):
        block.dropout = 0.5
    module.train()
    torch.manual_seed(0)
    ones = [task.evaluate_mc(rows, passes=1)["loss"] for _ in range(3)]
    torch.manual_seed(0)
    together = task.evaluate_mc(rows, passes=3)["loss"]
    assert module.training
    assert len(set(ones)) == 3
    assert together <= sum(ones) / 3  # by Jensen's inequality
    assert task.evaluate_mc(rows, passes=1, max_tokens=10)["tokens"] < static["tokens"]
    if name != "tcn":  # all windows share the masks, so longer windows change nothing
        torch.manual_seed(0)
        longer = LanguageModeling(module, horizon=59, repackage=True)
        if name != "trellisnet":
            assert longer.evaluate_mc(rows, passes=1)["loss"] == pytest.approx(ones[0], rel=1e-5)


@pytest.mark.parametrize("masks", ["shared", "separate"])
def test_passes_are_kept_and_continued(tmp_path, masks):
    options = {"hidden_dropout": 0.3, "separate_masks": masks == "separate"}
    options |= {"input_dropout": 0.2} if masks == "shared" else {"core": functools.partial(RHN, input_dropout=0.2)}
    module = TrellisLanguageModel(40, 12, 12, 3, output_size=12, output_dropout=0.3, **({"core": RHN} | options))
    task, rows = LanguageModeling(module, horizon=7, repackage=True), tokens(2, 60)

    def score(passes, kept=None, name="test"):
        return task.evaluate_mc(rows, passes=passes, kept=kept, name=name)

    def file():
        return Passes(tmp_path / "passes", lambda: serialization.sha256_of(module.state_dict()))

    torch.manual_seed(0)
    whole = score(5)
    torch.manual_seed(0)
    assert score(2, file()) == score(2, file())  # nothing is drawn again
    torch.manual_seed(99)
    score(1, file(), "valid")
    assert score(5, file()) == whole
    assert score(5, file())["loss"] != score(1, file(), "valid")["loss"]
    with pytest.raises(UserError, match="passes: holds 5 passes of test; ask for as many with --mc_dropout"):
        score(4, file())
    with torch.no_grad():
        module.head.bias += 1
    with pytest.raises(UserError, match="holds passes with other weights, data or settings; name another --mc_file"):
        score(9, file())
    serialization.save(tmp_path / "passes", {"key": 1})
    with pytest.raises(UserError, match="not a file of --mc_file, or corrupt"):
        score(9, file())


def test_a_plateau_by_the_rule_of_the_tcns_authors():
    schedule = Schedule(4.0, recent=3, factor=10.0)
    rates = [schedule.step(epoch, loss) for epoch, loss in enumerate([5, 4, 9, 9, 9, 8.9, 9, 3, 3, 9], start=1)]
    # The sixth epoch is the first to be compared, with the worst of the three before it.
    assert rates == pytest.approx([4, 4, 4, 4, 4, 4, 0.4, 0.4, 0.4, 0.04])
