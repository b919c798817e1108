"""Any command line and any file content get an answer, or one line that says what is wrong.

These need the package hypothesis and minutes: `pip install -e .[dev]`, then `pytest -m slow tests/test_fuzz.py`.
"""

import dataclasses
import itertools
import json
import tempfile
import typing
from pathlib import Path

import pytest
import torch

from char_ptb import data as char_data
from cifar10 import data as cifar_data
from pmnist import data as mnist_data
from trellisnet import serialization
from trellisnet.data import corpus, encoder, pixels
from trellisnet.data.text import Texts, normalised
from trellisnet.errors import UserError
from trellisnet.training import checkpoint, programs
from trellisnet.training.config import build_parser, flag_of, parse, to_settings
from word_ptb.train import main

hypothesis = pytest.importorskip("hypothesis", reason="needs the package hypothesis: pip install hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
CONFIGS = [programs.get(task).config_class for task in programs.TASKS]
MANY = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
FEW = settings(MANY, max_examples=40)

TEXTS = st.text(max_size=200)
LETTERS = st.characters(codec="utf-8", exclude_characters="\0")
SIZES = """horizon seq_len batch_size eval_batch_size nlevels ksize aux_freq nhid accumulate max_eval_tokens
log-interval dropout clip lr n_experts inject_every""".split()
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["", "1e999", "0x1", "1_0", "٣", "-0"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def one_line(error: UserError) -> None:
    said = str(error)
    assert said
    assert said.isprintable()


def flags(config):
    """Lists of arguments, most of them flags with values that may fit."""
    names = [action.option_strings[0] for action in build_parser(config)._actions if action.option_strings[0] != "-h"]
    value = NUMBERS.map(str) | st.sampled_from(["auto", "cpu", "Adam", "default", "small", "synthetic"]) | TEXTS
    flag = st.tuples(st.sampled_from(names), st.lists(value, max_size=2)).map(lambda pair: [pair[0], *pair[1]])
    return st.lists(flag | st.lists(TEXTS, max_size=2), max_size=5).map(lambda parts: [*itertools.chain(*parts)])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.task)
def test_any_command_line(config):
    @MANY
    @given(flags(config))
    def check(argv):
        try:
            parsed, _ = parse(config, argv)
        except UserError as e:
            return one_line(e)
        json.dumps(to_settings(parsed), allow_nan=False)  # what is taken can be kept

    check()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.task)
def test_any_settings_file(config, tmp_path):
    names = [field.name for field in dataclasses.fields(config)]
    known = st.dictionaries(st.sampled_from(names) | st.text(max_size=10), JSON, max_size=4)

    @MANY
    @given(JSON | known | st.fixed_dictionaries({"settings": known, "task": st.just(config.task)}))
    def check(content):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        try:
            parsed, taken = parse(config, ["--config", str(path)])
        except UserError as e:
            return one_line(e)
        hints = typing.get_type_hints(config)
        for name in taken.keys() - {"config"}:
            assert isinstance(getattr(parsed, name), typing.get_origin(hints[name]) or hints[name]), name

    check()


def test_any_flag_changes_its_own_setting():
    @MANY
    @given(st.sampled_from(CONFIGS), st.data(), st.integers(1, 1000))
    def check(config, data, number):
        hints = typing.get_type_hints(config)
        fields = [f for f in dataclasses.fields(config) if hints[f.name] in (int, float)]
        field = data.draw(st.sampled_from(fields))
        try:
            parsed, taken = parse(config, [flag_of(config, field.name), str(number)])
        except UserError as e:
            return one_line(e)
        assert taken == {field.name: number}
        assert getattr(parsed, field.name) == number

    check()


@MANY
@given(st.binary(max_size=400))
def test_any_file_that_should_hold_tensors(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        for read in (lambda: serialization.load(path, "weights"), lambda: checkpoint.load(path)):
            with pytest.raises(UserError) as raised:
                read()
            one_line(raised.value)


@MANY
@given(st.lists(st.text(LETTERS, max_size=80), min_size=3, max_size=3))
def test_any_text_is_encoded_alike_and_comes_back(texts):
    expected = corpus.encode(map(corpus.words, map(normalised, texts)), sha256="", label="x")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{split}.txt" for split in corpus.SPLITS]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode())
        try:
            found = [encoder.encode_files(Texts(paths), folder / "cache", label="x") for _ in range(2)]
            found.append(corpus.encode(map(corpus.words, Texts(paths).read()), sha256="", label="x"))
        except UserError as e:
            one_line(e)
            assert not all(normalised(text).strip() for text in texts)
            found = []
    for other in found:
        for split in corpus.SPLITS:
            ours, theirs = ([c.vocabulary[i] for i in getattr(c, split)] for c in (expected, other))
            assert ours == theirs


@MANY
@given(st.binary(max_size=300))
def test_any_bytes_as_text(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_bytes(content)
        try:
            (text, *_) = Texts([path] * 3).read()
        except UserError as e:
            return one_line(e)
        assert text == normalised(content.decode())


@MANY
@given(st.binary(max_size=100), st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.booleans())
def test_any_image_file(content, sizes, honest):
    head = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in sizes) if honest else b""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images"
        path.write_bytes(head + content)
        for read in (lambda: pixels.read_idx(path, 3), lambda: cifar_data.read_batch(path)):
            try:
                read()
            except UserError as e:
                one_line(e)


@pytest.mark.parametrize("load", [char_data.load, mnist_data.load, cifar_data.load])
def test_any_folder(load, tmp_path):
    names = [*cifar_data.NAMES, *mnist_data.MD5, *(f"{split}.txt" for split in corpus.SPLITS)]

    @FEW
    @given(st.dictionaries(st.sampled_from(names), st.binary(max_size=100)))
    def check(files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            try:
                load(folder)
            except UserError as e:
                one_line(e)

    check()


@FEW
@given(st.dictionaries(st.sampled_from(SIZES), st.sampled_from([0, 1, 2, 3, 7, 40, 400]), max_size=4))
def test_any_sizes_train_or_are_refused(given_sizes):
    torch.set_num_threads(1)
    sizes = {"emsize": 4, "nout": 4, "nhid": 3, "nlevels": 3, "horizon": 5, "seq_len": 12, "batch_size": 200}
    sizes |= {"eval_batch_size": 50, "aux_freq": 2, "max_eval_tokens": 200} | given_sizes
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--data", "synthetic", "--out", f"{folder}/run", "--max_steps", "2", "--epochs", "1"]
        code = main([*argv, *(str(part) for name, size in sizes.items() for part in (f"--{name}", size))])
        assert code in (0, 1, 2)  # 1: a loss that is not finite, at a rate of 400
        assert code != 1 or sizes.get("lr", 0) >= 7
