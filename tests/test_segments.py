"""Part names read off bare ids: chats by their shape, everything else as a raw prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hooked_qwen2vl.positions import IMAGE, TEXT, VIDEO
from hooked_qwen2vl.segments import number_visuals, segments_from_ids

START, END, BREAK, TEXT_END = 90, 91, 92, 93
SYSTEM, USER, ASSISTANT = [1], [2, 3], [4, 5, 6]  # roles of one token and of several
VISION_START, VISION_END, PAD = 94, 95, 96
CFG = SimpleNamespace(special=SimpleNamespace(eos=(END, TEXT_END)), vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)


def turn(role: list[int], content: list[int], closed: bool = True) -> list[int]:
    return [START, *role, BREAK, *content] + ([END, BREAK] if closed else [])


def parts(tokens: list[int]) -> dict[str, list[int]]:
    """Name -> its tokens."""
    types = [IMAGE if token == PAD else TEXT for token in tokens]
    found: dict[str, list[int]] = {}
    for token, name in zip(tokens, segments_from_ids(tokens, types, CFG), strict=True):
        found.setdefault(name, []).append(token)
    return found


def test_a_chat_is_named_by_its_turns():
    tokens = turn(SYSTEM, [10, 11]) + turn(USER, [VISION_START, PAD, PAD, VISION_END, 12, 13])
    found = parts(tokens + turn(ASSISTANT, [], closed=False))
    assert found["system"] == [10, 11]
    assert found["vision_start"] == [VISION_START] and found["vision_end"] == [VISION_END]
    assert found["image"] == [PAD, PAD]
    assert found["question"] == [12, 13]
    assert "answer" not in found and "history" not in found
    assert len(found["template"]) == len(tokens) + 5 - 8


def test_only_the_last_question_is_the_question():
    tokens = turn(SYSTEM, [10]) + turn(USER, [20]) + turn(ASSISTANT, [30, 31]) + turn(USER, [21])
    found = parts(tokens + turn(ASSISTANT, [32], closed=False))
    assert found["history"] == [20, 30, 31]
    assert found["question"] == [21] and found["answer"] == [32]


@pytest.mark.parametrize("ending", [[END, BREAK], [END]])
def test_a_closed_answer_is_an_answer_without_its_end(ending):
    found = parts(turn(SYSTEM, [10]) + turn(USER, [20]) + turn(ASSISTANT, [30], closed=False) + ending)
    assert found["answer"] == [30] and END in found["template"]


def test_a_chat_without_a_system_turn():
    found = parts(turn(USER, [20]) + turn(ASSISTANT, [], closed=False))
    assert found["question"] == [20] and "system" not in found


def test_a_chat_whose_question_is_not_answered_yet():
    found = parts(turn(SYSTEM, [10]) + turn(USER, [20, 21]))
    assert found["system"] == [10] and found["question"] == [20, 21] and "answer" not in found


@pytest.mark.parametrize(
    "tokens",
    [
        [10, 11, 12],
        [START],
        [10, 12, BREAK, 10, 13, BREAK, 10],  # lines that begin alike, but no end token
        [START, BREAK, 20, END, BREAK, START, BREAK],  # no role
        [END, 2, BREAK, 20, END, BREAK, END],  # the end token cannot begin a turn
        turn([], [20]) + turn(ASSISTANT, [], closed=False),  # nobody asks
        turn(SYSTEM, [10]) + turn(USER, [20]) + turn(USER, [], closed=False),  # nobody answers
        turn(SYSTEM, [10]) + turn(USER, [20]) + turn(ASSISTANT, [30]) + turn(USER, [21], closed=False),  # not asked yet
        turn(SYSTEM, [10]) + turn(USER, [20], closed=False) + turn(ASSISTANT, []),  # a turn that is not closed
        turn(SYSTEM, [10]) + turn(USER, [20, END, 21]) + turn(ASSISTANT, [], closed=False),  # an end inside
        turn(SYSTEM, [10]) + turn(USER, [20]) + turn(ASSISTANT, [30]) + turn([7], [], closed=False),  # a fourth role
    ],
)
def test_anything_else_is_a_raw_prompt(tokens):
    assert parts(tokens) == {"question": tokens}


MERGED = 97  # "\\n\\n": the template's line break and the content's in one token


@pytest.mark.parametrize("content", [[12, 13], [12, BREAK, 13], [MERGED, 12], []])
def test_content_that_begins_with_line_breaks(content, monkeypatch):
    """Where the tokenizer is known, whatever the roles; where it is not, roles that are one token."""
    for known, roles in (((BREAK, MERGED), (SYSTEM, USER, ASSISTANT)), ((), ([1], [2], [3]))):
        monkeypatch.setattr(CFG.special, "line_breaks", known, raising=False)
        system, user, assistant = roles
        tokens = turn(system, [10]) + [START, *user, MERGED, *content, END, BREAK] + turn(assistant, [], closed=False)
        found = parts(tokens)
        assert found["system"] == [10] and found.get("question", []) == content
        assert len(found["template"]) == len(tokens) - 1 - len(content)


def test_a_raw_prompt_with_an_image():
    found = parts([VISION_START, PAD, VISION_END, 10, 11])
    assert found == {"vision_start": [VISION_START], "image": [PAD], "vision_end": [VISION_END], "question": [10, 11]}


def test_images_and_videos_are_numbered_apart():
    types = [IMAGE, IMAGE, TEXT, VIDEO, IMAGE, VIDEO, VIDEO, TEXT]
    names = number_visuals(["x"] * 8, types, [(IMAGE, 2), (VIDEO, 1), (IMAGE, 1), (VIDEO, 2)])
    assert names == ["image[0]", "image[0]", "x", "video[0]", "image[1]", "video[1]", "video[1]", "x"]
