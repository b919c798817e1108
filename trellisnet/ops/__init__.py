"""The trellis operators and their backends, each operator behind one call.

`reference` is the paper's equation and the truth that every other backend is tested against.
"""

from collections.abc import Sequence

from torch import Tensor

from trellisnet.ops import mixed_group, reference
from trellisnet.ops.last_step import dependencies
from trellisnet.ops.last_step import last_step as _last_step
from trellisnet.ops.reference import GATES

_BACKENDS = {"reference": reference.trellis}
BACKENDS = ("auto", *_BACKENDS)

__all__ = ["BACKENDS", "GATES", "dependencies", "last_step", "resolve", "trellis"]


def resolve(backend: str) -> str:
    """The backend that `backend` stands for here: `auto` becomes the fastest that can run.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return "reference" if backend == "auto" else backend


def trellis(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: str = "lstm",
    kernel_groups: int | None = None,
    inject_every: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Run all layers of the trellis.

    Args:
        x: input sequence (N, L, C), L ≥ 1.
        weight_x: kernel on x, (GH, C, k), newest tap last, G row groups: i, o, g, f of an LSTM.
        weight_h: kernel on the hidden sequence, (GH, H, k).
        bias: (GH,).
        state: (h, c) left of the first time step, (N, H) each.
        num_layers: how often the one layer is applied.
        dilation: dilations, cycled over the layers.
        output_size: how many of the last channels of h are the output.
        aux_every: also return the output of every layer i = 1..num_layers with i % aux_every == 0.
        hidden_scale: factor on the hidden input of every layer and time step, its left padding included, (N, H, 1);
            0 or 1/(1−p) for variational dropout. Cell path, x and outputs are untouched.
        lengths: valid steps of every row of a right-padded batch, int64 (N,) in 1..L; the state is then that of the
            last valid step. None: all are valid.
        activation: one of `GATES`, which says how many gates G it has.
        kernel_groups: None for a dense kernel. A number of groups for the kernel of Theorem 1: weight_x is then
            (GH/groups, C, k), weight_h (GH, H/groups, k), rows ordered as in :mod:`trellisnet.ops.mixed_group`.
        inject_every: x enters layers 1, 1 + inject_every, 1 + 2·inject_every, …; the bias enters all.
        backend: one of `BACKENDS`; `auto` takes the fastest that can run here.

    Returns:
        output (N, L, output_size); (h, c) of the last layer at the last step, (N, H) each; the auxiliary outputs,
        (N, L, output_size) each.

    Raises:
        ValueError: unknown backend.
    """
    return _BACKENDS[resolve(backend)](
        x,
        weight_x,
        weight_h,
        bias,
        state,
        num_layers=num_layers,
        dilation=dilation,
        output_size=output_size,
        aux_every=aux_every,
        hidden_scale=hidden_scale,
        lengths=lengths,
        activation=activation,
        kernel_groups=kernel_groups,
        inject_every=inject_every,
    )


def last_step(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    hidden_scale: Tensor | None = None,
    activation: str = "lstm",
    kernel_groups: int | None = None,
    inject_every: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """What :func:`trellis` returns for the last time step, from the layer-steps that it depends on and no others.

    Which these are says :func:`dependencies`. There is one implementation, for every backend.

    Args:
        x: input sequence (N, L, C), L ≥ 1.
        weight_x: kernel on x, (GH, C, k), newest tap last, G row groups: i, o, g, f of an LSTM.
        weight_h: kernel on the hidden sequence, (GH, H, k).
        bias: (GH,).
        state: (h, c) left of the first time step, (N, H) each.
        num_layers: how often the one layer is applied.
        dilation: dilations, cycled over the layers.
        output_size: how many of the last channels of h are the output.
        hidden_scale: factor on the hidden input of every layer and time step, its left padding included, (N, H, 1).
        activation: one of `GATES`, which says how many gates G it has.
        kernel_groups: None for a dense kernel. A number of groups for the kernel of Theorem 1: weight_x is then
            (GH/groups, C, k), weight_h (GH, H/groups, k), rows ordered as in :mod:`trellisnet.ops.mixed_group`.
        inject_every: x enters layers 1, 1 + inject_every, 1 + 2·inject_every, …; the bias enters all.
        backend: one of `BACKENDS`.

    Returns:
        output (N, 1, output_size); (h, c) of the last layer at the last step, (N, H) each; the number of layer-steps
        (pairs of a layer and a time step) whose gates were computed.

    Raises:
        ValueError: unknown backend.
    """
    resolve(backend)
    if kernel_groups is not None:
        weight_x, weight_h, bias = mixed_group.dense(weight_x, weight_h, bias, kernel_groups, GATES[activation])
    return _last_step(
        x,
        weight_x,
        weight_h,
        bias,
        state,
        num_layers=num_layers,
        dilation=dilation,
        output_size=output_size,
        hidden_scale=hidden_scale,
        activation=activation,
        inject_every=inject_every,
    )
