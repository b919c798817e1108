"""Layering: imports point one way, have no side effects, and need only the packages of setup.py."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from trellisnet.training.config import PROJECT
from trellisnet.training.programs import TASKS

# Each layer may import from those after it.
LAYERS = [
    "tasks",
    "__main__",
    "evaluation",
    "training",
    "weights",
    "models",
    "heads",
    "theorem1",
    "wrappers",
    "baselines",
    "equilibrium",
    "core",
    "regularization",
    "data",
    "ops",
    "foundation",
]
FOUNDATION = {"console", "errors", "serialization"}
FILES = sorted(path for top in ("trellisnet", *TASKS) for path in (PROJECT / top).rglob("*.py"))

EXTRAS = {"triton_gates.py": {"triton"}, "serialization.py": {"safetensors"}}  # imported only on demand


def layer_of(module: str) -> str | None:
    """Return the layer of a dotted name; None for the package's front page and for other packages."""
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
    own = layer_of(".".join(path.relative_to(PROJECT).with_suffix("").parts))
    if own is None or (path.name == "__init__.py" and path.parent.name == "trellisnet"):
        return
    assert own in LAYERS, f"{path} has no layer"
    for name in imported(path):
        layer = layer_of(name)
        if layer is not None and layer != own:
            assert LAYERS.index(layer) > LAYERS.index(own), f"{path.name} ({own}) imports {name} ({layer})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_only_declared_packages_are_needed(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "tqdm", "trellisnet", *TASKS, *EXTRAS.get(path.name, ())}


def test_importing_prints_and_draws_nothing_and_a_network_loads_no_compiler():
    files = [p for p in FILES if p.name != "triton_gates.py"]
    modules = [".".join(p.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    code = "import torch; s = torch.get_rng_state(); import " + ", ".join(modules)
    code += "; assert torch.equal(s, torch.get_rng_state()); import sys"
    code += "; from trellisnet import TrellisNet; TrellisNet(3, 4, 2)(torch.ones(1, 5, 3)).output.sum().backward()"
    # torch's compiler and exporter take seconds to load.
    code += "; assert not {'triton', 'safetensors', 'torch._dynamo', 'torch.onnx'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_function_is_duplicated_in_the_task_folders():
    seen = {}
    for path in FILES:
        if path.parent.name not in TASKS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
                body = "".join(ast.dump(statement) for statement in node.body[documented:])
                other = seen.setdefault(body, path.parent.name)
                assert other == path.parent.name, f"{path.parent.name} and {other} both have {node.name}"
    assert len(seen) > 5


SCRIPTS = [*sorted((PROJECT / "scripts").glob("*.sh")), PROJECT / ".ci" / "run"]


@pytest.mark.parametrize("path", [*FILES, *sorted((PROJECT / "scripts").glob("*.py"))], ids=lambda p: p.name)
def test_nothing_is_passed_to_a_shell_or_an_unpickler(path):
    if path.name == "payloads.py":  # makes hostile files
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"), path
            assert keywords.get("shell", "False") == "False", path
            assert called != "torch.load" or keywords["weights_only"] == "True", path
            assert called != "np.load" or keywords["allow_pickle"] == "False", path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_evaluate_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<!-)\beval\b|\bsh -c\b|`", re.sub(r"(?m)^#.*", "", text))
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    # 1090, 1091: files that are sourced; 2154: what these set.
    command = ["shellcheck", "--shell=bash", "--exclude=1090,1091,2154", "--severity=warning", *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
