"""The classifier and its task, on random data."""

import pytest
import torch
from torch.testing import assert_close

from trellisnet.models import TrellisClassifier
from trellisnet.regularization import Masks
from trellisnet.training.tasks import Classification


def classifier(**options):
    torch.manual_seed(0)
    settings = {"input_size": 2, "num_classes": 5, "hidden_size": 9, "num_layers": 4, "dilation": (1, 2), **options}
    model = TrellisClassifier(**settings, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def test_it_is_a_linear_map_of_the_last_step():
    model, x = classifier(output_size=6), torch.randn(3, 11, 2, dtype=torch.float64)
    out = model(x)
    full = model.core(x)
    assert_close(out.logits, model.head(full.output[:, -1]))
    for ours, theirs in zip(out.state, full.state, strict=True):
        assert_close(ours, theirs)
    again = model(torch.randn(3, 4, 2, dtype=torch.float64), out.state)
    assert again.logits.shape == (3, 5)


def test_with_lengths_every_row_is_as_if_alone():
    model, x, lengths = classifier().eval(), torch.randn(4, 12, 2, dtype=torch.float64), torch.tensor([12, 1, 5, 9])
    state = tuple(torch.randn(4, 9, dtype=torch.float64) for _ in "hc")
    out = model(x, state, lengths=lengths)
    for i, length in enumerate(lengths):
        alone = model(x[i : i + 1, :length], tuple(s[i : i + 1] for s in state))
        assert_close(out.logits[i : i + 1], alone.logits)
        for ours, theirs in zip(out.state, alone.state, strict=True):
            assert_close(ours[i : i + 1], theirs)
    assert_close(model(x, state, lengths=lengths.int()).logits, out.logits)
    spoiled = x.clone()
    spoiled[1, 1:] = 1e6
    assert_close(model(spoiled, state, lengths=lengths).logits, out.logits)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0, 3], r"lengths: expected integers from 1 to 6"),
        ([7, 3], r"lengths: expected integers from 1 to 6"),
        ([3], r"lengths: expected shape \(2,\), got \(1,\)"),
        ([1.0, 2.0], r"lengths: expected integers"),
    ],
)
def test_bad_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        classifier()(torch.zeros(2, 6, 2, dtype=torch.float64), lengths=torch.tensor(lengths))


def test_dropout_is_off_in_evaluation_and_elementwise_in_training():
    x = torch.randn(3, 8, 2, dtype=torch.float64)
    model = classifier(input_dropout=0.5, output_dropout=0.5).eval()
    state = torch.get_rng_state()
    assert_close(model(x).logits, model(x).logits)
    assert torch.equal(state, torch.get_rng_state())
    model.train()
    assert (model(x).logits == 0).any()
    ones = Masks(input=torch.ones(3, 8, 2), output=torch.ones(3, 5))
    assert_close(model(x, masks=ones).logits, 2 * classifier()(2 * x).logits)
    with pytest.raises(ValueError, match=r"masks.output: expected shape \(3, 5\), got \(3, 4\)"):
        model(x, masks=Masks(output=torch.ones(3, 4)))


def task(n=50, **options):
    data = torch.randn(n, 6, 2, dtype=torch.float64), torch.randint(5, (n,))
    return Classification(classifier(), batch_size=8, **options), data


def test_batches_are_shuffled_by_seed_and_epoch():
    classification, (x, y) = task()
    tag = torch.arange(50)
    order = [classification.batches((x, tag), epoch) for epoch in (0, 0, 1)]
    order = [torch.cat([targets for _, targets in batches]).tolist() for batches in order]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == sorted(order[2]) == tag.tolist() != order[0]
    other = Classification(classification.model, batch_size=8, seed=1).batches((x, tag))
    assert torch.cat([targets for _, targets in other]).tolist() != order[0]
    batches = classification.batches((x, y))
    assert [classification.size(batch) for batch in batches] == [8] * 6 + [2]
    state = torch.get_rng_state()
    inputs, targets = batches[3]
    assert torch.equal(state, torch.get_rng_state())
    where = (x == inputs[0]).flatten(1).all(1).nonzero().item()
    assert y[where] == targets[0]


def test_loss_and_accuracy():
    classification, (x, y) = task()
    losses, state = classification.loss(x, y)
    logits = classification.model(x).logits
    assert state is None
    assert_close(losses["loss"], -logits.log_softmax(1)[torch.arange(50), y].mean())
    assert losses["raw"] is losses["loss"]
    right = (logits.argmax(1) == y).sum().item()
    assert losses["accuracy"].item() == pytest.approx(right / 50)
    for size in (7, 64):
        classification.eval_batch_size = size
        result = classification.evaluate((x, y))
        assert result["loss"] == pytest.approx(losses["loss"].item())
        assert (result["accuracy"], result["examples"]) == (right / 50, 50)
    classification.eval_batch_size = 7
    assert classification.evaluate((x, y), max_tokens=8)["examples"] == 14
    assert classification.model.training
    assert classification.scores(result, "test") == {"accuracy": right / 50}


def test_results_rank_by_accuracy_then_by_loss():
    better = Classification.is_better
    assert better({"accuracy": 0.5, "loss": 9}, {"accuracy": 0.4, "loss": 1})
    assert better({"accuracy": 0.5, "loss": 1}, {"accuracy": 0.5, "loss": 2})
    assert not better({"accuracy": 0.5, "loss": 2}, {"accuracy": 0.5, "loss": 2})


def test_the_model_gets_the_prepared_batch():
    classification, (x, y) = task(prepare=lambda sequences: sequences.flip(1))
    plain = Classification(classification.model, batch_size=8)
    assert classification.evaluate((x, y)) == plain.evaluate((x.flip(1), y))
    ours, theirs = classification.batches((x, y))[0], plain.batches((x.flip(1), y))[0]
    assert torch.equal(ours[0], theirs[0])


def test_label_smoothing_affects_the_training_loss_alone():
    model, x, classes = classifier().train(), torch.randn(6, 11, 2, dtype=torch.float64), torch.arange(6) % 5
    plain, smooth = (Classification(model, batch_size=6, label_smoothing=e) for e in (0.0, 0.1))
    logits = model(x).logits
    losses, _ = smooth.loss(x, classes)
    assert_close(losses["loss"], torch.nn.functional.cross_entropy(logits, classes, label_smoothing=0.1))
    assert_close(losses["raw"], torch.nn.functional.cross_entropy(logits, classes))
    assert losses["loss"] != losses["raw"]
    assert smooth.evaluate((x, classes)) == plain.evaluate((x, classes))
    with pytest.raises(ValueError, match="label_smoothing: expected a share"):
        Classification(model, batch_size=6, label_smoothing=1.0)
