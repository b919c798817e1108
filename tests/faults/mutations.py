"""Corrupted files: all corruption is detected or harmless. Part of scripts/torture.py.

Files of an interrupted run, weights in both containers, encoded corpora and packed images are altered at random, one at
a time, and read. The outcome is one of

    detected    refused with a message, replaced by the previous file, or made again
    harmless    read to the same content, to the bit
    unnoticed   read to another content
"""

import contextlib
import gzip
import io
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from trellisnet import serialization, weights
from trellisnet.data import corpus, encoder, pixels
from trellisnet.data.text import Texts
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import checkpoint
from word_ptb.train import main

DETECTED, HARMLESS, UNNOTICED = "detected", "harmless", "unnoticed"
KINDS = ("bit flip", "bit flips", "zero block", "noise", "truncation", "extension", "another file")
FLAGS = """--data synthetic --emsize 6 --nhid 4 --nout 6 --nlevels 2 --repack --seq_len 0 --horizon 150 --aux 0 --lr 2
--batch_size 25 --eval_batch_size 5 --max_eval_tokens 500 --epochs 3 --threads 1 --checkpoint_steps 5""".split()


@dataclass
class Target:
    """A file and a way to read it.

    Args:
        name: its name in the summary.
        path: the file.
        read: reads the corrupted file and returns the outcome.
        others: files that may take its place.
        share: its share of the mutations, relative to the other targets.
        summed: it has a checksum; without one only truncation must be noticed.
    """

    name: str
    path: Path
    read: Callable[[], str]
    others: list[Path] = field(default_factory=list)
    share: int = 4
    summed: bool = True


def mutated(content: bytes, kind: str, others: list[bytes], rng: random.Random) -> bytes:
    """Alter `content` in one of the KINDS."""
    changed = bytearray(content)
    start = rng.randrange(len(changed))
    if kind in ("bit flip", "bit flips"):
        for at in [start] if kind == "bit flip" else rng.choices(range(len(changed)), k=rng.randint(2, 50)):
            changed[at] ^= 1 << rng.randrange(8)
    elif kind in ("zero block", "noise"):
        size = min(rng.choice([1, 16, 512, 4096]), len(changed) - start)
        changed[start : start + size] = bytes(size) if kind == "zero block" else rng.randbytes(size)
    elif kind == "truncation":
        del changed[start:]
    elif kind == "extension":
        changed += rng.choice([bytes(rng.randint(1, 600)), rng.randbytes(rng.randint(1, 600))])
    else:
        changed[:] = rng.choice(others)
    return bytes(changed)


def try_one(target: Target, rng: random.Random) -> tuple[str, str]:
    """Damage the file, read it and restore it; return the kind of damage and the outcome."""
    intact = target.path.read_bytes()
    others = [path.read_bytes() for path in target.others]
    kind = rng.choice([kind for kind in KINDS if others or kind != "another file"])
    damaged = mutated(intact, kind, others, rng)
    target.path.write_bytes(damaged)
    try:
        return kind, HARMLESS if damaged == intact else target.read()
    finally:
        if target.path.parent.is_dir():
            target.path.write_bytes(intact)


def digest_of(read: Callable[[], object]) -> Callable[[], str]:
    """Outcome of a reader that refuses corrupt files; digests tell whether the content is the same."""
    expected = serialization.sha256_of(read())

    def outcome() -> str:
        try:
            return HARMLESS if serialization.sha256_of(read()) == expected else UNNOTICED
        except UserError:
            return DETECTED

    return outcome


def call(*argv: object) -> tuple[int, str]:
    """Run the program in this process; return its exit code and output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main([str(a) for a in argv])
    return code, printed.getvalue()


# -- the files ---------------------------------------------------------------------------------------------------------


def weight_targets(folder: Path) -> Iterator[Target]:
    """Weights in both containers."""
    model = TrellisLanguageModel(50, 8, 14, 3, output_size=8)
    paths = {"zip": folder / "weights.pkl", "2019": folder / "weights-2019.pkl"}
    for name, path in paths.items():
        weights.save_weights(model, path, legacy=name == "2019", vocabulary="a" * 64)

        def read(path: Path = path) -> object:
            weights.load_weights(model, path, vocabulary="a" * 64)
            return list(model.parameters())

        yield Target(f"weights, {name} container", path, digest_of(read), summed=name == "zip")


def checkpoint_targets(folder: Path) -> Iterator[Target]:
    """Checkpoints without a run, read and memory-mapped."""
    torch.manual_seed(1)
    content = {
        "task": "word_ptb", "settings": {"lr": 2.0}, "command": "", "data": ["", 1, 2, 3, None], "average": None,
        "model": {"w": torch.randn(30, 30)}, "optimizer": {"state": {}, "param_groups": []},
        "schedule": {"lr": 1.0, "history": [], "averaging": False}, "epoch": 0, "batch": 0, "step": 7,
        "carry": (torch.randn(4, 9), torch.randn(4, 9)), "best": None, "seconds": 0.0, "running": {}, "skipped": 0,
        "rng": checkpoint.rng_state(), "rng_others": [],
    }  # fmt: skip
    for mmap in (False, True):
        path = folder / f"checkpoint-{mmap}.pt"
        checkpoint.save(path, content)
        name = f"checkpoint, {'mapped' if mmap else 'read'}"
        yield Target(name, path, digest_of(lambda path=path, mmap=mmap: checkpoint.load(path, mmap=mmap)))


def cache_targets(folder: Path) -> Iterator[Target]:
    """Files of an encoded corpus, which is made again if one of them is corrupt."""
    texts = [["the cat sat\n on the mat\n" * 40, "a dog\n", "the dog ran\n"], ["a dog\n" * 50, "the cat\n", "x\n"]]
    truth = serialization.sha256_of(_streams(corpus.encode(map(corpus.words, texts[0]), sha256="", label="x")))

    def outcome(path: Path, read: Callable[[], corpus.Corpus]) -> str:
        damaged = path.read_bytes()
        if serialization.sha256_of(_streams(read())) != truth:
            return UNNOTICED
        return HARMLESS if path.read_bytes() == damaged else DETECTED

    large = folder / "large"
    for number, text in enumerate(texts):
        for split, content in zip(corpus.SPLITS, text, strict=True):
            (folder / f"{number}-{split}.txt").write_text(content)
    paths = [[folder / f"{number}-{split}.txt" for split in corpus.SPLITS] for number in (0, 1)]
    read = lambda number=0: encoder.encode_files(Texts(paths[number]), large, label="x")  # noqa: E731
    read()
    (ours,) = large.iterdir()
    read(1)
    (theirs,) = set(large.iterdir()) - {ours}
    for file in sorted(ours.iterdir()):
        others = [theirs / file.name, *(other for other in sorted(ours.iterdir()) if other != file)]
        name = "encoded large corpus"
        yield Target(name, file, lambda file=file: outcome(file, read), others, share=1)


def _streams(content: corpus.Corpus) -> list[object]:
    return [content.vocabulary, *(getattr(content, split).to(torch.int64) for split in corpus.SPLITS)]


def image_targets(folder: Path) -> Iterator[Target]:
    """Images as they are published, in a gzip file."""
    array = np.random.default_rng(1).integers(0, 256, (9, 28, 28), np.uint8)
    path = folder / "images.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", *array.shape) + array.tobytes()))
    yield Target("packed images", path, digest_of(lambda: torch.from_numpy(pixels.read_idx(path, 3).copy())))


class Run:
    """An interrupted run that is resumed with a corrupted file in its folder; the final weights are compared."""

    FILES = ("last.pt", "last.previous.pt", "best.pt", "config.json", "weights.pkl", "log.txt", "metrics.jsonl")

    def __init__(self, folder: Path):
        self.intact, self.other, self.work = folder / "intact", folder / "other", folder / "work"
        for path, seed in ((self.intact, 1), (self.other, 2)):
            code, printed = call(*FLAGS, "--seed", seed, "--out", path, "--max_steps", 42)
            assert code == 0, printed
        self._fresh()
        code, printed = self._resume()
        assert code == 0, printed
        self.expected = self._weights()

    def _fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.intact, self.work)

    def _resume(self) -> tuple[int, str]:
        return call("--resume", self.work / "last.pt", "--max_steps", 0)

    def _weights(self) -> str:
        return serialization.sha256_of(serialization.load(self.work / "weights.pkl", "weights"))

    def try_one(self, rng: random.Random) -> tuple[str, str]:
        """Damage a file of the run, or exchange two, and resume the run; return the kind of damage and the outcome."""
        self._fresh()
        path = self.work / rng.choice(self.FILES)
        others = [folder / name for folder in (self.work, self.other) for name in self.FILES if folder / name != path]
        kind = rng.choice([*KINDS, "exchange"])
        if kind == "exchange":
            other = self.work / rng.choice([name for name in self.FILES if name != path.name])
            one, two = path.read_bytes(), other.read_bytes()
            path.write_bytes(two)
            other.write_bytes(one)
        else:
            chosen = [other.read_bytes() for other in others]
            path.write_bytes(mutated(path.read_bytes(), kind, chosen, rng))
        code, printed = self._resume()
        lines = printed.splitlines()
        if code == 2 and lines[-1].startswith("error: "):
            return kind, DETECTED
        if code or self._weights() != self.expected:
            return f"{kind} of {path.name}, exit code {code}: {lines[-1:]}", UNNOTICED
        return kind, DETECTED if any(line.startswith("NOTICE: ") for line in lines) else HARMLESS


def run(folder: Path, count: int, seed: int) -> list[dict[str, object]]:
    """Try `count` mutations, a tenth of them on the folder of a run.

    Returns:
        a record for each target: name, counts (tried, detected, harmless, unnoticed), the kinds of damage that went
        unnoticed (how), and whether it has a checksum (summed).
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    makers = (weight_targets, checkpoint_targets, cache_targets, image_targets)
    targets = [target for make in makers for target in make(folder)]
    shares = [target.share for target in targets]
    found: dict[str, Counter] = {}
    summed = {target.name: target.summed for target in targets}
    for target in rng.choices(targets, shares, k=count - count // 10):
        found.setdefault(target.name, Counter())[try_one(target, rng)] += 1
    if count // 10:
        base, name = Run(folder / "run"), "files of a run"
        summed[name] = True
        found[name] = Counter(base.try_one(rng) for _ in range(count // 10))
    return [
        {
            "target": name, "tried": outcomes.total(), "summed": summed[name],
            **{o: sum(n for (_, other), n in outcomes.items() if other == o) for o in (DETECTED, HARMLESS, UNNOTICED)},
            "how": sorted({kind for kind, outcome in outcomes if outcome == UNNOTICED}),
        }
        for name, outcomes in sorted(found.items())
    ]  # fmt: skip


def broken(records: list[dict[str, object]]) -> list[str]:
    """Lines about damage that must not go unnoticed: any to a file with a checksum, and truncation of any file."""
    return [
        f"{r['target']}: {r[UNNOTICED]} not noticed ({', '.join(r['how'])})"
        for r in records
        if r["how"] and (r["summed"] or "truncation" in r["how"])
    ]
