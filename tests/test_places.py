"""One meaning of a place: every public function that takes positions is given the same good and bad ones.

The oracle is the list of positions that each good place means, worked out by hand; a function read at a place must give what
it gives when it is read at that list.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import picture

from analyses.answer_scores import SCORES
from analyses.common.prompts import as_prompt
from analyses.contextual_lens import contextual_score, ground, sweep_layers, word_spans
from analyses.counterfactuals import changed_positions
from analyses.embedding_lens import contextual_neighbours, embedding_lens, text_bank
from analyses.explorer import explore
from analyses.flip_patching import attribute_flip, component_effects
from analyses.knockout import attention_knockout, knockout_hooks
from analyses.logit_lens import logit_lens, residual_stack
from analyses.model_patching import patch_between_models
from analyses.patching import patch_sweep
from analyses.trajectory import answer_log_probs, answer_trajectory
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.geometry import Box

RED, BLUE = 258, 262


class World(NamedTuple):
    """A model, a prompt with an image of 3×5 tokens of exactly 28 pixels and a teacher-forced answer, and its like."""

    model: HookedQwen2VL
    other_model: HookedQwen2VL
    inputs: object
    other: object
    bank: object


@pytest.fixture(scope="module")
def world(model):
    from tiny import tiny_hf

    inputs, other = (model.encode(model.to_inputs("what?", images=[picture(140, 84, seed)], answers="red it")) for seed in (1, 2))
    different = HookedQwen2VL.from_hf(tiny_hf(seed=5), model.processor)
    return World(model, different, inputs, other, text_bank(model, ["red and blue", "it is red"], progress=False))


def good(inputs) -> dict[str, tuple[object, list[int]]]:
    """name -> (place, the positions it means)."""
    n, first = inputs.shape[1], inputs.segments[0].index("image[0]")
    answer = inputs.segments[0].index("answer")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[[2, first]] = True
    return {
        "image": ("image", list(range(first, first + 15))),
        "numbered image": ("image[0]", list(range(first, first + 15))),
        "last": ("last", [answer - 1]),
        "int": (3, [3]),
        "numpy int": (np.int64(3), [3]),
        "from the end": (-2, [n - 2]),
        "list": ([1, first], [1, first]),
        "list from the end": ([-1], [n - 1]),
        "range": (range(2, 5), [2, 3, 4]),
        "slice": (slice(2, 6, 2), [2, 4]),
        "slice from the end": (slice(-3, None), [n - 3, n - 2, n - 1]),
        "tensor": (torch.tensor([4, 2]), [4, 2]),
        "array": (np.array([4, 2]), [4, 2]),
        "mask": (mask, [2, first]),
        "mask as an array": (mask.numpy(), [2, first]),
        "mask as a list": (mask.tolist(), [2, first]),
        "mask of the batch": (mask[None], [2, first]),
        "box": (Box(28, 28, 84, 56), [first + 6, first + 7]),
        "four numbers": ((28, 28, 84, 56), [first + 6, first + 7]),
        "box past the edge": ((112.5, 60.0, 141.0, 85.0), [first + 14]),
    }


def bad(inputs) -> dict[str, tuple[object, str]]:
    """name -> (place, what the error says)."""
    n = inputs.shape[1]
    return {
        "misspelt": ("imgae", "no segment called 'imgae'"),
        "image that is not there": ("image[1]", "no segment called"),
        "past the end": (n, f"no position {n}"),
        "before the start": (-n - 1, f"no position {-n - 1}"),
        "list past the end": ([0, 999], "no position 999"),
        "tensor past the end": (torch.tensor([999]), "no position 999"),
        "nothing": ([], "no token|expected a place"),
        "empty slice": (slice(5, 5), "selects no token"),
        "empty mask": (torch.zeros(n, dtype=torch.bool), "selects no token"),
        "short mask": (torch.ones(3, dtype=torch.bool), "mask of 3 positions"),
        "bool": (True, "expected a place"),
        "float": (1.5, "expected a place"),
        "floats": ([1.0, 2.0], "expected a place"),
        "none": (None, "expected a place"),
        "names in a list": (["image", "last"], "expected a place"),
        "two axes": (torch.zeros(2, 2, dtype=torch.long), "expected a place"),
        "three numbers": ((1, 2, 3), "a tuple is a box"),
        "box with a name": ((1, 2, 3, "x"), "a tuple is a box"),
        "box of nothing": ((5, 5, 5, 9), "x0 < x1"),
        "box turned round": ((9, 0, 3, 5), "x0 < x1"),
        "box in fractions": ((0.1, 0.2, 0.5, 0.9), "fractions of the image"),
        "box outside": ((200, 0, 220, 10), "outside the image"),
        "box in thousandths": ((100, 200, 600, 900), "outside the image"),
        "box not finite": ((0, 0, float("nan"), 9), "a tuple is a box"),
    }


def lens(w, place):
    return logit_lens(w.model, w.inputs, positions=place).top_probs


def neighbours(w, place):
    return embedding_lens(w.model, w.inputs, positions=place, top_k=2).similarity


def in_context(w, place):
    return contextual_neighbours(w.model, w.inputs, w.bank, positions=place, top_k=2).similarity


def score(w, place):
    return contextual_score(w.model, w.inputs, span=place).scores


def grounding(w, place):
    return ground(w.model, w.inputs, span=place).similarity[0]


def sweep(w, place):
    return sweep_layers(w.model, [w.inputs, w.other], [True, False], span=place, progress=False).auroc


def knocked_out_keys(w, place):
    return attention_knockout(w.model, w.inputs, [RED], {"f": (place, "last")}, only_correct=False, progress=False).effects


def hooks_of_queries(w, place):
    return w.model.run_with_hooks(w.inputs, fwd_hooks=knockout_hooks(w.inputs, [0], place, [0, 1]))


def patched(w, place):
    metric = lambda logits: logits[:, -1, RED] - logits[:, -1, BLUE]  # noqa: E731
    return patch_sweep(w.model, w.inputs, w.other, metric, positions={"row": place}, progress=False).values


def between_models(w, place):
    return patch_between_models(w.model, w.other_model, [w.inputs], spans=[place], progress=False).explained


SEVERAL = (lens, neighbours, in_context, score, grounding, sweep, knocked_out_keys, hooks_of_queries, patched, between_models)


def trajectory(w, place):
    return answer_trajectory(w.model, w.inputs, "red", ["red", "blue"], position=place).entropy


def attribution(w, place):
    return attribute_flip(w.model, w.inputs, 1, RED, BLUE, position=place).heads


def metric_at(w, place):
    metric = lambda logits: logits[:, -1, RED] - logits[:, -1, BLUE]  # noqa: E731
    return patch_sweep(w.model, w.inputs, w.other, metric, positions=["image"], metric_position=place, progress=False).values


def one_position(w, place):
    return torch.tensor(w.inputs.position(place))


ONE = (trajectory, attribution, metric_at, one_position)


def means_itself(inputs, place):
    return inputs.resolve(place).tolist()


@pytest.mark.parametrize("row", [0, 1, -1])
def test_every_place_by_hand(world, row):
    both = world.model.to_inputs(["what?"] * 2, images=[[picture(140, 84)], [picture(140, 84)]], answers=["red it"] * 2)
    mask = torch.zeros(both.shape, dtype=torch.bool)
    for name, (place, expected) in good(world.inputs).items():
        if name == "mask of the batch":
            mask[row, expected] = True
            place = mask
        assert both.resolve(place, row).tolist() == expected == both.positions(place, row).tolist(), name
    for name, (place, message) in bad(world.inputs).items():
        for resolve in (both.resolve, both.positions, both.span):
            with pytest.raises(ValueError, match=message):
                resolve(place, row)
                pytest.fail(name)


@pytest.mark.parametrize("function", SEVERAL, ids=lambda f: f.__name__)
def test_functions_of_several_positions(world, function):
    """What is read at a place is what is read at its positions; the bad places are refused in the same words."""
    seen = {}
    for name, (place, expected) in good(world.inputs).items():
        key = tuple(expected)
        if key not in seen:
            seen[key] = function(world, list(expected))
        ours = function(world, place)
        assert ours.shape == seen[key].shape and torch.allclose(ours, seen[key], atol=1e-6, equal_nan=True), name
    distinct = {tuple(value.flatten().tolist()) for value in seen.values()}
    assert len(distinct) > 1 or function is sweep, "the function does not look where it is told"
    for name, (place, message) in bad(world.inputs).items():
        if function is between_models and name == "image that is not there":
            message = "no prompt has a segment called"
        if function is between_models and name == "misspelt":
            message = "no segment called"
        with pytest.raises(ValueError, match=message):
            function(world, place)
            pytest.fail(name)


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_functions_of_one_position(world, function):
    for name, (place, expected) in good(world.inputs).items():
        if len(expected) == 1:
            assert torch.allclose(function(world, place), function(world, expected[0]), atol=1e-6), name
        else:
            with pytest.raises(ValueError, match="one position"):
                function(world, place)
                pytest.fail(name)
    for name, (place, message) in bad(world.inputs).items():
        with pytest.raises(ValueError, match=message):
            function(world, place)
            pytest.fail(name)


def test_rows_of_a_sweep(world):
    """A list holds a place for each row; one name or box is one row; a slice, tensor or mask gives a row to each position."""
    metric = lambda logits: logits[:, -1, RED]  # noqa: E731
    first = world.inputs.segments[0].index("image[0]")

    def rows(positions):
        result = patch_sweep(world.model, world.inputs, world.other, metric, layers=[0], positions=positions, progress=False)
        return result.index_df["pos"].tolist()

    assert rows("image") == ["image"] and rows((28, 28, 84, 56)) == [(28, 28, 84, 56)] and rows(3) == [3]
    assert rows(slice(2, 5)) == [2, 3, 4] and rows(torch.tensor([first, 2])) == [first, 2]
    assert rows(["image", (0, 0, 28, 28), [1, 2], -1]) == ["image", (0, 0, 28, 28), [1, 2], -1]
    with pytest.raises(ValueError, match="no position to patch"):
        rows([])


# ---- rows -------------------------------------------------------------------------------------------

QUESTIONS = ["what?", "what is the red thing there?", "the red"]
ANSWERS = ["red it", "blue", "red"]


@pytest.fixture(scope="module")
def batch(model):
    """Rows of three lengths and two grids, so that no row's places are another's; each carries an answer."""
    images = [[picture(84, 56, 1)], [picture(56, 112, 2)], [picture(84, 56, 3)]]
    return model.to_inputs(QUESTIONS, images=images, answers=ANSWERS)


def row_scores(w, inputs, row):
    names = [name for name in SCORES if name != "contextual_control"]
    return torch.tensor([SCORES[name](w.model, inputs, row) for name in names])


def row_explored(w, inputs, row):
    grid = inputs.grid(row)
    seeds = (1, 3) if grid == (2, 3) else (2,)
    pictures = [picture(28 * grid[1], 28 * grid[0], seed) for seed in seeds]
    own = next(p for p in pictures if torch.equal(w.model.to_inputs("x", images=[p]).pixels, inputs.row(row).pixels))
    page = explore(w.model, inputs, [own], row=row)
    return torch.cat([page.kept_probs.flatten(), page.contextual.flatten(), page.lens.top_probs.flatten()])


def row_words(w, inputs, row):
    places = torch.tensor(word_spans(w.model, inputs, ["the"], row, "question")["the"])
    return places - inputs.positions("question", row)[0]


ROWS = {
    "logit_lens": lambda w, x, row: logit_lens(w.model, x, "image", row=row, targets=[RED]).target_probs,
    "embedding_lens": lambda w, x, row: embedding_lens(w.model, x, row=row).similarity,
    "contextual_neighbours": lambda w, x, row: contextual_neighbours(w.model, x, w.bank, row=row).similarity,
    "contextual_score": lambda w, x, row: contextual_score(w.model, x, row).similarity,
    "ground": lambda w, x, row: torch.cat([ground(w.model, x, row).heat[0].flatten(), ground(w.model, x, row).boxes[0]]),
    "answer_trajectory": lambda w, x, row: answer_trajectory(w.model, x, "red", ["red", "blue"], row=row).entropy,
    "answer_log_probs": lambda w, x, row: answer_log_probs(w.model, x, "red it", row=row),
    "attribute_flip": lambda w, x, row: attribute_flip(w.model, x, 1, RED, BLUE, row=row).heads,
    "component_effects": lambda w, x, row: torch.tensor(
        component_effects(w.model, x, attribute_flip(w.model, x, 1, RED, BLUE, row=row))["ablated"].tolist()
    ),
    "SCORES": row_scores,
    "explore": row_explored,
    "word_spans": row_words,
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_batch_is_that_row_alone(world, batch, name):
    """Whatever takes `row=` gives what the row gives by itself, without its padding; a row that is not there is refused."""
    rows = (1, 2, -2) if name == "word_spans" else (0, 1, 2, -2)
    alone = {}
    for row in rows:
        image = picture(56, 112, 2) if row in (1, -2) else picture(84, 56, row + 1)
        one = world.model.to_inputs(QUESTIONS[row], images=[image], answers=ANSWERS[row])
        alone[row] = ROWS[name](world, one, 0)
        ours = ROWS[name](world, batch, row)
        assert ours.shape == alone[row].shape and torch.allclose(ours, alone[row], atol=2e-5, rtol=1e-4, equal_nan=True), row
    assert alone[1].shape != alone[2].shape or not torch.allclose(alone[1], alone[2], atol=1e-3), "the rows are alike"
    for row in (3, -4):
        with pytest.raises(ValueError, match=f"no row {row}"):
            ROWS[name](world, batch, row)


def test_rows_of_two_prompts(model, batch):
    """What changed between two prompts, row by row; prompts that do not correspond, and rows that are not there, are refused."""
    images = [[picture(84, 56, 1)], [picture(56, 112, 5)], [picture(84, 56, 3)]]
    other = model.to_inputs(QUESTIONS, images=images, answers=ANSWERS)
    changed = [changed_positions(batch, other, row).tolist() for row in range(3)]
    assert changed == [[], batch.positions("image", 1).tolist(), []]
    with pytest.raises(ValueError, match="no row 3"):
        changed_positions(batch, other, 3)
    square, wide = (model.to_inputs("what?", images=[picture(*size)]) for size in ((112, 84), (84, 112)))
    with pytest.raises(ValueError, match="differ in grid"):
        changed_positions(square, wide)
    with pytest.raises(ValueError, match="without"):
        changed_positions(model.to_inputs("what?"), model.to_inputs("what?"))


def test_knockout_hooks_are_of_their_own_prompt(model, batch):
    """Hooks act on every row of what is run: rows that are laid out otherwise, and other prompts, are refused."""
    x, wide = (model.to_inputs("what?", images=[picture(*size)]) for size in ((112, 84), (84, 112)))
    hooks = knockout_hooks(x, "image", "last", [0])
    pair = model.to_inputs(["what?"] * 2, images=[[picture(112, 84, 4)], [picture(112, 84, 5)]])
    together = model.run_with_hooks(pair, fwd_hooks=hooks)
    assert torch.allclose(together[1], model.run_with_hooks(pair[1], fwd_hooks=hooks)[0], atol=1e-5)
    for other in (wide, batch, model.to_inputs("what is the red thing?", images=[picture(84, 112)])):
        with pytest.raises(ValueError, match="made for a prompt whose positions"):
            model.run_with_hooks(other, fwd_hooks=hooks)
    with pytest.raises(ValueError, match="made for a prompt whose positions"):
        model.run_with_hooks(batch, fwd_hooks=knockout_hooks(batch, "image", "last", [0], row=1))


def test_a_stream_at_hand_is_of_this_prompt(world, batch):
    stack, _ = residual_stack(world.model, batch[1])
    own = contextual_score(world.model, batch, 1, stack=stack[:, 0])
    assert torch.allclose(own.similarity, contextual_score(world.model, batch, 1).similarity, atol=1e-6)
    for read in (contextual_score, ground):
        with pytest.raises(ValueError, match="expected a residual stream"):
            read(world.model, batch, 1, stack=stack[:, 0, 1:])
        with pytest.raises(ValueError, match="expected a residual stream"):
            read(world.model, batch, 1, stack=stack)


def test_padding_is_no_place(model):
    inputs = model.to_inputs(["the red thing", "go"], template=False)
    short, n = 1, inputs.shape[1]
    pad = int((inputs.attention_mask[short] == 0).sum())
    assert pad > 0 and inputs.resolve(slice(None), short).tolist() == list(range(pad, n))
    assert inputs.resolve("padding", short).tolist() == list(range(pad))
    for place in (0, [0, n - 1], torch.arange(n), -n):
        with pytest.raises(ValueError, match=f"position 0 of row 1 is padding: its tokens are at {pad}..{n - 1}"):
            inputs.resolve(place, short)
    with pytest.raises(ValueError, match="selects no token of row 1"):
        inputs.resolve(slice(0, pad), short)
    with pytest.raises(ValueError, match="is padding"):
        logit_lens(model, inputs, positions=0, row=short)


def test_words_in_a_part(world):
    assert word_spans(world.model, world.inputs, ["red"])
    with pytest.raises(ValueError, match="no segment called 'imgae'"):
        word_spans(world.model, world.inputs, ["red"], segment="imgae")


def test_a_text_has_no_segments(model):
    """The counterpart for models without images: positions as in `Inputs`, and `last`."""
    for prompt in ("the red thing", model.to_tokens("the red thing")):
        n = as_prompt(model, prompt).shape[1]
        assert torch.equal(answer_trajectory(model, prompt, "red").entropy, answer_trajectory(model, prompt, "red", position=n - 1).entropy)
        for place in ("image", n, [0, 999], (0, 0, 28, 28)):
            with pytest.raises(ValueError):
                answer_trajectory(model, prompt, "red", position=place)
            with pytest.raises(ValueError):
                logit_lens(model, prompt, positions=place)
