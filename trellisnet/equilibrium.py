r"""A trellis at its equilibrium: the outputs that one more layer would not change.

The layers of a trellis share their weights and read the same :math:`\tilde x`, so an infinitely deep one, if it
settles, solves

.. math:: z^*_t = (h^*_t, c^*_t) = f(\tilde x_t + W_1 h^*_{t-1} + W_2 h^*_t,\; c^*_{t-1})

for all t (Bai, Kolter & Koltun, 2019, "Deep Equilibrium Models", arXiv:1909.01377). A solver replaces the layers, and
the implicit function theorem replaces backpropagation through them, so that memory does not grow with the number of
evaluations.

There are two ways to solve. *By segments*, as in that paper, all steps of a segment are updated at once. *In time
order*, step t is solved once t − 1 is: of z only h*_t is then unknown, and the trellis is a recurrent network with an
implicit cell. Either way a segment that begins with the carried state gives exactly what one long pass would; a trellis
of finite depth with "history repackaging" does not.

Letters: N batch, L length, C input channels, H hidden channels, m evaluations that are mixed.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet import ops
from trellisnet.core import State, TrellisNet, TrellisOutput, check_at_least
from trellisnet.errors import counted
from trellisnet.ops import gemm as products
from trellisnet.ops import streaming
from trellisnet.ops.reference import lstm
from trellisnet.regularization import Masks, dropout_scale

Map = Callable[[Tensor], Tensor]
MIXED = 5  # m of Anderson mixing


class Solution(NamedTuple):
    """Result of a solver.

    Args:
        z: f(z) of the last evaluation, (N, …).
        residual: the largest ‖f(z) − z‖ / ‖f(z)‖ of a row at that evaluation, 0-dim.
        evaluations: number of evaluations of f; in time order their mean over the steps.
    """

    z: Tensor
    residual: Tensor
    evaluations: float


def _norm(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=tuple(range(1, z.dim())))  # (N,)


def _residual(difference: Tensor, f_z: Tensor) -> Tensor:
    """Return the largest ratio of these norms, (N,) each; 0 if N is 0."""
    ratios = difference / f_z.clamp_min(torch.finfo(f_z.dtype).tiny)
    return ratios.max() if ratios.numel() else ratios.new_zeros(())


def iterate(f: Map, z: Tensor, tolerance: float, max_evaluations: int) -> Solution:
    """Solve z = f(z) by fixed-point iteration, z ← f(z): each evaluation is one more layer.

    Args:
        f: maps (N, …) to (N, …), row by row.
        z: initial value, (N, …).
        tolerance: stop when the residual of no row is above this.
        max_evaluations: stop after this many evaluations, 1 or more.
    """
    evaluations = 0
    while True:
        before, z = z, f(z)
        evaluations, residual = evaluations + 1, _residual(_norm(z - before), _norm(z))
        if residual <= tolerance or evaluations == max_evaluations:
            return Solution(z, residual, evaluations)


def anderson(f: Map, z: Tensor, tolerance: float, max_evaluations: int) -> Solution:
    """Solve z = f(z) by Anderson mixing (Walker & Ni, 2011); arguments as in :func:`iterate`.

    The next z of a row is an affine combination of its last m values of f, with the weights that minimise the norm of
    the same combination of the residuals f(z) − z. This finds fixed points that iteration circles around.
    """
    rows, tiny, eps = z.flatten(1), torch.finfo(z.dtype).tiny, torch.finfo(z.dtype).eps
    values, differences = rows.new_empty(2, rows.size(0), MIXED, rows.size(1))  # (N, m, …)
    gram = rows.new_zeros(rows.size(0), MIXED, MIXED)  # of the differences
    # Keeps the least-squares problem solvable when differences are alike.
    ridge = 16 * eps * torch.eye(MIXED, dtype=z.dtype, device=z.device)
    evaluations = 0
    while True:
        f_z = f(z)
        slot, mixed = evaluations % MIXED, min(evaluations + 1, MIXED)
        evaluations += 1
        with torch.autocast(z.device.type, enabled=False):  # 16 bits are too few for the least-squares problem
            values[:, slot] = f_z.flatten(1)
            differences[:, slot] = values[:, slot] - z.flatten(1)
            column = differences[:, :mixed] @ differences[:, slot].unsqueeze(2)  # (N, mixed, 1)
            gram[:, :mixed, slot] = gram[:, slot, :mixed] = column.squeeze(2)
            residual = _residual(gram[:, slot, slot].sqrt(), _norm(values[:, slot]))
            if residual <= tolerance or evaluations == max_evaluations:
                return Solution(f_z, residual, evaluations)
            used = gram[:, :mixed, :mixed]
            largest = used.diagonal(dim1=1, dim2=2).amax(1).clamp_min(tiny).view(-1, 1, 1)
            used = used / largest + ridge[:mixed, :mixed]
            weights = torch.linalg.solve_ex(used, z.new_ones(rows.size(0), mixed, 1))[0]  # (N, mixed, 1)
            weights = weights / weights.sum(1, keepdim=True)
            z = (weights.transpose(1, 2) @ values[:, :mixed]).view_as(f_z)


SOLVERS: dict[str, Callable[[Map, Tensor, float, int], Solution]] = {"iterate": iterate, "anderson": anderson}
WAYS = ("stepwise", *SOLVERS)  # `stepwise` is Anderson mixing in time order


class _Layer:
    """The layer of a segment as a differentiable map of z, (N, 2H, L): the equation of `ops.reference`.

    Args:
        weights: effective (weight_x, weight_h, bias).
        x: (N, L, C).
        state: (h, c, x) to the left of the first step, (N, H), (N, H), (N, C).
        scale: factor on the hidden input, (N, H, 1); None for 1.
    """

    def __init__(self, weights: ops.Weights, x: Tensor, state: State, scale: Tensor | None):
        weight_x, self.weight_h, bias = weights
        self.h_left, self.c_left, x_left = (part.unsqueeze(2) for part in state)
        self.scale = scale
        self.x_tilde = F.conv1d(torch.cat([x_left, x.transpose(1, 2)], dim=2), weight_x, bias)  # (N, 4H, L)

    def __call__(self, z: Tensor) -> Tensor:
        h, c = z.chunk(2, dim=1)
        h_padded = torch.cat([self.h_left, h], dim=2)  # (N, H, 1 + L)
        if self.scale is not None:
            h_padded = h_padded * self.scale
        c_shifted = torch.cat([self.c_left, c[:, :, :-1]], dim=2)
        # Within autocast only the products are in 16 bits.
        z_x, z_h = (part.to(z.dtype) for part in (self.x_tilde, F.conv1d(h_padded, self.weight_h)))
        return torch.cat(lstm(z_x, z_h, c_shifted), dim=1)


class _FastLayer:
    """The same map without gradients, time first: z is (L, N, 2H). Products and gates are those of `ops.fused`."""

    def __init__(self, layer: _Layer, weights: ops.Weights, spec: ops.TrellisSpec, execution: ops.Execution, rows: int):
        _, self.weight_h, bias = weights
        self.rows = rows  # of a product
        compute, self.product, gates = streaming.choose(bias, spec.activation, execution)
        self.cell = streaming.Cell(bias, spec.activation, compute, gates)
        self.old, self.new = map(self.packed, self.weight_h.unbind(2))  # (4H, H)
        self.x_tilde = layer.x_tilde.permute(2, 0, 1).to(compute).contiguous()  # (L, N, 4H)
        self.h_left, self.c_left = (part.permute(2, 0, 1) for part in (layer.h_left, layer.c_left))  # (1, N, H)
        self.scale = None if layer.scale is None else layer.scale.squeeze(2)  # (N, H)

    def packed(self, weight: Tensor) -> Tensor:
        """Return a matrix as the product reads it fastest."""
        return products.pack(weight.to(self.cell.compute).contiguous(), self.rows, self.product)

    def tap(self, h: Tensor, weight: Tensor) -> Tensor:
        """Return what a tap contributes to Conv1D(h), (…, N, 4H)."""
        return self.multiply(h if self.scale is None else h * self.scale, weight)

    def multiply(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return rows (…, N, K) · weightᵀ in the dtype of the products."""
        return self.product(rows.to(self.cell.compute).flatten(0, -2), weight).unflatten(0, rows.shape[:-1])

    def conv_h(self, h: Tensor) -> Tensor:
        """Return Conv1D(h) of all steps, (L, N, 4H)."""
        return self.tap(torch.cat([self.h_left, h[:-1]]), self.old) + self.tap(h, self.new)

    def activate(self, z_x: Tensor, z_h: Tensor, cells: Tensor) -> Tensor:
        """Apply the gates to steps (·, N, 4H) of x̃ and of Conv1D(h): (·, N, 2H)."""
        return torch.cat(self.cell(z_x, z_h, cells.contiguous(), last=True), dim=2)

    def segment(self, z: Tensor) -> Tensor:
        """Evaluate all steps at once."""
        h, c = z.chunk(2, dim=2)
        return self.activate(self.x_tilde, self.conv_h(h), torch.cat([self.c_left, c[:-1]]))

    def in_time(self, tolerance: float, max_evaluations: int) -> Solution:
        """Solve step after step, each from the solution of the step before: z is (L, N, 2H)."""
        z = torch.cat([self.h_left, self.c_left], dim=2)[0]  # (N, 2H)
        solutions = []
        for x_tilde in self.x_tilde:
            h, cells = z.chunk(2, dim=1)
            z_x = (x_tilde + self.tap(h, self.old)).unsqueeze(0)

            def f(z: Tensor, z_x: Tensor = z_x, cells: Tensor = cells) -> Tensor:
                z_h = self.tap(z[:, : cells.size(1)], self.new)
                return self.activate(z_x, z_h.unsqueeze(0), cells.unsqueeze(0))[0]

            solutions.append(anderson(f, z, tolerance, max_evaluations))
            z = solutions[-1].z
        return _joined(solutions)

    def adjoint(self, z: Tensor) -> "_Adjoint":
        """Linearise at z (L, N, 2H)."""
        h, c = z.chunk(2, dim=2)
        z_hat = (self.x_tilde + self.conv_h(h)).to(z.dtype)
        return _Adjoint(self, z_hat, torch.cat([self.c_left, c[:-1]]))


class _Adjoint:
    r"""The transposed Jacobian of a layer at a solution, u ↦ Jᵀu, and the solution of u = Jᵀu + g.

    Args:
        layer: the layer.
        z_hat: pre-activations there, (L, N, 4H).
        cells: c one step back, (L, N, H).
    """

    def __init__(self, layer: _FastLayer, z_hat: Tensor, cells: Tensor):
        self.layer = layer
        self.old, self.new = (layer.packed(weight.t()) for weight in layer.weight_h.unbind(2))  # (H, 4H)
        z_i, z_o, z_g, z_f = z_hat.chunk(4, dim=2)
        i, o, g, f = z_i.sigmoid(), z_o.sigmoid(), z_g.tanh(), z_f.sigmoid()
        tanh_c = (f * cells + i * g).tanh()
        self.forget, self.cell = f, o * (1 - tanh_c.square())  # ∂c/∂c_{t−1}, ∂h/∂c
        self.by_o = tanh_c * o * (1 - o)  # ∂h/∂z_o; below, ∂c by the other pre-activations
        self.by_i, self.by_g, self.by_f = g * i * (1 - i), i * (1 - g.square()), cells * f * (1 - f)

    def gates(self, u_h: Tensor, u_c: Tensor, t: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the gradients of the pre-activations (…, 4H) and of c one step back (…, H)."""
        d_c = u_c + u_h * self.cell[t]
        d_z = torch.cat([d_c * self.by_i[t], u_h * self.by_o[t], d_c * self.by_g[t], d_c * self.by_f[t]], dim=-1)
        return d_z, d_c * self.forget[t]

    def hidden(self, d_z: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the h that one tap reads."""
        d_h, scale = self.layer.multiply(d_z, weight).to(d_z.dtype), self.layer.scale
        return d_h if scale is None else d_h * scale

    def segment(self, u: Tensor) -> Tensor:
        """Return Jᵀu for all steps at once, (L, N, 2H)."""
        d_z, d_cells = self.gates(*u.chunk(2, dim=2))
        u = F.pad(self.hidden(d_z, self.new), (0, d_cells.size(2)))  # no part of z_t depends on c_t
        u[:-1] += torch.cat([self.hidden(d_z, self.old), d_cells], dim=2)[1:]
        return u

    def in_time(self, gradient: Tensor, tolerance: float, max_evaluations: int) -> Solution:
        """Solve step by step from the last: only the part of u that belongs to h is unknown."""
        solutions, later = [], torch.zeros_like(gradient[0])
        for t in reversed(range(gradient.size(0))):
            g_h, u_c = (gradient[t] + later).chunk(2, dim=1)

            def f(u_h: Tensor, g_h: Tensor = g_h, u_c: Tensor = u_c, t: int = t) -> Tensor:
                return g_h + self.hidden(self.gates(u_h, u_c, t)[0], self.new)

            solution = anderson(f, g_h, tolerance, max_evaluations)
            d_z, d_cells = self.gates(solution.z, u_c, t)
            later = torch.cat([self.hidden(d_z, self.old), d_cells], dim=1)
            solutions.append(solution._replace(z=torch.cat([solution.z, u_c], dim=1)))
        return _joined(solutions[::-1])


def _joined(solutions: Sequence[Solution]) -> Solution:
    """Join the solutions of single steps."""
    z, residuals, evaluations = zip(*solutions, strict=True)
    return Solution(torch.stack(z), torch.stack(residuals).max(), sum(evaluations) / len(evaluations))


class NotConverged(UserWarning):
    """A solver has stopped above its tolerance."""


class EquilibriumTrellisNet(TrellisNet):
    """A :class:`TrellisNet` of infinite depth, with the same parameters: dilation 1, two taps and LSTM gates.

    Its state is (h, c, x) of the last step and carries over exactly. Its gradient is that of the equilibrium itself or
    of its last `phantom` evaluations. It has no second derivative.

    Args:
        input_size, hidden_size, options: as for :class:`TrellisNet`.
        num_layers: no effect; kept so that either class can read the other's weights.
        solver: one of `WAYS`. `stepwise` needs far fewer evaluations; `anderson` and `iterate` update all steps of a
            segment at once, and `iterate` may circle around the solution.
        tolerance: relative residual ‖f(z) − z‖ / ‖f(z)‖ at which a row is solved, forwards and backwards.
        max_evaluations: limit on the evaluations of the layer, with `stepwise` for each step. Stopping above the
            tolerance issues the warning :class:`NotConverged`.
        phantom: 0 for the implicit gradient (Bai, Kolter & Koltun, 2019, Theorem 1), else the number of evaluations
            to backpropagate through.

    Attributes:
        solved: residual and number of evaluations of the last "forward" and "backward" solution.

    Raises:
        ValueError: a setting is out of range, or is one that an equilibrium does not have.
    """

    receptive_field = None  # unlimited, as in a recurrent network
    reach = float("inf")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        solver: str = "stepwise",
        tolerance: float = 1e-3,
        max_evaluations: int = 60,
        phantom: int = 0,
        **options: Any,
    ):
        super().__init__(input_size, hidden_size, num_layers, **options)
        self.solver, self.tolerance, self.max_evaluations, self.phantom = solver, tolerance, max_evaluations, phantom
        self._check_settings()
        self.solved: dict[str, tuple[Tensor, float]] = {}

    def _check_settings(self) -> None:
        """Raise ValueError for a setting out of range, or one that an equilibrium does not have."""
        needs = {"kernel_size": 2, "dilation": (1,), "kernel_groups": None, "inject_every": 1, "recompute": False}
        for name, value in (needs | {"activation": "lstm"}).items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: an equilibrium needs {value}, got {getattr(self, name)}")
        if self.solver not in WAYS:
            raise ValueError(f"solver: expected one of {', '.join(WAYS)}, got {self.solver!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected 0 or more, got {self.tolerance}")
        check_at_least(1, max_evaluations=self.max_evaluations)
        check_at_least(0, phantom=self.phantom)

    def state_widths(self) -> dict[str, int]:
        return super().state_widths() | {"x": self.input_size}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        start: int = 0,
        aux_every: int | None = None,
        last_only: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int | None = None,
        masks: Masks | None = None,
    ) -> TrellisOutput:
        """Solve for the equilibrium of a segment.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: (h, c, x) of the step before, (N, H), (N, H) and (N, input_size); None for zeros.
            start, last_only, lengths, masks: as in :meth:`TrellisNet.forward`.
            aux_every, num_layers: None; an equilibrium has no layers.

        Raises:
            TypeError: x is not a tensor, or x or the state is not in the dtype of the weights.
            ValueError: a shape or setting does not fit; or torch compiles, exports, traces or transforms the call.
        """
        if ops.traced() or ops.transformed():
            raise ValueError("torch cannot compile or transform an equilibrium, which stops by the values it computes")
        self._check_settings()  # again, because they can be set
        lengths = self._check_call(x, state, start, last_only, lengths)
        for name, value in (("aux_every", aux_every), ("num_layers", num_layers)):
            if value is not None:
                raise ValueError(f"{name}: an equilibrium has no layers; expected None, got {value}")
        (N, L, _), H = x.shape, self.hidden_size
        if lengths is not None:
            x = ops.hide_padding(x, lengths)
        weights = self.effective_weight("weight_x", masks), self.effective_weight("weight_h", masks), self.bias
        # Solved in float32 at least: 16 bits do not resolve the tolerance.
        weights = tuple(weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights)
        x = ops.widened(x, weights[2])
        if state is None:
            state = tuple(x.new_zeros(N, width) for width in self.state_widths().values())
        state = tuple(ops.widened(part, weights[2]) for part in state)
        self.spec.check_kernel(weights[1])
        scale = dropout_scale(x, (N, H, 1), self.hidden_dropout, self.training, masks, "hidden")
        layer = _Layer(weights, x, state, scale)
        z = self._equilibrium(layer, weights, N, L)
        h, c = z.chunk(2, dim=1)  # (N, H, L)
        output = h[:, H - self.output_size :, L - 1 if last_only else start :].transpose(1, 2)
        if lengths is None:
            state = h[:, :, -1], c[:, :, -1], x[:, -1]
        else:
            last = (lengths - 1).view(N, 1, 1)
            state = (part.gather(2, last.expand(-1, part.size(1), 1)).squeeze(2) for part in (h, c, x.transpose(1, 2)))
        dtype = self.bias.dtype
        # Copied, because the caller may change x and the output in place.
        return TrellisOutput(output.to(dtype), tuple(part.to(dtype, copy=True) for part in state), [])

    def _equilibrium(self, layer: _Layer, weights: ops.Weights, N: int, L: int) -> Tensor:
        """Return z* (N, 2H, L) as a function of weights, x and state."""
        with torch.no_grad():
            rows = N if self.solver == "stepwise" else N * L
            fast = _FastLayer(layer, weights, self.spec, self.execution, rows)
            zero = layer.h_left.new_zeros(L, N, 2 * self.hidden_size)
            if self.solver == "stepwise":
                solution = fast.in_time(self.tolerance, self.max_evaluations)
            elif ops.resolve(self.spec, self.execution) == "reference":
                solution = self._solve_segment(lambda z: layer(z.permute(1, 2, 0)).permute(2, 0, 1), zero)
            else:
                solution = self._solve_segment(fast.segment, zero)
            z = self._checked("forward", solution)
        z_star = z.permute(1, 2, 0)
        if not torch.is_grad_enabled():
            return z_star
        for _ in range(self.phantom or 1):
            z_star = layer(z_star)
        if not self.phantom and z_star.requires_grad:
            z_star.register_hook(partial(self._implicit, fast, z))
        return z_star

    def _implicit(self, fast: _FastLayer, z: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Turn the gradient g of an equilibrium, (N, 2H, L), into that of its last layer: solve u = Jᵀu + g."""
        if torch.is_grad_enabled():
            raise RuntimeError("an equilibrium has no second derivative; with phantom set, its last layers have one")
        if gradient is None:  # nothing downstream was differentiated
            return None
        adjoint, gradient = fast.adjoint(z), gradient.permute(2, 0, 1)
        if self.solver == "stepwise":
            solution = adjoint.in_time(gradient, self.tolerance, self.max_evaluations)
        else:
            solution = self._solve_segment(lambda u: adjoint.segment(u) + gradient, gradient)
        return self._checked("backward", solution).permute(1, 2, 0)

    def _solve_segment(self, f: Map, z: Tensor) -> Solution:
        """Solve for all steps of z (L, N, 2H) at once; a row of the batch is a row of the solver."""
        rows = SOLVERS[self.solver](
            lambda z: f(z.transpose(0, 1)).transpose(0, 1), z.transpose(0, 1), self.tolerance, self.max_evaluations
        )
        return rows._replace(z=rows.z.transpose(0, 1))

    def _checked(self, name: str, solution: Solution) -> Tensor:
        """Return z of a solution; record its residual and evaluations in `solved`, and warn if it is not converged."""
        self.solved[name] = solution.residual, solution.evaluations
        if not solution.residual <= self.tolerance:
            warnings.warn(
                f"{name} solution above the tolerance after {counted(self.max_evaluations, 'evaluations')}: raise "
                "max_evaluations or tolerance",
                NotConverged,
                stacklevel=4,
            )
        return solution.z

    def extra_repr(self) -> str:
        names = ("output_size", "weight_norm", "hidden_dropout", "weight_dropout", "temporal_weight_dropout")
        names += ("solver", "tolerance", "max_evaluations", "phantom", "backend", "gemm", "gates")
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *(f"{n}={getattr(self, n)!r}" for n in names)])

    @torch.no_grad()
    def init_stream(self, batch_size: int, *, num_layers: int | None = None) -> State:
        """Start reading sequences piece by piece: return the state before the first step, zeros."""
        check_at_least(1, batch_size=batch_size)
        if num_layers is not None:
            raise ValueError(f"num_layers: an equilibrium has no layers; expected None, got {num_layers}")
        return tuple(self.bias.new_zeros(batch_size, width) for width in self.state_widths().values())

    @torch.no_grad()
    def stream(self, x: Tensor, stream: State, tolerance: float = 0.0) -> tuple[Tensor, State]:
        """Read the next steps (N, T, input_size), without dropout: outputs (N, T, output_size), and the new state."""
        if tolerance:
            raise ValueError(f"tolerance: an equilibrium has no layers to leave out; expected 0, got {tolerance}")
        output, state, _ = self(x, stream, masks=Masks())
        return output, state

    @torch.no_grad()
    def step(self, x: Tensor, stream: State) -> tuple[Tensor, State]:
        """Read one step (N, input_size): output (N, output_size), and the new state."""
        output, state = self.stream(x.unsqueeze(1), stream)
        return output.squeeze(1), state
