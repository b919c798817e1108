"""The code of trellisnet/README.md, added to a copy of the project and trained for a step."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from trellisnet.training.config import PROJECT

PAGE = (PROJECT / "trellisnet" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COPIED = ("trellisnet", "word_ptb")
STEP = "--max_steps 1 --no-download --threads 1 --max_eval_tokens 40 --batch_size 4 --eval_batch_size 2".split()
SMALL = [*STEP, *"--data synthetic --emsize 8 --nhid 8 --nout 8 --horizon 5 --seq_len 13 --nlevels 3 --aux 0".split()]


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in (*COPIED, "text8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with the page's code in it, which imports find while this file is tested."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in BLOCKS:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
    (folder / "text8" / "__init__.py").touch()
    originals = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    for name in filter(_is_ours, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(originals)


def main(task: str, *argv: str | Path) -> int:
    program = importlib.import_module("trellisnet.training.programs").get(task)
    return program.main(list(map(str, argv)))


def test_the_page_names_files_as_they_are():
    assert len(BLOCKS) == 11
    new = {name for name, _ in BLOCKS if not (PROJECT / name).exists()}
    assert new == {"text8/data.py", "text8/model.py", "text8/train.py", "trellisnet/baselines/gru.py"}
    for name in re.findall(r"`([\w/]+\.(?:py|c))`", PAGE):
        assert find(name) or name.startswith("text8/"), name


def find(name: str) -> Path | None:
    """The file that the page calls by this name."""
    package = PROJECT / "trellisnet"
    places = (PROJECT, package, package / "training", package / "ops")
    return next((place / name for place in places if (place / name).is_file()), None)


ROWS = re.findall(r"^\| .+ \| (`.+`.*) \|$", PAGE.partition("## The path of a batch")[2], re.MULTILINE)


@pytest.mark.parametrize("where", ROWS)
def test_the_paths_lead_through_what_is_there(where):
    """Every name of a row is defined in one of its files."""
    names = re.findall(r"`([\w./]+)`", where)
    text = "\n".join(path.read_text(encoding="utf-8") for path in map(find, names) if path)
    for name in names:
        for part in [] if find(name) else name.split("."):
            assert re.search(rf"\b(def|class) {part}\b|\b{part}(: \S+)? = ", text), name


def test_an_activation(copy, tmp_path):
    ops, net = importlib.import_module("trellisnet.ops"), importlib.import_module("trellisnet").TrellisNet
    assert Path(ops.__file__).is_relative_to(copy)
    results = []
    for backend in ("reference", "fused"):
        torch.manual_seed(0)
        core = net(3, 6, 5, dilation=[1, 2], activation="softsign", backend=backend, dtype=torch.float64)
        x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
        output = core(x).output
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *core.parameters()])))
    assert_close(results[0], results[1])
    assert main("word_ptb", *SMALL, "--activation", "softsign", "--out", tmp_path / "run") == 0


def test_a_task(copy, tmp_path, capsys):
    for split, lines in (("train", 60), ("valid", 20), ("test", 20)):
        (tmp_path / f"{split}.txt").write_text("the cat sat\n" * lines)
    assert main("text8", "--preset", "tiny", *STEP, "--data", tmp_path, "--out", tmp_path / "run") == 0
    assert "8 symbols" in capsys.readouterr().out
    assert main("text8", "--preset", "tiny", *STEP, "--data", "synthetic", "--out", tmp_path / "synthetic") == 0


def test_a_core(copy, tmp_path, capsys):
    flags = ["--model", "gru", *STEP, "--data", "synthetic", "--emsize", "8", "--nhid", "8", "--nout", "8"]
    assert main("word_ptb", *flags, "--out", tmp_path / "run") == 0
    weights = tmp_path / "run" / "weights.pkl"
    assert main("word_ptb", *flags, "--eval", "--load_weight", weights) == 0
    capsys.readouterr()
    assert main("word_ptb", *SMALL, "--eval", "--load_weight", weights) == 2
    assert capsys.readouterr().err.endswith("was trained with another core; pass --model gru\n")


def test_a_head(copy, tmp_path):
    heads, models, weights = (importlib.import_module(f"trellisnet.{name}") for name in ("heads", "models", "weights"))
    one, two = (
        models.TrellisLanguageModel(11, 4, 6, 3, output_size=4, head=heads.TemperedSoftmax, weight_norm=False)
        for _ in range(2)
    )
    tokens = torch.randint(11, (2, 5))
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    one.loss(one(tokens).output, tokens).backward()
    optimizer.step()
    assert one.head.beta.item() != 1
    weights.save_weights(one, tmp_path / "w.pkl")
    weights.load_weights(two, tmp_path / "w.pkl")
    assert_close(two.log_prob(two(tokens).output), one.log_prob(one(tokens).output))
    losses = one.loss(one(tokens).output, tokens, reduction="none")
    assert_close(losses, -one.log_prob(one(tokens).output).gather(2, tokens.unsqueeze(2)).squeeze(2))
