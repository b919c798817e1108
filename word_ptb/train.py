"""Train or score a TrellisNet on word-level Penn Treebank: `python word_ptb/train.py --help`."""

import functools
import sys
from collections.abc import Sequence

import torch

from trellisnet.data.corpus import SPLITS, batchify
from trellisnet.errors import UserError
from trellisnet.training import cli
from trellisnet.training.engine import Splits
from trellisnet.training.optim import Schedule
from trellisnet.training.tasks import LanguageModeling
from word_ptb import data
from word_ptb.model import Config, build_model


def setup(config: Config, device: torch.device) -> tuple[LanguageModeling, Splits, Schedule, dict[str, int]]:
    """Data, model, task and schedule of a run."""
    # Only the project's own folder is filled by itself; a folder that the user names is theirs.
    corpus = data.load(config.data_folder(), download=config.download and not config.data)
    model = build_model(config, len(corpus.vocabulary)).to(device)
    task = LanguageModeling(
        model,
        horizon=config.horizon,
        seq_len=config.seq_len,
        repackage=config.repack,
        aux_weight=config.aux,
        aux_every=int(config.aux_freq),
        alpha=config.alpha,
        beta=config.beta,
    )
    sizes = {"train": config.batch_size, "valid": config.eval_batch_size, "test": config.eval_batch_size}
    try:
        rows = {split: batchify(getattr(corpus, split), sizes[split]).to(device) for split in SPLITS}
        steps = 0 if config.eval else len(task.batches(rows["train"]))
        for split in ("valid", "test"):
            if next(task.windows(rows[split], training=False), None) is None:
                raise ValueError(f"{split}: rows of {rows[split].size(1)} tokens hold no window with anything to score")
    except ValueError as e:
        raise UserError(f"the corpus is too short for these settings: {e}") from e
    # The authors' word-level rule: divide by 4 on a plateau while the rate is above 0.02. Their --when is never read.
    schedule = Schedule(config.lr, config.anneal, factor=4.0, floor=0.02, when=config.when, asgd=config.asgd)
    tokens = tuple(getattr(corpus, split).numel() for split in SPLITS)
    score_all = functools.partial(task.evaluate_all, batch_size=config.eval_batch_size)
    every = {f"{split}_all": (score_all, getattr(corpus, split).to(device)) for split in ("valid", "test")}
    splits = Splits(
        **rows, label=corpus.label, sha256=corpus.sha256, sizes=tokens, everything=every if config.eval_all else {}
    )
    facts = {"training tokens": tokens[0], "words": len(corpus.vocabulary)}
    if not config.eval:
        facts["steps an epoch"] = steps
    return task, splits, schedule, facts


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.main(Config, setup, argv)


if __name__ == "__main__":
    sys.exit(main())
