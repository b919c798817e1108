"""Weight files in the authors' layout: loading, refusals and their messages. Numbers are in test_conformance.py."""

import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch

import cases
from trellisnet import TrellisNet
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.weights import authors_state_dict, load_weights, parameter_map, round_weights, save_weights, summarise


def model(**options):
    settings = {"vocab_size": 20, "embedding_size": 4, "hidden_size": 7, "num_layers": 3, "output_size": 4} | options
    return TrellisLanguageModel(**{"weight_norm": False} | settings)


def test_a_module_without_names_in_the_layout_is_refused(tmp_path, saved):
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.core = TrellisNet(4, 6, 2)

    message = r"^model: expected a TrellisLanguageModel or a TrellisClassifier, got Tagger; save other modules with"
    with pytest.raises(ValueError, match=message.replace("Tagger", "TrellisNet")):
        save_weights(Tagger().core, tmp_path / "w.pkl")
    for use in (parameter_map, lambda m: save_weights(m, tmp_path / "w.pkl"), lambda m: load_weights(m, saved)):
        with pytest.raises(ValueError, match=message):
            use(Tagger())
    assert not (tmp_path / "w.pkl").exists()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.pkl"
    save_weights(model(), path)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_norm": True}, {"tied": False, "output_size": 3}])
def test_round_trip(tmp_path, legacy, options):
    first, second = model(**options), model(**options)
    save_weights(first, tmp_path / "w.pkl", legacy=legacy)
    load_weights(second, tmp_path / "w.pkl")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["w.pkl"]  # and no temporary file


@pytest.mark.parametrize(
    "options", [{}, {"weight_norm": True, "n_experts": 2}, {"tied": False}, {"cutoffs": [5], "dtype": torch.float64}]
)
def test_safetensors_hold_the_same_as_a_pkl(tmp_path, options):
    package = pytest.importorskip("safetensors.torch")
    first, path = model(**options), tmp_path / "w.safetensors"
    save_weights(first, path, vocabulary="a" * 64, task="word_ptb")
    assert package.load_file(path).keys() == parameter_map(first).keys()
    round_weights(path, tmp_path / "half.safetensors", torch.float16)
    round_weights(path, tmp_path / "half.pkl", torch.float16)
    for name, dtype in (("w.safetensors", None), ("half.safetensors", torch.half), ("half.pkl", torch.half)):
        second = model(**options)
        load_weights(second, tmp_path / name, vocabulary="a" * 64)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a.to(dtype).to(a.dtype), b)
        with pytest.raises(ValueError, match="was trained on another vocabulary"):
            load_weights(second, tmp_path / name, vocabulary="b" * 64)
        assert summarise(tmp_path / name).vocabulary == "a" * 64
    with pytest.raises(ValueError, match="^legacy: expected a path that does not end in .safetensors"):
        save_weights(first, path, legacy=True)


def test_corrupt_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    save_weights(model(), path)
    data = path.read_bytes()
    for corrupt in (b"", data[:5], data[:-9], data[:40], b"\xff" * 8 + data[8:], data.replace(b"}", b"]", 1)):
        path.write_bytes(corrupt)
        with pytest.raises(UserError, match=r"w.safetensors: not weights .*, or corrupt \("):
            load_weights(model(), path)


def test_safetensors_without_the_package_name_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "w.safetensors"
    message = "w.safetensors: files of this kind need the package safetensors; pip install safetensors, or use a .pkl"
    with pytest.raises(UserError, match=message):
        save_weights(model(), path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        load_weights(model(), path)


def test_repeated_tensors_are_written_once(tmp_path):
    module = model(vocab_size=5000)
    save_weights(module, tmp_path / "w.pkl")
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    assert (tmp_path / "w.pkl").stat().st_size < 1.1 * size
    state = authors_state_dict(module)
    assert (
        state["decoder.weight"].data_ptr() == state["encoder.weight"].data_ptr() == module.embedding.weight.data_ptr()
    )


def test_files_without_the_repeated_names_load(tmp_path):
    module = model()
    torch.save({n: p.detach() for n, p in parameter_map(module).items()}, tmp_path / "w.pkl")
    other = model()
    load_weights(other, tmp_path / "w.pkl")
    assert torch.equal(other.core.weight_h, module.core.weight_h)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"embedding_size": 5, "output_size": 5},
            r"encoder.weight has shape \(20, 4\), .* \(20, 5\); pass embedding_size=4, output_size=4$",
        ),
        (
            {"vocab_size": 21},
            r"encoder.weight has shape \(20, 4\), .* \(21, 4\); the file has 20 words, the data 21; pass the data",
        ),
        ({"hidden_size": 9}, r"full_conv.bias2 has shape \(28,\), .* \(36,\); pass hidden_size=7$"),
        ({"kernel_size": 3}, r"weight1_raw has shape \(28, 4, 2\), .* \(28, 4, 3\); pass kernel_size=2$"),
        ({"weight_norm": True}, r"has no tnet.module.full_conv.weight1_g; .* pass weight_norm=False$"),
        ({"tied": False}, None),
        ({"tied": False, "output_size": 3, "hidden_size": 7}, r"decoder.weight .* pass output_size=4, hidden_size=7$"),
    ],
)
def test_a_misfit_names_tensor_shapes_and_argument(saved, options, message):
    module = model(**options)
    before = [p.detach().clone() for p in module.parameters()]
    if message is None:  # a tied file fits an untied model: it holds both matrices
        load_weights(module, saved)
        return
    with pytest.raises(ValueError, match=message):
        load_weights(module, saved)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_more_misfits(tmp_path):
    save_weights(model(weight_norm=True), tmp_path / "wn.pkl")
    with pytest.raises(UserError, match=r"trained with weight normalisation; pass weight_norm=True$"):
        load_weights(model(), tmp_path / "wn.pkl")
    save_weights(model(tied=False), tmp_path / "untied.pkl")
    with pytest.raises(UserError, match=r"decoder.weight differs from encoder.weight, .* pass tied=False$"):
        load_weights(model(), tmp_path / "untied.pkl")
    save_weights(model(n_experts=2), tmp_path / "mixture.pkl")
    with pytest.raises(UserError, match=r"mixture of softmaxes; pass n_experts=2$"):
        load_weights(model(), tmp_path / "mixture.pkl")
    with pytest.raises(UserError, match=r"the file has 46 words, the data 45; pass the data"):
        load_weights(cases.load("lm_plain_k2_tied").model(), cases.FIXTURES / "lm_mos_tied_plain.pkl")
    with pytest.raises(UserError, match="from another model or task, a classifier of pixels"):
        load_weights(model(), cases.FIXTURES / "pixel_1ch.pkl")
    with pytest.raises(ValueError, match=r"only a split softmax .* pass init_tail=False"):
        load_weights(model(), tmp_path / "wn.pkl", init_tail=True)


def split(cutoffs=(5, 9), **options):
    return model(cutoffs=cutoffs, **options)


def test_tail_vectors_are_saved_and_required(tmp_path):
    module = split()
    torch.nn.init.normal_(module.head.tail_vectors)
    save_weights(module, tmp_path / "split.pkl")
    again = split()
    assert load_weights(again, tmp_path / "split.pkl", init_tail=True) == []  # the file has them
    assert torch.equal(again.head.tail_vectors, module.head.tail_vectors)
    for other in (model(), split([5]), split([5, 8])):
        with pytest.raises(UserError, match="another split of the softmax; pass cutoffs=\\[5, 9\\]"):
            load_weights(other, tmp_path / "split.pkl")
    torch.save(OrderedDict(authors_state_dict(module)), tmp_path / "silent.pkl")  # without metadata
    with pytest.raises(UserError, match="split softmax with 2 bands; pass the cutoffs that it was trained with"):
        load_weights(model(), tmp_path / "silent.pkl")
    with pytest.raises(UserError, match=r"tail_vectors has shape \(2, 4\), .* \(1, 4\); the file has 2 bands"):
        load_weights(split([5]), tmp_path / "silent.pkl")
    save_weights(model(), tmp_path / "ours.pkl")
    with pytest.raises(UserError, match="another split of the softmax; pass cutoffs=None"):
        load_weights(again, tmp_path / "ours.pkl", init_tail=True)
    torch.save(authors_state_dict(model()), tmp_path / "plain.pkl")
    before = [p.detach().clone() for p in again.parameters()]
    with pytest.raises(
        UserError, match="has no criterion.tail_vectors: .* pass init_tail=True to continue with untrained ones"
    ):
        load_weights(again, tmp_path / "plain.pkl")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), before, strict=True))
    assert load_weights(again, tmp_path / "plain.pkl", init_tail=True) == list(parameter_map(again))[-2:]
    assert torch.equal(again.head.tail_vectors, module.head.tail_vectors)  # unchanged
    torch.save(authors_state_dict(model(weight_norm=True)), tmp_path / "wn.pkl")
    with pytest.raises(UserError, match="pass weight_norm=True"):
        load_weights(split(), tmp_path / "wn.pkl", init_tail=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_another_vocabulary_are_refused(tmp_path, legacy):
    save_weights(model(), tmp_path / "w.pkl", legacy=legacy, vocabulary="a" * 64)
    load_weights(model(), tmp_path / "w.pkl", vocabulary="a" * 64)
    load_weights(model(), tmp_path / "w.pkl")  # no vocabulary to compare with
    module = model()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(UserError, match=r"another vocabulary \(sha256 aaaaaaaaaaaa… instead of bbbbbbbbbbbb…\)"):
        load_weights(module, tmp_path / "w.pkl", vocabulary="b" * 64)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    state = torch.load(tmp_path / "w.pkl", weights_only=True)
    assert list(state) == list(authors_state_dict(model()))  # no names but the authors'
    save_weights(model(), tmp_path / "silent.pkl", legacy=legacy)
    load_weights(model(), tmp_path / "silent.pkl", vocabulary="b" * 64)  # nor here
    theirs = authors_state_dict(model())
    theirs._metadata = OrderedDict({"": {"version": 1}, "trellisnet": 7})
    torch.save(theirs, tmp_path / "theirs.pkl", _use_new_zipfile_serialization=not legacy)
    load_weights(model(), tmp_path / "theirs.pkl", vocabulary="b" * 64)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, writer):
    path, trap = tmp_path / "bad.pkl", tmp_path / "trap"
    content = OrderedDict({"encoder.weight": Bomb(trap)})
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UserError, match="corrupt" if writer == "pickle" else "pickled object.*refused"):
        load_weights(model(), path)
    assert not trap.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_model_is_refused_with_an_explanation(tmp_path, legacy):
    torch.save(model(), tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"holds a pickled object \(a whole model\?\).*state_dict"):
        load_weights(model(), tmp_path / "model.pt")


def test_corrupt_and_foreign_files_are_refused(tmp_path, saved):
    content = saved.read_bytes()
    legacy = tmp_path / "legacy.pkl"
    save_weights(model(), legacy, legacy=True)
    old = legacy.read_bytes()
    bad = {
        "empty": b"", "text": b"hello world\n" * 50, "zeros": bytes(4096), "half": content[: len(content) // 2],
        "half-legacy": old[: len(old) // 2], "tail": old[:-5],
    }  # fmt: skip
    for name, corrupt in bad.items():
        path = tmp_path / name
        path.write_bytes(corrupt)
        with pytest.raises(UserError, match=f"{name}: not weights in the authors' layout"):
            load_weights(model(), path)
    with pytest.raises(UserError, match="nothing.pkl: no such file"):
        load_weights(model(), tmp_path / "nothing.pkl")
    torch.save({"format": 1, "step": 3}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="continued with --resume"):
        load_weights(model(), tmp_path / "last.pt")


def test_values_that_are_not_finite_are_refused(tmp_path):
    module = model()
    with torch.no_grad():
        module.core.weight_h[3, 2, 1] = float("nan")
    save_weights(module, tmp_path / "w.pkl")
    with pytest.raises(UserError, match="weight2_raw holds values that are not finite"):
        load_weights(model(), tmp_path / "w.pkl")
    state = authors_state_dict(model())
    state["network.0.module.full_conv.bias2"] = state["network.0.module.full_conv.bias2"] + 1
    torch.save(state, tmp_path / "differ.pkl")
    with pytest.raises(UserError, match="should be one tensor but differ"):
        load_weights(model(), tmp_path / "differ.pkl")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.weight", torch.zeros(20), "the file is from another model or task"),
        ("encoder.weight", torch.zeros(20, 4, dtype=torch.int64), "has dtype torch.int64"),
        ("encoder.weight", torch.zeros(20, 4, dtype=torch.complex64), "has dtype torch.complex64"),
        ("encoder.weight", torch.zeros(20, 4).to_sparse(), "torch.sparse_coo"),
        (7, torch.zeros(1), "not weights in the authors' layout"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_of_another_kind_are_refused(tmp_path, name, tensor, message, tied):
    state = authors_state_dict(model(tied=False))
    state[name] = tensor
    if tied and isinstance(name, str):
        state["decoder.weight"] = tensor
    torch.save(state, tmp_path / "w.pkl")
    with pytest.raises(UserError, match=message):
        load_weights(model(tied=tied), tmp_path / "w.pkl")


def test_flipped_bits_in_a_zip_are_noticed(saved):
    content = bytearray(saved.read_bytes())
    position = content.find(model().head.bias.detach().numpy().tobytes())  # zeros: the first run of them in the file
    content[position + 5] ^= 16
    saved.write_bytes(bytes(content))
    with pytest.raises(UserError, match="corrupt"):
        load_weights(model(), saved)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, saved):
    """The records of a zip are truncated with matching checksums; a legacy file makes a huge claim."""
    short = tmp_path / "short.pkl"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(short, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, content[: len(content) // 2] if "/data/" in member else content)
    with pytest.raises(UserError, match="not weights in the authors' layout"):
        load_weights(model(), short)

    legacy = tmp_path / "legacy.pkl"
    state = {"encoder.weight": torch.zeros(1_000_003, 3)}
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    whole = legacy.read_bytes()
    claim, more = (3_000_009).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little")
    assert claim in whole
    legacy.write_bytes(whole[:5000].replace(claim, more))
    with pytest.raises(UserError, match="not weights in the authors' layout"):
        load_weights(model(), legacy)


def test_weights_of_another_task_name_it(tmp_path):
    save_weights(model(vocab_size=30, weight_norm=True), tmp_path / "w.pkl", task="char_ptb")
    message = r"w.pkl: holds weights of char_ptb, not of word_ptb; load them with char_ptb/train.py$"
    with pytest.raises(UserError, match=message):
        load_weights(model(), tmp_path / "w.pkl", task="word_ptb")
    with pytest.raises(UserError, match="the file has 30 words, the data 20; pass the data"):  # not weight_norm
        load_weights(model(), tmp_path / "w.pkl")
    # Weights that fit are loaded, whatever their task.
    assert load_weights(model(vocab_size=30, weight_norm=True), tmp_path / "w.pkl", task="word_ptb") == []
    torch.save(authors_state_dict(model(vocab_size=30)), tmp_path / "w.pkl")
    with pytest.raises(UserError, match="the file has 30 words"):
        load_weights(model(), tmp_path / "w.pkl", task="word_ptb")
    (tmp_path / "config.json").write_text('{"task": "char_ptb"}')  # as in the folder of a run
    with pytest.raises(UserError, match=message):
        load_weights(model(), tmp_path / "w.pkl", task="word_ptb")


@pytest.mark.parametrize(
    ("dilation", "config", "warned"),
    [
        ([1], '{"settings": {"dilation": [1, 2]}}', "trained with dilation 1 2, but the model has 1, which makes"),
        ([1, 1], '{"settings": {"dilation": [1]}}', ""),
        ([1], '{"settings": {"dilation": [1, 1, 1, 2]}}', ""),  # the fourth of three layers
        ([1], '{"settings": {"dilation": []}}', ""),
        ([1], '{"settings": 3}', ""),
        ([1], "3", ""),
        ([1], "{", ""),
    ],
)
def test_another_dilation_than_that_of_the_run_is_reported(saved, dilation, config, warned):
    saved.with_name("config.json").write_text(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_weights(model(dilation=dilation), saved)
    assert len(caught) == bool(warned)
    assert all(warned in str(warning.message) for warning in caught)


def test_a_runs_folder_stands_for_its_weights(tmp_path):
    first, second = model(), model()
    save_weights(first, tmp_path / "weights.pkl")
    load_weights(second, tmp_path)
    assert torch.equal(first.core.weight_h, second.core.weight_h)
    (tmp_path / "weights.pkl").unlink()
    with pytest.raises(UserError, match=f"{tmp_path}: the folder holds no weights.pkl; name weights in the authors'"):
        load_weights(second, tmp_path)
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match=f"now by train.py --resume {tmp_path}/last.pt --max_steps 1$"):
        load_weights(second, tmp_path)
