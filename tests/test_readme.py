"""The README pages: snippets and commands run, links and flags exist, every program and preset is described."""

import argparse
import functools
import importlib
import re
import shlex
import warnings

import pytest

from cases import committed
from scripts.reports.pages import PAGES
from trellisnet.training import programs
from trellisnet.training.config import PROJECT, Parser, build_parser
from trellisnet.training.tasks.windows import Windows

CONFIGS = [programs.get(task).config_class for task in programs.TASKS]
TEXTS = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in (*PAGES, "CHANGELOG.md")
    for path in committed(pattern)
}
GUIDES = {name: text for name, text in TEXTS.items() if name.endswith("README.md")}
PROGRAMS = [path for path in committed("scripts/*.py") if "__main__" in path.read_text(encoding="utf-8")]
FLAG = re.compile(r"(?<![\w/.-])--[a-z][\w-]*")
# Of torchrun and pip; placeholders; of the authors' scripts.
OTHERS = """--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --extra-index-url --flag --no-flag --cifar
--load""".split()


def code(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Command lines of a page: those of its blocks, and `python …` or `bash …` in its prose and tables."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (command for command in re.findall(r"`((?:\w+=\S+ )*(?:python|bash) [^`…]+)`", prose))
    for block in code("bash", text):
        yield from filter(None, map(str.strip, block.replace("\\\n", " ").splitlines()))


class Parsed(BaseException):
    """Thrown out of a program when its command line has been parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that runs a program until its command line, unless empty, is parsed, and returns its parser."""
    known = Parser.parse_known_args

    def parse_known_args(self, args, namespace=None):
        rest = known(self, args, namespace)[1] if args else []  # for the train.py of a task
        raise Parsed(self, known(build_parser(CONFIGS[0]), rest)[1])

    def parse_args(self, args, namespace=None):
        raise Parsed(self, known(self, args, namespace)[1] if args else [])

    monkeypatch.setattr(Parser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(Parser, "parse_args", parse_args)

    def run(program, *words):
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        with pytest.raises(Parsed) as parsed:
            module.main(list(words))
        parser, unknown = parsed.value.args
        assert not unknown
        return parser

    return run


@functools.cache
def snippets():
    """Python of all pages, without what tests/test_extending.py puts into the files named in the first line."""
    pairs = [(name, block) for name, text in GUIDES.items() for block in code("python", text)]
    return [(name, block) for name, block in pairs if not re.match(r"# [\w/]+\.py\n", block)]


@pytest.mark.parametrize("number", range(len(snippets())))
def test_snippets_print_what_their_comments_say(number, capsys, monkeypatch):
    name, snippet = snippets()[number]
    monkeypatch.chdir(PROJECT)
    if "torch.onnx" in snippet:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        warnings.simplefilter("ignore")  # of torch's exporter
    exec(compile(snippet, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^ *print\(.*\)  # (.+)$", snippet, re.MULTILINE)
    assert len(printed) == len(said)
    for line, comment in zip(printed, said, strict=True):
        assert re.fullmatch(re.escape(comment).replace("…", ".*"), line)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_name_programs_and_flags_that_exist(name, parse):
    for command in commands(GUIDES[name]):
        words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z]+=", word)]
        if not words:
            continue
        if words[0] == "torchrun":
            words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
        if words[0] == "python" and not words[1].startswith("-"):
            parse(words[1], *words[2:])
        elif words[0] == "bash":
            assert (PROJECT / words[1]).is_file(), command
        elif "install" in words:
            for extra in re.findall(r"\.\[(\w+)\]", command):
                assert f'"{extra}": [' in (PROJECT / "setup.py").read_text()


def test_every_flag_it_names_exists_and_every_flag_is_named(parse):
    parsers = [parse(path.relative_to(PROJECT).as_posix()) for path in PROGRAMS] + list(map(build_parser, CONFIGS))
    for parser in parsers:  # and those of subcommands, appended on the way
        for action in parser._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    actions = [action for parser in parsers for action in parser._actions if action.help != argparse.SUPPRESS]
    flags = {flag for action in actions for flag in action.option_strings}
    named = {flag for text in GUIDES.values() for flag in FLAG.findall(text)}
    assert named - flags == named & set(OTHERS)
    spelled = {flag for flag in flags if not flag.startswith(("--no-", "-h", "--help", "--log_interval"))}
    assert spelled - named == set()


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (PROJECT / name).parent / path if path else PROJECT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], link


def written_by_hand(text):
    """Remove what programs write into a guide."""
    return re.sub(r"<!-- ([\w ]+): begin -->\n.*?<!-- \1: end -->\n", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", GUIDES)
def test_prose_fits_into_120_columns(name):
    lines = written_by_hand(GUIDES[name]).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_front_page_is_short():
    assert len(written_by_hand(TEXTS["README.md"]).splitlines()) <= 265


def test_every_program_is_listed():
    for path in [*PROGRAMS, *committed("scripts/*.sh")]:
        assert f"`{path.name}`" in GUIDES["scripts/README.md"], path.name


@pytest.mark.parametrize(("config", "preset"), [(config, preset) for config in CONFIGS for preset in config.presets])
def test_every_preset_is_described(config, preset):
    core = config.presets[preset].get("model")
    page = GUIDES["trellisnet/baselines/README.md" if core else f"{config.task}/README.md"]
    assert re.search(rf"^\| (`[\w-]+`, )*`{preset}`(, `[\w-]+`)* \|", page, re.MULTILINE)


@pytest.mark.parametrize(("task", "tokens"), [("word_ptb", 929_589), ("char_ptb", 5_101_618), ("wt103", 103_227_021)])
def test_updates_per_epoch_are_those_of_the_released_defaults(task, tokens):
    config = programs.get(task).config_class()
    windows = Windows.for_training(config.horizon, config.task_seq_len(), config.repack)
    updates = len(windows.starts(tokens // config.batch_size))
    rows = re.findall(r"^\| `default` \|.* ([\d,]+) updates per epoch", GUIDES[f"{task}/README.md"], re.MULTILINE)
    assert rows == [f"{updates:,}"]
    assert f"{tokens:,}" in GUIDES[f"{task}/README.md"]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_task_folder_has_its_sections(config):
    text = GUIDES[f"{config.task}/README.md"]
    for part in ("## Train", "## Data", "## What the paper reports", "## What is comparable"):
        assert f"\n{part}\n" in text
    flags = {flag for action in build_parser(config)._actions for flag in action.option_strings}
    assert set(FLAG.findall(text)) <= flags
