"""Several processes that train together, started by torchrun, or one that is alone.

Each process is a *rank* and has the whole model. Of every batch a rank computes its own rows; DistributedDataParallel
sums the gradients over the ranks during the backward pass, so that all ranks make the same update. One small all-reduce
per step then combines its status: whether all numbers are finite, whether a checkpoint is due, whether a signal came.
"""

import contextlib
import datetime
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from trellisnet.errors import LINE, NAME, RunError, UserError, from_system, shown
from trellisnet.training.interrupts import SIGNALS, Interrupted
from trellisnet.training.watch import Progress, Watch

# A rank that has died is noticed by its connections; where NCCL does not, by torchrun, which then ends all. This is
# only for how long one may have nothing to tell: where a text is scored in one row all others wait for the first.
PATIENCE = datetime.timedelta(days=2)
_LOST = re.compile("gloo|nccl|connection|socket|broken pipe|recvvalue failed", re.IGNORECASE)


class LostError(RunError):
    """Another rank has ended, or cannot be reached."""

    def __init__(self) -> None:
        super().__init__("a process of this run has ended or cannot be reached any more")


@contextlib.contextmanager
def reaching(progress: Progress | None = None) -> Iterator[None]:
    """Raise as LostError what a broken connection raises; with `progress`, mark a collective call in it."""
    try:
        with progress.meeting() if progress is not None else contextlib.nullcontext():
            yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or not (isinstance(e, dist.DistError) or _LOST.search(str(e))):
            raise
        raise LostError from e


class _Place(NamedTuple):
    """Where a tensor was, in a value that is sent."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _mapped(value: Any, function: Any, kind: type) -> Any:
    """`value` with `function` applied to everything of a kind in its dicts, lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function, kind) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function, kind) for item in value)
    return value


@dataclass(frozen=True)
class StepStatus:
    """Status of a training step, the same on all ranks.

    Args:
        finite_loss, finite_gradient, finite_state: whether loss, gradient and carried state are finite.
        late: whether a checkpoint is due, by the first rank's clock.
        signum: the signal that a rank has received; 0: none.
    """

    finite_loss: bool
    finite_gradient: bool
    finite_state: bool
    late: bool
    signum: int

    @property
    def finite(self) -> bool:
        """Whether the step may update the weights."""
        return self.finite_loss and self.finite_gradient and self.finite_state


class Ranks:
    """This process among those that train together; by default it is alone, and nothing is communicated.

    Whatever communicates (:meth:`gather`, :meth:`sum`, :meth:`share`, :meth:`agreed`, …) is called by all ranks, in the
    same order.

    Args:
        rank, size: which one this is, of how many.
        local_rank, local_size: the same on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.progress = Progress()
        self._store: dist.Store | None = None
        self._prefix = ""  # of its keys
        self._console = sys.stderr  # which may be silenced later

    @classmethod
    def of_environment(cls) -> "Ranks":
        """This process as torchrun's environment describes it; alone if torchrun did not start it."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    def join(self) -> None:
        """Meet the other ranks: gloo for what is on the CPU, NCCL for what is on CUDA devices.

        Raises:
            RunError: they cannot be reached.
        """
        if self.size == 1:
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=5)))
            # A process may join more than once, and torchrun keeps what it stored before.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            count = store.add(f"trellisnet {attempt} {self.rank}", 1)
            self._prefix = f"trellisnet {attempt} {count}"
            self._store = dist.PrefixStore(self._prefix, store)
            options = {"store": self._store, "rank": self.rank, "world_size": self.size, "timeout": PATIENCE}
            dist.init_process_group(backend, **options)
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
            raise RunError(f"the {self.size} processes of torchrun could not meet ({reason})") from e

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While inside, say on standard error which rank the others have been waiting for for minutes."""
        if self.size == 1:
            yield
            return

        def connect() -> dist.Store:
            address, patience = (
                (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
                datetime.timedelta(minutes=1),
            )
            store = dist.TCPStore(*address, is_master=False, timeout=patience, wait_for_workers=False)
            return dist.PrefixStore(f"{self._prefix} watch", store)

        def say(line: str) -> None:
            tqdm.write(shown(line, LINE), file=self._console)

        with Watch(connect, self.rank, self.size, self.progress, say):
            yield

    def leave(self) -> None:
        """Part from the other ranks, when all are here. From now on torchrun cannot end one for another's exit code."""
        if self.size == 1 or not dist.is_initialized():
            return
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):
            dist.barrier()
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def claims(self) -> bool:
        """Whether this rank is the one that says what only some ranks know: the first to ask."""
        if self._store is None:
            return True
        try:
            return self._store.add("said", 1) == 1
        except RuntimeError:  # nobody else can ask either
            return True

    def launcher(self) -> list[str]:
        """How a program is started on as many ranks."""
        if self.size == 1:
            return ["python"]
        nodes = self.size // self.local_size
        return ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(self.local_size)]

    # -- whose is what ---------------------------------------------------------------------------------------------

    def part(self, items: Any) -> Any:
        """This rank's share of a sequence, or of a tensor's rows: one stretch, the shares of all in their order."""
        each, more = divmod(len(items), self.size)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    def device(self, wanted: str) -> None:
        """Make this rank's own CUDA device the one that "cuda" means.

        Raises:
            UserError: there are too few, or all ranks are to share one.
        """
        if self.size == 1 or not wanted.startswith(("auto", "cuda")) or not torch.cuda.is_available():
            return
        if wanted.startswith("cuda:"):
            raise UserError(f"--device {wanted}: every rank takes a device of its own; pass --device cuda")
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"--nproc_per_node {self.local_size}: there are {count} CUDA devices; start as many, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)

    def check_rows(self, batch_size: int) -> None:
        """Raise UserError unless a batch of so many rows, which is that of all ranks, can be divided among them."""
        if batch_size % self.size:
            near = max(round(batch_size / self.size), 1) * self.size
            raise UserError(
                f"--batch_size {batch_size}: its rows cannot be divided among {self.size} ranks; pass --batch_size "
                f"{near}, or start another number of processes"
            )

    def seed(self, seed: int, step: int = 0) -> None:
        """Give every rank but the first random numbers of its own; the first goes on with those that it has."""
        if not self.first:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, step]).generate_state(1, np.uint64)[0]))

    # -- communication -----------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, in their order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with reaching(self.progress):
            dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over the ranks, equal to the bit on all of them."""
        return values if self.size == 1 else tuple(map(sum, zip(*self.gather(values), strict=True)))

    def share(self, value: Any) -> Any:
        """The first rank's value. Its tensors are sent one by one: there is never a second copy of all of them."""
        if self.size == 1:
            return value
        tensors: list[Tensor] = []

        def taken(tensor: Tensor) -> _Place:
            tensors.append(tensor)
            return _Place(len(tensors) - 1, tuple(tensor.shape), tensor.dtype)

        def made(place: _Place) -> Tensor:
            if not self.first:
                tensors.append(torch.empty(place.shape, dtype=place.dtype))
            return tensors[place.index]

        sent = [_mapped(value, taken, Tensor) if self.first else None]
        with reaching(self.progress):
            dist.broadcast_object_list(sent, src=0)
            value = _mapped(sent[0], made, _Place)
            for tensor in filter(Tensor.numel, tensors):
                dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=0)
        return value

    def copy(self, model: nn.Module) -> None:
        """Give all ranks the first one's weights."""
        if self.size > 1:
            with reaching(self.progress):
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Go on only if no rank fails inside, where nothing is communicated; else raise on all what one has raised."""
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except LostError:
            raise
        except (UserError, RunError, OSError) as e:
            error = e
        if isinstance(error, OSError):
            error = from_system(error)
        told = self.gather(None if error is None else (isinstance(error, UserError), error.args))
        if error is not None:
            raise error
        for rank, said in enumerate(told):
            if said is not None:
                wrong, (line, *more) = said
                raise (UserError if wrong else RunError)(f"rank {rank}: {line}" if rank else line, *more)

    def check_same(self, facts: Callable[[], dict[str, Any]], advice: str) -> None:
        """Raise UserError on all ranks if they differ; it names a rank, its host and both values.

        Args:
            facts: gives what must be equal on all ranks, by name; not called where there is one rank.
            advice: what to do about a difference.
        """
        if self.size == 1:
            return
        told = self.gather((platform.node(), {name: str(value) for name, value in facts().items()}))
        host, first = told[0]
        differ = [rank for rank, (_, other) in enumerate(told) if other != first]
        if not differ:
            return
        there, other = told[differ[0]]
        names = [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]
        theirs, ours = (
            ", ".join(f"{name} {shown(values.get(name), NAME)}" for name in sorted(names)) for values in (other, first)
        )
        more = f" (ranks that differ from rank 0: {', '.join(map(str, differ))})" if len(differ) > 1 else ""
        raise UserError(f"rank {differ[0]} on {there} has {theirs}; rank 0 on {host} has {ours}{more}; {advice}")

    def reduce_status(self, finite: Tensor, *, late: bool, signum: int) -> StepStatus:
        """Copy the status of a step to the host (synchronises), combined over the ranks.

        Args:
            finite: bool, on the device: whether this rank's loss, gradient and each tensor of its state are finite.
            late, signum: see :class:`StepStatus`; `late` counts on any rank, and the largest signal wins.
        """
        if self.size > 1:
            wrong = finite.logical_not().to(torch.int32)
            status = torch.cat([wrong, wrong.new_tensor([late, signum])])
            with reaching(self.progress):
                dist.all_reduce(status, op=dist.ReduceOp.MAX)
                *wrong, late, signum = status.tolist()
            loss, gradient, *state = (not value for value in wrong)
        else:
            loss, gradient, *state = finite.tolist()
        return StepStatus(loss, gradient, all(state), bool(late), signum)

    def heed(self, signum: int) -> None:
        """Raise Interrupted on all ranks if one of them has been told to end, by the signal `signum` (0: has not)."""
        if self.size > 1 and (signum := max(self.gather(signum))):
            raise Interrupted(signum)
