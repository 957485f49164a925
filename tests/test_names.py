"""The names that code outside relies on: each is still where README, docs, notebooks and the design have put it once."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import pickle
import subprocess
import sys
import warnings
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace

import pandas as pd
import pytest
from every_result import RESULTS

import hooked_qwen2vl
from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.moved import ARGUMENTS, ATTRIBUTES, COLUMNS, KEPT, MOVED, NAMES

PUBLIC = {
    "analyses.activation_store": "ActivationStore store_activations",
    "analyses.attention_heads": "detect_heads",
    "analyses.baselines": "SCORES all_scores",
    "analyses.benchmarks": "load_amber load_chair load_grounding load_hqh load_mmhal load_pope load_scenes",
    "analyses.compare": "compare_models text_agreement",
    "analyses.contextual_lens": "contextual_score ground sweep_layers word_spans yes_no_score",
    "analyses.counterfactuals": "check_pairs scene_candidates",
    "analyses.data": "examples",
    "analyses.direct_path": "",
    "analyses.domain_neurons": "count_firings disable_neurons find_domain_neurons mean_activations read_firings",
    "analyses.edge_attribution": "",
    "analyses.embedding_lens": "",
    "analyses.explorer": "explore",
    "analyses.flip_patching": "attribute_flip component_effects",
    "analyses.grounding_experiment": "",
    "analyses.hallucination": "detect_hallucinations read_hallucinations",
    "analyses.interventions": "ablate drop_tokens hide mask_image project_out redirect_attention scale_heads steer",
    "analyses.dictionaries": "load_dictionary",
    "analyses.saliency": "saliency token_effects",
    "analyses.knockout": "attention_knockout",
    "analyses.logit_lens": "logit_lens",
    "analyses.model_patching": "patch_between_models",
    "analyses.neuron_experiment": "ablate conditions prepare read_ablations read_effects",
    "analyses.neuron_pictures": "top_images written_tokens",
    "analyses.patching": "patch_sweep recovery",
    "analyses.prefixes": "Prefixes",
    "analyses.project_away": "",
    "analyses.run_sums": "",
    "analyses.runs": "read_failures read_results run",
    "analyses.studies": "flip_study read_flip_study",
    "analyses.trajectory": "answer_trajectory",
    "analyses.tuned_lens": "",
    "analyses.views.attention": "maps_on_image",
    "analyses.views.circuits": "Page strip",
    "analyses.views.patching": "recovery_map recovery_on_image",
    "hooked_qwen2vl": "HookedQwen2VL Inputs cache_image",
    "hooked_qwen2vl.cli": "main",
    "hooked_qwen2vl.scenes": "counterfactual_pairs sample",
}
MEMBERS = {
    HookedQwen2VL: (
        "from_pretrained from_hf to_inputs encode run_with_cache run_with_hooks hooks generate process_weights to_string to_single_token "
        "to_tokens set_use_attn_result set_use_split_qkv_input set_use_attn_in set_use_hook_mlp_in tl_parameters blocks_with "
        "W_E W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out QK OV accumulated_bias tokens_to_residual_directions "
        "all_composition_scores all_head_labels"
    ),
    Inputs: (
        "from_processor from_tokens tokens attention_mask position_ids image_grids positions span shape ndim device to cpu repeat __len__ __getitem__ token_types boxes grid"
    ),
}
COMMANDS = "ablate check compare explain explore flips ground hallucination knockout lens neurons patch scenes".split()
RUN_AS_MODULES = [
    "analyses.grounding_experiment", "analyses.experiments.grounding", "analyses.experiments.features", "hooked_qwen2vl.cli", "hooked_qwen2vl.scenes.train",
    "hooked_qwen2vl.scenes.card",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_is_there(path):
    module = import_module(path)
    missing = [name for name in PUBLIC[path].split() if not hasattr(module, name)]
    assert not missing
    for name in PUBLIC[path].split():  # as `from path import name` has it
        space = {}
        exec(f"from {path} import {name}", space)
        assert space[name] is getattr(module, name)


@pytest.mark.parametrize("owner", MEMBERS)
def test_every_public_member_is_there(owner):
    fields = getattr(owner, "__dataclass_fields__", {})
    assert not [name for name in MEMBERS[owner].split() if not hasattr(owner, name) and name not in fields]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_there(command, capsys):
    from analyses.cli import main

    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"hooked-qwen2vl {command}" in capsys.readouterr().out


def test_the_command_says_its_version(capsys):
    from analyses.cli import main

    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"hooked-qwen2vl {hooked_qwen2vl.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN_AS_MODULES)
def test_modules_that_are_run_say_their_usage(path):
    done = subprocess.run([sys.executable, "-m", path, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


# ---- paths that modules had before ------------------------------------------------------------------


def forgotten(monkeypatch, path):
    """As if nothing had imported the module by this path yet."""
    monkeypatch.delitem(sys.modules, path, raising=False)


@pytest.mark.parametrize("old, new", [*KEPT.items(), *MOVED.items()])
def test_an_old_path_is_the_very_module(old, new, monkeypatch):
    """No second copy, whose classes and registries would be others; and it keeps its own name, file and loader."""
    forgotten(monkeypatch, old)
    module = import_module(new)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert import_module(old) is module
    ours = [str(warning.message) for warning in said if " is now " in str(warning.message)]
    assert ours == ([f"{old} is now {new}."] if old in MOVED else [])
    assert module.__name__ == module.__spec__.name == new and module.__spec__.origin == module.__file__
    parent, _, name = old.rpartition(".")
    assert getattr(import_module(parent), name) is module  # `from analyses import name`


def test_old_and_new_come_in_either_order():
    """In a fresh process, the old path first, and each once more; the warning names the line that imports."""
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from analyses.rectangles import *\n"
        "    import analyses.rectangles, analyses.common.rectangles\n"
        "    from analyses import rectangles\n"
        "assert analyses.rectangles is analyses.common.rectangles is rectangles\n"
        "print([str(one.message) for one in said])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['analyses.rectangles is now analyses.common.rectangles.']"


def test_what_was_never_there_is_not_found():
    for path in ("analyses.nowhere", "analyses.rectangles.more", "hooked_qwen2vl.nowhere", "nowhere"):
        with pytest.raises(ModuleNotFoundError, match="nowhere|more"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(path)


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_objects_pickled_under_an_old_path_are_read():
    """What an earlier version pickled names the old path; what is pickled now names the new one."""
    from analyses.common.result import Result

    old = b"canalyses.result\nResult\n."  # protocol 0: the global `analyses.result.Result`
    assert pickle.loads(old) is Result
    assert b"analyses.common.result" in pickle.dumps(Result)


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_a_module_imported_by_its_old_path_can_be_reloaded():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from importlib import reload\n"
        "import analyses.rectangles as old, analyses.common.rectangles as new\n"
        "assert reload(old) is new and old.__name__ == 'analyses.common.rectangles'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- names that classes, functions and tables had before -------------------------------------------------


def each(table: dict) -> list[tuple[str, str, str]]:
    return [(place, old, new) for place, names in table.items() for old, new in names.items()]


def thing(place: str):
    module, _, name = place.partition(":")
    return attrgetter(name)(import_module(module))


@pytest.mark.parametrize("module, old, new", each(NAMES))
def test_an_old_name_is_the_very_thing(module, old, new):
    home, _, name = new.partition(":")
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {home}\.{name}\."):
        found = getattr(import_module(module), old)
    assert found is thing(new) and old not in vars(import_module(module))


@pytest.mark.parametrize("place, old, new", each(ATTRIBUTES))
def test_an_old_attribute_gives_what_the_new_one_does(place, old, new):
    kind = thing(place)
    assert new in {*getattr(kind, "__dataclass_fields__", {}), *dir(kind)} and old not in getattr(kind, "__dataclass_fields__", {})
    with pytest.warns(DeprecationWarning, match=rf"{kind.__name__}\.{old} is now .*{kind.__name__}\.{new}\."):
        assert inspect.getattr_static(kind, old).fget(SimpleNamespace(**{new: 7})) == 7


@pytest.mark.parametrize("place, old, new", each(ARGUMENTS))
def test_an_old_argument_is_taken_and_both_are_refused(place, old, new):
    function = thing(place)
    names = inspect.signature(function).parameters
    assert new in names and old not in names
    with pytest.warns(DeprecationWarning, match=rf"\({old}=\) is now .*\({new}=\)\."), pytest.raises(TypeError, match="missing"):
        function(**{old: 7})  # of the others, not of this one
    with pytest.raises(TypeError, match=f"{new}= and {old}="):
        function(**{old: 7, new: 7})


def test_an_old_option_is_taken_and_hidden(capsys):
    from analyses.cli.shared import add_run

    parser = argparse.ArgumentParser()
    add_run(parser, 8)
    with pytest.warns(DeprecationWarning, match="--shard is now --rank"):
        assert parser.parse_args(["--shard", "1/2"]).rank == parser.parse_args(["--rank", "1/2"]).rank == "1/2"
    assert "--shard" not in parser.format_help()


def test_tables_in_files_have_their_columns_of_now(tmp_path):
    for place, names in COLUMNS.items():
        result = RESULTS[thing(place)]()
        tables = {f: value for f, value in vars(result).items() if isinstance(value, pd.DataFrame)}
        before = {f: table.rename(columns={new: old for old, new in names.items()}) for f, table in tables.items()}
        assert any(not before[f].columns.equals(table.columns) for f, table in tables.items())
        again = type(result).load(dataclasses.replace(result, **before).save(tmp_path / "before"))
        assert all(getattr(again, f).columns.equals(table.columns) for f, table in tables.items())
