"""Imports point one way: the contracts in setup.cfg say which (`make lint`); here, that nothing goes in a circle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

import hooked_qwen2vl.scenes

SCENES = sorted(
    f"hooked_qwen2vl.scenes.{file.stem}" for file in Path(hooked_qwen2vl.scenes.__file__).parent.glob("*.py") if file.stem != "__init__"
)


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Sets of modules that import one another in a circle, at the top of the file, in a function or for types alone."""
    modules = sorted(graph.modules)
    number = {module: n for n, module in enumerate(modules)}
    arrows = [(number[a], number[b]) for a in modules for b in graph.find_modules_directly_imported_by(a)]
    rows, columns = np.array(arrows).T
    matrix = csr_array((np.ones(len(arrows)), (rows, columns)), shape=(len(modules), len(modules)))
    _, component = connected_components(matrix, connection="strong")
    sets = [[modules[n] for n in np.flatnonzero(component == one)] for one in np.unique(component)]
    return [one for one in sets if len(one) > 1]


def test_no_modules_import_one_another_in_a_circle():
    graph = grimp.build_graph("hooked_qwen2vl", "analyses", cache_dir=None)
    assert len(graph.modules) > 80 and graph.count_imports() > 200
    assert circles(graph) == []
    graph.add_import(importer="hooked_qwen2vl.scenes.folder", imported="hooked_qwen2vl.scenes.train")  # and it would be seen
    assert "hooked_qwen2vl.scenes.train" in circles(graph)[0]


def test_any_module_of_the_world_can_be_imported_first():
    code = (
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [module for module in sys.modules if module.startswith('hooked_qwen2vl')]:\n"
        "        del sys.modules[loaded]\n"
        "    __import__(name)\n"
    )
    subprocess.run([sys.executable, "-c", code, *SCENES], check=True)
