"""Test real runs and files against kills, full disks, jumping clocks, corruption and hostile content.

    python scripts/torture.py                          everything but the soak: a quarter of an hour
    python scripts/torture.py --kills 10 --mutations 0 --no-payloads
    python scripts/torture.py --soak 30                also half an hour of training, whose memory must not grow

The faults themselves are in tests/faults.
"""

import argparse
import functools
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch

from scripts.common import check_bounds, origin
from tests.faults import mutations, payloads
from tests.faults.runs import BrokenError, clocks, expect, full, kill, locks, soak
from trellisnet.errors import RunError
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser
from trellisnet.training.runlog import check_json_path, write_json


def hostile(folder: Path) -> dict[str, Any]:
    """Open hostile files in a process with little memory."""
    found = payloads.run(folder)
    expect(not found["executed"], "a file ran code")
    expect(not found["accepted"], f"accepted: {', '.join(found['accepted'])}")
    expect(found["bytes"] < payloads.BOMB / 2, f"memory grew by {found['bytes']:,} bytes")
    return {key: found[key] for key in ("files", "opened", "executed", "bytes")}


def damaged(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Read corrupted files; the corruption must be detected or harmless."""
    records = mutations.run(folder, count, seed)
    expect(not (wrong := mutations.broken(records)), "; ".join(wrong))
    return records


def run(argv: Sequence[str]) -> None:
    """Parse, break things, print and write."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to survive (default: 100)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of every run that is killed (default: 12)")
    parser.add_argument("--writes", type=int, default=150, help="failing writes to survive (default: 150)")
    parser.add_argument("--mutations", type=int, default=1000, help="corrupted files to try (default: 1000)")
    parser.add_argument("--payloads", action=argparse.BooleanOptionalAction, default=True, help="open hostile files")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="also train and watch the memory")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (default: 1)")
    parser.add_argument("--json", help="also write the findings to this file")
    args = parser.parse_args(argv)
    check_bounds(args, kills=0, epochs=1, writes=0, mutations=0, soak=0, seed=0)
    if args.json:
        check_json_path(args.json, "--json", ("command", "seed", "machine"))
    torch.set_num_threads(1)
    head = {**origin("scripts/torture.py", argv, torch.device("cpu")), "seed": args.seed}
    findings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Any]] = {
            "kills": lambda: kill(folder, args.kills, args.seed, args.epochs),
            "disk": lambda: full(folder, args.writes, args.seed),
            "clocks": lambda: clocks(folder, args.seed),
            "locks": lambda: locks(folder, args.seed),
            "mutations": lambda: damaged(folder / "mutations", args.mutations, args.seed),
            "payloads": lambda: hostile(folder / "payloads"),
            "soak": lambda: soak(folder, args.soak, args.seed),
        }
        wanted = {"kills": args.kills, "mutations": args.mutations, "payloads": args.payloads, "soak": args.soak}
        for part, act in parts.items():
            if not wanted.get(part, args.writes):
                continue
            started = time.monotonic()
            try:
                findings[part] = act()
            except BrokenError as e:
                raise RunError(f"{part}: {e}") from e
            for record in findings[part] if isinstance(findings[part], list) else [findings[part]]:
                shown = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                                  for key, value in record.items() if value != [])  # fmt: skip
                print(f"{part}: {shown}", flush=True)
            print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
    if args.json:
        write_json(args.json, "--json", {**head, **findings})


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
