"""Conformance fixtures: numbers computed with the authors' code (see fixtures/README.json)."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks
from trellisnet.training.config import PROJECT
from trellisnet.training.tasks import LanguageModeling

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass
class Case:
    name: str
    meta: dict
    arrays: dict[str, torch.Tensor]

    @property
    def config(self) -> dict:
        return self.meta["config"]["model"]

    def file(self, suffix: str = ".pkl") -> Path:
        return FIXTURES / f"{self.name}{suffix}"

    def scalar(self, name: str) -> float:
        return self.meta["scalars"][name]["value"]

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.arrays["h0"].squeeze(2), self.arrays["c0"].squeeze(2)

    def model(self, **changes) -> TrellisLanguageModel:
        c = dict.fromkeys(("dropout", "dropouti", "dropouth", "dropoutl", "emb_dropout", "wdrop"), 0)
        c |= {"temporalwdrop": True} | self.config | changes
        return TrellisLanguageModel(
            c["ntoken"],
            c["ninp"],
            c["nhid"] + c["nout"],
            c["nlevels"],
            output_size=c["nout"],
            tied=c["tie_weights"],
            kernel_size=c["kernel_size"],
            dilation=c["dilation"],
            weight_norm=c["wnorm"],
            output_dropout=c["dropout"],
            input_dropout=c["dropouti"],
            hidden_dropout=c["dropouth"],
            embedding_dropout=c["emb_dropout"],
            weight_dropout=c["wdrop"],
            temporal_weight_dropout=c["temporalwdrop"],
            n_experts=c["n_experts"],
            cutoffs=self.meta["config"].get("splits"),
            latent_dropout=c["dropoutl"],
            log_epsilon=1e-8,  # as in the authors' code; no effect on a single softmax
            freeze_last_embedding=c.get("freeze_last_embedding", False),
        )

    def language_modeling(self, model: TrellisLanguageModel) -> LanguageModeling:
        args = self.meta["config"]["args"]
        return LanguageModeling(
            model,
            horizon=args["horizon"],
            seq_len=args["seq_len"],
            repackage=args["repack"],
            aux_weight=args["aux"],
            aux_every=self.config["aux_frequency"] if self.config["aux"] else None,
            alpha=args["alpha"],
            beta=args["beta"],
        )

    def masks(self) -> Masks:
        names = {"emb": "embedding", "input": "input", "weight1": "weight_x", "weight2": "weight_h"}
        names |= {name: name for name in ("hidden", "output", "aux", "latent", "latent_aux")}
        return Masks(**{ours: self.arrays.get(f"mask_{theirs}") for theirs, ours in names.items()})

    def decode(self, model: TrellisLanguageModel, output: torch.Tensor, mask: torch.Tensor | None = None):
        """Return what the authors' model returns: logits, or with a mixture log(p + 1e-8)."""
        if model.n_experts:
            return model.log_prob(output, latent_mask=mask, draw=False)
        return model.head.logits(output)


def load(name: str) -> Case:
    meta = json.loads((FIXTURES / f"{name}.json").read_text())
    arrays = {}
    with np.load(FIXTURES / f"{name}.npz") as file:
        for key, value in file.items():
            tensor = torch.from_numpy(value)
            arrays[key] = tensor.long() if tensor.dtype == torch.int32 else tensor
    return Case(name, meta, arrays)


def names(kind: str, without: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the cases of a kind."""
    cases = json.loads((FIXTURES / "README.json").read_text())["cases"]
    return [c["name"] for c in cases if c["kind"] == kind and c["name"] not in without]


def committed(pattern: str) -> list[Path]:
    """Return the project's files that match a pattern: those tracked by git or, without a checkout, all.

    Files that users have put into results/ are not tested.
    """
    files = sorted(path for path in PROJECT.glob(pattern) if path.is_file())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=False)
    tracked = set(listed.stdout.split("\0"))
    return files if listed.returncode else [path for path in files if path.relative_to(PROJECT).as_posix() in tracked]
