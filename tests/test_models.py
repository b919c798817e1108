"""The language model: shapes, weight sharing, dropout, and refused input."""

import copy

import pytest
import torch
from torch.testing import assert_close

from trellisnet.models import TrellisLanguageModel, count_parameters
from trellisnet.regularization import Masks


def model(**options):
    torch.manual_seed(1)
    settings = {"vocab_size": 30, "embedding_size": 6, "hidden_size": 10, "num_layers": 4, "output_size": 6} | options
    module = TrellisLanguageModel(**settings)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def tokens(n=3, length=8):
    return torch.randint(30, (n, length), generator=torch.Generator().manual_seed(2))


def test_output_and_loss():
    module = model().eval()
    out = module(tokens(), aux_every=2)
    assert out.output.shape == (3, 8, 6)
    assert torch.equal(out.output, out.raw_output)
    assert [a.shape for a in out.aux] == [(3, 8, 6)] * 2
    log_prob, target = module.log_prob(out.output), tokens(3, 9)[:, 1:]
    assert log_prob.shape == (3, 8, 30)
    expected = -log_prob.gather(-1, target[..., None]).squeeze(-1)
    assert_close(module.loss(out.output, target, reduction="none"), expected)
    assert_close(module.loss(out.output, target), expected.mean())


def test_tied_weights_are_one_parameter_and_survive_a_copy():
    module = model()
    assert module.head.weight is module.embedding.weight
    twin = copy.deepcopy(module)
    assert twin.head.weight is twin.embedding.weight
    assert count_parameters(model(tied=False)) == count_parameters(module) + 30 * 6
    untied = model(tied=False, output_size=4)
    assert untied.head.weight.shape == (30, 4)


def test_embedding_dropout_drops_whole_words_of_the_input_only():
    module, ids = model(embedding_dropout=0.5), tokens()
    mask = (torch.arange(30) % 2 == 0)[:, None]
    embedded = module.embed(ids, Masks(embedding=mask))
    expected = module.embedding.weight * mask / 0.5
    assert torch.equal(embedded, expected[ids])
    out = module(ids, masks=Masks(embedding=mask)).output
    assert_close(module.head.logits(out), out @ module.embedding.weight.T + module.head.bias)


def test_input_and_output_masks_are_constant_over_time():
    module, ids = model(input_dropout=0.4, output_dropout=0.4).train(), tokens()
    embedded = module.embed(ids) / module.embedding.weight[ids]
    assert_close(embedded, embedded[:, :1].expand_as(embedded))
    out = module(ids, aux_every=2)
    ratio = out.output / out.raw_output
    assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert (ratio == 0).any()
    assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.6))


def test_every_auxiliary_output_has_its_own_mask():
    module, ids = model(output_dropout=0.5).train(), tokens()
    raw = model().eval()(ids, aux_every=1).aux
    dropped = [(a == 0)[:, 0] for a in module(ids, aux_every=1).aux]
    assert all((r != 0).all() for r in raw)
    assert any(not torch.equal(dropped[0], d) for d in dropped[1:])


def test_evaluation_draws_no_random_numbers():
    rates = dict.fromkeys(
        ("embedding_dropout", "input_dropout", "output_dropout", "hidden_dropout", "weight_dropout"), 0.5
    )
    module = model(**rates).eval()
    state = torch.get_rng_state()
    first = module(tokens(), aux_every=2)
    assert torch.equal(first.output, module(tokens(), aux_every=2).output)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("frozen", [False, True])
def test_freezing_the_last_embedding_stops_its_input_gradient_only(frozen):
    module = model(tied=False, freeze_last_embedding=frozen)
    ids = torch.full((1, 4), 29)
    module.loss(module(ids).output, ids).backward()
    assert (module.embedding.weight.grad[29].abs().sum() == 0) == frozen
    assert module.head.weight.grad[29].abs().sum() > 0


def test_initialisation():
    torch.manual_seed(0)
    module = TrellisLanguageModel(500, 40, 50, 2, output_size=40)
    assert module.embedding.weight.abs().max() <= 0.1
    assert module.embedding.weight.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert module.head.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_size": 5}, "output_size: tied weights need embedding_size = 6, got 5"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"input_dropout": 1.0}, "input_dropout: expected a probability"),
        ({"n_experts": -1}, "n_experts: expected 0 or more, got -1"),
        ({"cutoffs": (50, 5)}, "cutoffs: expected increasing numbers between 0 and"),
        ({"cutoffs": (5,), "n_experts": 2}, "cutoffs: expected None with a mixture"),
        ({"latent_dropout": 1.0}, "latent_dropout: expected a probability"),
        ({"n_experts": 2, "log_epsilon": -1.0}, "log_epsilon: expected 0 or a small positive number"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_bad_inputs_are_named():
    module = model()
    with pytest.raises(ValueError, match=r"tokens: expected \(N, L ≥ 1\), got \(8,\)"):
        module(tokens()[0])
    with pytest.raises(ValueError, match="latent_mask: only a mixture of softmaxes"):
        module.loss(torch.zeros(1, 1, 6), torch.zeros(1, 1, dtype=torch.int64), latent_mask=torch.ones(1, 1, 6))
    with pytest.raises(ValueError, match=r"masks.embedding: expected shape \(30, 1\), got \(30,\)"):
        module(tokens(), masks=Masks(embedding=torch.ones(30)))


def test_losses_take_one_latent_mask_per_output():
    module = TrellisLanguageModel(7, 4, 8, 3, output_size=4, n_experts=2, latent_dropout=0.5, gemm="mm")
    assert module.head.gemm == "mm"
    outputs, target = torch.randn(3, 2, 5, 4), torch.randint(7, (2, 5))
    masks = [torch.randint(2, (2, 1, 8)), None, torch.randint(2, (2, 1, 8))]
    expected = [module.loss(o, target, latent_mask=m, draw=False) for o, m in zip(outputs, masks, strict=True)]
    total, each = module.losses(outputs, target, [1.0, 0.5, 0.25], latent_masks=masks, draw=False)
    assert_close(each, torch.stack(expected))
    assert_close(total, expected[0] + 0.5 * expected[1] + 0.25 * expected[2])
    plain = TrellisLanguageModel(7, 4, 8, 3, output_size=4)
    with pytest.raises(ValueError, match="latent_mask: only a mixture"):
        plain.losses(outputs, target, [1.0, 1.0, 1.0], latent_masks=masks)


def test_ids_and_targets_are_integers():
    model, tokens = TrellisLanguageModel(7, 4, 6, 2, output_size=4), torch.randint(7, (2, 5))
    with pytest.raises(TypeError, match="^tokens: expected ids in int64, got float32$"):
        model(tokens.float())
    output = model(tokens).output
    assert torch.equal(output, model(tokens.int()).output)
    for target in (tokens.float(), tokens.int()):
        with pytest.raises(TypeError, match="^target: expected class ids in int64, got "):
            model.loss(output, target)
        with pytest.raises(TypeError, match="^target: expected class ids in int64, got "):
            model.losses([output], target, [1.0])
