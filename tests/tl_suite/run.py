"""TransformerLens's own tests and notebooks as a client: `make tl-suite`.

The source distribution of the installed TransformerLens holds them; pip downloads it, nothing of it is kept here. The files of FILES
run with a HookedQwen2VL in the place of the bridge (`swap.py`): once with as many key-value heads as heads, and once, those of
GROUPED, with half as many. The notebooks of DEMOS run cell by cell (`demo.py`): once with an image in every prompt, and once without.
What does not pass needs a reason of REASONS; what has none fails the run. FILES and DEMOS only grow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
GROUPED = ("tests/unit/test_patching.py",)
FILES = (
    "tests/unit/test_activation_cache.py",
    "tests/unit/test_activation_cache_batch_dim.py",
    "tests/unit/test_direct_path_patching.py",
    "tests/unit/model_bridge/test_output_logits_contract.py",
    "tests/integration/test_model_protocol_bridge.py",
    *GROUPED,
)
DEMOS = (
    "Main_Demo.ipynb",
    "Exploratory_Analysis_Demo.ipynb",
    "Activation_Patching_in_TL_Demo.ipynb",
    "Attribution_Patching_Demo.ipynb",
    "Direct_Logit_Attribution_Demo.ipynb",
    "Head_Detector_Demo.ipynb",
    "SVD_Circuits_Demo.ipynb",
    "SVD_Interpreter_Demo.ipynb",
    "direct_path_patching_ioi.ipynb",
    "Patchscopes_Generation_Demo.ipynb",
    "ARENA_Content.ipynb",
)
# Why a test or cell that runs here does not pass: at most ten reasons, and patterns of names.
REASONS: dict[str, tuple[str, ...]] = {
    "torch without CUDA lacks a setting that the test changes and restores; the test uses no model": (
        "*::test_compute_head_results_matches_wide_float32_gradients*",
    ),
    "the test requires an error for an architecture without split inputs; every model here has them": (
        "*::test_model_without_fork_refused_before_any_forward",
    ),
    "the test counts the names of a module, and Python added one for a warning; the test uses no model": (
        "*::test_old_module_star_import_binds_the_moved_names_and_warns",
    ),
    "the cell needs a file from the hub, or the result of a cell that does": ("demos/Main_Demo.ipynb::5[689]",),
    "the cell uses refactor_factored_attn_matrices, which TransformerLens also refuses for rotary positions": (
        "demos/Exploratory_Analysis_Demo.ipynb::4",
    ),
    "the cell needs a BOS token, which Qwen does not have": ("demos/Activation_Patching_in_TL_Demo.ipynb::19",),
    "the cell uses a layer or head that the smaller model of this run does not have": (
        "demos/Attribution_Patching_Demo.ipynb::24",
        "demos/Attribution_Patching_Demo.ipynb::33",
    ),
    "the cell needs Python 3.12, or the result of a cell that does": ("demos/direct_path_patching_ioi.ipynb::[45]",),
    "the notebook imports pysvelte, which is not on PyPI": ("demos/SVD_Interpreter_Demo.ipynb::[2456]",),
}


def unpacked(into: Path) -> Path:
    """The folder of the installed version's source distribution, its tests and notebooks and nothing else of it.

    Raises:
        subprocess.CalledProcessError: pip cannot have it.
    """
    of = f"transformer_lens=={version('transformer_lens')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformer_lens", "-d", str(into), of]
    subprocess.run(pip, check=True)
    (archive,) = into.glob("transformer_lens-*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = [member for member in file.getmembers() if member.name.split("/")[1] in ("tests", "demos")]
        file.extractall(into, members=wanted, filter="data")
    return into / archive.name.removesuffix(".tar.gz")


def outcomes(folder: Path, heads: str, files: tuple[str, ...]) -> dict[str, list[str]]:
    """Test -> [outcome, what was said], run in a process of its own, far from this repository's own settings of pytest."""
    results = folder / f"{heads}.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), str(folder)]),
        "TL_SUITE_HEADS": heads,
        "TL_SUITE_RESULTS": str(results),
    }
    options = ["-c", os.devnull, f"--rootdir={folder}", "-q", "--tb=no", "-p", "swap", "-p", "no:randomly", "-p", "no:cacheprovider"]
    subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    if not results.exists():
        raise SystemExit(f"TransformerLens's tests did not run ({heads} heads): run pytest in {folder} to see why.")
    return json.loads(results.read_text())


def demo_outcomes(folder: Path, demo: str, image: bool) -> dict[str, list[str]]:
    """Cell -> [outcome, what was said]; a notebook that ends before its last cell is an error."""
    results = folder / f"{demo}.{image}.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "demo.py"), demo, str(results), *([] if image else ["--text"])]
    done = subprocess.run(command, cwd=folder / "demos", env=environment, capture_output=True, text=True)
    if not results.exists():
        raise SystemExit(f"{demo} did not run to its end:\n{done.stderr[-2000:]}")
    return json.loads(results.read_text())


def reason_of(test: str) -> str | None:
    """The reason that is given for a test's failure."""
    return next((reason for reason, patterns in REASONS.items() if any(fnmatch(test, pattern) for pattern in patterns)), None)


class Report:
    """What passed, and why the rest did not."""

    def __init__(self) -> None:
        self.rows, self.unexplained, self.used = [], [], Counter()

    def add(self, name: str, how: str, outcomes: dict[str, list[str]]) -> None:
        failed = {test: said for test, said in outcomes.items() if said[0] != "passed"}
        explained = {test: reason for test in failed if (reason := reason_of(test))}
        self.used.update(explained.values())
        self.unexplained += [f"{test} ({how}): {failed[test][0]}: {failed[test][1]}" for test in failed if test not in explained]
        self.rows.append(f"| `{name}` | {how} | {len(outcomes) - len(failed)} | {len(explained)} |")
        if not outcomes:
            self.unexplained.append(f"{name}: nothing was found to run")

    def end(self) -> None:
        print("| TransformerLens's file | run with | passed | failed for a reason |\n|---|---|---|---|")
        print("\n".join(self.rows))
        print("\n".join(f"- {self.used[reason]}: {reason}" for reason in REASONS))
        if self.unexplained:
            raise SystemExit("without a reason:\n" + "\n".join(self.unexplained))


def main() -> None:
    report = Report()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = unpacked(Path(scratch))
        runs = [(demo, image) for demo in DEMOS for image in (True, False)]
        demos = [pool.submit(demo_outcomes, folder, *run) for run in runs]
        for heads, files in (("full", FILES), ("grouped", GROUPED)):
            done = outcomes(folder, heads, files)
            for file in files:
                report.add(file, f"{heads} heads", {test: said for test, said in done.items() if test.startswith(file)})
        for (demo, image), done in zip(runs, demos):
            report.add(f"demos/{demo}", "images" if image else "text", done.result())
    report.end()


if __name__ == "__main__":
    main()
