"""Installed as a wheel and from a checkout: what can be imported from where, and where data and runs go."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from trellisnet.data import PROJECT, _project
from trellisnet.training.programs import TASKS


def test_data_and_runs_go_to_the_checkout_or_else_to_the_working_directory(tmp_path):
    assert _project(tmp_path) == Path()
    (tmp_path / "setup.py").touch()
    assert _project(tmp_path) == Path()
    (tmp_path / "word_ptb").mkdir()
    (tmp_path / "word_ptb" / "train.py").touch()
    assert _project(tmp_path) == tmp_path


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project in a folder named as the package is."""
    copy = tmp_path / "clones" / "trellisnet"
    copy.mkdir(parents=True)
    for name in ("trellisnet", "scripts", *TASKS):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy / name)
    return copy


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def python(code, folder, cwd):
    """Run code in `cwd` with the packages of `folder` and this environment's, but not what this one links to."""
    paths = f"site.addsitedir({str(folder)!r}); sys.path.append({sysconfig.get_path('purelib')!r})"
    code = f"import site, sys; {paths}\n{code}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_wheel_holds_the_package_alone_and_leaves_nothing_beside_it(checkout, tmp_path):
    pip("wheel", str(checkout), "--wheel-dir", str(tmp_path))
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"trellisnet"}
    files = [path.relative_to(checkout) for path in (checkout / "trellisnet").rglob("*.*") if path.is_file()]
    assert {path.as_posix() for path in files if path.suffix != ".md"} <= names  # sources of the gates, py.typed

    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip("install", str(wheel), "--target", str(site))
    code = """
import pathlib, torch, trellisnet
from trellisnet.training.config import RunConfig
from trellisnet.training.runlog import commit
from trellisnet.data.corpus import cache_folder
class Config(RunConfig):
    task, default_data = "mine", "data/mine"
print(trellisnet.__file__)
print(Config(name="run").folder().resolve())
print(pathlib.Path(Config().data_folder()).resolve())
print(cache_folder().resolve())
print(commit())
print(trellisnet.TrellisNet(4, 8, 5)(torch.zeros(1, 3, 4)).output.shape)
"""
    before = sorted(site.rglob("*"))
    found = python(code, site, here)
    shown = [site / "trellisnet" / "__init__.py", here / "runs/mine/run", here / "data/mine", here / "data/cache"]
    assert found == [*map(str, shown), "None", "torch.Size([1, 3, 8])"]
    assert sorted(site.rglob("*")) == before


@pytest.mark.slow
def test_an_editable_install_works_from_the_folder_that_holds_the_checkout(checkout, tmp_path):
    pip("install", "--editable", str(checkout), "--prefix", str(tmp_path / "prefix"), "--ignore-installed")
    site = next((tmp_path / "prefix").rglob("site-packages"))
    code = "import trellisnet, word_ptb.train, scripts.collect\n"
    code += "from trellisnet import TrellisNet; print(TrellisNet.__module__)\n"
    code += "from trellisnet.training.config import PROJECT; print(PROJECT)"
    for cwd in (checkout.parent, checkout, tmp_path):
        assert python(code, site, cwd) == ["trellisnet.core", str(checkout)]
