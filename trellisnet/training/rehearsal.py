"""A trial step, before a run replaces an earlier one."""

import math

from torch import nn

from trellisnet.errors import RunError
from trellisnet.training import checkpoint
from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.tasks import Splits, Task


def rehearse(task: Task, splits: Splits, config: RunConfig, ranks: Ranks) -> None:
    """Compute the loss and the gradient of the first batch and discard them, to fail before anything is lost.

    A step that does not fit into memory fails here. Leaves weights and random number generators unchanged;
    communicates nothing.

    Raises:
        RunError: loss or gradient are not finite, and `skip_bad_steps` does not allow for it.
    """
    parameters, rng = list(task.model.parameters()), checkpoint.rng_state()
    batch = [ranks.part(part) if len(part) >= ranks.size else part[:1] for part in task.batches(splits.train, 0)[0]]
    batch = [part.tensor_split(min(config.accumulate, len(part)))[0] for part in batch]
    task.model.train()
    with config.autocast(parameters[0].device):
        losses, _ = task.loss(*batch)
    losses["loss"].backward()
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    loss = losses["loss"].item()
    task.model.zero_grad(set_to_none=True)
    checkpoint.set_rng_state(rng)
    if not (math.isfinite(loss) and math.isfinite(norm)) and not config.skip_bad_steps:
        raise RunError(f"the first batch has loss {loss:g} and gradient norm {norm:g}, which is not finite")
