"""Sparse autoencoders and transcoders: load, splice into a run, edit features, map, attribute, train.

1. A dictionary encodes an activation x as sparse feature activations f(x) ≥ 0 and decodes them: x ≈ decode(f). A transcoder decodes
   to another activation than it encodes: an MLP's output from its input.
2. Splicing with the error term replaces the activation h by h + decode(edit(f)) − decode(f); without an edit the run is unchanged,
   bit for bit. Splicing without the error term replaces h by decode(edit(f)).
3. Attribution of a logit (or a logit difference) to features: activation × gradient through the rest of the model, with the final
   norm's scale held constant. At the last block's output it is exact: features, the decoder's bias and the error sum to the logit.

Formats: SAELens (cfg.json and sae_weights.safetensors: standard, topk, jumprelu, gated, and transcoders, of all versions) and
EleutherAI's sparsify (cfg.json and sae.safetensors). Other formats are refused. Definitions follow those libraries.

Sources: Bricken et al. 2023; Gao et al. 2024 (TopK); Rajamanoharan et al. 2024 (gated, JumpReLU); Dunefsky et al. 2024 (transcoders);
Marks et al. 2024 (attribution with the error term).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.prompts import Prompt
from analyses.common.result import Result
from analyses.data.examples import Example
from analyses.interventions import Interventions, Where
from hooked_qwen2vl.files import whole_files
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.protocols import Model

ACTIVATIONS = ("relu", "topk", "jumprelu", "gated")
NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
Edit = Callable[[Float[Tensor, "batch pos feature"]], Float[Tensor, "batch pos feature"]]


@dataclass(frozen=True)
class Dictionary(Result):
    """A sparse autoencoder or a transcoder.

    Attributes:
        hook: the hook point that is encoded; hook_out: the hook point that is reconstructed, another one for a transcoder.
        W_enc: [d_in feature]. b_enc: [feature]. W_dec: [feature d_out]. b_dec: [d_out].
        activation: one of ACTIVATIONS. k: of "topk". threshold: [feature] of "jumprelu".
        r_mag, b_mag: [feature] of "gated", whose b_enc is the gate's bias.
        W_skip: [d_in d_out] of a transcoder with a skip connection.
        centred: whether b_dec is subtracted from the input. by_norm: whether "topk" multiplies activations by the norms of W_dec's rows.
        normalisation: of the input, one of NORMALISATIONS. name: name of the folder that it was loaded from.
    """

    hook: str
    hook_out: str
    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]
    activation: str = "relu"
    k: int | None = None
    threshold: Float[Tensor, "feature"] | None = None
    r_mag: Float[Tensor, "feature"] | None = None
    b_mag: Float[Tensor, "feature"] | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    centred: bool = True
    by_norm: bool = False
    normalisation: str = "none"
    name: str = ""

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per feature: norms of its encoder and decoder, its bias."""
        columns = {"encoder_norm": self.W_enc.norm(dim=0), "decoder_norm": self.W_dec.norm(dim=1), "bias": self.b_enc}
        return pd.DataFrame({"feature": range(self.n_features), **{name: values.tolist() for name, values in columns.items()}})

    def encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes feature"]:
        """Feature activations, in the dictionary's dtype."""
        x = self._normalised(x.to(self.W_enc.dtype))[0]
        x = x - self.b_dec if self.centred else x
        pre: Any = x @ self.W_enc + self.b_enc
        if self.activation == "gated":
            return (pre > 0) * (x @ (self.W_enc * cast(Any, self.r_mag).exp()) + cast(Any, self.b_mag)).relu()
        if self.activation == "jumprelu":
            return pre.relu() * (pre > self.threshold)
        if self.activation == "topk":
            pre = pre * self.W_dec.norm(dim=-1) if self.by_norm else pre
            top = pre.topk(cast(int, self.k), dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return pre.relu()

    def decode(self, features: Float[Tensor, "*axes feature"], x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
        """The reconstruction; x, the encoded activation, is needed to undo the normalisation and for a skip connection."""
        features = features / self.W_dec.norm(dim=-1) if self.by_norm else features
        out = features @ self.W_dec + self.b_dec
        x = x.to(out.dtype)
        if self.W_skip is not None:
            out = out + x @ self.W_skip
        return self._normalised(x)[1](out) if self.hook == self.hook_out else out

    def direction(self, feature: int) -> Float[Tensor, "d_out"]:
        """What a feature adds to the reconstruction per unit of its activation."""
        if not 0 <= feature < self.n_features:
            raise ValueError(f"feature must be in 0..{self.n_features - 1}, got {feature}.")
        row = self.W_dec[feature]
        return row / row.norm() if self.by_norm else row

    def to(self, *args: Any) -> Dictionary:
        """The dictionary on another device or in another dtype; arguments as `Tensor.to`."""
        moved = {name: value.to(*args) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(the normalised input, the function that undoes the normalisation)."""
        if self.normalisation == "constant_norm_rescale":
            scale = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * scale, lambda out: out / scale
        if self.normalisation == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), lambda out: out * std + mean
        return x, lambda out: out


# ---- files --------------------------------------------------------------------------------------


def load_dictionary(
    folder: str | Path, hook: str | None = None, hook_out: str | None = None, dtype: torch.dtype | None = None
) -> Dictionary:
    """Reads a folder in the format of SAELens or sparsify.

    Args:
        hook: the hook point; None: from the configuration (sparsify's has none). hook_out: the same for a transcoder's output.
        dtype: None: the file's.
    Raises:
        ValueError: another format or kind of dictionary, missing or damaged files, weights that are not finite or whose shapes do not
            fit, or no hook.
    """
    folder = Path(folder)
    files = {name: folder / name for name in ("sae_weights.safetensors", "sae.safetensors") if (folder / name).is_file()}
    if not (folder / "cfg.json").is_file() or len(files) != 1:
        there = sorted(file.name for file in folder.iterdir())[:8] if folder.is_dir() else "no folder"
        raise ValueError(
            f"{folder} holds no dictionary that can be read: expected cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors "
            f"(sparsify), found {there}. Gemma Scope's .npz, pickled .pt files and others: load them with their own library and save as SAELens."
        )
    (kind, path), *_ = files.items()
    try:
        config, weights = json.loads((folder / "cfg.json").read_text(encoding="utf-8")), load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({type(error).__name__}: {str(error)[:200]}): its files are damaged.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'cfg.json'}: expected a configuration (an object), got {str(config)[:80]!r}.")
    fields = (_of_saelens if kind == "sae_weights.safetensors" else _of_sparsify)(config, weights, str(folder))
    fields["hook"] = fields["hook"] if hook is None else hook
    transcoder = fields.pop("transcoder")
    fields["hook_out"] = hook_out or fields["hook_out"] or (None if transcoder else fields["hook"])
    if not fields["hook"] or not fields["hook_out"]:
        raise ValueError(f"{folder} does not say where it belongs: pass hook= (and of a transcoder hook_out=), a name of model.hook_dict.")
    if weights:
        raise ValueError(f"{folder}: nothing is known of the weights {', '.join(sorted(weights))}: this is another kind of dictionary.")
    fields: dict[str, Any] = {
        name: value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value for name, value in fields.items()
    }
    return _checked(Dictionary(**fields, name=folder.name))


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> None:
    """Writes a folder in SAELens's format, which `load_dictionary` and SAELens read.

    Raises:
        ValueError: a gated dictionary.
    """
    if dictionary.activation == "gated":
        raise ValueError("gated dictionaries are only read: save the other kinds.")
    kind = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}[dictionary.activation]
    if dictionary.hook != dictionary.hook_out:
        kind = (
            {"standard": "", "jumprelu": "jumprelu_"}.get(kind, f"{kind}_")
            + ("skip_" if dictionary.W_skip is not None else "")
            + "transcoder"
        )
    config = {
        "architecture": kind, "d_in": dictionary.W_enc.shape[0], "d_sae": dictionary.n_features, "d_out": dictionary.W_dec.shape[1],
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": dictionary.centred,
        "normalize_activations": dictionary.normalisation, "reshape_activations": "none", "k": dictionary.k,
        "rescale_acts_by_decoder_norm": dictionary.by_norm,
        "metadata": {"hook_name": dictionary.hook, "hook_name_out": dictionary.hook_out, "model_name": dictionary.name},
    }  # fmt: skip
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
    weights = {
        stored: getattr(dictionary, name).contiguous().cpu() for stored, name in names.items() if getattr(dictionary, name) is not None
    }
    if dictionary.W_skip is not None:
        weights["W_skip"] = dictionary.W_skip.T.contiguous().cpu()
    with whole_files(folder) as place:
        save_file(weights, place / "sae_weights.safetensors")
        (place / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _of_saelens(config: dict[str, Any], weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    about = {**config, **(config.get("metadata") or {})}
    kind = str(config.get("architecture", "standard"))
    transcoder = kind.endswith("transcoder")
    base = kind.removesuffix("transcoder").rstrip("_").removesuffix("skip").rstrip("_") or "standard"
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if base == "standard" and function == "topk":
        base, config = "topk", {**config, "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif base == "standard" and function != "relu":
        base = str(function)
    activation = {"standard": "relu", "topk": "topk", "batchtopk": "", "jumprelu": "jumprelu", "gated": "gated"}.get(base, "")
    normalisation = config.get("normalize_activations", "none")
    normalisation = "none" if normalisation in (False, None) else normalisation
    if (
        not activation
        or config.get("finetuning_scaling_factor")
        or normalisation not in NORMALISATIONS
        or about.get("hook_head_index") is not None
    ):
        raise ValueError(
            f"{where}: a dictionary of kind {kind!r} (activation {function!r}, normalize_activations {normalisation!r}, one head: "
            f"{about.get('hook_head_index')}, finetuning_scaling_factor {config.get('finetuning_scaling_factor')}) is not read; expected "
            f"{', '.join(ACTIVATIONS)} or a transcoder, with normalize_activations {', '.join(NORMALISATIONS)} (fold other scales into the weights)."
        )
    missing = [
        n
        for n in ("W_enc", "W_dec", "b_dec", *{"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("threshold",)}.get(activation, ()))
        if n not in weights
    ]
    if missing:
        raise ValueError(f"{where}: its weights lack {', '.join(missing)}.")
    skip = weights.pop("W_skip", None)
    return {
        "hook": about.get("hook_name") or about.get("hook_point"), "hook_out": about.get("hook_name_out") if transcoder else None,
        "W_enc": weights.pop("W_enc"), "W_dec": weights.pop("W_dec"), "b_dec": weights.pop("b_dec"),
        "b_enc": weights.pop("b_gate" if activation == "gated" else "b_enc"), "activation": activation, "k": config.get("k") if activation == "topk" else None,
        "threshold": weights.pop("threshold", None), "r_mag": weights.pop("r_mag", None), "b_mag": weights.pop("b_mag", None),
        "W_skip": None if skip is None else skip.T, "centred": bool(config.get("apply_b_dec_to_input", True)) and not transcoder,
        "by_norm": bool(config.get("rescale_acts_by_decoder_norm", False)), "normalisation": normalisation, "transcoder": transcoder,
    }  # fmt: skip


def _of_sparsify(config: dict[str, Any], weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    if config.get("activation", "topk") != "topk" or "k" not in config:
        raise ValueError(
            f"{where}: a sparsify dictionary of activation {config.get('activation')!r} is not read; expected 'topk' with its k."
        )
    if missing := [name for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec") if name not in weights]:
        raise ValueError(f"{where}: its weights lack {', '.join(missing)}.")
    transcoder, skip = bool(config.get("transcode", False)), weights.pop("W_skip", None)
    return {
        "hook": None, "hook_out": None, "W_enc": weights.pop("encoder.weight").T, "b_enc": weights.pop("encoder.bias"),
        "W_dec": weights.pop("W_dec"), "b_dec": weights.pop("b_dec"), "activation": "topk", "k": config["k"],
        "W_skip": None if skip is None else skip.T, "centred": not transcoder, "transcoder": transcoder,
    }  # fmt: skip


def _checked(d: Dictionary) -> Dictionary:
    d_in, n = d.W_enc.shape if d.W_enc.ndim == 2 else (0, 0)
    d_out = len(d.b_dec)
    expected = {"b_enc": (n,), "W_dec": (n, d_out), "threshold": (n,), "r_mag": (n,), "b_mag": (n,), "W_skip": (d_in, d_out)}
    for name, shape in expected.items():
        value = getattr(d, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{d.name}: expected {name} of shape {shape}, got {tuple(value.shape)}.")
    if d.activation == "topk" and (not isinstance(d.k, int) or not 1 <= d.k <= n):
        raise ValueError(f"{d.name}: k must be in 1..{n}, got {d.k!r}.")
    if bad := [name for name, value in vars(d).items() if isinstance(value, Tensor) and not bool(value.isfinite().all())]:
        raise ValueError(f"{d.name}: {', '.join(bad)} have numbers that are not finite.")
    return d


# ---- in the model -------------------------------------------------------------------------------


def splice(
    dictionary: Dictionary,
    edit: Edit | None = None,
    error: bool = True,
    positions: Place | None = None,
    inputs: Any = None,
    generated: bool = False,
) -> Interventions:
    """Splices a dictionary into the run.

    Args:
        edit: function of the feature activations [batch pos feature] that returns the changed ones; None: no change.
        error: True: keep the reconstruction error: h + decode(edited) − decode(unedited). False: h becomes decode(edited).
        positions, inputs, generated: see `analyses.interventions.ablate`.
    Raises:
        ValueError: when run: activations of another size than the dictionary's.
    """
    where, d, held = Where.of(inputs, positions, generated), dictionary, {}

    def put(activation: Tensor, x: Tensor, hook: Any) -> Tensor:
        features = d.encode(x)
        changed = features if edit is None else edit(features.clone())
        flat = _flat(activation, d.W_dec.shape[1], hook)
        new = flat + (d.decode(changed, x) - d.decode(features, x)).to(flat.dtype) if error else d.decode(changed, x).to(flat.dtype)
        mask = where.mask(flat, hook)
        return (new if mask is None else torch.where(mask[..., None], new, flat)).reshape(activation.shape)

    if d.hook == d.hook_out:
        return Interventions([(d.hook, lambda activation, hook: put(activation, _flat(activation, d.W_enc.shape[0], hook), hook))])

    def hold(activation: Tensor, hook: Any) -> None:
        held["x"] = _flat(activation, d.W_enc.shape[0], hook)

    return Interventions([(d.hook, hold), (d.hook_out, lambda activation, hook: put(activation, held.pop("x"), hook))])


def ablate_features(dictionary: Dictionary, features: Sequence[int], **where: Any) -> Interventions:
    """Sets features to 0 and keeps the error term; `where`: positions, inputs, generated of `splice`."""
    return splice(dictionary, _editing(dictionary, {feature: 0.0 for feature in features}), **where)


def set_features(dictionary: Dictionary, values: Mapping[int, float], **where: Any) -> Interventions:
    """Sets features to values and keeps the error term; `where`: positions, inputs, generated of `splice`."""
    return splice(dictionary, _editing(dictionary, dict(values)), **where)


def _editing(dictionary: Dictionary, values: Mapping[int, float]) -> Edit:
    if not values or (wrong := [feature for feature in values if not 0 <= feature < dictionary.n_features]):
        raise ValueError(f"expected features in 0..{dictionary.n_features - 1}, got {wrong if values else 'none'}.")

    def edit(features: Tensor) -> Tensor:
        for feature, value in values.items():
            features[..., feature] = value
        return features

    return edit


def _flat(activation: Tensor, width: int, hook: Any) -> Float[Tensor, "batch pos d"]:
    flat = activation.flatten(2) if activation.ndim == 4 else activation
    if flat.shape[-1] != width:
        raise ValueError(f"{hook.name} is {flat.shape[-1]} wide, the dictionary {width}: it belongs to another hook point or model.")
    return flat


@torch.no_grad()
def feature_activations(model: Model, inputs: Prompt, dictionary: Dictionary) -> Float[Tensor, "batch pos feature"]:
    """Activations of all features at every position; the values at padding are meaningless."""
    _, cache = model.run_with_cache(inputs, names_filter=dictionary.hook, return_type=None)
    return dictionary.encode(cache[dictionary.hook].flatten(2))


def feature_maps(
    model: Model, inputs: Prompt, dictionary: Dictionary, features: Sequence[int], row: int = 0, image: int = 0
) -> dict[int, Tensor]:
    """feature -> [rows cols] activations over an image's tokens."""
    _editing(dictionary, dict.fromkeys(features, 0.0))
    item = model.as_inputs(inputs)[row]
    found = feature_activations(model, item, dictionary)[0, item.positions(f"image[{image}]")]
    return {feature: found[:, feature].reshape(item.grid(image=image)).cpu() for feature in features}


@torch.no_grad()
def top_activating(
    model: Model,
    data: Iterable[Example],
    dictionary: Dictionary,
    features: Sequence[int] | None = None,
    top: int = 9,
    progress: bool = True,
) -> pd.DataFrame:
    """The images on which each feature is most active. Questions with no image or several are skipped.

    Args:
        features: None: all. top: number of images per feature; images on which the feature is 0 are left out.
    Returns:
        one row per feature and rank: feature, id, image_token (the image's most active token), activation, its box x0, y0, x1, y1 in
        original pixels, rank.
    Raises:
        ValueError: no question has exactly one image.
    """
    chosen = list(range(dictionary.n_features)) if features is None else list(features)
    best: list[pd.DataFrame] = []
    for example in tqdm(data, desc="features", unit="image", disable=not progress, delay=2):
        if len(example.images) != 1:
            continue
        inputs = model.to_inputs(example.question, images=list(example.images))
        places = inputs.positions("image")
        values = feature_activations(model, inputs, dictionary)[0, places][:, chosen]
        most, at = values.max(0)
        boxes = inputs.boxes()[at.cpu()]
        table = pd.DataFrame({"feature": chosen, "id": example.id, "image_token": at.tolist(), "activation": most.tolist()})
        table[["x0", "y0", "x1", "y1"]] = boxes.numpy()
        best.append(table[table["activation"] > 0])
    if not best:
        raise ValueError("no question has exactly one image: there are no image tokens to look at.")
    whole = pd.concat(best).sort_values(["feature", "activation"], ascending=[True, False], kind="stable")
    whole["rank"] = whole.groupby("feature").cumcount()
    return whole[whole["rank"] < top].reset_index(drop=True)


def attribute_features(
    model: Model,
    inputs: Prompt,
    dictionary: Dictionary,
    target: str | int,
    against: str | int | None = None,
    where: Place = "last",
    row: int = 0,
) -> tuple[Float[Tensor, "pos feature"], dict[str, float]]:
    """Attribution of the target's logit (minus the logit of `against`) at one position to the features at every position.

    Activation × gradient, with the final norm's scale held constant.

    Returns:
        ([pos feature] attributions, {"logit": the logit or difference, "features": sum of the attributions, "error": attribution of
        the error term and the decoder's bias}). At the last block's output "features" and "error" sum to "logit"; at earlier hook
        points the gradient is a linear approximation.
    Raises:
        ValueError: a transcoder, or a text that is not one token.
    """
    item = model.encode(model.as_inputs(inputs)[row])
    at = item.position(where)
    ids = [model.to_single_token(t) if isinstance(t, str) else int(t) for t in (target, against) if t is not None]
    kept: dict[str, Tensor] = {}

    def put(activation: Tensor, hook: Any) -> Tensor:
        flat = _flat(activation, dictionary.W_enc.shape[0], hook).detach()
        kept["features"] = dictionary.encode(flat).detach().requires_grad_()
        rebuilt = dictionary.decode(kept["features"], flat)
        kept["rest"] = (flat - rebuilt + dictionary.decode(torch.zeros_like(kept["features"]), flat)).detach().requires_grad_()
        own = rebuilt - dictionary.decode(torch.zeros_like(kept["features"]), flat)
        return (own + kept["rest"]).to(activation.dtype).reshape(activation.shape)

    if dictionary.hook != dictionary.hook_out:
        raise ValueError("attribution is of autoencoders: of a transcoder, splice it and compare logits.")
    hooks = [(dictionary.hook, put), ("ln_final.hook_scale", lambda scale, hook: scale.detach())]
    with torch.enable_grad():
        logits = model.run_with_hooks(item, fwd_hooks=hooks, logits_at=at)[0, 0].float()
        logit = logits[ids[0]] - (logits[ids[1]] if against is not None else 0.0)
        of_features, of_rest = torch.autograd.grad(logit, [kept["features"], kept["rest"]])
    shares = (of_features * kept["features"].detach())[0]
    rest = float((of_rest * kept["rest"].detach()).sum())
    return shares, {"logit": float(logit.detach()), "features": float(shares.sum()), "error": rest}


# ---- training -----------------------------------------------------------------------------------


def train_dictionary(
    batches: Iterable[Float[Tensor, "row d_in"]],
    hook: str,
    n_features: int,
    k: int,
    lr: float = 1e-3,
    dead_after: int = 200,
    aux: float = 1 / 32,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Dictionary, pd.DataFrame]:
    """Trains a TopK autoencoder with Gao et al.'s auxiliary loss for dead features; the rows of W_dec have norm 1.

    Args:
        batches: shuffled activations (`ActivationStore.shuffled`, or any tensors).
        dead_after: a feature is dead if it was 0 for more than this many batches. aux: weight of the auxiliary loss.
    Returns:
        (the dictionary, one row per batch: `unexplained`, the unexplained share of the variance, and `dead`, the number of dead features).
    Raises:
        ValueError: no batches, or k outside 1..n_features.
    """
    if not 1 <= k <= n_features:
        raise ValueError(f"k must be in 1..{n_features}, got {k}.")
    stream: Iterator[Tensor] = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ValueError("there are no activations to train on.")
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(n_features, first.shape[1], generator=generator), dim=1)
    names = {"W_dec": W_dec, "W_enc": W_dec.T.clone(), "b_enc": torch.zeros(n_features), "b_dec": first.float().mean(0)}
    weights = {name: torch.nn.Parameter(value.to(first.device)) for name, value in names.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=lr)
    silent, rows = torch.zeros(n_features, device=first.device), []
    with torch.enable_grad():
        for x in tqdm(_then(first, stream), desc="training a dictionary", unit="batch", disable=not progress, delay=2):
            x = x.float()
            pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
            top = pre.topk(k, dim=-1)
            features = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            error = x - features @ weights["W_dec"] - weights["b_dec"]
            variance = (x - x.mean(0)).square().sum()
            loss = error.square().sum() / variance
            dead = silent > dead_after
            if n_dead := int(dead.sum()):
                some = pre.masked_fill(~dead, float("-inf")).topk(min(n_dead, max(1, x.shape[1] // 2)), dim=-1)
                rebuilt = torch.zeros_like(pre).scatter(-1, some.indices, some.values.relu()) @ weights["W_dec"]
                loss = loss + aux * (error.detach() - rebuilt).square().sum() / variance
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                weights["W_dec"].div_(weights["W_dec"].norm(dim=1, keepdim=True))
                silent = torch.where((features > 0).any(0), 0, silent + 1)
            rows.append({"unexplained": float(error.detach().square().sum() / variance), "dead": n_dead})
    plain: dict[str, Any] = {name: value.detach().cpu() for name, value in weights.items()}
    return Dictionary(hook, hook, activation="topk", k=k, name="trained", **plain), pd.DataFrame(rows)


def _then(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest
