"""TransformerLens's own tests as a client: `make tl-suite`.

The source distribution of the installed TransformerLens holds its tests; pip downloads it, nothing of it is kept here. The files of
FILES run with a HookedQwen2VL in the place of the bridge (`swap.py`): once with as many key-value heads as heads, and once, those of
GROUPED, with half as many. A test that does not pass needs a reason of REASONS; one that has none fails the run. FILES only grows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
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
# Why a test that runs here does not pass: at most ten reasons, and patterns of names.
REASONS: dict[str, tuple[str, ...]] = {
    "a build of torch without CUDA has no switch that the test sets and sets back; no model is in the test": (
        "*::test_compute_head_results_matches_wide_float32_gradients*",
    ),
    "the test asks that an architecture without split inputs is refused; every model here has them": (
        "*::test_model_without_fork_refused_before_any_forward",
    ),
    "the test counts the names of a module in which Python has noted a warning; no model is in it": (
        "*::test_old_module_star_import_binds_the_moved_names_and_warns",
    ),
}


def unpacked(into: Path) -> Path:
    """The folder of the installed version's source distribution, its tests and nothing else of it.

    Raises:
        subprocess.CalledProcessError: pip cannot have it.
    """
    of = f"transformer_lens=={version('transformer_lens')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformer_lens", "-d", str(into), of]
    subprocess.run(pip, check=True)
    (archive,) = into.glob("transformer_lens-*.tar.gz")
    with tarfile.open(archive) as file:
        tests = [member for member in file.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        file.extractall(into, members=tests, filter="data")
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


def reason_of(test: str) -> str | None:
    """The reason that is given for a test's failure."""
    return next((reason for reason, patterns in REASONS.items() if any(fnmatch(test, pattern) for pattern in patterns)), None)


def main() -> None:
    rows, unexplained, used = [], [], Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpacked(Path(scratch))
        for heads, files in (("full", FILES), ("grouped", GROUPED)):
            done = outcomes(folder, heads, files)
            for file in files:
                here = {test: said for test, said in done.items() if test.startswith(file)}
                failed = {test: said for test, said in here.items() if said[0] != "passed"}
                explained = {test: reason for test in failed if (reason := reason_of(test))}
                used.update(explained.values())
                unexplained += [f"{test}: {failed[test][0]}: {failed[test][1]}" for test in failed if test not in explained]
                rows.append((file.removeprefix("tests/"), heads, len(here) - len(failed), len(explained)))
                if not here:
                    unexplained.append(f"{file}: no test was found")
    print("| TransformerLens's file | key-value heads | passed | failed for a reason |\n|---|---|---|---|")
    print("\n".join(f"| `{file}` | {heads} | {passed} | {failed} |" for file, heads, passed, failed in rows))
    print("\n".join(f"- {used[reason]}: {reason}" for reason in REASONS))
    if unexplained:
        raise SystemExit("without a reason:\n" + "\n".join(unexplained))


if __name__ == "__main__":
    main()
