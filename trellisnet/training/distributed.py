"""Several processes that train together, started by torchrun, or a single one.

Each process is a *rank* and has the whole model. Each computes its own rows of a batch, and DistributedDataParallel
sums the gradients over the ranks during the backward pass, so that all ranks make the same update. One small all-reduce
per step then combines its status: whether all numbers are finite, whether a checkpoint is due, whether a signal came.
"""

import contextlib
import datetime
import importlib
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

from trellisnet.errors import LINE, NAME, RunError, UserError, counted, from_system, shown
from trellisnet.training.interrupts import SIGNALS, Interrupted
from trellisnet.training.watch import Progress, Watch

# A dead rank is noticed by its broken connections or, where NCCL does not notice, by torchrun, which ends the others.
# This only limits how long a rank may work alone: while text is scored in one row, all others wait for the first.
PATIENCE = datetime.timedelta(days=2)
_LOST = re.compile("gloo|nccl|connection|socket|broken pipe|recvvalue failed", re.IGNORECASE)


class LostError(RunError):
    """Another rank has ended, or cannot be reached."""

    def __init__(self) -> None:
        super().__init__("a process of this run has ended or can no longer be reached")


@contextlib.contextmanager
def reaching(progress: Progress | None = None) -> Iterator[None]:
    """Turn errors from a broken connection into LostError; with `progress`, mark a collective call."""
    try:
        with progress.meeting() if progress is not None else contextlib.nullcontext():
            yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or not (isinstance(e, dist.DistError) or _LOST.search(str(e))):
            raise
        raise LostError from e


class _Place(NamedTuple):
    """Placeholder for a tensor in a value that is sent."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _mapped(value: Any, function: Any, kind: type) -> Any:
    """Apply `function` to every instance of `kind` in nested dicts, lists and tuples."""
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
        """True if the step may update the weights."""
        return self.finite_loss and self.finite_gradient and self.finite_state


class Ranks:
    """This process among those that train together; by default it is alone, and nothing is communicated.

    All ranks call the methods that communicate (:meth:`gather`, :meth:`sum`, :meth:`share`, :meth:`agreed`, …) in the
    same order.

    Args:
        rank, size: number of this process, from 0, and of all processes.
        local_rank, local_size: the same among those of this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.progress = Progress()
        self._store: dist.Store | None = None
        self._prefix = ""  # of its keys
        self._console = sys.stderr  # redirected later on all ranks but the first

    @classmethod
    def of_environment(cls) -> "Ranks":
        """This process as torchrun's environment variables describe it; alone if torchrun did not start it."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))

    def join(self) -> None:
        """Connect to the other ranks: by gloo for tensors on the CPU, by NCCL for those on CUDA devices.

        Raises:
            RunError: they cannot be reached.
        """
        if self.size == 1:
            return
        # Functions of this module have the default group as a default argument, evaluated when it is imported, at the
        # latest by DistributedDataParallel. Imported once there is a group, it would keep the group and gloo's threads
        # alive past leave(), and a thread that frees a tensor while the interpreter ends aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
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
        """Report on standard error which rank has kept the others waiting for minutes."""
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
        """Disconnect once all ranks are here. From then on torchrun cannot end one because another failed."""
        if self.size == 1 or not dist.is_initialized():
            return
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):
            dist.barrier()
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True for the rank that writes files and prints."""
        return self.rank == 0

    def claims(self) -> bool:
        """Return whether this rank prints an error that the others may not know of: the first one to ask does."""
        if self._store is None:
            return True
        try:
            return self._store.add("said", 1) == 1
        except RuntimeError:  # nobody else can ask either
            return True

    def launcher(self) -> list[str]:
        """The command that starts a program on this number of ranks."""
        if self.size == 1:
            return ["python"]
        nodes = self.size // self.local_size
        return ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc_per_node", str(self.local_size)]

    # -- division of work ------------------------------------------------------------------------------------------

    def part(self, items: Any) -> Any:
        """This rank's share of a sequence or of a tensor's rows; the shares are contiguous, in the order of ranks."""
        each, more = divmod(len(items), self.size)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    def device(self, wanted: str) -> None:
        """Make this rank's own CUDA device the current one, which "cuda" stands for.

        Raises:
            UserError: there are fewer devices than ranks, or `wanted` is one device for all.
        """
        if self.size == 1 or not wanted.startswith("cuda") or not torch.cuda.is_available():
            return
        if wanted.startswith("cuda:"):
            raise UserError(f"--device {wanted}: every rank needs a device of its own; pass --device cuda")
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"--nproc_per_node {self.local_size}: there are {counted(count, 'CUDA devices')}; start no more "
                "processes, or pass --device cpu"
            )
        torch.cuda.set_device(self.local_rank)

    def check_rows(self, batch_size: int) -> None:
        """Raise UserError unless the rows of a batch can be divided evenly among the ranks."""
        if batch_size % self.size:
            near = max(round(batch_size / self.size), 1) * self.size
            raise UserError(
                f"--batch_size {batch_size}: its rows cannot be divided among {self.size} ranks; pass --batch_size "
                f"{near}, or start another number of processes"
            )

    def seed(self, seed: int, step: int = 0) -> None:
        """Seed every rank but the first with numbers of its own; the first keeps its generators as they are."""
        if not self.first:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, step]).generate_state(1, np.uint64)[0]))

    # -- communication -----------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with reaching(self.progress):
            dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over the ranks, bit-equal on all of them."""
        return values if self.size == 1 else tuple(map(sum, zip(*self.gather(values), strict=True)))

    def share(self, value: Any) -> Any:
        """The first rank's value. Tensors are sent one by one, so that there is never a second copy of all of them."""
        if self.size == 1:
            return value
        tensors: list[Tensor] = []

        def take(tensor: Tensor) -> _Place:
            tensors.append(tensor)
            return _Place(len(tensors) - 1, tuple(tensor.shape), tensor.dtype)

        def fill(place: _Place) -> Tensor:
            if not self.first:
                tensors.append(torch.empty(place.shape, dtype=place.dtype))
            return tensors[place.index]

        sent = [_mapped(value, take, Tensor) if self.first else None]
        with reaching(self.progress):
            dist.broadcast_object_list(sent, src=0)
            value = _mapped(sent[0], fill, _Place)
            for tensor in filter(Tensor.numel, tensors):
                dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=0)
        return value

    def copy(self, model: nn.Module) -> None:
        """Copy the first rank's weights to all ranks."""
        if self.size > 1:
            with reaching(self.progress):
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a body that does not communicate; if it fails on any rank, raise its error on all of them."""
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
        errors = self.gather(None if error is None else (isinstance(error, UserError), error.args))
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                is_users, (line, *more) = other
                raise (UserError if is_users else RunError)(f"rank {rank}: {line}" if rank else line, *more)

    def check_same(self, facts: Callable[[], dict[str, Any]], advice: str) -> None:
        """Raise UserError on all ranks if they differ; it names a rank, its host and both values.

        Args:
            facts: returns values by name, which must be equal on all ranks; not called if there is one rank.
            advice: how to remove a difference.
        """
        if self.size == 1:
            return
        reports = self.gather((platform.node(), {name: str(value) for name, value in facts().items()}))
        hosts, values = zip(*reports, strict=True)
        first, differ = values[0], [rank for rank, other in enumerate(values) if other != values[0]]
        if not differ:
            return
        rank, other = differ[0], values[differ[0]]
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        theirs, ours = (", ".join(f"{n} {shown(each.get(n), NAME)}" for n in names) for each in (other, first))
        more = f" (ranks that differ from rank 0: {', '.join(map(str, differ))})" if len(differ) > 1 else ""
        raise UserError(f"rank {rank} on {hosts[rank]} has {theirs}; rank 0 on {hosts[0]} has {ours}{more}; {advice}")

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
        """Raise Interrupted on all ranks if any has received a signal; `signum` is this rank's, 0 for none."""
        if self.size > 1 and (signum := max(self.gather(signum))):
            raise Interrupted(signum)
