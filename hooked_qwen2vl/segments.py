"""Finds the segments of a prompt from its token ids alone.

A chat has the form that Qwen2-VL's template gives every conversation:

    <start> role \\n content <end> \\n <start> role \\n content <end> \\n … <start> role \\n [content]

where <start> is the row's first token and <end> one of the checkpoint's end tokens. Any other prompt is one segment, `question`.
This is not needed for prompts from `model.to_inputs`, whose segments are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .config import HookedQwen2VLConfig
from .moved import moved_names
from .positions import IMAGE, TEXT, VIDEO

__getattr__ = moved_names(__name__)

PADDING = "padding"
KINDS = {IMAGE: "image", VIDEO: "video"}


_NAME = re.compile(
    r"system|vision_start|vision_end|question|history|template|answer|padding|last|(image|video)(\[\d+\])?|video\[\d+\]\.(frame|time)\[\d+\]"
)


def is_segment_name(name: str) -> bool:
    """Whether a prompt could have a segment of this name (see `Inputs.resolve`)."""
    return _NAME.fullmatch(name) is not None


def segments_from_ids(tokens: Sequence[int], types: Sequence[int], cfg: HookedQwen2VLConfig, frames: Sequence[int] = ()) -> list[str]:
    """The segment of each position of one row without padding.

    If content begins with line breaks, one token may contain both these and the template's line break; it belongs to `template`.

    Args:
        tokens: the row's token ids, without padding.
        types: 0 text, 1 image, 2 video, for each token.
        frames: number of frames of each video of the row, if frames come after timestamps.
    """
    breaks: set[int] = set(getattr(cfg.special, "line_breaks", ()))
    names = _chat_names(list(tokens), set(cfg.special.eos), breaks) or ["question"] * len(tokens)
    vision = {cfg.vision_start_token_id: "vision_start", cfg.vision_end_token_id: "vision_end"}
    for position, name in _timestamps(list(tokens), list(types), frames, cfg).items():
        names[position] = name
    return [KINDS[kind] if kind != TEXT else vision.get(token, name) for token, kind, name in zip(tokens, types, names)]


def _timestamps(tokens: list[int], types: list[int], frames: Sequence[int], cfg: HookedQwen2VLConfig) -> dict[int, str]:
    """Position -> `video[k].time[t]`, for the timestamps that can be found from token ids.

    Between two frames of a video there is only a timestamp. Before the first frame there is other text, too; its timestamp begins
    with the same token as the others. In a video with one frame it cannot be found.
    """
    starts = [i for i, kind in enumerate(types) if kind == VIDEO and (i == 0 or types[i - 1] != VIDEO)]
    frame_of = [(video, frame) for video, n in enumerate(frames) for frame in range(n)]
    found: dict[int, str] = {}
    opening = None
    for (video, frame), start in reversed(list(zip(frame_of, starts))):
        before = start - 1  # <|vision_start|>
        first = before
        while first and types[first - 1] == TEXT and tokens[first - 1] not in (cfg.vision_start_token_id, cfg.vision_end_token_id):
            first -= 1
        if frame:
            opening = tokens[first]
        else:
            first = next((i for i in range(before - 1, first - 1, -1) if tokens[i] == opening), before)
        found |= dict.fromkeys(range(first, before), f"video[{video}].time[{frame}]")
    return found


def number_visuals(names: Sequence[str], types: Sequence[int], visuals: Sequence[tuple[int, int]]) -> list[str]:
    """The names with `image[k]` for the tokens of each image of one row, and `video[k]` for those of each video.

    Args:
        visuals: (kind, number of tokens) of the row's images and videos, in order of appearance.
    """
    seen = dict.fromkeys(KINDS, 0)
    labels: list[str] = []
    for kind, n_tokens in visuals:
        labels += [f"{KINDS[kind]}[{seen[kind]}]"] * n_tokens
        seen[kind] += 1
    following = iter(labels)
    return [name if kind == TEXT else next(following) for name, kind in zip(names, types)]


def _chat_names(tokens: list[int], ends: set[int], breaks: set[int]) -> list[str] | None:
    """Segment of each token, or None if the row is not a chat; `breaks`: tokens that begin with a line break, if known."""
    starts = [index for index, token in enumerate(tokens) if token == tokens[0]]
    if len(starts) < 2:
        return None
    line_break = tokens[starts[1] - 1]
    turns = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]
    # Without a tokenizer: "assistant", the last turn's role, is the longest word; if it is one token, so are the other roles.
    single = not breaks and turns[-1][2:3] == [line_break]
    parsed = [_turn(turn, ends, line_break, breaks, single, last=turn is turns[-1]) for turn in turns]
    parsed = [turn for turn in parsed if turn is not None]
    if len(parsed) < len(turns):
        return None
    called = _called([role for role, _, _ in parsed], still_open=parsed[-1][2] == 0)
    if called is None:
        return None
    names: list[str] = []
    for turn, name, (role, n_content, _) in zip(turns, called, parsed):
        header = len(role) + 2
        names += ["template"] * header + [name] * n_content + ["template"] * (len(turn) - header - n_content)
    return names


def _turn(
    turn: list[int], ends: set[int], line_break: int, breaks: set[int], single: bool, last: bool
) -> tuple[tuple[int, ...], int, int] | None:
    """(role, length of the content, number of tokens that close the turn); None if this is not a turn."""
    closing = 2 if turn[-2:-1] and turn[-2] in ends and turn[-1] == line_break else 1 if turn[-1] in ends else 0
    body = turn[1 : len(turn) - closing]
    if (closing < 2 and not last) or ends & set(body):
        return None
    n_role = 1 if single and len(body) > 1 else next((n for n, t in enumerate(body) if t == line_break or t in breaks), 0)
    return (tuple(body[:n_role]), len(body) - n_role - 1, closing) if n_role else None


def _called(roles: list[tuple[int, ...]], still_open: bool) -> list[str] | None:
    """The segment name of each turn's content, for an optional system turn, then alternating user and assistant turns."""
    has_system = roles[0] not in roles[1:] and not (still_open and len(roles) == 2)
    turns = roles[1:] if has_system else roles
    users, assistants = turns[0::2], turns[1::2]
    if len(set(users)) != 1 or len(set(assistants)) > 1 or set(users) & set(assistants):
        return None
    if still_open and len(turns) % 2:
        return None
    names = ["history"] * len(turns)
    names[2 * (len(users) - 1)] = "question"
    if len(turns) % 2 == 0:
        names[-1] = "answer"
    return ["system", *names] if has_system else names
