"""Would the tests notice? `make mutants MODULE=analyses/trajectory.py [N=30 SEED=0]`.

Each mutant is the module with one small fault, made by cosmic-ray's operators and one of ours (SWAPPED). Of the module's own
tests (`modules.py`) those that reach the fault's statement (coverage.py, in a first run) run on it, in a copy of the tree under
out/mutants; the working tree is never touched. A mutant is killed when a test fails or does not end in time, and survives
otherwise. The sample takes places of the source at
random, one fault at each. What is known is kept in a file beside the table, so that an interrupted run goes on; a change
to the module or its tests begins anew.

Left out, as no test could or should see them: annotations, the texts of errors, decorators, and progress bars.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from modules import TESTS

ROOT = Path(__file__).parents[2]
OUT = ROOT / "out" / "mutants"
SWAPPED = {
    "min": "max", "max": "min", "argmin": "argmax", "argmax": "argmin", "amin": "amax", "amax": "amin", "any": "all", "all": "any",
    "mean": "sum", "sum": "mean", "median": "mean", "nanmedian": "nanmean", "floor": "ceil", "ceil": "floor", "sort": "flip",
}  # fmt: skip
BARS = {"desc", "unit", "disable", "delay"}  # tqdm's arguments


class SwapName(Operator):
    """Another function of the same kind: the largest for the smallest, the mean for the median."""

    def mutation_positions(self, node):
        if node.type == "name" and node.value in SWAPPED and _is_called(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = SWAPPED[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


def _is_called(name) -> bool:
    after = name.get_next_leaf()
    return after is not None and after.value == "(" and name.parent.type not in ("funcdef", "import_from")


@dataclass
class Mutant:
    """A fault: the operator's occurrence in the source, and what it does to the line."""

    operator: str
    occurrence: int
    line: int
    column: int
    change: str = ""
    outcome: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.operator} {self.occurrence}"


def operators() -> dict[str, Operator]:
    """Every operator of cosmic-ray that needs no arguments, and ours."""
    found = {"swap-name": SwapName()}
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if not kind.arguments() and "decorator" not in name.lower():
            found[name] = kind()
    return found


def all_mutants(source: str) -> list[Mutant]:
    """Every mutant, those of annotations and errors' texts left out."""
    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for name, operator in operators().items():
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _is_left_out(node, start):
                    found.append(Mutant(name, occurrence, *start))
                occurrence += 1
    return found


def _is_left_out(node, start) -> bool:
    """In an annotation (also of what a function returns), in a raise statement, or in what a progress bar looks like."""
    while (parent := node.parent) is not None:
        if parent.type in ("raise_stmt", "annassign") and not _is_value(parent, start):
            return True
        if parent.type == "argument" and getattr(parent.children[0], "value", "") in BARS:
            return True
        if parent.type == "param" and parent.name.value == "progress":
            return True
        if parent.type == "param" and parent.annotation is not None and _inside(parent.annotation, start):
            return True
        if parent.type == "funcdef" and parent.annotation is not None and _inside(parent.annotation, start):
            return True
        node = parent
    return False


def _is_value(statement, start) -> bool:
    """After the `=` of `name: annotation = value`."""
    return statement.type == "annassign" and len(statement.children) == 4 and start >= statement.children[3].start_pos


def _inside(node, start) -> bool:
    return node.start_pos <= start < node.end_pos


def sample(mutants: list[Mutant], n: int, seed: int) -> list[Mutant]:
    """n mutants: places at random, and at each place one at random; a second of the same place only when all have one."""
    draw = random.Random(seed)
    places: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in mutants:
        places.setdefault((mutant.line, mutant.column), []).append(mutant)
    for at_place in places.values():
        draw.shuffle(at_place)
    order = list(places.values())
    draw.shuffle(order)
    rounds = (place[turn] for turn in range(max(map(len, order), default=0)) for place in order if turn < len(place))
    return [mutant for mutant, _ in zip(rounds, range(n))]


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the fault.

    Raises:
        ValueError: the source has no such place.
    """
    code = mutate_code(source, operators()[mutant.operator], mutant.occurrence)
    if code is None or code == source:
        raise ValueError(f"{mutant.name} changes nothing at line {mutant.line}.")
    return code


def change(source: str, code: str, around: int = 20) -> str:
    """What differs, with a little of its line before and after, as `old → new`."""
    start = len(os.path.commonprefix((source, code)))
    end = min(len(os.path.commonprefix((source[::-1], code[::-1]))), min(len(source), len(code)) - start)
    before, after = source[max(0, start - around) : start], source[len(source) - end :][:around]
    parts = (before.rpartition("\n")[2] + text[start : len(text) - end] + after.partition("\n")[0] for text in (source, code))
    return " → ".join(" ".join(part.split()) for part in parts)


# ---- running ----------------------------------------------------------------------------------------


def copy_tree(to: Path) -> None:
    """What git has or would take of the working tree."""
    shutil.rmtree(to, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def import_what_is_slow() -> None:
    """Before the forks, and nothing of this repository's: each child imports its own copy, and the rest is there."""
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch  # noqa: F401
    import transformer_lens  # noqa: F401
    from transformers import Qwen2VLForConditionalGeneration  # noqa: F401

    ours = [name for name in sys.modules if name.split(".")[0] in ("hooked_qwen2vl", "analyses")]
    assert not ours, ours


def reaching(tree: Path, module: str, tests: list[str]) -> Callable[[int], list[str]]:
    """line -> the tests that ran its statement, as the run that left .coverage in the tree found; all where an import did."""
    from coverage import CoverageData

    data = CoverageData(str(tree / ".coverage"))
    data.read()
    contexts = data.contexts_by_lineno(str(tree / module))
    statements = [node for node in ast.walk(ast.parse((tree / module).read_text())) if isinstance(node, ast.stmt)]

    def of(line: int) -> list[str]:
        around = [s for s in statements if s.lineno <= line <= s.end_lineno]
        start = max((s.lineno for s in around), default=line)
        ran = {context for at in range(start, line + 1) for context in contexts.get(at, [])}
        if "" in ran or not ran:
            return tests
        files = {name.partition("::")[0] for name, _, when in (c.rpartition("|") for c in ran) if when != "run"}  # fixtures are shared
        return sorted(files | {name for name, _, _ in (c.rpartition("|") for c in ran) if name.partition("::")[0] not in files})

    return of


def run_tests(tree: Path, tests: list[str], timeout: float, *options: str) -> tuple[int | None, float, str]:
    """(pytest's exit code or None when it did not end, seconds, its output) in a forked process of its own group."""
    log = tree / "pytest.log"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(tree, [*options, *tests], log))
    began = time.monotonic()
    process.start()
    process.join(timeout)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the tests started, too
    process.join()
    return code, time.monotonic() - began, log.read_text(errors="replace")


def _child(tree: Path, tests: list[str], log: Path) -> None:
    import pytest

    os.setsid()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.dont_write_bytecode = True  # two mutants of one second and size would share a .pyc
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, Path(__file__).parent))]
    code = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:randomly", "-p", "no:cacheprovider", *tests])
    os._exit(int(code))


def outcome(code: int | None) -> str:
    """What pytest's exit code says: 1, a test failed; 2 or 4, an import did; 0, nobody noticed.

    Raises:
        RuntimeError: no test ran, or pytest was called wrongly.
    """
    if code in (3, 5):
        raise RuntimeError(f"pytest ended with {code}: the mapping in modules.py names no tests that run.")
    return "survived" if code == 0 else "timeout" if code is None else "killed"


def digest(module: str, tests: list[str]) -> str:
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in (module, *tests))).hexdigest()[:16]


def known(file: Path, state: str) -> dict[str, Mutant]:
    """What an earlier run found, of the same module and tests; else the file begins anew."""
    head, *lines = file.read_text().splitlines(keepends=True) if file.exists() else [""]
    if head != (ours := json.dumps({"state": state}) + "\n"):
        head, lines = ours, []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    file.write_text("".join([head, *whole]))
    return {mutant.name: mutant for mutant in (Mutant(**json.loads(line)) for line in whole)}


def judge(module: str, n: int, seed: int) -> list[Mutant]:
    """Runs the module's tests on each mutant of the sample; says and writes each outcome as it comes.

    Raises:
        ValueError: no tests are named for the module, or they fail without any fault.
    """
    if module not in TESTS:
        raise ValueError(f"tests/mutants/modules.py names no tests for {module!r}; it knows {', '.join(TESTS)}.")
    tests = [f"tests/{name}.py" for name in TESTS[module].split()]
    source = (ROOT / module).read_text()
    folder = OUT / module.removesuffix(".py").replace("/", ".")
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    done = known(results, digest(module, tests))
    mutants = [done.get(mutant.name, mutant) for mutant in sample(all_mutants(source), n, seed)]
    if any(not mutant.outcome for mutant in mutants):
        import_what_is_slow()
        tree = folder / "tree"
        copy_tree(tree)
        code, seconds, said = run_tests(tree, tests, 3600, "--cov=analyses", "--cov=hooked_qwen2vl", "--cov-context=test", "--cov-report=")
        if code != 0:
            raise ValueError(f"the tests of {module} fail without any fault:\n{said[-3000:]}")
        of = reaching(tree, module, tests)
        print(f"{module}: {len(mutants)} mutants, {seconds:.0f} s a run of {' '.join(tests)}", flush=True)
    for number, mutant in enumerate(mutants, 1):
        if not mutant.outcome:
            code = mutated(source, mutant)
            mutant.change = change(source, code)
            (tree / module).write_text(code)
            code, mutant.seconds, _ = run_tests(tree, of(mutant.line), 60 + 3 * seconds)
            mutant.outcome = outcome(code)
            with open(results, "a") as file:
                file.write(json.dumps(asdict(mutant)) + "\n")
        print(f"{number:3} {mutant.outcome:9} line {mutant.line}: {mutant.change}", flush=True)
    (folder / "table.md").write_text(table(module, mutants, seed))
    return mutants


def summary(mutants: list[Mutant]) -> str:
    survived = [mutant for mutant in mutants if mutant.outcome == "survived"]
    return f"{len(mutants) - len(survived)} of {len(mutants)} killed"


def table(module: str, mutants: list[Mutant], seed: int) -> str:
    """Markdown: survivors first."""
    rows = sorted(mutants, key=lambda mutant: (mutant.outcome != "survived", mutant.line))
    cells = [[m.outcome, str(m.line), m.operator.removeprefix("core/"), "`" + m.change.replace("|", "\\|") + "`"] for m in rows]
    lines = [["outcome", "line", "operator", "change"], ["---"] * 4, *cells]
    head = f"# {module}\n\n{summary(mutants)} (seed {seed}).\n\n"
    return head + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help="as modules.py spells it")
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        mutants = judge(options.module, options.n, options.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder = options.module.removesuffix(".py").replace("/", ".")
    print(f"{options.module}: {summary(mutants)}; the table is out/mutants/{folder}/table.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
