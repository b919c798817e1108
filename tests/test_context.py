"""Loss by context length: its definition, and scripts/context.py."""

import json

import pytest
import torch
from torch.testing import assert_close

from scripts import context
from test_generate import KINDS, V, model
from trellisnet.evaluation.context import context_lengths, loss_by_context


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_visible_tokens_alone(kind):
    module = model(**KINDS[kind])
    stream = torch.randint(V, (120,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    found = loss_by_context(module, stream, [4, 1, 30], targets=13)
    assert [record["context"] for record in found] == [1, 4, 30]
    module.eval()
    places = [30 + i * 90 // 13 for i in range(13)]
    each = {}
    for n in (1, 4, 30):
        with torch.no_grad():
            said = [module.log_prob(module(stream[t - n : t].long()[None]).output[:, -1:]) for t in places]
        each[n] = -torch.stack([p.flatten()[stream[t].item()] for p, t in zip(said, places, strict=True)])
    for record in found:
        difference = each[record["context"]] - each[30]
        assert record["loss"] == pytest.approx(each[record["context"]].mean().item(), abs=1e-12)
        assert record["error"] == pytest.approx(difference.std().item() / 13**0.5, abs=1e-12)


def test_tokens_beyond_the_receptive_field_have_no_influence():
    module, stream = model(dilation=(1, 2)), torch.randint(V, (300,))
    field = module.core.receptive_field
    short, seen, more = loss_by_context(module, stream, [field - 1, field, 3 * field], targets=50)
    assert_close(seen["loss"], more["loss"], atol=1e-12, rtol=0)
    assert seen["error"] < 1e-12
    assert abs(short["loss"] - seen["loss"]) > 1e-6


def test_default_lengths():
    assert context_lengths(None, 32) == [1, 2, 4, 8, 16, 32]
    assert context_lengths(9) == [1, 2, 4, 8, 9, 18]
    assert context_lengths(8) == [1, 2, 4, 8, 16]
    assert context_lengths(300, 100) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(("lengths", "targets", "size"), [([], 3, 50), ([0], 3, 50), ([3], 0, 50), ([50], 3, 50)])
def test_impossible_lengths_and_targets_are_refused(lengths, targets, size):
    with pytest.raises(ValueError, match="expected"):
        loss_by_context(model(), torch.zeros(size, dtype=torch.int64), lengths, targets=targets)


def test_real_numbers_are_no_ids():
    with pytest.raises(TypeError, match="^stream: expected ids in int64, got float32$"):
        loss_by_context(model(), torch.rand(50), [3], targets=3)


def test_the_program(capsys, tmp_path, run_folder):
    path = tmp_path / "context.json"
    assert context.main(["--run", str(run_folder), "--targets", "50", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["receptive_field"] == 4
    assert [r["context"] for r in record["records"]] == [1, 2, 4, 8]
    assert record["records"][2]["loss"] == pytest.approx(record["records"][3]["loss"], abs=1e-5)
    assert capsys.readouterr().out.count("±") == 4
    weights = run_folder / "weights.pkl"
    before = weights.read_bytes()
    for wrong, message in ((weights, "holds something else"), ("/no/where.json", "cannot be written")):
        assert context.main(["--run", "unread", "--json", str(wrong)]) == 2  # before the work
        assert capsys.readouterr().err.startswith(f"error: --json {wrong}: {message}")
    assert weights.read_bytes() == before
    assert context.main(["--run", str(run_folder), "--targets", "5", "--json", str(path)]) == 0  # an earlier result
    assert json.loads(path.read_text())["targets"] == 5
    capsys.readouterr()
    assert context.main(["--run", str(run_folder), "--lengths", "999999"]) == 2
    assert capsys.readouterr().err.startswith("error: --lengths 999999: ")
