"""A part of a training step as one CUDA graph: its kernels are launched all at once instead of one by one.

A step of a deep network is hundreds of short kernels, which a GPU may compute faster than Python can launch them. A
recorded graph reads and writes the same memory every time, so inputs are copied to where the recorded ones were, and
gradients stay where they were. The numbers are those of a step that is not recorded, dropout masks included: CUDA's
random numbers advance from replay to replay as they do from kernel to kernel.

A recorded function must neither read numbers from the device (`.item()`, `.nonzero()`) nor copy from the CPU.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from trellisnet.errors import RunError

WARM_UP = 3  # calls before one is recorded, in which libraries choose and compile their kernels

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors, Tensors | None], Tensors]


class Recorder(Protocol):
    """Interface of a device's recorder."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Run the body where calls are recorded, without recording."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Record a call of `function`: its results, which are empty, and a function that fills them and `.grad`."""


class CUDARecorder:
    """Recorder on a stream of its own, on which the earlier calls run too, because autograd remembers streams."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        # All recordings share this memory, since none reads what another has left there.
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def beside(self):
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream):
            results = function()
        return results, graph.replay


class Recorded:
    """A function whose calls of one shape are recorded and replayed: the first shape seen more than WARM_UP times.

    Args:
        function: (batch, carry) → tensors. It computes the gradients of `parameters` anew. Results may require
            gradients: their graph, with the tensors it has saved, then lives as long as the recording.
        parameters: the trained parameters.
        recorder: of the device.
    """

    def __init__(self, function: Function, parameters: Iterable[nn.Parameter], recorder: Recorder):
        self._function, self._parameters, self._recorder = function, list(parameters), recorder
        self._calls: dict[tuple, int] = {}
        self._shape: tuple | None = None  # of the recorded call
        self._inputs: tuple[Tensors, Tensors | None]
        self._results: Tensors
        self._gradients: list[Tensor | None]
        self._replay: Callable[[], None]

    def __call__(self, batch: Tensors, carry: Tensors | None) -> Tensors:
        """Call the function. Results are detached and the caller's to keep; gradients are in `.grad`.

        Raises:
            RunError: the call cannot be recorded.
        """
        shape = tuple((t.shape, t.dtype) for t in batch), None if carry is None else tuple(t.shape for t in carry)
        if shape != self._shape:
            calls = self._calls[shape] = self._calls.get(shape, 0) + 1
            if self._shape is not None or calls <= WARM_UP:
                with self._recorder.beside():
                    return tuple(result.detach() for result in self._function(batch, carry))
            self._record(batch, carry)
            self._shape = shape
        for target, source in zip(_flat(self._inputs), _flat((batch, carry)), strict=True):
            target.copy_(source)
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return tuple(result.detach().clone() for result in self._results)

    def _record(self, batch: Tensors, carry: Tensors | None) -> None:
        self._inputs = tuple(t.clone() for t in batch), None if carry is None else tuple(t.clone() for t in carry)
        try:
            self._results, self._replay = self._recorder.record(lambda: self._function(*self._inputs))
        except RuntimeError as e:
            first = e  # ending a broken recording raises errors of its own
            while not isinstance(first, torch.OutOfMemoryError) and isinstance(first.__context__, RuntimeError):
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            reason = (str(first).strip().splitlines() or [type(first).__name__])[0][:120]
            raise RunError(f"a step cannot be recorded as a CUDA graph ({reason}); pass --cuda_graph off") from e
        self._gradients = [parameter.grad for parameter in self._parameters]


def _flat(inputs: tuple[Tensors, Tensors | None]) -> list[Tensor]:
    batch, carry = inputs
    return [*batch, *(carry or ())]
