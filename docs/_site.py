"""What mkdocs cannot be told in mkdocs.yml: pages from outside of docs/, and an API reference of every public module.

Raises (so that the build fails): a public class or function that is in no page.
"""

from __future__ import annotations

import ast
import zlib
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGES = ("hooked_qwen2vl", "analyses")
OUTSIDE = {  # file -> its page
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/benchmarks/benchmarks.md": "benchmarks.md",
    "tests/benchmarks/patching.png": "patching.png",
    "hooked_qwen2vl/scenes/checkpoint/README.md": "embedded_model.md",
    "hooked_qwen2vl/scenes/checkpoint/emergence.png": "emergence.png",
    "hooked_qwen2vl/scenes/adapter/README.md": "known_difference.md",
}
LINKS = {"](docs/": "]("} | {f"]({up}{source}": f"]({page}" for source, page in OUTSIDE.items() for up in ("", "../")}


def modules() -> dict[str, Path]:
    """Every public module, and its file."""
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    named = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: file for name, file in named.items() if not any(part.startswith("_") for part in name.split("."))}


def public_names(file: Path) -> list[str]:
    """The classes and functions that a module defines."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return [node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


def on_config(config):
    pages = {package: [{name: f"reference/{name}.md"} for name in modules() if name.split(".")[0] == package] for package in PACKAGES}
    config.nav.append({"API reference": [{package: own} for package, own in pages.items()]})
    return config


def on_files(files, config):
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"# `{name}`\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    for theirs, ours in LINKS.items():
        markdown = markdown.replace(theirs, ours)
    return markdown


def on_post_build(config):
    lines = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)
    there = {line.split(" ", 1)[0] for line in zlib.decompress(lines[4]).decode().splitlines()}
    missing = [f"{name}.{one}" for name, file in modules().items() for one in public_names(file) if f"{name}.{one}" not in there]
    if missing:
        raise PluginError(f"not in the API reference: {', '.join(missing)}")
