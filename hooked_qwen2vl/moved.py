"""Names of earlier versions, in both packages; each refers to the current object and gives a DeprecationWarning.

modules      MOVED, found by MovedModules; KEPT are public paths that remain valid, without a warning
names        NAMES, through a module's `__getattr__ = moved_names(__name__)`
attributes   ATTRIBUTES, through the class decorator `renamed_attributes`
arguments    ARGUMENTS, through the function decorator `renamed_arguments`
stored       fields and columns in files of earlier versions: ATTRIBUTES and COLUMNS, through `current_fields` and `renamed_columns`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any, ParamSpec, TypeVar

C = TypeVar("C")
R = TypeVar("R")
P = ParamSpec("P")

KEPT = {  # public paths that remain valid: no warning
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
    "hooked_qwen2vl.scenes.sheet": "hooked_qwen2vl.scenes.contact_sheets",
}
NAMES = {  # module -> earlier name -> current module and name
    "analyses.common.statistics": {"within": "analyses.common.statistics:within_groups"},
    "analyses.common.vocabulary": {
        "Readout": "analyses.common.vocabulary:Predictions",
        "readout": "analyses.common.vocabulary:predictions_of",
    },
    "analyses.logit_lens": {"read_entries": "analyses.logit_lens:residual_at"},
    "analyses.runs": {
        "Part": "analyses.runs.engine:Shard",
        "read_part": "analyses.runs.engine:read_shard",
        "settled": "analyses.runs.engine:refreshed",
        "this_share": "analyses.runs.engine:this_rank",
    },
    "analyses.runs.engine": {
        "Part": "analyses.runs.engine:Shard",
        "read_part": "analyses.runs.engine:read_shard",
        "settled": "analyses.runs.engine:refreshed",
        "this_share": "analyses.runs.engine:this_rank",
    },
    "hooked_qwen2vl.prompt_text": {
        "Part": "hooked_qwen2vl.prompt_text:Segment",
        "tokenize_parts": "hooked_qwen2vl.prompt_text:tokenize_segments",
    },
    "hooked_qwen2vl.segments": {"names_from_ids": "hooked_qwen2vl.segments:segments_from_ids"},
    "hooked_qwen2vl.devices": {
        "beside": "hooked_qwen2vl.devices:to_its_device",
        "spread_over": "hooked_qwen2vl.devices:n_devices",
    },
    "hooked_qwen2vl.image_embeddings": {"Prefixes": "hooked_qwen2vl.image_embeddings:ImageEmbeddingsCache"},
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

ATTRIBUTES = {  # class -> earlier name -> current name
    "hooked_qwen2vl.geometry:Geometry": {"part_names": "segment_names"},
    "hooked_qwen2vl.inputs:Inputs": {"names": "segments"},
    "analyses.explorer:Explorer": {"parts": "segments"},
    "analyses.flip_patching:FlipAttribution": {"entry": "flip_layer", "layer": "block"},
    "analyses.runs.engine:Run": {"share": "rank"},
    "analyses.runs.plan:Memory": {"prefixes": "embeddings"},
    "analyses.flip_patching:FlipTest": {"entry_difference": "lens_difference"},
}
ARGUMENTS = {  # function -> earlier name -> current name
    "hooked_qwen2vl.inputs:Inputs.build": {"names": "segments"},
    "analyses.contextual_lens:word_spans": {"part": "segment"},
    "analyses.views.circuits:strip": {"names": "segments"},
    "analyses.flip_patching:attribute_flip": {"entry": "layer"},
    "analyses.runs.engine:run": {"prefixes": "embeddings", "shard": "rank", "batches_per_part": "batches_per_shard"},
    "analyses.runs.engine:prepare": {"prefixes": "embeddings", "shard": "rank"},
    "analyses.runs.activation_store:store_activations": {"shard": "rank", "batches_per_part": "batches_per_shard"},
    "analyses.experiments.experiment:Experiment.run": {"shard": "rank"},
    "analyses.experiments.experiment:Experiment.start": {"shard": "rank"},
    "analyses.experiments.flips:flip_study": {"shard": "rank"},
    "analyses.experiments.hallucination:detect_hallucinations": {"shard": "rank"},
    "analyses.experiments.neurons:count_firings": {"shard": "rank"},
    "analyses.experiments.neurons:ablation_effects": {"shard": "rank"},
    "analyses.experiments.neurons:ablate": {"shard": "rank"},
}
COLUMNS = {  # result -> earlier column -> current column, for tables in files
    "analyses.experiments.flips:FlipStudy": {
        "entry": "layer",
        "entry_difference": "lens_difference",
        "entry_difference_ablated": "lens_difference_ablated",
        "entry_difference_random": "lens_difference_random",
    },
}


def moved_names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that finds names of earlier versions, with a DeprecationWarning."""

    def find(name: str) -> Any:
        if name not in NAMES[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = NAMES[module][name].partition(":")
        warn_of(f"{module}.{name}", f"{home}.{now}", stacklevel=2)
        return getattr(import_module(home), now)

    return find


def renamed_attributes(cls: type[C]) -> type[C]:
    """Class decorator that makes renamed attributes readable under their earlier names."""
    for old, new in ATTRIBUTES[place_of(cls)].items():
        setattr(cls, old, _renamed_attribute(f"{place_of(cls)}.{old}", f"{place_of(cls)}.{new}", new))
    return cls


def _renamed_attribute(was: str, now: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_of(was, now)
        return getattr(self, new)

    return property(read, doc=f"Now `{new}`.")


def renamed_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Function decorator that accepts renamed keyword arguments under their earlier names.

    Raises:
        TypeError: when called: an argument under both names.
    """
    place, names = place_of(function), ARGUMENTS[place_of(function)]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for old in names.keys() & kwargs.keys():
            if names[old] in kwargs:
                raise TypeError(
                    f"{function.__name__}() got {names[old]}= and {old}=, its name in earlier versions: give {names[old]}= alone."
                )
            warn_of(f"{place}({old}=)", f"{place}({names[old]}=)", stacklevel=3)
            kwargs[names[old]] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call


def place_of(thing: Any) -> str:
    """ "module:name" of a class or function, as in the tables above."""
    return f"{thing.__module__}:{thing.__qualname__}"


def warn_of(was: str, now: str, stacklevel: int = 3) -> None:
    """Gives the DeprecationWarning "`was` is now `now`."."""
    warnings.warn(f"{was.replace(':', '.')} is now {now.replace(':', '.')}.", DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_columns(kind: type) -> dict[str, str]:
    """Earlier name -> current name of the renamed columns in a result's tables."""
    return COLUMNS.get(place_of(kind), {})


def current_fields(place: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a file stores for a class, under their current names."""
    names = ATTRIBUTES.get(place, {})
    return {(names[name] if name in names and names[name] not in stored else name): value for name, value in stored.items()}


class MovedModules(MetaPathFinder, InspectLoader):
    """Import finder for modules under their earlier paths, also for `python -m`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in KEPT and name not in MOVED:
            return None
        return ModuleSpec(name, self, origin=find_spec(current_path(name)).origin)  # becomes sys.argv[0] with `python -m`

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name in MOVED:
            warn_of(spec.name, MOVED[spec.name], stacklevel=2)
        module = import_module(current_path(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import system has set the spec of the old path

    def get_code(self, fullname: str) -> CodeType | None:
        spec = find_spec(current_path(fullname))
        return spec.loader.get_code(spec.name)  # pyright: ignore[reportAttributeAccessIssue] (of a source file)

    def get_source(self, fullname: str) -> str | None:
        spec = find_spec(current_path(fullname))
        return spec.loader.get_source(spec.name)  # pyright: ignore[reportAttributeAccessIssue] (of a source file)


def current_path(name: str) -> str:
    """The current path of a module; the given path if it was never moved."""
    return KEPT.get(name) or MOVED.get(name, name)
