"""Uses of trained models: loading, adaptive scores, loss by context length, generated text."""
