"""Language modelling with scores other than perplexity."""

import math

import torch
from torch import Tensor

from trellisnet.models import TrellisLanguageModel
from trellisnet.training.tasks.language_modeling import LanguageModeling


class Reciting(LanguageModeling):
    """Language modelling scored by accuracy: the share of targets that are the model's most probable token.

    On the training text this measures memorisation ("learning to recite": Demeester et al., 2018, "Predefined
    Sparseness in Recurrent Sequence Models", section 4.2).
    """

    score_name = "accuracy"
    digits = 4
    measured = ("loss", "accuracy")

    def _measure(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            likeliest = self.model.log_prob(output, draw=False).argmax(-1)
        return super()._measure(output, targets) | {"accuracy": (likeliest == targets).float().mean()}

    def training_score(self, means: dict[str, float]) -> float:
        """Accuracy during training, before each update."""
        return means["accuracy"]

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """Accuracy and perplexity of a result."""
        return {"accuracy": result["accuracy"], "ppl": self.score(result["loss"])}


class CharacterModeling(LanguageModeling):
    """Next-character prediction, scored in bits per character (Table 3).

    Bits per character are bits per *symbol*, and the same text can be spelled in more or fewer symbols, so results are
    comparable only on the same denominator. Every denominator is reported: `bpc` counts the symbols of the stream that
    is modelled, and `bpc_<name>` those in which the stream <name> spells the same text.

    Args:
        model: the language model.
        symbols: name of a stream → split → its symbols per symbol of the stream that is modelled.
        options: those of :class:`LanguageModeling`.
    """

    score_name = "bpc"
    digits = 4

    def __init__(self, model: TrellisLanguageModel, *, symbols: dict[str, dict[str, float]], **options):
        super().__init__(model, **options)
        self.symbols = symbols

    @staticmethod
    def score(loss: float) -> float:
        """Bits of a mean loss in nats."""
        return loss / math.log(2)

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """Bits per character on every denominator."""
        bpc = self.score(result["loss"])
        return {"bpc": bpc} | {f"bpc_{name}": bpc / ratios[split] for name, ratios in self.symbols.items()}
