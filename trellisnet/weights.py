"""The authors' weight files: their names for our parameters, loading, saving, and saying what does not fit.

Their state dict holds every tensor of the trellis twice (`tnet.*` and `network.0.*`), a tied `decoder.weight` repeats
`encoder.weight`, raw kernels end in `_raw`, and with weight normalisation in `_v_raw` and `_g`. What they have no name
for: the vectors of the bands of a split softmax, which their scripts never save, are `criterion.*` here, and the two
parts of a mixed group convolution `weight2_past*` and `weight2_below*`. Models with another core than TrellisNet, which
the authors do not have, are saved and loaded under the names of their parameters here.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trellisnet import serialization
from trellisnet.baselines import SparseEmbedding
from trellisnet.core import TrellisNet
from trellisnet.errors import NAME, UserError, shown
from trellisnet.heads import SplitSoftmax
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.ops import GATES

Model = TrellisLanguageModel | TrellisClassifier
TRELLISNET = "trellisnet"

_CORE = "tnet.module.full_conv."
_PIXEL_CORE = "network.0.module.full_conv."  # of a classifier, which has no second name for it
_MIXTURE = "mixsoft."
_CRITERION = "criterion."
_TAIL = (_CRITERION + "tail_vectors", _CRITERION + "tail_bias")
# The authors' modules hold these tensors twice: the second name of every prefix repeats the first.
_AGAIN = {_CORE: "network.0.module.full_conv.", _MIXTURE: "network.1."}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of tensors that are loaded
_METADATA = "trellisnet"  # our entry in the metadata of a state dict; torch looks for names of modules there
_SIZES = "pass the sizes that it was trained with, which stand in the config.json of its run"
WHAT = "weights in the authors' layout (a state dict)"


def parameter_map(model: Model) -> dict[str, nn.Parameter]:
    """The authors' name of every parameter of `model`, each exactly once, in the order of their model.

    Parameters of what the authors do not have keep the names that they have here.
    """
    if not _is_trellis(model):
        return dict(model.named_parameters())
    if isinstance(model, TrellisClassifier):
        return _core_names(model) | {f"linear.{name}": p for name, p in model.head.named_parameters()}
    names = {f"encoder.{name}": p for name, p in model.embedding.named_parameters()}
    if not model.tied:
        names["decoder.weight"] = model.head.weight
    names["decoder.bias"] = model.head.bias
    names |= _core_names(model)
    if model.n_experts:
        names |= {_MIXTURE + name: p for part in ("prior", "latent") for name, p in _named(model.head, part)}
    if isinstance(model.head, SplitSoftmax):
        names |= dict(zip(_TAIL, (model.head.tail_vectors, model.head.tail_bias), strict=True))
    return names


def _is_trellis(model: nn.Module) -> bool:
    return isinstance(getattr(model, "core", None), TrellisNet)


def _network(model: nn.Module) -> str:
    """What `--model` calls the core."""
    return getattr(getattr(model, "core", None), "model_name", TRELLISNET)


def _prefix(model: Model) -> str:
    return _PIXEL_CORE if isinstance(model, TrellisClassifier) else _CORE


def _core_names(model: Model) -> dict[str, nn.Parameter]:
    prefix, core = _prefix(model), dict(model.core.named_parameters())
    names = {"bias2": core.pop("bias")}
    for g in [name for name in core if name.endswith("_g")]:
        names[_core_name(g)] = core.pop(g)
    names |= {f"{_core_name(name)}_raw": p for name, p in core.items()}
    return {prefix + name: p for name, p in names.items()}


def _core_name(name: str) -> str:
    return name.replace("weight_x", "weight1").replace("weight_h", "weight2")


def _named(head: nn.Module, part: str) -> list[tuple[str, nn.Parameter]]:
    return [(f"{part}.{name}", p) for name, p in getattr(head, part).named_parameters()]


def authors_state_dict(model: Model) -> "OrderedDict[str, Tensor]":
    """The model as the authors' code would save it: their names and order, repeated tensors sharing storage."""
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
    for prefix, again in _AGAIN.items():
        for name in [name for name in state if name.startswith(prefix)]:
            state[again + name.removeprefix(prefix)] = state[name]
    for name in _TAIL:
        if name in tensors:
            state.move_to_end(name)
    return state


def save_weights(model: Model, path: str | os.PathLike, *, legacy: bool = False, vocabulary: str | None = None) -> None:
    """Write the weights in the authors' layout, atomically.

    Args:
        model: the model.
        path: file to write.
        legacy: the container of torch < 1.6, which the authors' 2019 environment reads; else today's zip.
        vocabulary: digest of what the ids, or the places in a sequence, stand for. It travels in the metadata that a
            state dict has beside its tensors, so that :func:`load_weights` can refuse the weights of another one.
    """
    state = authors_state_dict(model)
    told = {"model": _network(model), "vocabulary": vocabulary, "cutoffs": _cutoffs(model), **_kind(model)}
    state._metadata = OrderedDict({_METADATA: told})
    serialization.save(path, state, legacy=legacy)


def round_weights(source: str | os.PathLike, path: str | os.PathLike, dtype: torch.dtype) -> None:
    """Write a weight file again, in today's container, with every number rounded to the nearest of another type.

    What the file says of itself, such as its vocabulary, is kept, and repeated tensors are still written once.

    Args:
        source: weights in the authors' layout, of any model.
        path: file to write, atomically.
        dtype: torch.float16 for half the size of float32.

    Raises:
        ValueError: the file is no such thing, or holds a number that is too large for `dtype`.
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
) -> list[str]:
    """Copy weights in the authors' layout into `model`; either all of them or, on any error, none.

    Files may hold numbers of 16, 32 or 64 bits, which become numbers of the model's own type: the same ones where that
    holds them, as float32 does those of a float16 file, else the nearest.

    Args:
        model: the model, built with the settings that the weights were trained with.
        path: their `.pkl`, zip or legacy container, tensors from any device.
        init_tail: for a split softmax: leave the vectors of the bands as they are if the file has none. The authors'
            scripts do not save them, and scores with untrained ones say little.
        vocabulary: digest as in :func:`save_weights` of what the model is to work on; a file that names another one is
            refused.
        changed: how the text of this vocabulary is read where version 0.1.0 read it otherwise, for the message.

    Returns:
        names of the parameters that the file does not have: tail vectors with `init_tail`, otherwise none.

    Raises:
        ValueError: the file is no such thing or does not fit; one line names the tensor, both shapes and the flag
            to change.
    """
    language = isinstance(model, TrellisLanguageModel)
    if init_tail and not isinstance(model.head, SplitSoftmax):
        raise UserError("--init_tail: only a split softmax (--cutoffs) has tail vectors; leave it out")
    loaded = serialization.load(path, WHAT)
    state = _unique(loaded, path, _first_name if language else str)
    told = _metadata(loaded)
    own = _network(model)
    theirs = told.get("model", TRELLISNET if any(name.startswith((_CORE, _PIXEL_CORE)) for name in state) else None)
    if isinstance(theirs, str) and theirs != own:
        raise UserError(f"{path}: was trained with another network; pass --model {shown(theirs, NAME)}")
    if language and model.tied and _is_trellis(model):
        _check_tied(state, path)
        state.pop("decoder.weight", None)
    expected = parameter_map(model)
    cutoffs = told.get("cutoffs")
    if isinstance(cutoffs, list) and cutoffs != _cutoffs(model):
        bands = " ".join(map(str, cutoffs or [0]))
        raise UserError(f"{path}: was trained with another split of the softmax; pass --cutoffs {shown(bands, NAME)}")
    left = [name for name in _TAIL if name in expected and name not in state]
    if left and len(state) + len(left) == len(expected) and not init_tail:
        raise UserError(
            f"{path}: has no {left[0]}: the authors' script trains the vectors of the bands but does not save them, so "
            "its scores cannot be had from this file; --init_tail goes on with untrained ones"
        )
    expected = {name: parameter for name, parameter in expected.items() if name not in left}
    if _is_trellis(model):
        _check_names(state, expected, path, _prefix(model))
    elif other := sorted(state.keys() ^ expected.keys()):
        what = f"has no {other[0]}" if other[0] in expected else f"holds {other[0]}, which the model has not"
        raise UserError(f"{path}: {what}; {_SIZES}")
    kind = {flag: told.get(flag) for flag in _kind(model)}
    if _is_kind(kind) and kind != _kind(model):
        flags = " ".join(f"--{flag} {value}" for flag, value in kind.items() if value != _kind(model)[flag])
        raise UserError(f"{path}: was trained with another kind of layer; pass {flags}")
    _check_vocabulary(told.get("vocabulary"), vocabulary, path, language, changed)
    for name, parameter in expected.items():
        if state[name].shape != parameter.shape:
            advice = _SIZES
            if _is_trellis(model) and not isinstance(getattr(model, "embedding", None), SparseEmbedding):
                advice = _other_gates(state, model) or (_advice if language else _classifiers_advice)(
                    name, state, model
                )
            shapes = tuple(state[name].shape), tuple(parameter.shape)
            raise UserError(f"{path}: {name} has shape {shapes[0]}, the model needs {shapes[1]}; {advice}")
        if state[name].dtype != parameter.dtype and not serialization.all_finite(state[name].to(parameter.dtype)):
            raise UserError(f"{path}: {name} holds numbers that are too large for {parameter.dtype}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(state[name])
    return left


def _kind(model: Model) -> dict[str, Any]:
    """What shapes and names do not tell, or not clearly, of the layers, under the names of the flags."""
    if not _is_trellis(model):
        return {}
    core = model.core
    return {
        "activation": core.activation, "mixed_group": core.kernel_groups or 0, "inject_every": core.inject_every,
    }  # fmt: skip


def _is_kind(kind: dict[str, Any]) -> bool:
    """Whether a file says all of it; the authors' files say nothing, and are known by names and shapes alone."""
    return (
        bool(kind)
        and kind["activation"] in tuple(GATES)
        and all(type(kind[name]) is int for name in ("mixed_group", "inject_every"))
    )


def _cutoffs(model: Model) -> list[int]:
    return model.head.cutoffs if isinstance(model.head, SplitSoftmax) else []


def _metadata(loaded: dict[str, Tensor]) -> dict[str, Any]:
    """What :func:`save_weights` has written beside the tensors; other files have nothing there."""
    metadata: Any = getattr(loaded, "_metadata", None)
    told = metadata.get(_METADATA) if isinstance(metadata, dict) else None
    return told if isinstance(told, dict) else {}


def _check_vocabulary(told: Any, vocabulary: str | None, path: str | os.PathLike, language: bool, changed: str) -> None:
    """Refuse weights whose ids, or places, stand for something else; files that do not say for what pass."""
    if vocabulary is not None and isinstance(told, str) and told != vocabulary:
        what, flags = (
            ("vocabulary", "--data (and in wt103 the --vocab_order, in char_ptb the --stream)")
            if language
            else ("order of the pixels", "--permute or --no-permute, and the --permutation_seed,")
        )
        again = f"; if that was this very text, train again: version 0.1.0 read it otherwise, now it is read {changed}"
        raise UserError(
            f"{path}: was trained on another {what} (sha256 {told[:12]}… instead of {vocabulary[:12]}…): pass the "
            f"{flags} that it was trained on{again * bool(changed)}"
        )


def _unique(state: object, path: str | os.PathLike, first_name: Callable[[str], str]) -> dict[str, Tensor]:
    """The file's tensors under their first names; all must be finite, and repeated ones must agree."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: not {WHAT}; checkpoints of a run (last.pt, best.pt) are continued with --resume")
    unique = {}
    for name, tensor in state.items():
        if shown(name, NAME) != name:  # all later messages may print names as they are
            raise UserError(f"{path}: holds a tensor called {shown(name, NAME)}; not {WHAT}")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise UserError(f"{path}: {name} is of dtype {tensor.dtype}, {tensor.layout}; not {WHAT}")
        if not serialization.all_finite(tensor):
            raise UserError(f"{path}: {name} holds values that are not finite numbers; the file is damaged")
        first = first_name(name)
        if first != name and first in state and not torch.equal(state[first], tensor):
            raise UserError(f"{path}: {name} and {first} should be one tensor but differ; the file is damaged")
        unique.setdefault(first, tensor)
    return unique


def _first_name(name: str) -> str:
    """The name under which the authors' model first holds the tensor `name`."""
    for prefix, again in _AGAIN.items():
        if name.startswith(again):
            name = prefix + name.removeprefix(again)
    return name.removeprefix(_MIXTURE) if name.startswith(_MIXTURE + "decoder.") else name


def _check_tied(state: dict[str, Tensor], path: str | os.PathLike) -> None:
    encoder, decoder = state.get("encoder.weight"), state.get("decoder.weight")
    if encoder is not None and decoder is not None and not torch.equal(encoder, decoder):
        raise UserError(f"{path}: decoder.weight differs from encoder.weight, the model ties them; pass --no-tied")


def _check_names(
    state: dict[str, Tensor], expected: dict[str, nn.Parameter], path: str | os.PathLike, prefix: str
) -> None:
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if not missing and not extra:
        return
    if "encoder.weight" in missing or "linear.weight" in missing or prefix + "bias2" in missing:
        advice = "it is of another model or task"
    elif any(name.startswith(_MIXTURE) for name in extra):
        experts = state[_MIXTURE + "prior.bias"].numel() if _MIXTURE + "prior.bias" in state else "K"
        advice = f"the file is of a mixture of softmaxes; pass --n_experts {experts}"
    elif any(name.startswith(_MIXTURE) for name in missing):
        advice = "the file is of a plain softmax; pass --n_experts 0"
    elif any(name in _TAIL for name in extra):
        bands = state[_TAIL[1]].numel() if _TAIL[1] in state else "some"
        advice = f"the file is of a split softmax with {bands} bands; pass its --cutoffs"
    elif any(name in _TAIL for name in missing):
        advice = "the file is damaged"
    elif any("weight2_past" in name for name in extra):
        first = next((state[prefix + w] for w in ("weight1_raw", "weight1_v_raw") if prefix + w in state), None)
        groups = "N" if first is None or not first.size(0) else state[prefix + "bias2"].numel() // first.size(0)
        advice = f"the file is of a mixed group convolution; pass --mixed_group {groups}"
    elif any("weight2_past" in name for name in missing):
        advice = "the file is of a dense kernel; pass --mixed_group 0"
    elif any(name.endswith("_g") for name in extra):
        advice = "the file was trained with weight normalisation; pass --wnorm"
    elif any(name.endswith("_g") for name in missing) and prefix + "weight1_raw" in state:
        advice = "the file was trained without weight normalisation; pass --no-wnorm"
    elif missing == ["decoder.weight"]:
        advice = "the file is of a model with tied weights; pass --tied"
    else:
        advice = "it is of another model or task"
    what = f"has no {missing[0]}" if missing else f"holds {extra[0]}, which the model has not"
    raise UserError(f"{path}: {what}; {advice}")


def _other_gates(state: dict[str, Tensor], model: Model) -> str:
    """Advice if the file has another number of gates than the model; a dense hidden kernel tells how many."""
    for name, kernel in state.items():
        if name.removeprefix(_prefix(model)) in ("weight2_raw", "weight2_v_raw") and kernel.dim() == 3:
            for activation, gates in GATES.items():
                if kernel.size(0) == gates * kernel.size(1) and activation != model.core.activation:
                    return f"pass --activation {activation}"
    return ""


def _advice(name: str, state: dict[str, Tensor], model: TrellisLanguageModel) -> str:
    """The first setting in which file and model differ, as the flag to change."""
    if name in _TAIL:
        return f"the file has {state[_TAIL[1]].numel()} bands; pass its --cutoffs"
    kernel = state.get(_CORE + "weight1_v_raw", state.get(_CORE + "weight1_raw"))
    encoder, bias, gates = state["encoder.weight"], state[_CORE + "bias2"], GATES[model.core.activation]
    if (encoder.dim(), kernel.dim(), bias.dim()) != (2, 3, 1) or bias.numel() % gates:
        return "it is of another model or task"
    words, embedding_size = encoder.shape
    if embedding_size != model.embedding.embedding_dim:
        both = model.tied and not model.n_experts
        return f"pass --emsize {embedding_size}" + (f" --nout {embedding_size}" if both else "")
    if words != model.vocab_size:
        return f"the file knows {words} words, the data {model.vocab_size}: pass the --data it was trained on"
    if kernel.size(2) != model.core.kernel_size:
        return f"pass --ksize {kernel.size(2)}"
    if model.n_experts and state[_MIXTURE + "prior.bias"].numel() != model.n_experts:
        return f"pass --n_experts {state[_MIXTURE + 'prior.bias'].numel()}"
    if model.n_experts:
        if state[_MIXTURE + "prior.weight"].dim() != 2:
            return "it is of another model or task"
        nout = state[_MIXTURE + "prior.weight"].size(-1)
    else:
        nout = embedding_size if model.tied else state["decoder.weight"].size(-1)
    nhid = bias.numel() // gates - nout
    flags = [] if nout == model.core.output_size else [f"--nout {nout}"]
    if nhid != model.core.hidden_size - model.core.output_size:
        flags.append(f"--nhid {nhid}")
    return f"pass {' '.join(flags)}" if flags and nhid >= 0 else f"{name} is of another model"


def _classifiers_advice(name: str, state: dict[str, Tensor], model: TrellisClassifier) -> str:
    kernel = state.get(_PIXEL_CORE + "weight1_v_raw", state.get(_PIXEL_CORE + "weight1_raw"))
    bias, linear, gates = state[_PIXEL_CORE + "bias2"], state["linear.weight"], GATES[model.core.activation]
    if (kernel.dim(), bias.dim(), linear.dim()) != (3, 1, 2) or bias.numel() % gates:
        return "it is of another model or task"
    if linear.size(0) != model.num_classes or kernel.size(1) != model.core.input_size:
        return f"it is of images with {kernel.size(1)} channels and {linear.size(0)} classes"
    if kernel.size(2) != model.core.kernel_size:
        return f"pass --ksize {kernel.size(2)}"
    nhid = bias.numel() // gates - linear.size(1)
    if linear.size(1) != model.core.output_size or nhid < 0:
        return f"{name} is of another model"
    return f"pass --nhid {nhid}"
