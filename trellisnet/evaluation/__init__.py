"""Uses of a trained language model: adaptive scores, loss by length of context, generated text."""
