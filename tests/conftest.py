"""Fixtures that several test files share, created once because they take a while."""

import pytest

from word_ptb.train import main

SMALL = """--emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 3 --seq_len 13 --batch_size 4 --aux 0 --data synthetic
--epochs 1 --max_steps 20 --max_eval_tokens 200""".split()
SIZES = SMALL[:18]  # the flags that determine the model


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a small run of word_ptb on the synthetic corpus."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def sizes():
    """The flags of `run_folder` that determine the model."""
    return SIZES
