"""Workloads of the benchmark: a task's model and a batch of its shape, computed by any variant."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from trellisnet import ops
from trellisnet.errors import RunError
from trellisnet.ops import gemm
from trellisnet.training import programs
from trellisnet.training.allocator import keep_freed_memory
from trellisnet.training.config import parse
from trellisnet.training.graphs import WARM_UP, CUDARecorder, Recorded, Recorder
from trellisnet.training.optim import make_optimizer
from trellisnet.training.tasks import LanguageModeling
from trellisnet.training.tasks.windows import STREAM_POSITIONS

# Shapes of the data: size of the vocabulary; pixels and colours.
LANGUAGE = {"word_ptb": 10_000, "char_ptb": 50, "wt103": 267_735}
IMAGES = {"pmnist": (784, 1), "cifar10": (1024, 3)}
PRESETS = dict.fromkeys(LANGUAGE, "paper") | dict.fromkeys(IMAGES, "default")  # the authors' size for images
# --quick: every network in a size that takes a fraction of a second.
SMALLER = {name: ["--nhid", "120", "--nlevels", "12", "--batch_size", "8"] for name in LANGUAGE}
SMALLER["word_ptb"] += ["--emsize", "80", "--nout", "80", "--horizon", "12", "--seq_len", "36", "--aux_freq", "4"]
SMALLER["char_ptb"] += ["--emsize", "40", "--nout", "40", "--horizon", "36", "--aux_freq", "6"]
SMALLER["wt103"] += ["--emsize", "64", "--nout", "64", "--horizon", "12", "--aux_freq", "6"]
SMALLER |= {name: ["--batch_size", "8"] for name in IMAGES}


class Variant(NamedTuple):
    backend: str
    precision: str
    recompute: int = 0  # store the input of every K-th layer; 0: of all
    graph: bool = False

    @property
    def name(self) -> str:
        precision = self.precision.replace("fp32", "")
        words = [self.backend, precision, f"recompute {self.recompute}" * bool(self.recompute), "graph" * self.graph]
        return " ".join(filter(None, words))


REFERENCE = Variant("reference", "fp32")
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}  # by device
# Largest norm of a difference from the reference, relative to the reference's norm.
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 0.1}
PARTS = ("forward", "core", "step", "evaluation", "generation", "head")
OF_LANGUAGE = ("evaluation", "generation", "head")
TRAINING = ("core", "step")
STEPS = 32  # tokens generated at a time


def variants_on(device: torch.device, recompute: Sequence[int] = ()) -> list[Variant]:
    """The reference, on CUDA in every precision that may be its fastest, then the other variants."""
    precisions = PRECISIONS[device.type]
    references = precisions if device.type == "cuda" else precisions[:1]
    fused = [Variant("fused", precision, every) for every in (0, *recompute) for precision in precisions]
    if device.type == "cuda":
        fused = [variant._replace(graph=graph) for variant in fused for graph in (False, True)]
    return [*(Variant("reference", precision) for precision in references), *fused]


class Work:
    """A task's model and a batch of its shape."""

    def __init__(self, task: str, quick: bool, device: torch.device, flags: list[str]):
        self.name, self.device = task, device
        if task in IMAGES and device.type == "cpu":
            keep_freed_memory()  # as train.py does
        smaller = SMALLER[task] if quick else []
        program = programs.get(task)
        config, _ = parse(program.config_class, ["--preset", PRESETS[task], *smaller, *flags])
        self.config = config
        precisions = PRECISIONS[device.type]  # with the products and gates that a run on this device would choose
        self.chosen = {p: dataclasses.replace(config, precision=p).resolved(device) for p in precisions}
        torch.manual_seed(1)
        N = self.config.batch_size
        if task in LANGUAGE:
            V = 2_000 if quick else LANGUAGE[task]
            self.model = program.build_model(self.config, V).to(device)
            c = self.config
            self.task = LanguageModeling(
                self.model, horizon=c.horizon or None, seq_len=c.task_seq_len(), repackage=c.repack, aux_weight=c.aux,
                aux_every=c.aux_freq, alpha=c.alpha, beta=c.beta,
            )  # fmt: skip
            rows = torch.randint(V, (N, max(c.horizon, c.seq_len) + 1), device=device)
            self.inputs, self.targets = self.task.batches(rows)[0]
            self.x = self.model.embed(self.inputs).detach()
            self.start = self.inputs.size(1) - self.task.size((self.inputs, self.targets)) // N
            self.aux_every = c.aux_freq if c.aux > 0 else None
        else:
            length, channels = IMAGES[task]
            length = 256 if quick else length
            self.model = program.build_model(self.config, channels, 10).to(device)
            self.x = self.inputs = torch.randn(N, length, channels, device=device)
            self.targets = torch.randint(10, (N,), device=device)
            self.start, self.aux_every = length - 1, None
        core = self.model.core
        wanted = (self.x.size(1), core.num_layers, core.dilation, core.kernel_size, self.start)
        self.first = len(ops.dependencies(*wanted)[0])  # positions of the first layer
        self.optimizer = make_optimizer(self.model.parameters(), self.config)
        self.tokens = N * (self.inputs.size(1) - self.start) if task in LANGUAGE else N
        self._streams: dict[tuple[Variant, int], Any] = {}
        self._recorded: dict[tuple[str, Variant], Recorded] = {}
        self._recorder: Recorder | None = None
        self._probes: list[torch.Tensor] = []

    @contextlib.contextmanager
    def use(self, variant: Variant) -> Iterator[None]:
        """Select a variant: the backend until further notice, the precision within the context."""
        core, chosen = self.model.core, self.chosen[variant.precision]
        core.backend, core.gemm, core.gates = variant.backend, chosen.gemm, chosen.gates
        core.recompute, core.recompute_every = bool(variant.recompute), variant.recompute or None
        with chosen.float32_products(), chosen.autocast(self.device):
            yield

    def _unpruned(self, variant: Variant) -> dict[str, Any]:
        """Arguments that make the reference compute all layer-steps, as a plain convolutional network does."""
        if variant.backend != "reference" or self.name in LANGUAGE:
            return {}
        N, L, _ = self.x.shape
        return {"lengths": torch.full((N,), L, device=self.device)}

    def core(self, variant: Variant, training: bool) -> tuple[torch.Tensor, ...]:
        """Outputs of the core for the batch, then the auxiliary outputs."""
        self.model.core.train(training)
        torch.manual_seed(2)
        return self._core(variant, training)

    def _core(self, variant: Variant, training: bool) -> tuple[torch.Tensor, ...]:
        unpruned = self._unpruned(variant)
        with self.use(variant):
            aux_every = self.aux_every if training else None
            out = self.model.core(self.x, start=0 if unpruned else self.start, aux_every=aux_every, **unpruned)
        return (out.output[:, -1:] if unpruned else out.output, *out.aux)

    def gradients(self, variant: Variant) -> list[torch.Tensor]:
        """Outputs, then the gradients of a fixed function of the outputs."""

        def compute() -> tuple[torch.Tensor, ...]:
            outs = self._core(variant, True)
            if not self._probes:
                torch.manual_seed(3)
                self._probes = [torch.randn(out.shape, device=self.device) for out in outs]
            loss = sum((out.float() * probe).sum() for out, probe in zip(outs, self._probes, strict=True))
            self.model.zero_grad(set_to_none=True)
            with self.chosen[variant.precision].float32_products():
                loss.backward()
            return outs

        self.model.core.train()
        torch.manual_seed(2)
        outs = self._computed("core", variant, compute)
        return [out.detach() for out in outs] + [p.grad for p in self.model.core.parameters()]

    def _computed(self, part: str, variant: Variant, compute: Callable[[], tuple[torch.Tensor, ...]]) -> Iterable:
        """Result of `compute`; for a graph variant by replay, after enough calls to record it."""
        if not variant.graph:
            return compute()
        if (part, variant) not in self._recorded:
            recorded = Recorded(lambda *_: compute(), self.model.parameters(), self.recorder())
            self._recorded[part, variant] = recorded
        return self._recorded[part, variant]((), None)

    def recorder(self) -> Recorder:
        """One recorder for all variants: parameters are bound to the stream that they were first recorded on."""
        self._recorder = self._recorder or CUDARecorder(self.device)
        return self._recorder

    def run(self, part: str, variant: Variant) -> int:
        """Compute a part once; return its number of tokens (or images)."""
        if part == "core":
            self.gradients(variant)
        elif part == "step":
            self.step(variant)
        elif part == "head":
            self.head(variant)
        else:
            with torch.inference_mode():
                if part != "forward":
                    return getattr(self, part)(variant)
                self.core(variant, False)
        return self.tokens

    def evaluation(self, variant: Variant, one_window: bool = False) -> float:
        """Score some tokens as an evaluation does; return their number.

        With `one_window`, score one window from its start and return the mean loss.
        """
        N, model = self.config.eval_batch_size, self.model.eval()
        windows = self.task.evaluation_windows
        streamed, skip = variant.backend != "reference" and self.task.streams(windows), windows.context
        length = max(1, STREAM_POSITIONS // N) if streamed and not one_window else windows.length
        torch.manual_seed(4)
        rows = torch.randint(model.vocab_size, (N, length + 1), device=self.device)
        with self.use(variant):
            if streamed:
                stream = None if one_window else self._streams.get((variant, N))
                output, stream = model.stream(rows[:, :-1], stream or model.init_stream(N))
                self._streams[variant, N] = stream
                skip = skip if one_window else 0
                output = output[:, skip:]
            else:
                output = model(rows[:, :-1], start=skip).output
            loss = model.loss(output, rows[:, skip + 1 :]).item()
        return loss if one_window else N * (length - skip)

    def generation(self, variant: Variant) -> int:
        """Compute the distributions of some next tokens; return their number."""
        model, core = self.model.eval(), self.model.core
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self.use(variant):
            if variant.backend == "reference":
                x = model.embed(token).expand(1, core.reach + 1, -1)
                model.log_prob(core(x, lengths=torch.tensor([x.size(1)], device=self.device)).output[:, -1])
                return 1
            stream = self._streams.get((variant, 1)) or core.init_stream(1)
            for _ in range(STEPS):
                y, stream = core.step(model.embed(token)[:, 0], stream)
                model.log_prob(y)
            self._streams[variant, 1] = stream
        return STEPS

    def head(self, variant: Variant) -> list[torch.Tensor]:
        """Loss of outputs and auxiliary outputs, then its gradients with respect to the outputs and the head."""
        model, targets = self.model, self.targets[:, self.start :]
        model.eval()  # latent dropout would be drawn in another order
        torch.manual_seed(5)
        count = 1 + (self.config.nlevels // self.aux_every if self.aux_every else 0)
        shape = (*targets.shape, model.head.in_features)
        outputs = [torch.randn(shape, device=self.device, requires_grad=True) for _ in range(count)]
        weights = [1.0] + [self.config.aux] * (count - 1)
        self.model.zero_grad(set_to_none=True)
        with self.use(variant):
            if variant.backend == "reference":
                losses = (F.nll_loss(model.log_prob(x).flatten(0, 1), targets.flatten()) for x in outputs)
                loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
            else:
                loss = model.losses(outputs, targets, weights)[0]
            loss.backward()
        return [loss.detach(), *(x.grad for x in outputs), *(p.grad for p in model.head.parameters())]

    def step(self, variant: Variant) -> None:
        def compute() -> tuple[torch.Tensor, ...]:
            self.optimizer.zero_grad(set_to_none=True)
            with self.use(variant):
                if self.name in LANGUAGE:
                    loss = self.task.loss(self.inputs, self.targets)[0]["loss"]
                else:
                    logits = self.model(self.inputs, **self._unpruned(variant)).logits
                    loss = F.cross_entropy(logits.float(), self.targets)
            with self.chosen[variant.precision].float32_products():
                loss.backward()
            return (loss,)

        self.model.train()
        self._computed("step", variant, compute)
        if self.config.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()

    def flops(self, part: str, variant: Variant) -> float:
        """Floating-point operations that the core's products over h need for their layer-steps."""
        core, (N, L, _) = self.model.core, self.x.shape
        pruned = variant.backend != "reference"
        # h is zero below the first layer, and the fused operator skips those products.
        layer_steps = core.layer_steps(L, start=self.start) - self.first if pruned else core.num_layers * L
        products = 2 * core.kernel_size * core.hidden_size * core.bias.numel()
        return N * layer_steps * products * (1 if part == "forward" else 3)


def parts_of(task: str, parts: Sequence[str]) -> list[str]:
    """The parts that a task has."""
    return [part for part in parts if task in LANGUAGE or part not in OF_LANGUAGE]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gate(work: Work, variants: Sequence[Variant], parts: Sequence[str] = PARTS) -> None:
    """Compare every variant with the first of them, the reference.

    Raises:
        RunError: a variant computes something else.
    """

    def compare(ours: torch.Tensor, truth: torch.Tensor) -> None:
        error = ((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[variant.precision]:
            raise RunError(f"{work.name}, {variant.name}: differs from the reference by {error:.2g}; nothing is timed")

    parts, plain = parts_of(work.name, parts), [variant for variant in variants[1:] if not variant.graph]
    if "head" in parts:
        expected = work.head(variants[0])
        for variant in plain:
            for ours, truth in zip(work.head(variant), expected, strict=True):
                compare(ours, truth)
    if set(parts) - set(OF_LANGUAGE):
        expected = work.gradients(REFERENCE)
        for variant in variants[1:]:
            for _ in range(WARM_UP * variant.graph):  # so that a replay is compared
                work.gradients(variant)
            for ours, truth in zip(work.gradients(variant), expected, strict=True):
                compare(ours, truth)
    if "evaluation" in parts:
        with torch.inference_mode():
            loss = torch.tensor(work.evaluation(REFERENCE, one_window=True))
            for variant in plain:
                compare(torch.tensor(work.evaluation(variant, one_window=True)), loss)
    if "generation" in parts:
        x = work.x[:1]
        with torch.inference_mode(), work.use(REFERENCE):
            expected = work.model.core.eval()(x).output[:, -1]
        for variant in plain:
            with torch.inference_mode(), work.use(variant):
                stream = work.model.core.init_stream(1)
                for t in range(x.size(1)):
                    y, stream = work.model.core.step(x[:, t], stream)
            compare(y, expected)


def seconds(function: Callable[[], None], device: torch.device) -> float:
    gc.collect()
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def peak_gflops(work: Work, precision: str) -> float:
    """Rate of the fastest product in GFLOP/s."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    core, on_gpu = work.model.core, work.device.type == "cuda"
    shapes = [(2048, core.kernel_size * core.hidden_size, core.bias.numel())] + [(8192, 8192, 8192)] * on_gpu
    times = 10 if on_gpu else 1  # per reading of the clock, which takes as long as a small product on a GPU
    best = 0.0
    for M, K, N in shapes:
        a, b = (torch.randn(rows, K, device=work.device).to(dtype) for rows in (M, N))
        for route, product in gemm.ROUTES.items():
            if gemm.usable(route, work.device, dtype):

                def repeat(product=product, a=a, b=b):
                    for _ in range(times):
                        product(a, b)

                with work.chosen[precision].float32_products():
                    best = max(best, *(2 * M * K * N * times / seconds(repeat, work.device) for _ in range(5)))
    return best / 1e9
