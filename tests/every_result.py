"""One made-up result of every class, at the size at which its picture is hardest to read, with tokens that pictures must survive.

28 layers, 20 positions, 28 heads, 1,200 image tokens; their numbers are random, their shapes and names as documented.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from explorer_pages import large
from PIL import Image
from tiny import tiny_hf, tiny_processor

from analyses.attention_heads import KINDS, AttentionHeads
from analyses.contextual_lens import ContextualScore, Grounding, LayerSweep
from analyses.counterfactuals import Candidate, Pair, Pairs
from analyses.data.benchmarks import Chair
from analyses.domain_neurons import DomainNeurons, select_neurons
from analyses.edge_attribution import EdgeAttribution
from analyses.embedding_lens import Neighbours
from analyses.experiments.ablation import AblationEffects, HeadSet
from analyses.experiments.compare import Comparison, Run
from analyses.experiments.features import UNITS, FeatureJudgement
from analyses.experiments.flips import FlipStudy
from analyses.experiments.grounding import METHODS, OWN_BOX, GroundingExperiment
from analyses.experiments.hallucination import Hallucinations
from analyses.experiments.locality import SPANS, LocalityStudy
from analyses.experiments.max_activating import Fired, TopImages
from analyses.experiments.neurons import CONTROLS, NONE, Ablations
from analyses.experiments.planted import Recovery
from analyses.experiments.saliency import FIGURES, SaliencyExperiment
from analyses.explorer import Explorer
from analyses.flip_patching import FlipAttribution
from analyses.knockout import Knockout
from analyses.logit_lens import LogitLens
from analyses.model_patching import ModelPatching
from analyses.probes import Probes
from analyses.saliency import METHODS as SALIENCY
from analyses.saliency import Curves, Saliency
from analyses.sinks import Sinks
from analyses.trajectory import Trajectories, Trajectory
from hooked_qwen2vl import HookedQwen2VL

LAYERS, POSITIONS, HEADS, ROWS, COLS = 28, 20, 28, 30, 40
HARD = ("中文颜色", "$x^2$ and $y$", "\n\n", "\t", "\x00", "\u202e", "<b>", "</script>", "", "ö" * 40, "\ufffd", " red", "W" * 30)
NAME = "Qwen/Qwen2-VL-$2B$-指令"
QUESTION = "这是什么？\nIs it $5 or $6, " + "and why so very much " * 4 + "?"
DOMAINS = ("charts", "natural images", "documents", "遥感", "medical $x$")


def token(number: int) -> str:
    return HARD[number % len(HARD)]


def tokens(*shape: int):
    """Nested tuples of hard tokens."""
    if not shape:
        return token(np.random.randint(10**6))
    return tuple(tokens(*shape[1:]) for _ in range(shape[0]))


def image(width: int = 400, height: int = 300) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def streams() -> pd.DataFrame:
    """Of `stream_by_layer`: every kind of selection."""
    kinds = (NONE, *CONTROLS, *(control for controls in CONTROLS.values() for control in controls))
    keys = [
        (kind, domain, layer, source)
        for kind in kinds
        for domain in DOMAINS
        for layer in range(LAYERS + 1)
        for source in ("image", "text", "last")
    ]
    table = pd.DataFrame(keys, columns=["selection", "domain", "layer", "source"])
    rng = np.random.default_rng(0)
    return table.assign(module="all", deviation=rng.random(len(table)), entropy_nats=rng.uniform(0, 12, len(table)))


def lens(positions: int = POSITIONS, grid: tuple[int, int] | None = None) -> LogitLens:
    probs = torch.rand(LAYERS + 1, positions, 2).softmax(-1).sort(descending=True).values
    return LogitLens(
        top_ids=torch.randint(0, 9999, probs.shape), top_probs=probs, entropy=torch.rand(LAYERS + 1, positions), final_probs=probs[..., 0],
        final_ranks=torch.zeros(LAYERS + 1, positions, dtype=torch.long), target_ids=None, target_probs=None, target_ranks=None,
        positions=tuple(range(positions)), layers=tuple(range(LAYERS + 1)),
        layer_labels=(*(f"{layer}_pre" for layer in range(LAYERS)), "final_post"), prompt_tokens=tokens(positions),
        top_tokens=tokens(LAYERS + 1, positions, 2), target_tokens=(), grid=grid, model_name=NAME,
    )  # fmt: skip


def trajectory(category: str = "colour") -> Trajectory:
    n = LAYERS + 1
    top = torch.arange(n) // 2 % len(HARD)
    shift = {"tv": 0.1, "kl": 0.2, "argmax_changed": 0.0}
    return Trajectory(
        question=QUESTION, answer="中文颜色", answer_ids=(3, 4), dropped=0, top1=top, top1_tokens=tuple(map(token, top.tolist())),
        answer_prob=torch.rand(n), answer_rank=torch.randint(0, 3, (n,)), rival="$b$", rival_prob=torch.rand(n), margin=torch.randn(n),
        entropy=11 * torch.rand(n), input_rank=torch.arange(n), candidates=("red", "blue"), candidates_top=torch.arange(n) % 2,
        last_shift=shift, double_norm_shift=shift, d_vocab=152_000, model_name=NAME, category=category,
    )  # fmt: skip


def heads() -> AttentionHeads:
    kinds = dict.fromkeys(KINDS)
    return AttentionHeads(
        {kind: torch.rand(LAYERS, HEADS) for kind in kinds}, {kind: torch.rand(LAYERS, HEADS) for kind in kinds},
        {kind: 0.1 for kind in kinds}, {kind: 0.05 for kind in kinds}, NAME,
    )  # fmt: skip


def comparison() -> Comparison:
    n = LAYERS + 1
    runs = tuple(
        Run(model, condition, Trajectories((trajectory(), trajectory("shape"))), torch.rand(2, n), torch.rand(2, n), torch.rand(3, n),
            torch.rand(3, n), torch.rand(3) + 1, 1, 0)
        for model in (NAME, "gpt2", "中文") for condition in ("image", "words", "neither")
    )  # fmt: skip
    return Comparison(runs, {model: heads() for model in (NAME, "gpt2", "中文")}, 2)


def pairs() -> Pairs:
    def candidate(number: int, picture) -> Candidate:
        return Candidate(QUESTION, picture, picture, "red", None, ((0.0, 0.0, 9.0, 9.0),), f"id-{number}", "colour", "遥感")

    model = HookedQwen2VL.from_hf(tiny_hf(), tiny_processor())
    inputs = model.to_inputs("is it?", images=[image(84, 56)])
    kept = tuple(
        Pair(inputs, inputs, candidate(n, image(84, 56)), 5, 6, torch.tensor([3, 4]), torch.tensor([4]), *torch.randn(2).tolist())
        for n in range(12)
    )
    reasons = ("wrong on the clean image", "wrong on the corrupted image", "the gap is too small: " + "very " * 20, "无法读取 $x$")
    refused = tuple((candidate(n, Path("images") / f"{n}.png"), reasons[n % 4]) for n in range(9))
    return Pairs(kept, refused, NAME)


@lru_cache(maxsize=1)  # its intervals are computed once
def hallucinations() -> Hallucinations:
    rng, n = np.random.default_rng(0), 150
    methods = ("contextual", "neg_entropy", "max_prob", "p_true", "logit_lens", "attention", "neg_perplexity", "random", "中文")
    claims = pd.DataFrame(
        {
            "key": [f"k{i}" for i in range(n)], "id": [f"i{i}" for i in range(n)], "question": QUESTION, "gold": "yes", "answer": "no",
            "category": [DOMAINS[2 + i % 3] for i in range(n)], "correct": [None if i % 50 == 0 else bool(i % 3) for i in range(n)],
            "judge": "yes/no", "said": ["yes" if i % 2 else "no" for i in range(n)], "noun": "dog", "error": "",
            **{method: np.where(rng.random(n) < 0.05, np.nan, rng.normal(size=n)) for method in methods},
            "cut": False, "other_tokens": [0] * n,
        }
    )  # fmt: skip
    return Hallucinations(claims, methods, "中文 data $x$", NAME, n_boot=5, layers=(14, 21))


@lru_cache(maxsize=1)
def ablations() -> Ablations:
    rng, rows = np.random.default_rng(0), []
    selections = [NONE, *CONTROLS, *dict.fromkeys(control for controls in CONTROLS.values() for control in controls)]
    for selection in selections:
        for module in ("all",) if selection == NONE else ("decoder", "tower", "all"):
            for domain in DOMAINS:
                for i in range(4):
                    rows.append({"selection": selection, "module": module, "target": "" if selection == NONE else domain, "seed": 0,
                                 "neurons": 9, "id": f"{domain}-{i}", "image": f"{domain}-{i // 2}", "domain": domain,
                                 "right": bool(rng.random() < 0.6), "log_prob": float(rng.normal())})  # fmt: skip
    return Ablations(pd.DataFrame(rows), NAME)


def grounding() -> Grounding:
    heat = tuple(torch.rand(ROWS, COLS) for _ in range(2))
    return Grounding(
        heat, heat, ((0, 0, 3, 4), (2, 2, 9, 9)), torch.tensor([[0.0, 0, 30, 40], [20, 20, 90, 90]]), torch.rand(2),
        ((400.0, 300.0), (400.0, 300.0)), QUESTION, 14, 20, NAME,
    )  # fmt: skip


def grounding_experiment() -> GroundingExperiment:
    rows = [
        {"item": i, "category": DOMAINS[i % 5], "domain": "shapes", "right": True, "share": 0.1, "method": method,
         "pointing": float(np.random.rand() < 0.5), "ap": np.random.rand(), "iou": np.random.rand() if method == OWN_BOX else np.nan}
        for i in range(30) for method in (*METHODS, OWN_BOX)
    ]  # fmt: skip
    return GroundingExperiment(pd.DataFrame(rows), {"too large": 2}, {"split": "test", "seed": 0, "image_layer": 3, "model": NAME})


def edges(layers: int = LAYERS, n_heads: int = 12, kv: int = 2) -> EdgeAttribution:
    writers = ["embed", *(name for l in range(layers) for name in (*(f"L{l}H{h}" for h in range(n_heads)), f"MLP{l}"))]
    readers = [
        name for l in range(layers)
        for name in (*(f"L{l}H{h}.q" for h in range(n_heads)), *(f"L{l}H{h}.{p}" for p in "kv" for h in range(kv)), f"MLP{l}")
    ] + ["logits"]  # fmt: skip
    there = torch.ones(len(writers), len(readers)).triu().bool()
    return EdgeAttribution(torch.randn(there.shape) * there, there, tuple(writers), tuple(readers), 5, NAME)


def flip_study() -> FlipStudy:
    prompts = Trajectories(tuple(trajectory(DOMAINS[i % 5]) for i in range(10))).to_dataframe()
    prompts.insert(0, "id", [f"i{i}" for i in range(10)])
    prompts["L"] = LAYERS
    n = 40
    numbers = {f"{where}_difference{what}": torch.randn(n).tolist() for where in ("lens", "final") for what in ("", "_ablated", "_random")}
    flips = pd.DataFrame(
        {"prompt": [i % 10 for i in range(n)], "id": "i", "question": QUESTION, "category": "colour", "right": [i % 3 > 0 for i in range(n)],
         "L": LAYERS, "layer": [i % LAYERS + 1 for i in range(n)], "lost": "a", "gained": "中", "change": 1.0, "attribution_error": 0.0,
         "components": "L3H2", **numbers, "removed": True, "removed_by_random": 0.1, "reversed": False, "reversed_by_random": 0.2}
    )  # fmt: skip
    return FlipStudy(prompts, flips, 1)


def neighbours(positions: int = POSITIONS) -> Neighbours:
    cosines = torch.rand(LAYERS + 1, positions, 3).sort(descending=True).values
    return Neighbours(
        cosines, torch.randint(0, 99, cosines.shape), tokens(LAYERS + 1, positions, 3), tokens(LAYERS + 1, positions, 3),
        tuple(range(LAYERS + 1)), tuple(range(100, 100 + positions)), NAME,
    )  # fmt: skip


def chair() -> Chair:
    mentions = pd.DataFrame(
        [
            {"image": f"i{i % 9}", "word": token(i), "object": token(i), "start": i, "end": i + 2, "hallucinated": i % 3 == 0}
            for i in range(80)
        ]
    )
    return Chair(mentions, 12)


def top_images() -> TopImages:
    examples = tuple(Fired(f"i{i}", QUESTION, DOMAINS[i], image(), torch.randn(ROWS, COLS)) for i in range(4))
    return TopImages(("decoder", 13, 4711), examples, tuple(map(token, range(6))))


def model_patching() -> ModelPatching:
    places = (*(f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)), f"blocks.{LAYERS - 1}.hook_resid_post")
    cells = torch.rand(len(places), 4, 6)
    return ModelPatching(
        cells, cells.round(), torch.rand(6), torch.ones(6), places, ("all", "image", "question", "last"), "resid_pre", 0, NAME, "中文 $m$"
    )


def explorer() -> Explorer:
    return large(rows=ROWS, cols=COLS, layers=LAYERS + 1, heads=HEADS, d_vocab=3000)


def contextual_score() -> ContextualScore:
    return ContextualScore(
        torch.rand(24), torch.rand(24, ROWS * COLS), tuple(f"word {i}" for i in range(24)), tuple(map(token, range(24))),
        torch.zeros(ROWS * COLS, dtype=torch.long), torch.rand(ROWS * COLS, 4), 14, 20, NAME,
    )  # fmt: skip


def domain_neurons() -> DomainNeurons:
    modules = {m: select_neurons(torch.rand(LAYERS, 64, 5).double(), 0.1) for m in ("tower", "projector", "decoder")}
    return DomainNeurons(modules, DOMAINS, ("image", "text"), NAME)


def flip_attribution() -> FlipAttribution:
    return FlipAttribution(27, "中文颜色", "$x$", 3, 4, -1.0, 2.0, torch.randn(HEADS), 0.1, -0.4, 0.2, 1219)


def ablation_effects() -> AblationEffects:
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"i{i}", "image": f"i{i // 2}", "category": DOMAINS[i % 5], "part": f"L{part}H1", "log_prob": float(rng.normal()),
         "right": bool(rng.random() < 0.5), "base_log_prob": 0.0, "base_right": True}
        for part in range(30) for i in range(8)
    ]  # fmt: skip
    return AblationEffects(pd.DataFrame(rows), {"how": "mean"}, NAME)


def head_set() -> HeadSet:
    search = pd.DataFrame({"size": range(1, 13), "layer": range(12), "head": 27, "share": np.linspace(0, 0.8, 12)})
    shares = {"share": np.linspace(0.8, -0.3, 21), "share_low": np.linspace(0.7, -0.4, 21), "share_high": np.linspace(0.9, -0.2, 21)}
    held_out = pd.DataFrame({"set": ["found", *(f"random {n}" for n in range(20))], "heads": "L0H1", **shares})
    return HeadSet(tuple((l, 27) for l in range(12)), search, held_out, 64, 96, {"share": 0.8, "how": "mean"}, NAME)


def saliency_map() -> Saliency:
    return Saliency(
        torch.randn(13, ROWS * COLS).double(), -torch.rand(13), torch.arange(13), HARD, ((ROWS, COLS),), ((400, 300),), "knockout", None,
        QUESTION, NAME,
    )  # fmt: skip


def saliency_experiment() -> SaliencyExperiment:
    rows = [
        {"id": f"i{i}", "image": f"i{i // 2}", "category": "colour", "method": method, **dict.fromkeys(FIGURES, float(np.random.rand()))}
        for i in range(12) for method in SALIENCY
    ]  # fmt: skip
    return SaliencyExperiment(pd.DataFrame(rows), {}, {"steps": 10}, NAME)


def feature_judgement() -> FeatureJudgement:
    rows = [
        {"truth": truth, "label": f"{token(i)} {i}", "unit": unit, "which": i, "auroc": 0.8, "auroc_low": 0.7, "auroc_high": 0.9,
         "chosen_auroc": 0.85, "objects": 20, "images": 40}
        for truth in ("color", "kind") for i in range(13) for unit in UNITS
    ]  # fmt: skip
    return FeatureJudgement(pd.DataFrame(rows), "blocks.4.hook_resid_pre", 1024, NAME)


def recovery() -> Recovery:
    found = pd.DataFrame(
        {"what": what, "seed": seed, "strength": strength, "method": method, "planted": 6, "chosen": 40, "recovered": 0.3 * seed,
         "random": 0.05, "random_high": 0.17}
        for what in ("domain neurons", "color prior", "copying head") for seed in range(3) for strength in (0.25, 0.5, 1.0)
        for method in ("zero ablation", "direct attribution")
    )  # fmt: skip
    behavior = pd.DataFrame([{"what": "color prior", "seed": 0, "strength": 1.0, "questions": "typical colour", "condition": "before",
                              "items": 9, "accuracy": 0.9, "copied": 0.1}])  # fmt: skip
    scores = pd.DataFrame([{"what": "color prior", "seed": 0, "strength": 1.0, "method": "probability", "auroc": 0.7, "auroc_low": 0.6,
                            "auroc_high": 0.8, "items": 40, "hallucinated": 12}])  # fmt: skip
    return Recovery(found, behavior, scores, NAME, "0123456789ab")


def sinks() -> Sinks:
    n = 300
    massive = pd.DataFrame({"layer": [2], "position": [0], "dimension": [7], "value": [1e4], "ratio": [2e3]})
    is_sink = torch.arange(n) % 40 == 0
    return Sinks(
        torch.rand(LAYERS, n) + 1, torch.rand(LAYERS, n) + 0.1, massive, tokens(n), ("question",) * n, tuple(range(20, 260)), ((12, 20),),
        is_sink, 5.0, 1, 1000.0, NAME,
    )  # fmt: skip


def probes() -> Probes:
    sites = [f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)]
    values = {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8, "control": 0.3, "control_largest": 0.4, "selectivity": 0.4}
    table = pd.DataFrame([{"site": site, **values, "majority": 0.35, "items": 40, "images": 20} for site in sites])
    weights = {site: torch.randn(3, 8) for site in sites}
    return Probes(table, weights, {site: torch.randn(3) for site in sites}, ("a", "b", "中"), {"C": 0.1}, NAME)


RESULTS = {
    AttentionHeads: heads,
    AblationEffects: ablation_effects,
    Ablations: ablations,
    Chair: chair,
    Comparison: comparison,
    ContextualScore: contextual_score,
    Curves: lambda: Curves(torch.linspace(0, 1, 11), torch.rand(11), torch.rand(11), "keys", "attention × gradient", NAME),
    DomainNeurons: domain_neurons,
    EdgeAttribution: edges,
    Explorer: explorer,
    FeatureJudgement: feature_judgement,
    Recovery: recovery,
    FlipAttribution: flip_attribution,
    FlipStudy: flip_study,
    Grounding: grounding,
    GroundingExperiment: grounding_experiment,
    Hallucinations: hallucinations,
    HeadSet: head_set,
    Knockout: lambda: Knockout(
        torch.randn(5, LAYERS, 6), torch.rand(6), ("image → last", "question → last", "中文", "$a$ → $b$", "x"), 5, 0, NAME
    ),
    LayerSweep: lambda: LayerSweep(torch.rand(LAYERS + 1, LAYERS + 1), 14, 20, 100, 60, NAME),
    LocalityStudy: lambda: LocalityStudy((True, False), (0.1, 0.2), (0.1, 0.3), torch.rand(2, LAYERS, len(SPANS)), ("a", "b"), 3, 0, NAME),
    LogitLens: lens,
    ModelPatching: model_patching,
    Neighbours: neighbours,
    Pairs: pairs,
    Probes: probes,
    Saliency: saliency_map,
    SaliencyExperiment: saliency_experiment,
    Sinks: sinks,
    TopImages: top_images,
    Trajectories: lambda: Trajectories(tuple(trajectory(DOMAINS[i % 5]) for i in range(10))),
    Trajectory: trajectory,
}
