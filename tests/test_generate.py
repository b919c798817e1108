"""Text generation: probabilities of a full forward pass, sampling by its definition, and scripts/generate.py."""

import math
import re

import pytest
import torch
from torch.testing import assert_close

from scripts import generate as program
from trellisnet.baselines import AWDLSTM, RHN, TCN
from trellisnet.data import corpus
from trellisnet.data.corpus import EOS
from trellisnet.data.spelling import SPELLINGS, STREAMS
from trellisnet.data.vocabulary import Vocabulary
from trellisnet.evaluation import pretrained
from trellisnet.evaluation.generate import PIECE, Reader, Sampling, generate
from trellisnet.models import TrellisLanguageModel

V = 23


def model(**options):
    torch.manual_seed(2)
    settings = {"output_size": 5, "dtype": torch.float64, "hidden_dropout": 0.5, "output_dropout": 0.5} | options
    module = TrellisLanguageModel(V, 5, settings.pop("hidden_size", 9), 6, **settings)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module


KINDS = {
    "trellis": {},
    "dilations": {"dilation": (1, 2, 4), "kernel_size": 3, "weight_norm": False},
    "mixture": {"n_experts": 3},
    "split": {"cutoffs": [5, 12]},
    "gru": {"activation": "gru"},
    "awd-lstm": {"core": AWDLSTM},
    "rhn": {"core": RHN, "hidden_size": 5},
    "tcn": {"core": TCN},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_the_probability_of_the_full_forward_pass(kind):
    module, options = model(**KINDS[kind]), Sampling(temperature=0.8)
    prompt = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(1))
    drawn = torch.stack(list(generate(module, prompt, 20, options, generator=torch.Generator().manual_seed(5))), dim=1)
    text = torch.cat([prompt, drawn], dim=1)
    reader = Reader(module, 3)
    said = [reader.read(text[:, :7]), *(reader.read(text[:, t : t + 1]) for t in range(7, 27))]
    module.eval()  # the reader needs no telling
    with torch.no_grad():
        expected = module.log_prob(module(text).output)
    assert_close(torch.stack(said, dim=1), expected[:, 6:], atol=1e-12, rtol=0)

    greedy = torch.stack(list(generate(module, prompt, 20, Sampling(temperature=0))), dim=1)
    with torch.no_grad():
        text = prompt
        for t in range(20):
            best = module.log_prob(module(text).output[:, -1:]).argmax(-1)
            assert torch.equal(best[:, 0], greedy[:, t])
            text = torch.cat([text, best], dim=1)


def test_a_prompt_is_read_in_pieces():
    for module in (model(), model(core=TCN), model(core=AWDLSTM)):
        prompt = torch.randint(V, (2, PIECE + 41))
        module.eval()
        with torch.no_grad():
            expected = module.log_prob(module(prompt).output[:, -1:])[:, 0]
        assert_close(Reader(module, 2).read(prompt), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_may_come_in_the_same_memory(kind):
    module = model(**KINDS[kind])
    text, reader, buffer = torch.randint(V, (2, 5)), Reader(module, 2), torch.empty(2, 1, dtype=torch.int64)
    for t in range(5):
        said = reader.read(buffer.copy_(text[:, t : t + 1]))
    assert_close(said, Reader(module, 2).read(text), atol=1e-12, rtol=0)


def test_the_seed_determines_the_text():
    module, prompt = model(), torch.zeros(2, 1, dtype=torch.int64)

    def text(seed):
        return torch.stack(list(generate(module, prompt, 30, generator=torch.Generator().manual_seed(seed)))).tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)


def naive(p, temperature, top_k, top_p):
    """The definition, token by token."""
    p = [math.exp((math.log(x) - math.log(max(p))) / temperature) if x else 0.0 for x in p]
    p = [x / sum(p) for x in p]
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = ranked[: top_k or None]
    total, nucleus, mass = sum(p[i] for i in kept), [], 0.0
    for i in kept:
        if mass >= top_p < 1:
            break
        nucleus.append(i)
        mass += p[i] / total
    total = sum(p[i] for i in nucleus)
    return [p[i] / total if i in nucleus else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("top_p", [0.01, 0.45, 0.82, 0.99, 1.0])
def test_the_distribution_is_that_of_the_definition(temperature, top_k, top_p):
    rows = [[0.5, 0.3, 0.1, 0.07, 0.03], [0.2] * 5, [0.0, 0.4, 0.0, 0.4, 0.2], [0.03, 0.07, 0.1, 0.3, 0.5]]
    p = Sampling(temperature, top_k, top_p).probabilities(torch.tensor(rows, dtype=torch.float64).log())
    expected = torch.tensor([naive(row, temperature, top_k, top_p) for row in rows], dtype=torch.float64)
    assert_close(p, expected, atol=1e-12, rtol=0)


def test_extremes_of_temperature():
    log_prob = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.45, 0.45]]).log()
    assert Sampling(temperature=0).draw(log_prob).tolist() == [1, 1]
    assert Sampling(temperature=0).probabilities(log_prob).tolist() == [[0, 1, 0], [0, 1, 0]]
    cold = Sampling(temperature=1e-300).probabilities(log_prob)
    assert cold.tolist() == [[0, 1, 0], [0, 0.5, 0.5]]
    hot = Sampling(temperature=1e300).probabilities(log_prob)
    assert_close(hot, torch.full_like(hot, 1 / 3))


def test_draws_have_the_frequencies_of_their_probabilities():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    drawn = Sampling(top_k=3).draw(p.log().expand(20_000, 4), torch.Generator().manual_seed(3))
    found = drawn.bincount(minlength=4) / 20_000
    assert_close(found, torch.tensor([0.5, 0.25, 0.15, 0.0]) / 0.9, atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0, got -1"),
        ({"temperature": math.inf}, "temperature: expected"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p: expected"),
    ],
)
def test_impossible_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prompt: expected \(N ≥ 1, T ≥ 1\), got \(2, 0\)"):
        next(generate(model(), torch.zeros(2, 0, dtype=torch.int64), 3))
    with pytest.raises(ValueError, match=r"tokens: expected \(2, T ≥ 1\), got \(3, 1\)"):
        Reader(model(), 2).read(torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Reader(model(), 0)


def test_prompts_are_spelled_like_the_text():
    assert corpus.open_words("the cat\n sat ") == ["the", "cat", EOS, "sat"]
    assert corpus.open_words("the cat\n") == ["the", "cat", EOS]
    assert corpus.open_words("") == []
    authors, standard = (STREAMS[name].open_tokens for name in ("authors", "standard"))
    assert authors(" a b") == [*" a b"]
    assert authors("a\nb\n") == ["a", EOS, "b", EOS]
    assert standard(" a b ") == [*"a_b_"]  # the last space is meant: the line goes on
    assert standard(" a b \n\n c") == [*"a_b", EOS, EOS, "c"]
    for text in ("", "one two", "one\ntwo three\n", "\n\na"):
        for spelling in SPELLINGS.values():
            assert spelling.text(spelling.open_tokens(text)) == text


# --- the program


@pytest.fixture
def script(capsys):
    def call(*argv):
        capsys.readouterr()
        code = program.main([str(a) for a in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_text_from_a_run(script, run_folder, sizes):
    code, text, err = script("--run", run_folder, "--prompt", "the old boat", "--length", 30, "--width", 40)
    assert code == 0
    assert text.startswith("the old boat")
    assert max(map(len, text.splitlines())) <= 40
    assert re.fullmatch(r"30 words in .* words/s, prompt of 3 included; trellisnet, [\d,]+ parameters, cpu\n", err)
    again = script("--run", run_folder, "--prompt", "the old boat", "--length", 30, "--width", 40)
    assert again[1] == text
    # The same weights by the flags of the task.
    flags = ["--task", "word_ptb", *sizes, "--load_weight", run_folder / "weights.pkl"]
    code, by_flags, _ = script(*flags, "--prompt", "the old boat", "--length", 30, "--width", 40)
    assert (code, by_flags) == (0, text)


def test_escape_codes_in_a_vocabulary_do_not_reach_a_terminal(script, run_folder, monkeypatch):
    monkeypatch.setattr(Vocabulary, "text", lambda *_: "a \x1b[2Jword\nof \x9b31m two")
    assert script("--run", run_folder, "--width", 0)[1] == "a \x1b[2Jword\nof \x9b31m two\n"
    monkeypatch.setattr(program.sys.stdout, "isatty", lambda: True)
    assert script("--run", run_folder, "--width", 0)[1] == "a \\x1b[2Jword\nof \\x9b31m two\n"


def test_a_prompt_is_normalised_like_the_text(script, run_folder):
    texts = [
        script("--run", run_folder, "--prompt", prompt, "--length", 9)[:2]
        for prompt in ("the boat\nthe crane", "\ufeffthe boat\r\nthe crane", "the boat\rthe crane")
    ]
    assert texts[0][0] == 0
    assert texts[0] == texts[1] == texts[2]


def test_samples_and_an_empty_prompt(script, run_folder):
    code, text, err = script("--run", run_folder, "--length", 5, "--samples", 3, "--top_k", 5, "--top_p", 0.9)
    assert code == 0
    assert re.findall(r"--- (\d) ---", text) == ["1", "2", "3"]
    assert err.startswith("empty prompt: starting from <eos>, the end of a line\n15 words in ")


def test_lines_are_wrapped_or_left_as_they_are():
    assert program.wrapped(" one two \nthree", 5) == "one\ntwo\nthree"
    assert program.wrapped(" one two \nthree", 0) == " one two \nthree"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "the zebra"], "--prompt: 'zebra' is not among the .* words of the vocabulary; leave it out"),
        (["--prompt", "The old"], "'The' is not among .*; write the for it"),
        (["--temperature", "-1"], "--temperature: expected a finite number of at least 0, got -1"),
        (["--length", "0"], "--length: expected at least 1, got 0"),
        (["--top_p", "2"], "--top_p: expected a probability"),
        (["--emsize", "9", "--nout", "9"], "encoder.weight has shape .*; pass --emsize 8 --nout 8"),
        (["--nonsense", "9"], "unknown argument --nonsense"),
        (["--task", "wt103"], "is a run of word_ptb; leave one of the two out"),
    ],
)
def test_mistakes_are_one_line(script, run_folder, arguments, message):
    code, text, err = script("--run", run_folder, *arguments)
    assert (code, text) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err)


def test_lack_of_memory_is_one_line(script, run_folder, monkeypatch):
    monkeypatch.setattr(pretrained, "generate", lambda *_, **__: torch.empty(2**50))
    code, text, err = script("--run", run_folder, "--prompt", "the old boat")
    assert (code, text) == (1, "")
    assert err == "failed: out of memory; ask for less at once, or pass another --device\n"
    monkeypatch.setattr(pretrained, "generate", lambda *_, **__: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):  # a mistake of the program stays one
        script("--run", run_folder, "--prompt", "the old boat")


def test_a_model_must_be_named(script, tmp_path):
    assert script()[2].startswith("error: no model: pass --run FOLDER")
    assert script("--task", "word_ptb")[2].startswith("error: no weights: pass --load_weight FILE")
    assert script("--run", tmp_path)[2].startswith(f"error: {tmp_path / 'config.json'}: no such file")
    (tmp_path / "config.json").write_text('{"task": "pmnist", "settings": {}}')
    assert "is a run of pmnist; expected a language model: word_ptb" in script("--run", tmp_path)[2]
    (tmp_path / "config.json").write_text('{"task": "word_ptb"}')
    assert "names no task and settings" in script("--run", tmp_path)[2]
