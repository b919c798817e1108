"""Trained models loaded from the folders of their runs, without the data and program of their training."""

import dataclasses
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from trellisnet import weights
from trellisnet.data.spelling import WORDS
from trellisnet.data.vocabulary import FILE, Vocabulary
from trellisnet.errors import NAME, UserError, counted, shown
from trellisnet.evaluation.generate import Sampling, generate
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.training import classification, language_model
from trellisnet.training.classification import ClassificationConfig
from trellisnet.training.config import AUTOMATIC, find_run, from_run, read_run_config
from trellisnet.training.core_config import CoreConfig
from trellisnet.training.hardware import PRECISIONS
from trellisnet.training.language_model import LanguageModelConfig
from trellisnet.training.runlog import depth_of_best
from trellisnet.training.settings import setting
from trellisnet.training.tasks import CharacterModeling, LanguageModeling

Config = TypeVar("Config", bound=CoreConfig)


@dataclass(kw_only=True)
class _LanguageModelConfig(LanguageModelConfig):
    """Settings of any task's language model."""

    task: ClassVar[str] = ""
    cutoffs: list[int] = setting([], "borders of the softmax's bands, as the weights name them", group="model")

    def bands(self, vocab_size: int) -> list[int] | None:
        return self.cutoffs or None


@dataclass(kw_only=True)
class _ClassificationConfig(ClassificationConfig):
    """Settings of any task's classifier of images."""

    task: ClassVar[str] = ""


@dataclass(frozen=True)
class Pretrained:
    """A trained model, in evaluation mode.

    Args:
        model: the model, on `device`.
        config: its settings.
        device: where it computes.
        vocabulary: tokens of its ids; None for an image classifier.
    """

    model: TrellisLanguageModel | TrellisClassifier
    config: CoreConfig = field(repr=False)
    device: torch.device
    vocabulary: Vocabulary | None = field(default=None, repr=False)

    def score(self, text: str) -> dict[str, Any]:
        """Score every token of a text but the first, each with the text before it as its history.

        The text is read as the corpus is: in whole lines with `<eos>` at their ends, and unknown words as `<unk>`. It
        is one row, cut into the windows of `train.py --eval`: where the state is carried, this is the score of `--eval
        --eval_batch_size 1`; with overlapping windows it is that of `--eval_all`, which also scores the first ones.

        Returns:
            `loss`, the mean in nats per token; `ppl`, the perplexity, or for characters `bpc`, bits per character;
            `tokens`, the number of scored tokens; and `unknown`, how often each word occurs that was read as `<unk>`.

        Raises:
            UserError: not a language model, a text of fewer than two tokens, or a character outside the alphabet.
        """
        vocabulary, config = self._language("score"), self.config
        ids, unknown = vocabulary.encode(text)
        if len(ids) < 2:
            raise UserError(f"text: expected at least 2 {vocabulary.spelling.noun}, <eos> included, got {len(ids)}")
        horizon = config.horizon or config.core.reach(config)  # of --nlevels, regardless of the depth of the scores
        windows = {"horizon": horizon, "seq_len": config.task_seq_len(), "repackage": config.repack}
        stream = torch.tensor(ids, device=self.device)
        with config.float32_products(), config.autocast(self.device):
            result = LanguageModeling(self.model, **windows).evaluate_all(stream, batch_size=config.eval_batch_size)
        kind = LanguageModeling if vocabulary.spelling is WORDS else CharacterModeling
        scores = {"loss": result["loss"], kind.score_name: kind.score(result["loss"])}
        return scores | {"tokens": result["tokens"], "unknown": unknown}

    def generate(
        self,
        prompt: str = "",
        length: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1111,
    ) -> str:
        """Continue a text.

        Args:
            prompt: its beginning, whose last line is unfinished; an empty one stands for `<eos>`, in bytes a line feed.
            length: tokens to generate.
            temperature, top_k, top_p: as in :class:`Sampling <trellisnet.evaluation.generate.Sampling>`.
            seed: the same seed gives the same text on the same machine.

        Returns:
            the prompt and its continuation.

        Raises:
            UserError: not a language model; or the vocabulary lacks a word of the prompt or, for an empty prompt, the
                end of a line.
            ValueError: a number out of range.
        """
        ids = self._language("generate").encode_prompt(prompt)
        (text,) = self.continuations(ids, length, Sampling(temperature, top_k, top_p), seed=seed)
        return text

    def continuations(
        self, prompt: list[int], length: int, sampling: Sampling, *, samples: int = 1, seed: int = 1111
    ) -> list[str]:
        """Continue a text in several ways, generated in parallel.

        Args:
            prompt: ids of its tokens.
            length, sampling, seed: as in :meth:`generate`.
            samples: number of continuations.
        """
        vocabulary = self._language("generate")
        start = torch.tensor([prompt or vocabulary.line_end()] * samples, device=self.device)
        generator = torch.Generator().manual_seed(seed)
        with self.config.float32_products(), self.config.autocast(self.device):
            drawn = [token.cpu() for token in generate(self.model, start, length, sampling, generator=generator)]
        return [vocabulary.text([*prompt, *(token[i].item() for token in drawn)]) for i in range(samples)]

    def _language(self, method: str) -> Vocabulary:
        if self.vocabulary is None:
            raise UserError(f"{method}: needs a language model; this one classifies images, call its `model`")
        return self.vocabulary


def load_pretrained(
    run: str | os.PathLike, *, device: str | torch.device = "auto", precision: str | None = None
) -> Pretrained:
    """Load a trained model from the folder of its run; neither data nor network are needed.

    Args:
        run: the folder, or the name of a model in `results/` of the checkout, such as "word_ptb_small".
        device: any torch device; "auto": CUDA if there is a device, else the CPU.
        precision: of products and activations, fp32, tf32 or bf16; None: that of the training, but fp32 instead of
            bf16 on a CPU without bfloat16 instructions.

    Raises:
        UserError: no such folder, a file of it is missing or corrupt, or files of different runs.
    """
    if precision not in (None, *PRECISIONS):
        raise UserError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    folder = find_run(run)
    content, file = read_run_config(folder), weights.locate(folder)
    summary = weights.summarise(file)
    changes = AUTOMATIC | {"device": str(device), "load_weight": str(file), "eval": True}
    changes |= {"precision": precision} if precision else {}
    if "emsize" in content["settings"]:
        vocabulary = read_vocabulary(file)
        changes |= {"cutoffs": summary.cutoffs}
        kind = _LanguageModelConfig
    elif "permute" in content["settings"]:
        vocabulary, kind = None, _ClassificationConfig
    else:
        raise UserError(f"{folder}: is a run of {shown(content['task'], NAME)}, not of a language or image model")
    config = from_run(kind, content["settings"], f"{folder / 'config.json'}", changes)
    return restore(config if precision else without_emulation(config), vocabulary)


def without_emulation(config: Config) -> Config:
    """Replace bf16 by fp32 on a CPU without bfloat16 instructions, where it is several times slower."""
    emulated = config.emulates_bf16(config.torch_device())
    return dataclasses.replace(config, precision="fp32") if emulated else config


def restore(config: CoreConfig, vocabulary: Vocabulary | None, changed: str = "") -> Pretrained:
    """Build the model of a configuration and load the weights that it names.

    Args:
        config: the settings, with `load_weight`.
        vocabulary: of a language model; None for a classifier.
        changed: as in :func:`trellisnet.weights.load_weights`.

    Raises:
        UserError: the weights are missing, corrupt or of another model, or the device cannot run it.
    """
    device = config.torch_device()
    config = config.resolved(device)
    if vocabulary is None:
        channels = weights.summarise(config.load_weight).channels
        model = classification.build_model(config, channels, config.classes)
    else:
        model = language_model.build_model(config, len(vocabulary))
    options = {"vocabulary": vocabulary and vocabulary.sha256, "changed": changed, "task": config.task or None}
    weights.load_weights(model, config.load_weight, **options, **config.load_options())
    if len(depths := config.scoring_depths()) == 1:
        model.core.num_layers = depths[0]
    if warning := _depth_in_doubt(config):
        advice = "to change that, set model.core.num_layers or, in programs, pass --eval_nlevels"
        warnings.warn(f"{warning}: the model has {counted(config.nlevels, 'layers')}; {advice}", stacklevel=3)
    return Pretrained(model.to(device).eval(), config, device, vocabulary)


def _depth_in_doubt(config: CoreConfig) -> str:
    """Say why the scores of the run may be those of another number of layers than `nlevels`; "" if they are not."""
    if len(config.scoring_depths()) > 1:
        return "the run chose the depth of its scores on validation data (--eval_nlevels auto), which are not read here"
    if config.eval_nlevels or not config.grow:
        return ""
    trained = depth_of_best(Path(weights.locate(config.load_weight)).with_name("metrics.jsonl"))
    same = trained in (None, config.nlevels)
    return "" if same else f"so far the run was trained with {counted(trained, 'layers')} (--grow)"


def read_vocabulary(file: str | os.PathLike) -> Vocabulary:
    """Read the vocabulary beside a weight file.

    Raises:
        UserError: it is missing, corrupt or not that of the weights.
    """
    path = Path(file).with_name(FILE)
    vocabulary, digest = Vocabulary.load(path), weights.summarise(file).vocabulary
    if digest not in (None, vocabulary.sha256):
        digests = f"sha256 {vocabulary.sha256[:12]}… instead of {digest[:12]}…"
        raise UserError(
            f"{path}: is not the vocabulary of {Path(file).name} beside it ({digests}); copy both from one run"
        )
    return vocabulary
