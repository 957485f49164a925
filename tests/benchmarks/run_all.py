"""Every benchmark in a process of its own, and one table of what they found: benchmarks.md and benchmarks.json.

    python run_all.py [--quick] [--only forward cache …] [--out DIR] [--nnsight PYTHON]

A benchmark is a file `bench_*.py` that ends in `timing.report(name, rows)`, and may write $BENCH_OUT/name.png. What `--only` leaves out stays in the
table as it was, with its own date. nnsight runs where PYTHON has it:

    python -m venv E && echo "$(pwd)/.venv/lib/python3.11/site-packages" > E/lib/python3.11/site-packages/main.pth
    E/bin/pip install nnsight; python tests/benchmarks/run_all.py --nnsight E/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timing

HERE = Path(__file__).parent
HEAD = "| mark | what | size | figure [95 %] | goal | met | |\n|---|---|---|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller prompts, five pairs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks, as forward or cache")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the table (default: beside this file)")
    parser.add_argument("--nnsight", metavar="PYTHON", help="an interpreter that has nnsight")
    options = parser.parse_args()
    table, failed = options.out / "benchmarks.json", []
    found = json.loads(table.read_text()) if table.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for script in sorted(HERE.glob("bench_*.py")):
            name = script.stem.removeprefix("bench_")
            python = options.nnsight if name == "nnsight" else sys.executable
            if python is None or (options.only and name not in options.only):
                continue
            failed += [name] * (run(python, script, folder, options.quick) != 0)
        found |= {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
        options.out.mkdir(parents=True, exist_ok=True)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, options.out)
    table.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (options.out / "benchmarks.md").write_text(as_markdown(found, options.out))
    print(f"wrote {table} and {table.with_suffix('.md')}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


def run(python: str, script: Path, folder: str, quick: bool) -> int:
    print(f"\n{script.stem}", flush=True)
    path = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"BENCH_OUT": folder, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([python, script, *(["--quick"] if quick else [])], env=environment, check=False).returncode


def as_markdown(found: dict, folder: Path) -> str:
    """The table, a section a benchmark, with where and with what it was run, and its picture NAME.png if there is one."""
    parts = ["# Benchmarks", timing.__doc__.split("\n\n", 1)[1].strip(),
             "A ratio is ours / theirs unless it says otherwise. Written by `make bench`."]  # fmt: skip
    for name, content in found.items():
        machine = content["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        where = f"{machine['date']}, {machine['device']}, {machine['threads']} thread(s), load {machine['load']}, {versions}"
        parts.append(f"## {name}\n\n{where}\n\n{HEAD}\n" + "\n".join(map(timing.line, content["rows"])))
        if (folder / f"{name}.png").exists():
            parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
