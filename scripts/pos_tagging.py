"""Part-of-speech tagging by a bidirectional LSTM or TrellisNet with a sparse embedding.

The model is that of Demeester et al. (2018), "Predefined Sparseness in Recurrent Sequence Models", section 4.3.

    python scripts/pos_tagging.py --data FOLDER --emsize 20 --emb_density 0.25 --emb_blocks 20 --nhid 10 --epochs 50 \\
        --dropouti 0.2 --wdrop 0.2 --vocab_order down --save runs/pos_sparse_vocab_down
    python scripts/pos_tagging.py --train train.conllu --valid dev.conllu --test test.conllu --columns 2 4
    python scripts/pos_tagging.py --data synthetic --epochs 5 --model trellisnet --nlevels 4

The flags of the paper's program keep their names. A line of a file has a word in its first column and the tag in its
last, or those that --columns names; a blank line ends a sentence. The paper's text is licensed (LDC99T42) and not
included; the synthetic text is drawn from a chain of tags. The flags of the training programs work here too: run
folders, --resume, --metrics, --eval.

Letters: N sentences in a batch, L their length, V words, E embedding width, H hidden width per direction.
"""

import dataclasses
import functools
import hashlib
import random
import re
import signal
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellisnet import ops
from trellisnet.baselines import SparseEmbedding
from trellisnet.baselines.lstm import WeightDropLSTM
from trellisnet.core import TrellisNet, check_lengths, check_tensor
from trellisnet.data.corpus import ALL_ORDERS, SPLITS, digest_of_tokens
from trellisnet.data.text import HELD_OUT, Part, Texts
from trellisnet.errors import UserError
from trellisnet.ops import hide_padding
from trellisnet.regularization import dropout_scale, scaled
from trellisnet.training import cli
from trellisnet.training.config import RunConfig
from trellisnet.training.cores import resolve_execution
from trellisnet.training.distributed import Ranks
from trellisnet.training.optim import Schedule, make_schedule
from trellisnet.training.settings import setting
from trellisnet.training.tasks import AccuracyTask, Splits, evaluating
from trellisnet.training.tasks.base import mean, tracked
from trellisnet.wrappers import both_ways

PAD, UNKNOWN, NO_TAG = "<pad>", "<unk>", -100  # cross_entropy ignores the last
# Words may contain other white space, such as a no-break space, and blanks if the columns are separated by tabs.
SPACE, TAB = re.compile(r"\s+", re.ASCII), re.compile(r"\s*\t\s*", re.ASCII)
RANGE = re.compile(r"\d+[-.]\d+")  # id of several words together, or of one that is not in the text (CoNLL-U)
FILES = {"train": "train", "valid": "valid|dev", "test": "test"}  # what their names contain, in a folder
THEIR_ORDERS = {"up": "frequency_up", "down": "frequency", "rand": "random", "none": "appearance"}
Sentence = list[tuple[str, str]]


@dataclass(kw_only=True)
class Config(RunConfig):
    """Tag parts of speech with a bidirectional LSTM or TrellisNet on a sparse embedding."""

    task: ClassVar[str] = "pos_tagging"

    defaults: ClassVar = {
        "name": "pos", "optim": "Adam", "epochs": 300, "batch_size": 20, "eval_batch_size": 100, "seed": 1982
    }  # fmt: skip
    helps: ClassVar = {
        "data": "folder with a file each for train, valid (or dev) and test; a single file, which is divided; or "
        "'synthetic' for sentences drawn from a chain of tags",
        "batch_size": "sentences in a training batch",
        "eval_batch_size": "sentences evaluated at a time",
        "anneal": "divide the learning rate by 4 on a plateau, with a patience of N epochs; 0: never",
    }

    train: str = setting("", "file of tagged sentences", group="data")
    valid: str = setting("", "file of tagged sentences", group="data")
    test: str = setting("", "file of tagged sentences", group="data")
    columns: list[int] = setting([1, -1], "columns of word and tag; negative ones count from the end", group="data")
    save: str = setting("", "the same as --out", group="run and checkpoints", process=True)
    emsize: int = setting(100, "embedding width", group="model", at_least=1)
    model: str = setting("lstm", "core of each direction", group="model", choices=("lstm", TrellisNet.core_name))
    nhid: int = setting(50, "hidden width of each direction", group="model", at_least=1)
    nlevels: int = setting(8, "layers of a TrellisNet", group="model", at_least=1)
    emb_blocks: int = setting(
        1, "column blocks of the embedding, shorter for rarer words; 1: dense", group="model", at_least=1
    )
    emb_density: float = setting(1.0, "share of the embedding's entries that are parameters", group="model")
    vocab_order: str = setting(
        "frequency_up", "order of the words; the first ones get short vectors", group="data",
        choices=(*ALL_ORDERS, *THEIR_ORDERS),
    )  # fmt: skip
    dropout: float = setting(
        0.0, "dropout before each linear map, elementwise", group="regularisation", rate="probability"
    )
    dropouti: float = setting(0.0, "input dropout, one mask per sentence", group="regularisation", rate="probability")
    emb_dropout: float = setting(
        0.0, "dropout of whole words of the vocabulary", group="regularisation", rate="probability"
    )
    wdrop: float = setting(
        0.0, "DropConnect on the recurrent weights of each direction", group="regularisation", rate="probability"
    )

    @classmethod
    def program(cls) -> str:
        return "scripts/pos_tagging.py"

    def validate(self) -> None:
        super().validate()
        blocks = min(self.emb_blocks, self.emsize)
        if not 1 / blocks <= self.emb_density <= 1:
            raise UserError(f"--emb_density: expected 1/{blocks} to 1 with {blocks} blocks, got {self.emb_density}")
        files = [self.train, self.valid, self.test]
        if self.data and any(files):
            raise UserError("--data: excludes --train, --valid and --test; leave it or them out")
        if not (self.data or self.resume or all(files)):
            raise UserError(
                "--train, --valid and --test: all three files are needed; or name a folder or file with --data, or try "
                "--data synthetic"
            )
        if len(self.columns) != 2 or 0 in self.columns:
            raise UserError(f"--columns: expected two numbers other than 0, got {' '.join(map(str, self.columns))}")
        if self.save and self.out and Path(self.save) != Path(self.out):
            raise UserError("--save and --out both name the folder of the run; leave one of the two out")
        if self.model != TrellisNet.core_name:
            if self.nlevels != self.preset_value("nlevels"):
                raise UserError(f"--nlevels: has no effect on --model {self.model}; leave it out")
            if self.backend not in ("auto", "reference"):
                raise UserError(
                    f"--backend {self.backend}: only TrellisNet has it; --model {self.model} needs auto or reference"
                )

    def no_graph(self, device: torch.device) -> str:
        return super().no_graph(device) or "sentences make batches of many shapes"

    def resolved(self, device: torch.device) -> Self:
        chosen = {"backend": "reference"}  # torch's own operators
        if self.model == TrellisNet.core_name:
            spec = ops.TrellisSpec(self.nlevels, self.nhid, ops.find_activation("lstm"), [1], 2)
            chosen = resolve_execution(self, spec, device)
        return dataclasses.replace(super().resolved(device), **chosen)

    def folder(self) -> Path:
        return Path(self.save) if self.save else super().folder()


# -- data --------------------------------------------------------------------------------------------------------------


def sentences(text: str, name: str = "text", columns: Sequence[int] = (1, -1)) -> list[Sentence]:
    """Read tagged sentences: a word and its tag per line, blank lines between sentences.

    Columns are separated by tabs or, in a line without tabs, by white space. Where the word is not in the first column,
    that column is an id, as in CoNLL-U: comments (#) before a sentence and ids of ranges and empty nodes are left out.

    Args:
        columns: of word and tag, from 1, or from the end with -1.

    Raises:
        UserError: a line lacks a column, or no sentence at all.
    """
    found, sentence = [], []
    word, tag = (column - (column > 0) for column in columns)
    needed = max(2, *(column if column > 0 else -column for column in columns))
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(string.whitespace)
        cells = (TAB if "\t" in line else SPACE).split(line) if line else []
        if cells and word and (RANGE.fullmatch(cells[0]) or (cells[0].startswith("#") and not sentence)):
            continue
        if 0 < len(cells) < needed:
            raise UserError(f"{name}, line {number}: expected a word and its tag, got {line[:40]!r}")
        if cells:
            sentence.append((cells[word], cells[tag]))
        elif sentence:
            found.append(sentence)
            sentence = []
    found += [sentence] if sentence else []
    if not found:
        raise UserError(f"{name}: holds no sentence")
    return found


def read(config: Config) -> tuple[list[list[Sentence]], list[str]]:
    """Read or draw training, validation and test sentences, with notices for the user.

    Raises:
        UserError: files that are missing, unreadable or too short.
    """
    if config.data == "synthetic":
        return synthetic(), []
    data, paths = Path(config.data), [Path(path) for path in (config.train, config.valid, config.test)]
    if config.data and data.is_dir():
        paths = [_file(data, pattern) for pattern in FILES.values()]
    elif config.data:
        everything = sentences("".join(Part(data).pieces()), str(data), config.columns)
        held_out = max(1, len(everything) // HELD_OUT)
        rest = len(everything) - 2 * held_out
        if rest < 1:
            raise UserError(f"{data}: {len(everything)} sentence(s) cannot be divided; name a longer file")
        notice = f"{data}: {rest:,} sentences for train, then {held_out:,} for valid and {held_out:,} for test"
        return [everything[:rest], everything[rest:-held_out], everything[-held_out:]], [notice]
    texts = Texts(paths)
    pairs = zip(texts.read(), paths, strict=True)
    return [sentences(text, str(path), config.columns) for text, path in pairs], texts.notices


def _file(folder: Path, pattern: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.is_file() and re.search(pattern, path.name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder}: expected one file with {pattern.replace('|', ' or ')} in its name, found {names}; name three "
            "files with --train, --valid and --test"
        )
    return found[0]


def synthetic(seed: int = 2018) -> list[list[Sentence]]:
    """Draw training, validation and test sentences from a chain of tags; every third word has two possible tags."""
    draw = random.Random(seed).random
    tags = [f"T{i}" for i in range(8)]

    def sentence() -> Sentence:
        made, tag = [], 0
        for _ in range(3 + int(12 * draw())):
            tag = (tag + 1 + int(3 * draw() ** 2)) % len(tags)
            rank = int(60 * draw() ** 2)  # frequent and rare words
            word = f"w{rank}" if rank % 3 == 0 and tag < 2 else f"w{rank}-{tag}"
            made.append((word, tags[tag]))
        return made

    return [[sentence() for _ in range(n)] for n in (1500, 200, 200)]


def ordered(counts: Counter[str], order: str, seed: int = 0) -> list[str]:
    """Sort words by appearance, frequency (either way, ties by appearance) or at random."""
    words = list(counts)
    if order == "random":
        random.Random(seed).shuffle(words)
    elif order != "appearance":
        words.sort(key=counts.__getitem__, reverse=order == "frequency")
    return words


@dataclass(frozen=True)
class Tagged:
    """Sentences as ids: words and tags (n, longest), and lengths (n,), int64."""

    words: Tensor
    tags: Tensor
    lengths: Tensor

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        lengths = self.lengths[rows]
        L = int(lengths.max())
        return self.words[rows, :L], self.tags[rows, :L], lengths


def encode(data: list[Sentence], words: dict[str, int], tags: dict[str, int], device: torch.device) -> Tagged:
    """Encode sentences; unknown words become `<unk>`, unknown tags count as errors, without a loss."""
    lengths = torch.tensor([len(sentence) for sentence in data])
    shape = len(data), int(lengths.max())
    ids, targets = torch.full(shape, words[PAD]), torch.full(shape, NO_TAG)
    for i, sentence in enumerate(data):
        ids[i, : len(sentence)] = torch.tensor([words.get(word, words[UNKNOWN]) for word, _ in sentence])
        targets[i, : len(sentence)] = torch.tensor([tags.get(tag, len(tags)) for _, tag in sentence])
    return Tagged(ids.to(device), targets.to(device), lengths.to(device))


# -- model and task ----------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Embedding, an LSTM or TrellisNet in each direction, linear map, tanh, linear map.

    Args:
        vocab_size: V.
        n_tags: number of tags.
        embedding_size: E.
        hidden_size: H.
        num_layers: layers of a TrellisNet; None for an LSTM.
        emb_blocks, emb_density: blocks and density of the :class:`trellisnet.baselines.sparse.SparseEmbedding`.
        dropout, input_dropout, embedding_dropout, weight_dropout: rates, see the flags of :class:`Config`.
        execution: `backend`, `gemm` and `gates` of a TrellisNet.
    """

    def __init__(
        self,
        vocab_size: int,
        n_tags: int,
        embedding_size: int,
        hidden_size: int,
        *,
        num_layers: int | None = None,
        emb_blocks: int = 1,
        emb_density: float = 1.0,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        **execution: str,
    ):
        super().__init__()
        self.dropout, self.input_dropout, self.embedding_dropout = dropout, input_dropout, embedding_dropout
        self.embedding = SparseEmbedding(vocab_size, embedding_size, blocks=emb_blocks, density=emb_density)
        if num_layers is None:
            core = functools.partial(WeightDropLSTM, embedding_size, hidden_size)
        else:
            core = functools.partial(TrellisNet, embedding_size, hidden_size, num_layers, init_gain=2.0, **execution)
        self.forwards, self.backwards = (core(weight_dropout=weight_dropout) for _ in range(2))
        self.hidden = nn.Linear(2 * hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, n_tags)

    def forward(self, words: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
        """Logits (N, L, n_tags) of word ids (N, L) with lengths (N,).

        Ids beyond the end of a sentence have no influence; logits there are undefined.
        """
        check_tensor("words", words)
        lengths = check_lengths(lengths, words)
        words = hide_padding(words, lengths)
        x = self.embedding(words)  # (N, L, E)
        rows = (self.embedding.num_embeddings, 1)
        kept = dropout_scale(x, rows, self.embedding_dropout, self.training, None, "embedding")
        x = x if kept is None else x * F.embedding(words, kept)
        channels = (x.size(0), 1, x.size(2))
        x = scaled(x, dropout_scale(x, channels, self.input_dropout, self.training, None, "input"))
        y = both_ways(self.forwards, self.backwards, x, lengths=lengths).output  # (N, L, 2H)
        drop = functools.partial(F.dropout, p=self.dropout, training=self.training)
        return self.head(drop(self.hidden(drop(y)).tanh()))


class Tagging(AccuracyTask):
    """Classification of every word, scored by accuracy."""

    unit, count = "tok", "tokens"

    def __init__(
        self, model: Tagger, *, batch_size: int, eval_batch_size: int, seed: int, label_smoothing: float = 0.0
    ):
        self.model, self.batch_size, self.eval_batch_size, self.seed = model, batch_size, eval_batch_size, seed
        self.label_smoothing = label_smoothing

    def batches(self, data: Tagged, epoch: int = 0) -> Sequence[tuple[Tensor, ...]]:
        """Batches of an epoch, shuffled by seed and epoch; the last one may be smaller."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(data.lengths)))
        return [data.batch(rows.to(data.words.device)) for rows in order.split(self.batch_size)]

    def size(self, batch: tuple[Tensor, ...]) -> int:
        """Number of words in a batch."""
        return int(batch[2].sum())

    def _sums(self, words: Tensor, tags: Tensor, lengths: Tensor, smoothing: float = 0.0) -> tuple[Tensor, ...]:
        """Summed losses without and with label smoothing, and the numbers of correct and of known tags."""
        logits = self.model(words, lengths).flatten(0, 1)
        tags = hide_padding(tags, lengths, NO_TAG)
        known = tags.flatten().masked_fill(tags.flatten() >= logits.size(1), NO_TAG)
        loss = smoothed = F.cross_entropy(logits, known, reduction="sum")
        if smoothing:
            smoothed = F.cross_entropy(logits, known, reduction="sum", label_smoothing=smoothing)
        return loss, smoothed, (logits.argmax(1) == tags.flatten()).sum(), (known != NO_TAG).sum()

    def loss(self, words: Tensor, tags: Tensor, lengths: Tensor, state: None = None) -> tuple[dict[str, Tensor], None]:
        """Mean loss and accuracy of the words of a batch."""
        raw, loss, right, known = self._sums(words, tags, lengths, self.label_smoothing)
        return {"loss": loss / known, "raw": raw / known, "accuracy": right / lengths.sum()}, None

    @torch.no_grad()
    def evaluate(self, data: Tagged, *, max_tokens: int | None = None, progress: Any = None) -> dict[str, Any]:
        """Accuracy of all words in evaluation mode, and the mean loss of those with a known tag."""
        loss = right = known = tokens = 0.0
        with evaluating(self.model):
            for start in tracked(range(0, len(data.lengths), self.eval_batch_size), progress):
                batch = data.batch(slice(start, start + self.eval_batch_size))
                sums = self._sums(*batch)
                loss, right, known = loss + sums[0].item(), right + sums[2].item(), known + sums[3].item()
                tokens += self.size(batch)
                if max_tokens is not None and tokens >= max_tokens:
                    break
        return {"loss": mean(loss, known), "accuracy": mean(right, tokens), "tokens": int(tokens)}


def setup(config: Config, device: torch.device, ranks: Ranks) -> tuple[Tagging, Splits, Schedule, dict[str, Any]]:
    """Task, data, schedule and facts of a run, for :func:`trellisnet.training.cli.main`.

    Raises:
        UserError: files that cannot be read, or whose tags have nothing in common; several processes, whose shares
            would have unequal numbers of words.
    """
    if ranks.size > 1:
        raise UserError("this program runs in one process; start it with python")
    parts, notices = read(config)
    order = THEIR_ORDERS.get(config.vocab_order, config.vocab_order)
    counts = Counter({PAD: 0, UNKNOWN: 0})
    counts.update(word for sentence in parts[0] for word, _ in sentence)
    words = {word: i for i, word in enumerate(ordered(counts, order))}
    tags = {tag: i for i, tag in enumerate(dict.fromkeys(tag for sentence in parts[0] for _, tag in sentence))}
    for split, part in zip(SPLITS[1:], parts[1:], strict=True):
        if tags.keys().isdisjoint(tag for sentence in part for _, tag in sentence):
            raise UserError(f"{split}: has no tag of the training text; name the column of the tags with --columns")
    model = Tagger(
        len(words), len(tags), config.emsize, config.nhid,
        num_layers=config.nlevels if config.model == TrellisNet.core_name else None,
        emb_blocks=config.emb_blocks, emb_density=config.emb_density, dropout=config.dropout,
        input_dropout=config.dropouti, embedding_dropout=config.emb_dropout, weight_dropout=config.wdrop,
        backend=config.backend, gemm=config.gemm, gates=config.gates,
    ).to(device)  # fmt: skip
    task = Tagging(
        model, batch_size=config.batch_size, eval_batch_size=config.eval_batch_size, seed=config.seed,
        label_smoothing=config.label_smoothing,
    )  # fmt: skip
    data = {split: encode(part, words, tags, device) for split, part in zip(SPLITS, parts, strict=True)}
    splits = Splits(
        **data,
        label="synthetic" if config.data == "synthetic" else "tagged sentences",
        sha256=hashlib.sha256(repr(parts).encode()).hexdigest(),
        sizes=tuple(int(part.lengths.sum()) for part in data.values()),
        vocabulary_sha256=digest_of_tokens([*words, *tags]),
        notices=tuple(notices),
    )
    facts = {"training tokens": splits.sizes[0], "words": len(words), "tags": len(tags)}
    schedule = make_schedule(config, lambda epoch: len(task.batches(data["train"], epoch)), anneal=config.anneal)
    return task, splits, schedule, facts


main = functools.partial(cli.main, Config, setup)

if __name__ == "__main__":
    sys.exit(main())
