"""The READMEs: what they name exists. Links, files, commands with their options, names that Python examples import."""

import ast
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import timm_ep
from timm_ep.cli import COMMANDS

PACKAGE = Path(timm_ep.__file__).parent
ROOT = Path(__file__).parents[1]
FOLDERS = ("model_cards", "scripts", "tests", "timm_ep", "timm_ep/hub", "timm_ep/training")
NAMES = ["README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS)]

each_readme = pytest.mark.parametrize("readme", [ROOT / name for name in NAMES], ids=NAMES)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@each_readme
def test_lines_are_short_enough(readme):
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert readme.parent != ROOT or len(lines) <= 150


@each_readme
def test_links_lead_to_files_and_headings(readme):
    text = readme.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https:")]
    for path, _, heading in (link.partition("#") for link in links):
        target = readme.parent / path if path else readme
        assert target.exists(), path
        assert not heading or heading in anchors(target.read_text(encoding="utf-8")), heading


@each_readme
def test_named_files_exist(readme):
    """In backquotes, from the root or from where the README is: `scripts/…`, `tests/…`, `….py`."""
    words = [code.split()[0] for code in re.findall(r"`([^`\n]+)`", readme.read_text(encoding="utf-8"))]
    named = [word for word in words if re.fullmatch(r"(scripts|tests|timm_ep|model_cards)/[\w./]+|[\w/]+\.py", word)]
    missing = [name for name in named if not ((ROOT / name).exists() or (readme.parent / name).exists())]
    assert set(missing) <= {"train.py"}  # timm's


@each_readme
def test_commands_and_options_exist(readme):
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        command = re.search(r"(?:timm-ep|-m timm_ep) ([a-z]+)(.*)", line.partition("#")[0])
        if command and command[1] != "run":
            module, kind, _ = COMMANDS[command[1]]
            known = {field.name for field in fields(getattr(import_module(module), kind))} | {"config", "help"}
            options = re.findall(r"--([a-z-]+)", command[2])
            assert {option.replace("-", "_") for option in options} <= known, line


@each_readme
def test_python_examples_compile_and_import_what_there_is(readme):
    for block in blocks(readme.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_map_of_the_package_names_every_file():
    """The table of `timm_ep/README.md`: which folder holds which files."""
    table = (PACKAGE / "README.md").read_text(encoding="utf-8").partition("| folder |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (?:`(\w+)/`)? ?\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    named, folder = set(), ""
    for wing, files in rows:
        folder = wing or folder
        named |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", files)}
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/*.py") if path.stem != "__init__"}
    assert named == there
