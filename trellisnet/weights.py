"""Weight files in the authors' layout: names, saving, loading, and messages about mismatches.

The authors' state dict holds every tensor of the trellis twice (`tnet.*` and `network.0.*`), repeats `encoder.weight`
as a tied `decoder.weight`, and names raw kernels `*_raw`, or `*_v_raw` and `*_g` with weight normalisation. We add
names for what it lacks: `criterion.*` for the tail vectors of a split softmax, which the authors' scripts never save,
`weight2_past*` and `weight2_below*` for the parts of a mixed group convolution, and `head.*` for parameters of heads
that the authors do not have. Models with another core than TrellisNet keep the names of their parameters here.
"""

import json
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trellisnet import baselines, serialization
from trellisnet.baselines import SparseEmbedding
from trellisnet.core import TrellisNet
from trellisnet.data import PROJECT
from trellisnet.errors import NAME, ArgumentError, UserError, counted, shown
from trellisnet.heads import SplitSoftmax
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import ACTIVATIONS

Model = TrellisLanguageModel | TrellisClassifier
CORES = {core.core_name: core for core in (TrellisNet, *baselines.CORES)}
FILE = "weights.pkl"  # in a run's folder

_CORE = "tnet.module.full_conv."
_PIXEL_CORE = "network.0.module.full_conv."  # in a classifier, which holds it only once
_MIXTURE = "mixsoft."
_CRITERION = "criterion."
_TAIL = (_CRITERION + "tail_vectors", _CRITERION + "tail_bias")
_REPEATED = {_CORE: "network.0.module.full_conv.", _MIXTURE: "network.1."}  # first → second prefix of a tensor
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that a file may hold
_METADATA = "trellisnet"  # our entry in the metadata of a state dict, in which torch looks up names of modules
_SIZES = "pass the sizes that it was trained with (see the config.json of its run)"
WHAT = "weights in the authors' layout (a state dict)"


def parameter_map(model: Model) -> dict[str, nn.Parameter]:
    """Map the authors' names to the parameters of `model`, each exactly once, in the order of their model.

    With another core than TrellisNet, and in modules without a core, parameters keep their own names.

    Raises:
        ValueError: a TrellisNet, or another kind of module around one, which has no names in this layout.
    """
    if not isinstance(model, Model) and any(isinstance(m, TrellisNet) for m in (model, getattr(model, "core", None))):
        expected = "expected a TrellisLanguageModel or a TrellisClassifier"
        advice = "save other modules with torch.save(model.state_dict(), FILE)"
        raise ValueError(f"model: {expected}, got {type(model).__name__}; {advice}")
    if not _is_trellis(model):
        return dict(model.named_parameters())
    if isinstance(model, TrellisClassifier):
        return _trellis_names(model) | {f"linear.{name}": p for name, p in model.head.named_parameters()}
    names = {f"encoder.{name}": p for name, p in model.embedding.named_parameters()}
    if not model.tied:
        names["decoder.weight"] = model.head.weight
    names["decoder.bias"] = model.head.bias
    names |= _trellis_names(model)
    if model.n_experts:
        for part in ("prior", "latent"):
            names |= {f"{_MIXTURE}{part}.{name}": p for name, p in getattr(model.head, part).named_parameters()}
    if isinstance(model.head, SplitSoftmax):
        names |= dict(zip(_TAIL, (model.head.tail_vectors, model.head.tail_bias), strict=True))
    named = set(map(id, names.values()))
    return names | {f"head.{name}": p for name, p in model.head.named_parameters() if id(p) not in named}


def _is_trellis(model: nn.Module) -> bool:
    return isinstance(getattr(model, "core", None), TrellisNet)


def _core_of(model: nn.Module) -> str:
    """Return the name of the core, a value of `--model`."""
    return getattr(getattr(model, "core", None), "core_name", TrellisNet.core_name)


def _prefix(model: Model) -> str:
    return _PIXEL_CORE if isinstance(model, TrellisClassifier) else _CORE


def _trellis_names(model: Model) -> dict[str, nn.Parameter]:
    prefix, core = _prefix(model), dict(model.core.named_parameters())
    names = {"bias2": core.pop("bias")}
    for g in [name for name in core if name.endswith("_g")]:
        names[_authors_name(g)] = core.pop(g)
    names |= {f"{_authors_name(name)}_raw": p for name, p in core.items()}
    return {prefix + name: p for name, p in names.items()}


def _authors_name(name: str) -> str:
    return name.replace("weight_x", "weight1").replace("weight_h", "weight2")


def authors_state_dict(model: Model) -> "OrderedDict[str, Tensor]":
    """Return the state dict that the authors' code would save: their names and order, repeated tensors sharing storage.

    Errors as in :func:`parameter_map`.
    """
    tensors = {name: p.detach().cpu() for name, p in parameter_map(model).items()}
    if isinstance(model, TrellisClassifier) or not _is_trellis(model):
        return OrderedDict(tensors)
    state = OrderedDict()
    for name, tensor in tensors.items():
        if name == "decoder.bias" and model.tied and "encoder.weight" in tensors:
            state["decoder.weight"] = tensors["encoder.weight"]
        state[name] = tensor
    if model.n_experts:  # the mixture holds the decoder once more
        if "decoder.weight" in state:
            state[_MIXTURE + "decoder.weight"] = state["decoder.weight"]
        state[_MIXTURE + "decoder.bias"] = state["decoder.bias"]
    for prefix, second in _REPEATED.items():
        for name in [name for name in state if name.startswith(prefix)]:
            state[second + name.removeprefix(prefix)] = state[name]
    for name in _TAIL:
        if name in tensors:
            state.move_to_end(name)
    return state


def save_weights(
    model: Model,
    path: str | os.PathLike,
    *,
    legacy: bool = False,
    vocabulary: str | None = None,
    task: str | None = None,
) -> None:
    """Write the weights in the authors' layout, atomically.

    Args:
        model: the model.
        path: file to write; in the format of the package safetensors if it ends in .safetensors.
        legacy: write the container of torch < 1.6, which the authors' 2019 environment reads, instead of a zip.
        vocabulary: digest of the vocabulary, or of the order of the pixels. It is stored in the metadata of the state
            dict, so that :func:`load_weights` can refuse weights of another one.
        task: name of the task, stored beside it.

    Raises:
        ValueError: as in :func:`parameter_map`; `legacy` and a path that ends in .safetensors.
        UserError: the package safetensors is needed and not installed.
    """
    if legacy and os.fspath(path).endswith(serialization.SAFETENSORS):
        raise ValueError(f"legacy: expected a path that does not end in {serialization.SAFETENSORS}, got {path}")
    state = authors_state_dict(model)
    metadata = {"model": _core_of(model), "vocabulary": vocabulary, "cutoffs": _cutoffs(model), **_kind(model)}
    metadata |= {"task": task} if task else {}
    state._metadata = OrderedDict({_METADATA: metadata})
    serialization.save(path, state, legacy=legacy)


def round_weights(source: str | os.PathLike, path: str | os.PathLike, dtype: torch.dtype) -> None:
    """Convert a weight file to another dtype, rounding to nearest. The result is a zip container or a .safetensors.

    Metadata, such as the vocabulary, is kept, and repeated tensors are still written once.

    Args:
        source: weights in the authors' layout, of any model.
        path: file to write, atomically.
        dtype: torch.float16 for half the size of float32.

    Raises:
        ValueError: not a weight file, or one with a number too large for `dtype`.
    """
    loaded = serialization.load(source, WHAT)
    _unique(loaded, source, str)
    rounded: dict[tuple[Any, ...], Tensor] = {}
    state = OrderedDict()
    for name, tensor in loaded.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        state[name] = rounded.setdefault(key, tensor.to(dtype))
        if not serialization.all_finite(state[name]):
            raise UserError(f"{source}: {name} holds numbers that are too large for {dtype}; choose another type")
    state._metadata = OrderedDict(getattr(loaded, "_metadata", None) or {})
    serialization.save(path, state)


def load_weights(
    model: Model,
    path: str | os.PathLike,
    *,
    init_tail: bool = False,
    vocabulary: str | None = None,
    changed: str = "",
    task: str | None = None,
) -> list[str]:
    """Copy weights in the authors' layout into `model`: all of them or, on any error, none.

    Files may hold 16-, 32- or 64-bit floats, which are converted to the model's dtype, rounding to nearest.

    Args:
        model: the model, built with the settings that the weights were trained with.
        path: the `.pkl`, a zip or legacy container with tensors from any device; a `.safetensors`; or the folder of a
            run.
        init_tail: for a split softmax, leave the tail vectors as they are if the file has none. The authors' scripts do
            not save them, and scores with untrained ones mean little.
        vocabulary: digest of the vocabulary that the model works on, as in :func:`save_weights`; a file with another
            one is refused.
        changed: how the text of this vocabulary is read now, if version 0.1.0 read it differently; for the message.
        task: name of the task that the model is for. If weights that do not fit name another one, or the config.json
            beside them does, the error says so.

    A warning says so if the config.json beside the file names other dilations, which neither names nor shapes show.

    Returns:
        names of the parameters that the file lacks: the tail vectors with `init_tail`, otherwise none.

    Raises:
        ValueError: not a weight file, or one that does not fit; one line names the tensor, both shapes and the argument
            of the model to change. Also as in :func:`parameter_map`.
    """
    path = locate(path)
    loaded = serialization.load(path, WHAT)
    try:
        missing = _load(model, loaded, path, init_tail, vocabulary, changed)
    except UserError as e:
        owner = _metadata(loaded).get("task") or task_beside(path)
        if task is None or not isinstance(owner, str) or owner == task:
            raise
        owner = shown(owner, NAME)
        raise UserError(f"{path}: holds weights of {owner}, not of {task}; load them with {owner}/train.py") from e
    _compare_dilation(model, path)
    return missing


def locate(path: str | os.PathLike) -> str | os.PathLike:
    """Return the weight file in the folder of a run, or the path itself if it is not a folder.

    Raises:
        UserError: the folder holds none.
    """
    if not os.path.isdir(path):
        return path
    file, checkpoint = (os.path.join(path, name) for name in (FILE, "last.pt"))
    if os.path.isfile(file):
        return file
    advice = f"name {WHAT}"
    if os.path.isfile(checkpoint):
        advice = (
            f"it is written after the first epoch, or with --schedule step now by train.py --resume {checkpoint} "
            "--max_steps 1"
        )
    raise UserError(f"{path}: the folder holds no {FILE}; {advice}")


class Summary(NamedTuple):
    """Metadata of a weight file: the model that it belongs to.

    Args:
        vocabulary: digest of its vocabulary; None if the file names none.
        cutoffs: borders of its softmax's bands.
        channels: input channels of its first convolution; 0 without one.
    """

    vocabulary: str | None
    cutoffs: list[int]
    channels: int


def summarise(path: str | os.PathLike) -> Summary:
    """Return the metadata of a weight file that describe its model.

    Raises:
        UserError: as in :func:`load_weights`.
    """
    loaded = serialization.load(path, WHAT)
    state, metadata = _unique(loaded, path, str), _metadata(loaded)
    vocabulary, cutoffs = metadata.get("vocabulary"), metadata.get("cutoffs")
    if not isinstance(cutoffs, list) or not all(type(border) is int for border in cutoffs):
        cutoffs = []
    kernels = [tensor for tensor in state.values() if tensor.dim() == 3 and tensor.size(2) > 1]
    channels = kernels[0].size(1) if kernels else 0
    return Summary(vocabulary if isinstance(vocabulary, str) else None, cutoffs, channels)


def shipped() -> list[Path]:
    """Return the folders in `results/` of the checkout that hold weights."""
    return [path.parent for path in sorted((PROJECT / "results").glob(f"*/{FILE}"))]


def task_beside(path: str | os.PathLike) -> Any:
    """Return the task named in the config.json beside the file; None if there is none."""
    return _config_beside(path).get("task")


def data_beside(path: str | os.PathLike) -> Any:
    """Return the digest of the data named in the config.json beside the file; None if there is none."""
    return _config_beside(path).get("data")


def layers_beside(path: str | os.PathLike) -> Any:
    """Return the number of layers named in the config.json beside the file, inf at an equilibrium; None without it."""
    settings = _config_beside(path).get("settings")
    if not isinstance(settings, dict):
        return None
    return math.inf if settings.get("equilibrium") is True else settings.get("nlevels")


def _config_beside(path: str | os.PathLike) -> dict[str, Any]:
    """Return the content of the config.json beside the file; empty if there is none."""
    try:
        content = json.loads(serialization.read_regular(os.path.join(os.path.dirname(path), "config.json")))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _compare_dilation(model: Model, path: str | os.PathLike) -> None:
    """Warn if the weights were trained with other dilations, which only the config.json beside them can tell."""
    settings = _config_beside(path).get("settings")
    theirs = settings.get("dilation") if isinstance(settings, dict) else None
    if not _is_trellis(model) or not isinstance(theirs, list) or not theirs:
        return
    ours, layers = model.core.dilation, range(model.core.num_layers)
    if any(theirs[i % len(theirs)] != ours[i % len(ours)] for i in layers):
        theirs, ours = (shown(" ".join(map(str, dilation)), NAME) for dilation in (theirs, ours))
        warnings.warn(
            f"{path}: was trained with dilation {theirs}, but the model has {ours}, which makes the same weights "
            "another network",
            stacklevel=3,
        )


def _load(
    model: Model, loaded: Any, path: str | os.PathLike, init_tail: bool, vocabulary: str | None, changed: str
) -> list[str]:
    """Copy the content of a file into `model`; arguments and errors as in :func:`load_weights`."""
    expected = parameter_map(model)
    language = isinstance(model, TrellisLanguageModel)
    if init_tail and not isinstance(model.head, SplitSoftmax):
        raise ArgumentError("only a split softmax (one with cutoffs) has tail vectors", init_tail=False)
    state = _unique(loaded, path, _first_name if language else str)
    metadata = _metadata(loaded)
    own = _core_of(model)
    is_trellis = any(name.startswith((_CORE, _PIXEL_CORE)) for name in state)
    theirs = metadata.get("model", TrellisNet.core_name if is_trellis else None)
    if isinstance(theirs, str) and theirs != own:
        if theirs not in CORES:
            raise UserError(f"{path}: was trained with another core, {shown(theirs, NAME)}; {_SIZES}")
        raise ArgumentError(f"{path}: was trained with another core", core=CORES[theirs])
    if language and model.tied and _is_trellis(model):
        _check_tied(state, path)
        state.pop("decoder.weight", None)
    cutoffs = metadata.get("cutoffs")
    if isinstance(cutoffs, list) and cutoffs != _cutoffs(model):
        printable = all(type(border) is int for border in cutoffs) and len(cutoffs) < 20
        bands = (cutoffs or None) if printable else ...
        raise ArgumentError(f"{path}: was trained with another split of the softmax", cutoffs=bands)
    missing_tail = [name for name in _TAIL if name in expected and name not in state]
    if missing_tail and len(state) + len(missing_tail) == len(expected) and not init_tail:
        raise ArgumentError(
            f"{path}: has no {missing_tail[0]}: the authors' script trains the tail vectors but does not save them, so "
            "this file cannot reproduce its scores",
            purpose=" to continue with untrained ones",
            init_tail=True,
        )
    expected = {name: parameter for name, parameter in expected.items() if name not in missing_tail}
    if _is_trellis(model):
        _check_names(state, expected, path, model)
    elif differing := sorted(state.keys() ^ expected.keys()):
        raise UserError(f"{path}: {_difference(differing[0], expected)}; {_SIZES}")
    kind = {name: metadata.get(name) for name in _kind(model)}
    if _is_kind(kind) and kind != _kind(model):
        differ = {name: value for name, value in kind.items() if value != _kind(model)[name]}
        if "mixed_group" in differ:
            differ["kernel_groups"] = differ.pop("mixed_group") or None
        raise ArgumentError(f"{path}: was trained with another kind of layer", **differ)
    _check_vocabulary(metadata.get("vocabulary"), vocabulary, path, isinstance(model, TrellisClassifier), changed)
    for name, parameter in expected.items():
        if state[name].shape != parameter.shape:
            advice: Advice = _SIZES
            if _is_trellis(model) and not isinstance(getattr(model, "embedding", None), SparseEmbedding):
                advice = _other_gates(state, model) or (_advice if language else _classifiers_advice)(
                    name, state, model
                )
            shapes = tuple(state[name].shape), tuple(parameter.shape)
            raise _misfit(f"{path}: {name} has shape {shapes[0]}, the model needs {shapes[1]}", advice)
        if state[name].dtype != parameter.dtype and not serialization.all_finite(state[name].to(parameter.dtype)):
            raise UserError(f"{path}: {name} holds numbers that are too large for {parameter.dtype}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])
    return missing_tail


# What would fit: a sentence, the arguments of the model, or both.
Advice = str | tuple[str, dict[str, Any]] | dict[str, Any]


def _difference(name: str, expected: dict[str, nn.Parameter]) -> str:
    """Say which of file and model has the tensor `name`."""
    return f"has no {name}" if name in expected else f"holds {name}, which the model does not have"


def _misfit(line: str, advice: Advice) -> UserError:
    """Build the error for weights that do not fit, from what is wrong and what would fit."""
    why, arguments = advice if isinstance(advice, tuple) else ("", advice)
    if isinstance(arguments, str):
        return UserError(f"{line}; {arguments}")
    return ArgumentError(f"{line}; {why}" if why else line, **arguments)


def _kind(model: Model) -> dict[str, Any]:
    """Return the settings of the layers that names and shapes do not determine, under their names in the metadata."""
    if not _is_trellis(model):
        return {}
    core = model.core
    return {
        "activation": core.activation, "mixed_group": core.kernel_groups or 0, "inject_every": core.inject_every,
    }  # fmt: skip


def _is_kind(kind: dict[str, Any]) -> bool:
    """Return whether a file's metadata has all these settings; the authors' files have none, only names and shapes."""
    return (
        bool(kind)
        and kind["activation"] in tuple(ACTIVATIONS)
        and all(type(kind[name]) is int for name in ("mixed_group", "inject_every"))
    )


def _cutoffs(model: Model) -> list[int]:
    return model.head.cutoffs if isinstance(model.head, SplitSoftmax) else []


def _metadata(loaded: dict[str, Tensor]) -> dict[str, Any]:
    """Return the metadata that :func:`save_weights` writes; empty for other files."""
    metadata: Any = getattr(loaded, "_metadata", None)
    ours = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    return ours if isinstance(ours, dict) else {}


def _check_vocabulary(theirs: Any, vocabulary: str | None, path: str | os.PathLike, pixels: bool, changed: str) -> None:
    """Refuse weights of another vocabulary or order of the pixels; files that do not name theirs pass."""
    if vocabulary is not None and isinstance(theirs, str) and theirs != vocabulary:
        noun = "order of the pixels" if pixels else "vocabulary"
        advice = f"; if it was this very text, train again: version 0.1.0 read it differently, now it is read {changed}"
        digests = f"{shown(theirs[:12])}… instead of {vocabulary[:12]}…"
        raise ArgumentError(
            f"{path}: was trained on another {noun} (sha256 {digests})", purpose=advice * bool(changed), data=...
        )


def _unique(state: object, path: str | os.PathLike, first_name: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the file's tensors under their first names; all must be finite, and repeated ones must agree."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: not {WHAT}; checkpoints of a run (last.pt, best.pt) are continued with --resume")
    unique = {}
    for name, tensor in state.items():
        if shown(name, NAME) != name:  # so that later messages can print names as they are
            raise UserError(f"{path}: holds a tensor called {shown(name, NAME)}; not {WHAT}")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {tensor.dtype} and layout {tensor.layout}; not {WHAT}")
        if not serialization.all_finite(tensor):
            raise UserError(f"{path}: {name} holds values that are not finite; the file is corrupt")
        first = first_name(name)
        if first != name and first in state and not torch.equal(state[first], tensor):
            raise UserError(f"{path}: {name} and {first} should be one tensor but differ; the file is corrupt")
        unique.setdefault(first, tensor)
    return unique


def _first_name(name: str) -> str:
    """Return the first of the authors' names for the tensor `name`."""
    for prefix, second in _REPEATED.items():
        if name.startswith(second):
            name = prefix + name.removeprefix(second)
    return name.removeprefix(_MIXTURE) if name.startswith(_MIXTURE + "decoder.") else name


def _check_tied(state: dict[str, Tensor], path: str | os.PathLike) -> None:
    encoder, decoder = state.get("encoder.weight"), state.get("decoder.weight")
    if encoder is not None and decoder is not None and not torch.equal(encoder, decoder):
        raise ArgumentError(f"{path}: decoder.weight differs from encoder.weight, but the model ties them", tied=False)


def _check_names(
    state: dict[str, Tensor], expected: dict[str, nn.Parameter], path: str | os.PathLike, model: Model
) -> None:
    prefix = _prefix(model)
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if not missing and not extra:
        return
    advice: Advice
    words = state["encoder.weight"].size(0) if "encoder.weight" in state and state["encoder.weight"].dim() else None
    if "encoder.weight" in missing or "linear.weight" in missing or prefix + "bias2" in missing:
        advice = _origin(state)
    elif words not in (None, getattr(model, "vocab_size", None)):
        advice = _other_words(words, model.vocab_size)
    elif any(name.startswith(_MIXTURE) for name in extra):
        experts = state[_MIXTURE + "prior.bias"].numel() if _MIXTURE + "prior.bias" in state else ...
        advice = "the file holds a mixture of softmaxes", {"n_experts": experts}
    elif any(name.startswith(_MIXTURE) for name in missing):
        advice = "the file holds a single softmax", {"n_experts": 0}
    elif any(name in _TAIL for name in extra):
        bands = counted(state[_TAIL[1]].numel(), "bands") if _TAIL[1] in state else "some bands"
        advice = f"the file holds a split softmax with {bands}", {"cutoffs": ...}
    elif any(name in _TAIL for name in missing):
        advice = "the file is corrupt"
    elif any("weight2_past" in name for name in extra):
        first = next((state[prefix + w] for w in ("weight1_raw", "weight1_v_raw") if prefix + w in state), None)
        groups = ... if first is None or not first.size(0) else state[prefix + "bias2"].numel() // first.size(0)
        advice = "the file holds a mixed group convolution", {"kernel_groups": groups}
    elif any("weight2_past" in name for name in missing):
        advice = "the file holds a dense kernel", {"kernel_groups": None}
    elif any(name.endswith("_g") for name in extra):
        advice = "the file was trained with weight normalisation", {"weight_norm": True}
    elif any(name.endswith("_g") for name in missing) and prefix + "weight1_raw" in state:
        advice = "the file was trained without weight normalisation", {"weight_norm": False}
    elif missing == ["decoder.weight"]:
        advice = "the file holds a model with tied weights", {"tied": True}
    else:
        advice = _origin(state)
    raise _misfit(f"{path}: {_difference((missing or extra)[0], expected)}", advice)


def _origin(state: dict[str, Tensor]) -> str:
    """Describe the kind of model that the weights come from, by their names alone."""
    if "linear.weight" in state:
        return "the file is from another model or task, a classifier of pixels (pmnist, cifar10)"
    if "encoder.weight" in state and state["encoder.weight"].dim() == 2:
        words = state["encoder.weight"].size(0)
        return f"the file is from another model or task, a language model with a vocabulary of {words:,}"
    return "the file is from another model or task"


def _other_words(words: int, expected: int) -> Advice:
    return f"the file has {counted(words, 'words')}, the data {expected:,}", {"data": ...}


def _other_gates(state: dict[str, Tensor], model: Model) -> Advice:
    """Advise another activation if the shape of a dense hidden kernel shows another number of gates."""
    for name, kernel in state.items():
        if name.removeprefix(_prefix(model)) in ("weight2_raw", "weight2_v_raw") and kernel.dim() == 3:
            for other in ACTIVATIONS.values():
                if kernel.size(0) == other.gates * kernel.size(1) and other.name != model.core.activation:
                    return {"activation": other.name}
    return {}


def _advice(name: str, state: dict[str, Tensor], model: TrellisLanguageModel) -> Advice:
    """Name the first argument in which file and model differ, with the file's value."""
    if name in _TAIL:
        return f"the file has {counted(state[_TAIL[1]].numel(), 'bands')}", {"cutoffs": ...}
    kernel = state.get(_CORE + "weight1_v_raw", state.get(_CORE + "weight1_raw"))
    encoder, bias, gates = state["encoder.weight"], state[_CORE + "bias2"], model.core.spec.activation.gates
    if (encoder.dim(), kernel.dim(), bias.dim()) != (2, 3, 1) or bias.numel() % gates:
        return _origin(state)
    words, embedding_size = encoder.shape
    if embedding_size != model.embedding.embedding_dim:
        both = model.tied and not model.n_experts
        return {"embedding_size": embedding_size} | ({"output_size": embedding_size} if both else {})
    if words != model.vocab_size:
        return _other_words(words, model.vocab_size)
    if kernel.size(2) != model.core.kernel_size:
        return {"kernel_size": kernel.size(2)}
    if model.n_experts and state[_MIXTURE + "prior.bias"].numel() != model.n_experts:
        return {"n_experts": state[_MIXTURE + "prior.bias"].numel()}
    if model.n_experts:
        if state[_MIXTURE + "prior.weight"].dim() != 2:
            return _origin(state)
        nout = state[_MIXTURE + "prior.weight"].size(-1)
    else:
        nout = embedding_size if model.tied else state["decoder.weight"].size(-1)
    sizes = {"output_size": nout, "hidden_size": bias.numel() // gates}
    if nout == model.core.output_size:
        del sizes["output_size"]
    differ = any(value != getattr(model.core, size) for size, value in sizes.items())
    return sizes if differ and nout <= sizes["hidden_size"] else f"{name} is from another model"


def _classifiers_advice(name: str, state: dict[str, Tensor], model: TrellisClassifier) -> Advice:
    """Name the first argument in which file and model differ, for a classifier."""
    kernel = state.get(_PIXEL_CORE + "weight1_v_raw", state.get(_PIXEL_CORE + "weight1_raw"))
    gates, bias, linear = model.core.spec.activation.gates, state[_PIXEL_CORE + "bias2"], state["linear.weight"]
    if (kernel.dim(), bias.dim(), linear.dim()) != (3, 1, 2) or bias.numel() % gates:
        return _origin(state)
    if linear.size(0) != model.num_classes or kernel.size(1) != model.core.input_size:
        return f"the file is for images with {counted(kernel.size(1), 'channels')} and {linear.size(0)} classes"
    if kernel.size(2) != model.core.kernel_size:
        return {"kernel_size": kernel.size(2)}
    hidden_size = bias.numel() // gates
    if linear.size(1) != model.core.output_size or hidden_size < linear.size(1):
        return f"{name} is from another model"
    return {"hidden_size": hidden_size}
