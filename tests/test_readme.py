"""The pages for readers: snippets run, flags and files exist, every program is listed."""

import re

import pytest

from trellisnet.training import programs
from trellisnet.training.config import PROJECT, build_parser

CONFIGS = [programs.get(task).config_class for task in programs.TASKS]

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_first_python_snippet_prints_what_its_comments_say(capsys):
    snippet, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "torch.Size([8, 100, 16])"
    assert printed[1] == "2 torch.Size([8, 64])"
    assert printed[2].startswith("{'loss': ")


def test_the_equation_by_hand_is_the_module_and_an_lstm_is_a_trellis(capsys):
    _, snippet, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "x (1, 7, 2) x_tilde (1, 20, 7) W (20, 5, 2)",
        "layer 1 z (1, 20, 7) h (1, 5, 7) an output sees 2 inputs",
        "layer 2 z (1, 20, 7) h (1, 5, 7) an output sees 3 inputs",
        "layer 3 z (1, 20, 7) h (1, 5, 7) an output sees 4 inputs",
        "as the module says: True",
        "5 layers, 10 channels in 2 groups",
        "the same function: True",
    ]


def test_streams(capsys):
    *_, snippet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["True"]


def test_every_flag_it_names_exists_and_every_flag_is_named():
    actions = [action for config in CONFIGS for action in build_parser(config)._actions]
    flags = {flag for action in actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - {"--flag", "--no-flag"}
    scripts = {
        "--check",
        "--table",
        "--quick",
        "--tasks",
        "--parts",
        "--repeats",
        "--no-memory",
        "--soak",
        "--train",
        "--valid",
        "--test",
        *"--run --task --prompt --length --samples --temperature --top_k --top_p --width".split(),
        *"--dtype --by --json --targets".split(),
        "--flags",
        "--nproc_per_node",
        "--nnodes",
        "--rdzv_backend",
        "--rdzv_endpoint",
    }
    assert named <= flags | scripts | {"--cifar"}  # the last is the authors'
    spelled = {flag for flag in flags if not flag.startswith(("--no-", "-h", "--help", "--log_interval"))}
    assert spelled - named == set()


def test_every_file_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 3
    for link in links:
        path, _, anchor = link.partition("#")
        assert (PROJECT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (PROJECT / path).read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], link


def test_every_program_is_listed():
    text = (PROJECT / "scripts" / "README.md").read_text(encoding="utf-8")
    programs = [path for path in (PROJECT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    for path in [*programs, *(PROJECT / "scripts").glob("*.sh")]:
        assert f"`{path.name}`" in text, path.name
    for command in re.findall(r"`([^`]*(?:python|bash) [^`]+)`", text):
        assert (PROJECT / re.search(r"(?:python|bash) (\S+)", command)[1]).exists(), command


@pytest.mark.parametrize(("config", "preset"), [(config, preset) for config in CONFIGS for preset in config.presets])
def test_every_preset_is_described(config, preset):
    about = README.split(f"python {config.task}/train.py --preset", 1)[1].split("\n## ", 1)[0]  # its section
    if config.presets[preset].get("model"):
        about = README.split("\n## What you can compare\n", 1)[1].split("\n## ", 1)[0]
    assert re.search(rf"^\| (`[\w-]+`, )*`{preset}`(, `[\w-]+`)* \|", about, re.MULTILINE)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_task_folder_has_its_sections(config):
    text = (PROJECT / config.task / "README.md").read_text(encoding="utf-8")
    for part in ("## Command", "## Data", "## What the paper reports", "## What is comparable", "## Time"):
        assert f"\n{part}\n" in text
    flags = {flag for action in build_parser(config)._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" in link or (PROJECT / config.task / link).exists(), link
