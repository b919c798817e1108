"""README does what it says."""

import re

import pytest

from trellisnet.training.config import PROJECT, build_parser
from word_ptb.model import Config

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs_and_prints_what_its_comments_say(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "torch.Size([8, 100, 16])"
    assert printed[1] == "2 torch.Size([8, 64])"
    assert printed[2].startswith("{'loss': ")


def test_every_flag_it_names_exists_and_every_flag_is_named():
    flags = {flag for action in build_parser(Config)._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - {"--flag", "--no-flag"}
    assert named <= flags | {"--check"}
    spelled = {flag for flag in flags if not flag.startswith(("--no-", "-h", "--help", "--log_interval"))}
    assert spelled - named == set()


def test_every_file_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 3
    for link in links:
        assert (PROJECT / link).exists(), link


@pytest.mark.parametrize("preset", list(Config.presets))
def test_every_preset_is_described(preset):
    assert f"| `{preset}` |" in README
