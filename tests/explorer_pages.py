"""An `Explorer` of any size, made up, with tokens that a page must survive."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from analyses.explorer import Explorer, _queries
from analyses.logit_lens import LogitLens

NASTY = ("</script>", "<b>", "&amp;", "\n", "\t", " ", "", "\u202e", "\x00", "\ufffd", "颜色", "<!--", "{{data}}", "  two", "ö" * 40)
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def large(rows: int = 30, cols: int = 40, layers: int = 29, heads: int = 12, k: int = 5, d_vocab: int = 152_000) -> Explorer:
    """Every cell of the lens is drawn from the whole vocabulary: the most texts that a page can need."""
    rng = np.random.default_rng(0)
    before, after = 15, 16
    n = before + rows * cols + after
    stream = "".join(LETTERS[rng.integers(0, 26, 9 * d_vocab)])
    words = [stream[9 * i : 9 * i + size] for i, size in enumerate(rng.integers(3, 9, d_vocab))]
    texts = [*NASTY, *words[len(NASTY) :]]
    ids = torch.from_numpy(rng.integers(0, d_vocab, (layers, n, k)))
    ids[-1, n - 4] = torch.arange(k)  # the nasty ones where the page opens
    ids[:, before, 0] = torch.arange(layers) % len(NASTY)
    probs = torch.from_numpy(rng.dirichlet(np.full(k + 1, 0.4), (layers, n))).float()[..., :k].sort(descending=True).values
    prompt = [texts[i] for i in rng.integers(0, d_vocab, n)]
    prompt[2:5] = NASTY[:3]
    kept = torch.from_numpy(np.unique(np.concatenate((np.arange(len(NASTY)), rng.integers(0, d_vocab, 2048)))))
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((cols * 28, rows * 28), Image.Resampling.BICUBIC)
    lens = LogitLens(
        top_ids=ids,
        top_probs=probs,
        entropy=torch.from_numpy(rng.uniform(0, 11, (layers, n))).float(),
        final_probs=probs[..., 0],
        final_ranks=torch.zeros(layers, n, dtype=torch.long),
        target_ids=torch.tensor([20]),
        target_probs=torch.from_numpy(rng.uniform(0, 0.2, (layers, n, 1))).float(),
        target_ranks=torch.zeros(layers, n, 1, dtype=torch.long),
        positions=tuple(range(n)),
        layers=tuple(range(layers)),
        layer_labels=(*(f"{layer}_pre" for layer in range(layers - 1)), "final_post"),
        prompt_tokens=tuple(prompt),
        top_tokens=tuple(tuple(tuple(texts[i] for i in at) for at in layer) for layer in ids.tolist()),
        target_tokens=(texts[20],),
        grid=None,
        model_name="made up",
    )
    segments = ("template",) * before + ("image[0]",) * (rows * cols) + ("question",) * (after - 3) + ("answer",) * 3
    queries = _queries(segments, n - 4, (layers - 1) * (heads + 1) * n, 2_000_000)
    return Explorer(
        lens=lens,
        segments=segments,
        images=(smooth,),
        starts=(before,),
        grids=((rows, cols),),
        image_names=("image 0",),
        last=n - 4,
        answer=(n - 3,),
        kept_ids=kept,
        kept_tokens=tuple(texts[i] for i in kept),
        kept_probs=torch.from_numpy(rng.uniform(0, 0.01, (layers, len(kept)))).float(),
        rest_prob=torch.full((layers,), 1e-4),
        queries=queries,
        attention_from=torch.from_numpy(rng.dirichlet(np.full(n, 0.3), (layers - 1, len(queries), heads))).float(),
        contextual=torch.from_numpy(rng.uniform(-0.2, 0.6, (layers, n))).float(),
        recovery=None,
        question="What is this?",
        answer_text="this",
        model_name="made up",
    )
