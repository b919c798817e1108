"""Measure how far back a trained language model looks.

    python scripts/context.py --run runs/word_ptb/small --json context.json
    python scripts/plot.py context context.json --out context.svg

The loss of the same targets, spread evenly over the validation text, is computed from only the 1, 2, 4, … tokens before
each of them; for a TrellisNet or a TCN also from as many tokens as its receptive field has, and from twice as many.
"""

import functools
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from scripts import trained
from scripts.common import check_bounds
from trellisnet.errors import UserError
from trellisnet.evaluation.context import context_lengths, loss_by_context
from trellisnet.models import count_parameters
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser
from trellisnet.training.runlog import check_json_path, environment, write_json


def run(argv: Sequence[str]) -> None:
    """Parse, load, measure, print and write."""
    parser = Parser(description=__doc__.splitlines()[0])
    trained.add_flags(parser)
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="visible tokens (default: see above)")
    parser.add_argument("--longest", type=int, default=256, help="largest of the default lengths (default: 256)")
    parser.add_argument("--targets", type=int, default=2000, help="largest number of tokens to predict (default: 2000)")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="(default: valid)")
    parser.add_argument("--json", help="file to write")
    args, flags = parser.parse_known_args(argv)
    check_bounds(args, lengths=1, longest=1, targets=1)
    if args.json:
        check_json_path(args.json, "--json", ("task", "receptive_field", "records"))
    model, corpus = trained.load_with_data(args, flags)
    field = getattr(model.model.core, "receptive_field", None)
    stream, lengths = getattr(corpus, args.split), args.lengths or context_lengths(field, args.longest)
    if stream.numel() <= max(lengths):
        has = f"{stream.numel():,} {model.config.spelling.noun}"
        raise UserError(f"--lengths {max(lengths)}: the {args.split} text has only {has}")
    count = min(args.targets, stream.numel() - max(lengths))
    with model.config.float32_products(), model.config.autocast(model.device):
        records = loss_by_context(model.model, stream.to(model.device), lengths, targets=count)
    print(f"{'context':>8}  {'loss':>8}  {'against the longest':>20}")
    for row in records:
        difference = row["loss"] - records[-1]["loss"]
        print(f"{row['context']:8,}  {row['loss']:8.4f}  {difference:+11.4f} ± {row['error']:.4f}")
    if args.json:
        env = environment(model.device)
        config = model.config
        record = {
            "task": config.task, "model": config.model, "preset": config.preset, "name": config.name,
            "params": count_parameters(model.model), "receptive_field": field, "token": config.spelling.noun,
            "corpus": corpus.label, "data": corpus.sha256, "split": args.split, "targets": count,
            "precision": config.precision, "machine": env["machine"], "torch": env["torch"], "commit": env["commit"],
            "records": records,
        }  # fmt: skip
        write_json(args.json, "--json", record)


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
