"""setup.cfg declares every package that is imported, and no other."""

from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {"analyses", "hooked_qwen2vl"}
READ = {"circuitsvis"}  # its JavaScript is put into pages; no Python of it is imported


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(section: str) -> set[str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    options = [config["options"]["install_requires"]] if section == "options" else [
        lines for name, lines in config["options.extras_require"].items() if name != "dev"
    ]  # fmt: skip
    return {plain(re.match(r"[\w.-]+", line)[0]) for lines in options for line in lines.split("\n") if line.strip()}


def imported() -> dict[str, Path]:
    """Top-level package -> a file that imports it, anywhere in it."""
    found: dict[str, Path] = {}
    for file in (path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.split(".")[0]: file for name in names}
    return {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name not in OURS}


def test_what_is_imported_is_declared():
    distributions = packages_distributions()
    allowed = declared("options") | declared("extras")
    found = {name: {plain(d) for d in distributions.get(name, [name])} for name in imported()}
    assert {name: str(imported()[name]) for name, of in found.items() if not of & allowed} == {}
    assert len(found) > 10 and declared("options") - set().union(*found.values()) == READ
