"""The setup of a developer: the list of `make`, the hooks of pre-commit, the container for development."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
GROUPS = ["Run it", "Develop", "Ship it", "Measure", "Break it", "Maintain"]
WIDTH = 140

pytestmark = pytest.mark.skipif(not (ROOT / ".pre-commit-config.yaml").exists(), reason="a copy without these files")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_target_once_in_its_group() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, *groups = shown.strip("\n").split("\n\n")
    listed = [line.split()[1] for line in shown.splitlines() if line.startswith("  make ")]

    assert first.split()[:2] == ["make", "help"]
    assert [group.splitlines()[0] for group in groups] == GROUPS
    assert all(re.fullmatch(r"  make [a-z-]+ +[^\s].*", line) for group in groups for line in group.splitlines()[1:])
    assert max(map(len, shown.splitlines())) <= WIDTH
    # `broken` is a part of the installation.
    assert sorted(listed) == sorted(set(re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, re.MULTILINE)) - {"broken"})


def test_every_target_that_a_document_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    named = {name for file in documents for name in re.findall(r"`make ([a-z-]+)", file.read_text())}

    assert len(named) > 10
    assert named - targets == set()


def test_hooks_run_tools_of_this_checkout_and_fetch_nothing() -> None:
    config: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]

    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert program.rpartition("/")[2] in MAKEFILE, "the Makefile runs it too"


def test_the_container_sets_the_shop_up_and_forwards_its_port() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())

    assert container["postCreateCommand"] == "make setup"
    assert container["forwardPorts"] == [8080]
    assert re.fullmatch(r"python:3\.\d+", container["image"])


def test_coverage_measures_what_its_tests_are_about_and_has_a_floor() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]
    covered = re.search(r"^COVERED := \$\(addprefix tests/,(.+)\)$", MAKEFILE, re.MULTILINE)

    assert covered
    assert all((ROOT / "tests" / folder).is_dir() for folder in covered[1].split())
    assert settings["run"]["branch"]
    assert settings["report"]["fail_under"] >= 80
    # The rest are the random walks through rules, and the placements, which are data.
    measured = {pattern.split("/")[1] for pattern in settings["report"]["include"]}
    assert set(covered[1].split()) - measured == {"models", "placements"}
