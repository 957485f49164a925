"""Import paths of earlier versions: each gives the very module, or name, that is meant now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

KEPT = {  # public paths that stay: no warning
    "analyses.benchmarks": "analyses.data.benchmarks",
    "analyses.compare": "analyses.experiments.compare",
}
MOVED = {
    "analyses.activation_store": "analyses.runs.activation_store",
    "analyses.baselines": "analyses.answer_scores",
    "analyses.detection": "analyses.common.statistics",
    "analyses.grounding_experiment": "analyses.experiments.grounding",
    "analyses.hallucination": "analyses.experiments.hallucination",
    "analyses.neuron_experiment": "analyses.experiments.neurons",
    "analyses.neuron_pictures": "analyses.experiments.max_activating",
    "analyses.prefixes": "hooked_qwen2vl.image_embeddings",
    "analyses.readout": "analyses.common.vocabulary",
    "analyses.rectangles": "analyses.common.rectangles",
    "analyses.result": "analyses.common.result",
    "analyses.run_files": "analyses.runs.files",
    "analyses.run_plan": "analyses.runs.plan",
    "analyses.run_sums": "analyses.runs.sums",
    "analyses.studies": "analyses.experiments.flips",
    "analyses.views.studies": "analyses.views.experiments",
}
NAMES = {  # module -> name of earlier versions -> module and name now
    "analyses.domain_neurons": {
        "firing_work": "analyses.experiments.neurons:FiringExperiment",
        "read_firings": "analyses.experiments.neurons:read_firings",
    },
    "analyses.experiments.flips": {
        "flip_work": "analyses.experiments.flips:FlipExperiment",
        "knockout_study": "analyses.experiments.knockout:knockout_study",
        "LocalityStudy": "analyses.experiments.locality:LocalityStudy",
        "locality_study": "analyses.experiments.locality:locality_study",
        "SPANS": "analyses.experiments.locality:SPANS",
        "wilson": "analyses.common.statistics:wilson",
    },
    "analyses.experiments.hallucination": {
        "hallucination_work": "analyses.experiments.hallucination:HallucinationExperiment",
    },
    "analyses.experiments.neurons": {
        "ablation_work": "analyses.experiments.neurons:AblationExperiment",
        "effect_work": "analyses.experiments.neurons:EffectExperiment",
        "wilson": "analyses.common.statistics:wilson",
    },
}


def moved_names(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: names that it had in earlier versions, each with a DeprecationWarning."""

    def find(name: str) -> Any:
        if name not in NAMES[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = NAMES[module][name].partition(":")
        warnings.warn(f"{module}.{name} is now {home}.{now}.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), now)

    return find


class MovedModules(MetaPathFinder, InspectLoader):
    """Finds a module under the path it had before, also for `python -m`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in KEPT and name not in MOVED:
            return None
        return ModuleSpec(name, self, origin=find_spec(current_path(name)).origin)  # which `python -m` makes sys.argv[0]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in MOVED:
            warnings.warn(f"{spec.name} is now {MOVED[spec.name]}.", DeprecationWarning, stacklevel=2)
        module = import_module(current_path(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import system has put the old path's there

    def get_code(self, fullname: str) -> CodeType | None:
        spec = find_spec(current_path(fullname))
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        spec = find_spec(current_path(fullname))
        return spec.loader.get_source(spec.name)


def current_path(name: str) -> str:
    """Where a module is now; its own name where it was never moved."""
    return KEPT.get(name) or MOVED.get(name, name)
