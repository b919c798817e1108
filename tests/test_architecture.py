"""The house: imports point one way, importing does nothing, and what runs needs only what setup.py names."""

import ast
import subprocess
import sys

import pytest

from trellisnet.training.config import PROJECT

# Each floor may import from those after it.
FLOORS = [
    "tasks",
    "training",
    "weights",
    "models",
    "heads",
    "theorem1",
    "baselines",
    "core",
    "regularization",
    "data",
    "ops",
    "foundation",
]
FOUNDATION = {"errors", "serialization"}
TASKS = {"word_ptb", "char_ptb", "wt103", "pmnist", "cifar10"}
FILES = sorted(path for top in ("trellisnet", *TASKS) for path in (PROJECT / top).rglob("*.py"))

EXTRAS = {"triton_gates.py": {"triton"}}  # imported only when asked for


def floor_of(module: str) -> str | None:
    """The floor of a dotted name; None for the package's face and for other people's modules."""
    first, *rest = module.split(".")
    if first in TASKS:
        return "tasks"
    if first != "trellisnet" or not rest:
        return None
    return "foundation" if rest[0] in FOUNDATION else rest[0]


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_imports_point_down(path):
    own = floor_of(".".join(path.relative_to(PROJECT).with_suffix("").parts))
    if own is None or (path.name == "__init__.py" and path.parent.name == "trellisnet"):
        return
    assert own in FLOORS, f"{path} has no floor"
    for name in imported(path):
        floor = floor_of(name)
        if floor is not None and floor != own:
            assert FLOORS.index(floor) > FLOORS.index(own), f"{path.name} ({own}) imports {name} ({floor})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_only_declared_packages_are_needed(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "tqdm", "trellisnet", *TASKS, *EXTRAS.get(path.name, ())}


def test_importing_prints_and_draws_nothing():
    files = [p for p in FILES if p.name not in EXTRAS]
    modules = [".".join(p.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    code = "import torch; s = torch.get_rng_state(); import " + ", ".join(modules)
    code += "; assert torch.equal(s, torch.get_rng_state()); import sys; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_function_is_written_twice_in_the_task_folders():
    seen = {}
    for path in FILES:
        if path.parent.name not in TASKS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                told = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
                body = "".join(ast.dump(statement) for statement in node.body[told:])
                other = seen.setdefault(body, path.parent.name)
                assert other == path.parent.name, f"{path.parent.name} and {other} both have {node.name}"
    assert len(seen) > 5
