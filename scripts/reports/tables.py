"""The papers' tables as data: their rows, and the scores printed there."""

from typing import NamedTuple


class Published(NamedTuple):
    """The paper's test score of TrellisNet on a task."""

    table: int
    score: str
    setting: str
    not_permuted: str = ""  # the score with pixels in their order


# In the order of the paper.
PUBLISHED = {
    "word_ptb": Published(1, "56.97", "24M parameters, preset `paper`"),
    "char_ptb": Published(3, "1.158", "13.4M parameters, preset `paper`, on the authors' stream"),
    "wt103": Published(2, "29.19", "180M parameters, preset `paper`, on the whole of WikiText-103"),
    "pmnist": Published(4, "98.13 %", "8M parameters, preset `8m`", "99.20 %"),
    "cifar10": Published(4, "73.42 %", "8M parameters, preset `8m`, on the original images"),
}


# Licences of data, by the label of the corpus.
_WIKIPEDIA = "articles of Wikipedia, under the Creative Commons Attribution-ShareAlike License"
_CIFAR = (
    "its authors state no licence and ask for a citation: Krizhevsky (2009), Learning Multiple Layers of Features from "
    "Tiny Images"
)
LICENCES = {
    "Penn Treebank": "articles of the Wall Street Journal as Mikolov prepared them, licensed by the Linguistic Data "
    "Consortium (LDC99T42)",
    "WikiText-103": _WIKIPEDIA,
    "WikiText sample": _WIKIPEDIA,
    "enwik8": _WIKIPEDIA,
    "text8": _WIKIPEDIA,
    "MNIST": "copyright Yann LeCun and Corinna Cortes, under the Creative Commons Attribution-Share Alike 3.0 License",
    "CIFAR-10": _CIFAR,
    "CIFAR-10 (JPEG)": f"the images of CIFAR-10, compressed again; {_CIFAR}",
}


class Row(NamedTuple):
    """A row of a table.

    Args:
        label: the model.
        size: as printed there, or "".
        paper: the score; None if there is none.
        name: of its function in the script that trains it.
        recited: whether the score is the training accuracy instead.
    """

    label: str
    size: str
    paper: float | None
    name: str
    recited: bool = False


class Table(NamedTuple):
    """A table, the score in it, and the script (scripts/<script>.sh) that trains its rows."""

    title: str
    score: str
    script: str
    rows: list[Row]


# Those of the authors' README of recurrent highway networks: test perplexity by depth, with tied and untied weights.
_RHN = (
    (90.6, 89.2), (75.1, 76.3), (70.6, 72.6), (68.6, 70.9), (67.7, 69.8),
    (66.6, 69.3), (66.4, 68.7), (66.1, 68.5), (66.0, 68.5), (66.0, 68.3),
)  # fmt: skip
# Table 5 of the paper lists settings, which are the presets `paper`. The numbers of "Predefined Sparseness in Recurrent
# Sequence Models" are not in its README.
TABLES = {
    "1": Table(
        "Table 1. Word-level Penn Treebank", "test perplexity", "table1",
        [
            Row("Generic TCN", "13M", 88.68, "tcn"),
            Row("AWD-LSTM (without finetuning)", "24M", 58.8, "awd_lstm"),
            Row("AWD-LSTM, finetuned (56.5 in its authors' README)", "", None, "awd_lstm_finetuned"),
            Row("AWD-LSTM-MoS (without finetuning)", "24M", 55.97, "awd_lstm_mos"),
            Row("AWD-LSTM-MoS, finetuned (54.64 in its authors' README)", "", None, "awd_lstm_mos_finetuned"),
            Row("TrellisNet", "24M", 56.97, "trellisnet"),
            Row("TrellisNet (1.4x larger)", "33M", 56.80, "trellisnet_larger"),
            Row("TrellisNet-MoS", "25M", 54.67, "trellisnet_mos"),
            Row("TrellisNet-MoS (1.4x larger)", "34M", 54.19, "trellisnet_mos_larger"),
            Row("Recurrent highway network, depth 10 (not in the paper)", "", None, "rhn"),
            Row("Sparse LSTM (not in the paper)", "", None, "sparse_lstm"),
        ],
    ),
    "2": Table(
        "Table 2. WikiText-103", "test perplexity", "table2",
        [
            Row("Generic TCN (ours with our settings)", "150M", 45.2, "tcn"),
            Row("TrellisNet", "180M", 29.19, "trellisnet"),
        ],
    ),
    "3": Table(
        "Table 3. Character-level Penn Treebank", "test bits per character", "table3",
        [
            Row("Generic TCN", "3.0M", 1.31, "tcn"),
            Row("AWD-LSTM, standard stream", "13.8M", 1.175, "awd_lstm"),
            Row("TrellisNet", "13.4M", 1.158, "trellisnet"),
            Row("TrellisNet, standard stream", "13.4M", None, "trellisnet_standard"),
        ],
    ),
    "4": Table(
        "Table 4. MNIST and CIFAR-10 pixel by pixel", "test accuracy in percent", "table4",
        [
            Row("Sequential MNIST: Generic TCN", "", 99.0, "sequential_mnist_tcn"),
            Row("Sequential MNIST: TrellisNet", "8M", 99.20, "sequential_mnist"),
            Row("Sequential MNIST: TrellisNet, released settings", "", None, "sequential_mnist_released"),
            Row("Permuted MNIST: Generic TCN", "", 97.2, "permuted_mnist_tcn"),
            Row("Permuted MNIST: TrellisNet", "8M", 98.13, "permuted_mnist"),
            Row("Permuted MNIST: TrellisNet, released settings", "", None, "permuted_mnist_released"),
            Row("Sequential CIFAR-10: TrellisNet", "8M", 73.42, "sequential_cifar10"),
            Row("Sequential CIFAR-10: TrellisNet, released settings", "", None, "sequential_cifar10_released"),
        ],
    ),
    "6": Table(
        "Table 6. Ablations on word-level Penn Treebank", "test perplexity", "table6",
        [
            Row("TrellisNet", "24.1M", 56.97, "trellisnet"),
            Row("- Hidden (VD-based) Dropout", "24.1M", 64.69, "no_hidden_dropout"),
            Row("- Weight Dropout", "24.1M", 63.82, "no_weight_dropout"),
            Row("- Auxiliary Losses", "24.1M", 57.99, "no_auxiliary_losses"),
            Row("- Long Seq. Parallelism", "24.1M", 57.35, "no_long_sequence_parallelism"),
            Row("- Dense Kernel (i.e. mixed group conv; 2 groups here)", "24.1M", 59.18, "mixed_group_2"),
            Row("- Dense Kernel (4 groups; not in the paper)", "", None, "mixed_group_4"),
            Row("- Injected Input (every 2 layers instead)", "24.1M", 57.44, "inject_every_2"),
            Row("- Injected Input (every 5 layers instead)", "24.1M", 59.75, "inject_every_5"),
            Row("- Injected Input (every 10 layers instead)", "24.1M", 60.70, "inject_every_10"),
            Row("- Injected Input (every 20 layers instead)", "24.1M", 74.91, "inject_every_20"),
            Row("GRU gates (not in the paper)", "", None, "activation_gru"),
            Row("tanh, no gates (not in the paper)", "", None, "activation_tanh"),
        ],
    ),
    "rhn": Table(
        "Recurrent highway networks on word-level Penn Treebank", "test perplexity", "rhn_table",
        [
            Row(f"depth {depth}, {tied} weights", "32M" if tied == "untied" else "", paper, f"depth_{depth}{suffix}")
            for depth, both in enumerate(_RHN, start=1)
            for (tied, suffix), paper in zip((("tied", ""), ("untied", "_untied")), both, strict=True)
        ],
    ),
    "wikipedia": Table(
        "enwik8 and text8", "test bits per character", "wikipedia_table",
        [
            Row("enwik8: Recurrent highway network, depth 10", "46M", 1.27, "enwik8_rhn"),
            Row("enwik8: Recurrent highway network, depth 5, Torch settings", "27.6M", 1.32, "enwik8_rhn_depth_5"),
            Row("enwik8: TrellisNet of the same size (settings of ours)", "", None, "enwik8_trellisnet"),
            Row("text8: Recurrent highway network, depth 10", "45M", 1.27, "text8_rhn"),
            Row("text8: TrellisNet of the same size (settings of ours)", "", None, "text8_trellisnet"),
        ],
    ),
    "sparse": Table(
        "Predefined sparseness on word-level Penn Treebank", "test perplexity", "sparse_table",
        [
            Row("AWD-LSTM", "24.2M", None, "dense"),
            Row("AWD-LSTM, finetuned", "24.2M", None, "dense_finetuned"),
            Row("sparse_hidden, 1725 channels", "23.8M", None, "sparse"),
            Row("sparse_hidden, 1725 channels, finetuned", "23.8M", None, "sparse_finetuned"),
            Row("Reciting: dense", "24.2M", None, "recite_dense", recited=True),
            Row("Reciting: dense, half the width", "7.07M", None, "recite_dense_reduced", recited=True),
            Row("Reciting: sparse_hidden", "7.07M", None, "recite_sparse_hidden", recited=True),
            Row("Reciting: sparse_all, sparse embedding", "7.07M", None, "recite_sparse_all", recited=True),
        ],
    ),
    "pos": Table(
        "Part-of-speech tagging with a sparse embedding", "test accuracy in percent", "pos_table",
        [
            Row("LSTM, embedding of width 5", "", None, "dense"),
            Row("LSTM, sparse embedding of width 20", "", None, "sparse"),
            Row("LSTM, sparse embedding, frequent words short", "", None, "sparse_vocab_down"),
            Row("TrellisNet, embedding of width 5", "", None, "dense_trellisnet"),
            Row("TrellisNet, sparse embedding of width 20", "", None, "sparse_trellisnet"),
        ],
    ),
}  # fmt: skip
# Rows of scripts/compare.sh: the name of a row and of its network.
COMPARED = {
    "trellisnet": "TrellisNet", "grown": "TrellisNet, windows of 4 tokens, half of the time with 4 layers",
    "awd_lstm": "AWD-LSTM", "tcn": "Generic TCN", "rhn": "Recurrent highway network", "sparse_lstm": "Sparse LSTM",
}  # fmt: skip
# Rows of scripts/memory.sh: the name of a row, without its problem, and of its network.
MEMORY = {
    "trellisnet": "TrellisNet", "trellisnet_short": "TrellisNet, field too short", "tcn": COMPARED["tcn"],
    "awd_lstm": "LSTM", "rhn": COMPARED["rhn"],
}  # fmt: skip
# Rows of scripts/depth.sh: by text, the multiply-adds per token outside the layers and in each of them, and the
# epochs of each number of layers in the rows that cost equally much.
GROWTH = {
    "word": (721_920, 204_800, {"fixed": {8: 3}, "grown": {2: 2, 8: 2}, "windows": {8: 3}}),
    "char": (8_992, 32_768, {"fixed": {8: 3}, "grown": {4: 2, 8: 2}, "windows": {8: 3}}),
}
# Rows of scripts/recipe.sh.
RECIPE = {
    "authors": "constant rate, authors' initial weights", "gain": "+ `--init_gain`", "onecycle": "+ one-cycle rate",
    "ema": "+ averaged weights", "smoothing": "+ label smoothing", "augment": "+ augmentation",
}  # fmt: skip


# Tagged texts that scripts/pos_table.sh was run on, by their SHA-256 in a record.
TAGGED = {
    "59847bdf9217312f73ae8ffeba9c4570c53fd5779bcaab07a23a77e66215e61c": "the articles of Wikipedia in the Turkish Web "
    "Treebank, tagged by hand (`turkish-treebanks` 1.0.0 on PyPI, Apache License 2.0; part-of-speech column `XPOS`)",
}


class Solved(NamedTuple):
    """Published numbers of a TrellisNet at its equilibrium, beside the unrolled one; "" where there are none.

    Args:
        label: data, size and source.
        unrolled, solved: test perplexity.
        peak, peak_solved: training memory.
        ratio: training time, as a multiple of that of the unrolled network.
    """

    label: str
    unrolled: str
    solved: str
    peak: str
    peak_solved: str
    ratio: str


# Tables 2 to 4 of "Deep Equilibrium Models", and a public attempt by others.
_DEEP_EQUILIBRIUM = "[Bai, Kolter & Koltun (2019)](https://arxiv.org/abs/1909.01377)"
_ATTEMPT = "[robertmkjeffrey/deq](https://github.com/robertmkjeffrey/deq/tree/pytorch-1.5)"
EQUILIBRIA = (
    Solved(f"Penn Treebank, 24M, {_DEEP_EQUILIBRIUM}", "57.0", "57.1", "8.5 GB", "1.2 GB", ""),
    Solved(
        f"WikiText-103, 180M, {_DEEP_EQUILIBRIUM}", "29.2", "29.0", "24.7 GB, with checkpoints 5.2 GB", "3.3 GB", "2.4"
    ),
    Solved(f"Penn Treebank, 24.19M, {_ATTEMPT}, Adam for 16,000 s", "", "75.6", "", "", "5.4, against 20 layers"),
)
# Weights of scripts/equilibrium.sh: the rows that score them with 16 layers and at the equilibrium.
WEIGHTS = {
    "as shipped": ("start_unrolled", "start_solved"), "16 layers": ("unrolled", "unrolled_solved"),
    "equilibrium": ("equilibrium_unrolled", "equilibrium"),
}  # fmt: skip
