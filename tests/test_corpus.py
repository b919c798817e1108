"""Vocabulary, encoding and batchify."""

import hashlib

import pytest
import torch

from trellisnet.data import synthetic
from trellisnet.data.corpus import (
    ALL_ORDERS,
    EOS,
    batchify,
    by_frequency,
    digest,
    encode,
    only_held_out,
    reordered,
    words,
)


def test_words_end_every_line_even_a_blank_one():
    assert list(words(" a b \n\nc\u2028d\r\n e")) == ["a", "b", EOS, EOS, "c", "d", EOS, "e", EOS]


def test_ids_are_given_by_first_appearance_over_all_splits():
    corpus = encode([["b", "a", "b"], ["c", "a"], ["d", "c"]], sha256="", label="x")
    assert corpus.vocabulary == ["b", "a", "c", "d"]
    assert corpus.train.tolist() == [0, 1, 0]
    assert corpus.valid.tolist() == [2, 1]
    assert corpus.test.tolist() == [3, 2]
    assert corpus.train.dtype == torch.int64


def test_batchify_cuts_contiguous_rows_and_trims_the_tail():
    rows = batchify(torch.arange(11), 3)
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert rows.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_batchify_keeps_the_dtype_and_copies_only_strided_ids(dtype):
    stream = torch.arange(11, dtype=dtype)
    rows = batchify(stream, 3)
    assert rows.dtype == dtype
    assert rows.data_ptr() == stream.data_ptr()
    scattered = batchify(torch.arange(22, dtype=dtype)[::2], 3)
    assert scattered.is_contiguous()
    assert torch.equal(scattered, 2 * rows)


def test_by_frequency_numbers_the_most_frequent_first():
    corpus = encode([["a", "b", "c", "c", "b", "d"], ["e", "a"], ["f", "e", "d"]], sha256="s", label="x")
    ordered = by_frequency(corpus)
    assert ordered.vocabulary == ["b", "c", "a", "d", "e", "f"]
    assert ordered.train.tolist() == [2, 0, 1, 1, 0, 3]
    assert ordered.valid.tolist() == [4, 2]
    assert ordered.test.tolist() == [5, 4, 3]
    assert ordered.train.dtype == torch.int64
    assert (ordered.sha256, ordered.label) == ("s", "x")
    assert corpus.train.tolist() == [0, 1, 2, 2, 1, 3]  # unchanged


def test_the_digest_of_the_vocabulary_depends_on_its_order():
    sums = [encode([tokens, [], []], sha256="", label="x").vocabulary_sha256 for tokens in (["a", "é"], ["é", "a"])]
    assert sums[0] == hashlib.sha256("a\né".encode()).hexdigest()
    assert sums[0] != sums[1]


@pytest.mark.parametrize(
    ("ids", "batch_size", "message"),
    [
        (torch.arange(4), 5, "batch_size: expected 1 to 4"),
        (torch.arange(4), 0, "batch_size: expected 1 to 4"),
        (torch.zeros(2, 2, dtype=torch.int64), 1, "ids: expected 1-D int64 or int32, got 2-D"),
        (torch.zeros(4, dtype=torch.int16), 1, "ids: expected 1-D int64 or int32, got 1-D torch.int16"),
        (torch.zeros(4), 1, "ids: expected 1-D int64 or int32, got 1-D torch.float32"),
    ],
)
def test_batchify_refuses(ids, batch_size, message):
    with pytest.raises(ValueError, match=message):
        batchify(ids, batch_size)


def test_the_synthetic_corpus_is_the_same_everywhere():
    texts = synthetic.texts()
    assert digest(texts) == "e99f17d011f777cbcdf31ae85733d745437b78f5ce9d1244c8d03930f304be3e"
    assert synthetic.texts(seed=1) != texts
    corpus = encode(map(words, texts), sha256="", label="synthetic")
    assert set(texts[2].split()) <= set(texts[0].split())  # nothing new in the test text
    assert 100 < len(corpus.vocabulary) < 300


def test_the_synthetic_grammar_agrees_at_a_distance():
    openings = {"who": "someone", "where": "somewhere", "when": "someday"}
    asked = [line.split() for line in synthetic.texts()[0].splitlines() if line.split()[0] in openings]
    assert len(asked) > 500
    assert all(openings[line[0]] == line[-1] for line in asked)
    assert max(map(len, asked)) > 20


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_types_that_only_valid_and_test_have_are_counted(order):
    splits = [["a", "b", "b"], ["c", "a", "c", "d"], ["b", "d"]]
    corpus = reordered(encode(splits, sha256="", label="x"), order, seed=3)
    assert only_held_out(corpus) == {"valid": (2, 3), "test": (1, 1)}
    splits[0] += ["c", "d"]
    assert only_held_out(reordered(encode(splits, sha256="", label="x"), order, seed=3)) == {}
