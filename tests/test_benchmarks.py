"""Benchmark files: every format, every kind of bad row by its line, and the judging by hand."""

from __future__ import annotations

import json

import pytest
from conftest import picture
from sklearn.metrics import f1_score, precision_score, recall_score

from analyses.data.benchmarks import (
    AMBER_TYPES,
    HQH_TYPES,
    MMHAL_TYPES,
    NEEDS_A_JUDGE,
    OBJECTS,
    YES_NO,
    Benchmark,
    Question,
    chair,
    judge,
    load_amber,
    load_chair,
    load_grounding,
    load_hqh,
    load_mmhal,
    load_pope,
    load_scenes,
    mentions,
    object_noun,
    parse_yes_no,
    read_synonyms,
    says_yes_or_no,
    yes_no_metrics,
)  # fmt: skip
from analyses.data.examples import LeftOut

VOCABULARY = {"person": "person", "boy": "person", "dog": "dog", "puppy": "dog", "hot dog": "hot dog", "bus": "bus"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(30, 30).save(tmp_path / name)
    return tmp_path


def pope_rows(n: int = 4) -> list[dict]:
    objects = ("dog", "cat", "bus", "apple")
    return [
        {"question_id": i + 1, "image": "ab"[i % 2] + ".jpg", "text": f"Is there a {objects[i]} in the image?",
         "label": ("yes", "no")[i % 2]}
        for i in range(n)
    ]  # fmt: skip


def write_lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def write_array(path, rows, **style):
    path.write_text(json.dumps(rows, **style))
    return path


def test_both_forms_of_pope_are_told_by_their_first_character(folder):
    lines = write_lines(folder / "coco_pope_random.json", pope_rows())
    for style in ({}, {"indent": 1}):
        array = write_array(folder / "gqa_pope_random.json", pope_rows(), **style)
        array.write_text("\ufeff \n" + array.read_text())  # space and a byte-order mark say nothing
        ours, theirs = load_pope(lines), load_pope(array)
        assert [(i.id, i.question, i.answer, i.images) for i in ours] == [(i.id, i.question, i.answer, i.images) for i in theirs]
    first = ours[0]
    assert (first.id, first.answer, first.noun, first.judge, first.category) == ("1", "yes", "dog", YES_NO, "random")
    assert first.images == (folder / "a.jpg",) and first.source.endswith("random.json, line 1")
    assert [item.noun for item in ours] == ["dog", "cat", "bus", "apple"]


def bad_pope_rows() -> list:
    good = pope_rows()
    return [
        good[0],
        '{"question_id": 5,',
        {**good[1], "label": "maybe"},
        {**good[2], "question_id": 1},
        {**good[2], "image": "gone.jpg"},
        "",
        {"question_id": 9, "image": "a.jpg", "label": "yes"},
        "[1, 2]",
        good[3],
    ]


def test_bad_lines_are_named_and_counted(folder):
    file = write_lines(folder / "pope.json", bad_pope_rows())
    with pytest.raises(ValueError, match="6 bad rows beside 2 good") as caught:
        load_pope(file)
    kept = load_pope(file, skip_bad=True)
    assert [item.id for item in kept] == ["1", "4"] and len(kept.problems) == 6
    expected = {2: "not JSON", 3: "maybe", 4: "also that of", 5: "gone.jpg", 7: "text", 8: "expected an object"}
    for (line, words), problem in zip(expected.items(), kept.problems, strict=True):
        assert f"pope.json, line {line}:" in problem and words in problem
    assert all(problem in str(caught.value) for problem in kept.problems[:5]) and "1 more" in str(caught.value)


def test_bad_rows_of_an_array_have_their_line_too(folder):
    rows = pope_rows()
    rows[2]["label"] = "perhaps"
    file = write_array(folder / "pope.json", rows, indent=2)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if '"question_id": 3' in text) - 1
    with pytest.raises(ValueError, match=f"line {line}: .*perhaps"):
        load_pope(file)
    broken = file.read_text().replace('"label": "perhaps"', '"label" "yes"')
    file.write_text(broken)
    with pytest.raises(ValueError, match=f"line {line + 4}: not JSON"):
        load_pope(file)


@pytest.mark.parametrize("content, words", [("", "begins with ''"), ("id,label\n", "begins with 'i'"), ("[]", "no rows")])
def test_files_that_are_not_benchmarks(folder, content, words):
    (folder / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        load_pope(folder / "x.json")
    with pytest.raises(ValueError, match="missing.json is not a file"):
        load_pope(folder / "missing.json")
    (folder / "x.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match="UTF-8"):
        load_pope(folder / "x.json")


def test_images_elsewhere_and_unchecked(folder, tmp_path):
    other = tmp_path / "pictures"
    other.mkdir()
    file = write_lines(folder / "pope.json", pope_rows())
    with pytest.raises(ValueError, match="4 bad rows"):
        load_pope(file, images=other)
    assert load_pope(file, images=other, check_images=False)[0].images == (other / "a.jpg",)


def test_hqh(folder):
    (folder / "images").mkdir()
    (folder / "a.jpg").rename(folder / "images" / "7.jpg")
    rows = [
        {"id": i, "image_id": 7, "image": "./images/7.jpg", "instruction": f"What {kind}?", "ground_truth": "it", "type": kind}
        for i, kind in enumerate(("OCR", *HQH_TYPES[1:]))
    ]
    write_array(folder / "HQH.json", rows)
    items = load_hqh(folder)
    assert [item.category for item in items] == list(HQH_TYPES)
    assert all(item.judge == NEEDS_A_JUDGE and judge(item, "it") is None for item in items)
    assert items[0].images == (folder / "images" / "7.jpg",)
    write_array(folder / "HQH.json", [{**rows[0], "type": "colour"}, rows[1]])
    with pytest.raises(ValueError, match="1 bad rows beside 1 good.*\n.*line 1: .*'colour'"):
        load_hqh(folder)


def amber(folder, notes, queries, name="query_all.json"):
    write_array(folder / "annotations.json", notes)
    write_array(folder / name, queries)
    return folder


def test_amber(folder):
    kinds = list(AMBER_TYPES)
    notes = [{"id": n + 1, "type": kind, "truth": ("yes", "no")[n % 2]} for n, kind in enumerate(kinds)]
    notes[0] = {"id": 1, "type": "generative", "truth": ["beach"], "hallu": ["boat"]}
    queries = [{"id": n, "image": "a.jpg", "query": f"Is there a thing {n}?"} for n in (2, 1, 7, 6)]  # not in order
    items = load_amber(amber(folder, notes, queries))
    assert [item.category for item in items] == ["existence", "generative", "relation", "relation"]
    assert [item.answer for item in items] == ["no", "", "yes", "no"]  # of annotation id − 1
    assert items[1].judge == NEEDS_A_JUDGE and items[1].truth == ("beach",) and items[1].hallucinated == ("boat",)
    assert items[0].judge == YES_NO

    (folder / "query_all.json").rename(folder / "query_x.json")
    assert [i.id for i in load_amber(folder)] == [i.id for i in load_amber(folder / "query_x.json")] == ["2", "1", "7", "6"]
    notes[1]["id"] = 3
    queries.append({"id": 8, "image": "a.jpg", "query": "Is it?"})
    with pytest.raises(ValueError, match="2 bad rows") as caught:
        load_amber(amber(folder, notes, queries, "query_x.json"))
    assert "annotation 2 is" in str(caught.value) and "id 8 has no annotation: there are 7" in str(caught.value)
    (folder / "annotations.json").unlink()
    with pytest.raises(ValueError, match="annotations.json is not a file"):
        load_amber(folder)


def test_mmhal(folder):
    rows = [
        {"question": f"What {i}?", "gt_answer": "it", "model_answer": "that", "image_content": ["dog"],
         "image_src": "https://example.org/x/a.jpg"}
        for i in range(10)
    ]  # fmt: skip
    items = load_mmhal(write_array(folder / "mmhal.json", rows))
    assert [item.category for item in items] == [MMHAL_TYPES[i % 8] for i in range(10)]
    assert items[0].images == (folder / "a.jpg",) and items[0].given == "that" and items[0].truth == ("dog",)
    lines = write_lines(folder / "mmhal.json", [*map(json.dumps, rows[:3]), "{", *map(json.dumps, rows[4:])])
    kept = load_mmhal(lines, skip_bad=True)  # a bad row does not shift the types after it
    assert [item.category for item in kept] == [MMHAL_TYPES[i % 8] for i in range(10) if i != 3]


def test_chair_by_hand(folder):
    rows = [
        {"image_id": 1, "caption": "Two puppies? No: a puppy, a dog and a Hot Dog."},  # dog dog; "hot dog" is one thing
        {"image_id": 2, "caption": "A boy waits; buses and a bus pass. Two persons."},
        {"image_id": 3, "caption": "Nothing of note."},
    ]
    truth = {"1": ["dog"], "2": ["person", "bus"], "3": []}
    items = load_chair(write_lines(folder / "captions.jsonl", rows), objects=truth)
    result = chair(items, VOCABULARY)
    assert result.mentions["object"].tolist() == ["dog", "dog", "hot dog", "person", "bus", "bus", "person"]
    assert result.mentions["hallucinated"].tolist() == [False, False, True, False, False, False, False]
    assert result.chair_i == pytest.approx(1 / 7) and result.chair_s == pytest.approx(1 / 3)
    assert result.to_dataframe().iloc[0].to_dict() == {
        "captions": 3, "hallucinated_captions": 1, "mentions": 7, "hallucinated_mentions": 1,
        "CHAIRs": pytest.approx(1 / 3), "CHAIRi": pytest.approx(1 / 7),
    }  # fmt: skip
    assert chair(items[2:], VOCABULARY).chair_i != chair(items[2:], VOCABULARY).chair_i  # nothing named: NaN

    files = write_array(folder / "captions.json", rows), write_array(folder / "objects.json", truth)
    again = load_chair(files[0], objects=files[1])
    assert [item.truth for item in again] == [item.truth for item in items] and again[0].judge == OBJECTS
    assert load_chair(files[0])[0].judge == NEEDS_A_JUDGE
    with pytest.raises(ValueError, match="no list of the objects"):
        chair(load_chair(files[0]), VOCABULARY)
    with pytest.raises(ValueError, match="line 1: no objects are listed for image 2"):
        load_chair(files[0], objects={"1": [], "3": []})
    with pytest.raises(ValueError, match="'cow' is not in the vocabulary"):
        chair(load_chair(files[0], objects={**truth, "3": ["cow"]}), VOCABULARY)
    picture(30, 30).save(folder / "COCO_val2014_000000000001.jpg")
    assert load_chair(files[0], images=folder, skip_bad=True)[0].images[0].name == "COCO_val2014_000000000001.jpg"


def test_mentions_say_where():
    caption = "A hot dog by the dog's bus"
    found = mentions(caption, VOCABULARY)
    assert [(m.object, caption[m.start : m.end]) for m in found] == [("hot dog", "hot dog"), ("dog", "dog"), ("bus", "bus")]
    assert mentions("a dogma, busy boycott", VOCABULARY) == []
    assert [m.object for m in mentions("a bus stop", {"bus": "bus", "bus stop": "stop"})] == ["stop"]
    with pytest.raises(ValueError, match="empty"):
        mentions("a dog", {})


def test_synonyms(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("person, girl, Boy\n\ndog, puppy,\n")
    assert read_synonyms(file) == {"person": "person", "girl": "person", "boy": "person", "dog": "dog", "puppy": "dog"}
    file.write_text("person, girl\ndog, girl\n")
    with pytest.raises(ValueError, match="line 2: 'girl' is already"):
        read_synonyms(file)


def test_grounding(folder):
    rows = [
        {"image": "a.jpg", "phrase": "the dog", "bbox": [2, 3, 10, 5]},
        {"image": "a.jpg", "expression": "a cat", "box": [2, 3, 10, 5], "mask": "b.jpg"},
    ]
    items = load_grounding(write_array(folder / "g.json", rows))
    assert items[0].boxes == ((2, 3, 12, 8),) and items[1].boxes == ((2, 3, 10, 5),)
    assert items[1].mask == folder / "b.jpg" and items[0].answer == "the dog"
    with pytest.raises(ValueError, match="no area"):
        load_grounding(write_array(folder / "g.json", [{**rows[1], "box": [5, 5, 5, 9]}]))
    with pytest.raises(ValueError, match='"phrase"'):
        load_grounding(write_array(folder / "g.json", [{"image": "a.jpg", "box": [5, 5, 6, 9]}]))


@pytest.mark.parametrize(
    "text, said, either",
    [
        ("Yes", "yes", True), ("No, there is no dog.", "no", True), ("no", "no", True), ("There is not a dog.", "no", True),
        ("There is a dog. No cat is there.", "yes", False), ("nothing", "yes", False), ("", "yes", False),
        ("yes.", "yes", True), ("NO", "yes", False), ("Yes, not one", "no", True), ("Not", "yes", False),
    ],
)  # fmt: skip
def test_answers_are_read_as_popes_script_does(text, said, either):
    assert parse_yes_no(text) == said
    assert says_yes_or_no(text) == either


def yes_no_items(golds, category="c"):
    return [Question(str(i), "Is it?", gold, judge=YES_NO, category=category) for i, gold in enumerate(golds)]


def test_yes_no_metrics_by_hand():
    items = yes_no_items(["yes", "yes", "yes", "yes", "no", "no"])
    answers = ["Yes", "Yes.", "No", "no", "yes", "There is not"]  # tp 2, fn 2, fp 1, tn 1
    figures = yes_no_metrics(items, answers).set_index("category").loc["all"]
    assert figures.to_dict() == pytest.approx(
        {"items": 6, "accuracy": 1 / 2, "precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7, "yes_rate": 1 / 2, "neither": 0}
    )
    turned = yes_no_metrics(items, answers, positive="no").set_index("category").loc["all"]  # AMBER's class
    assert (turned["precision"], turned["recall"], turned["f1"]) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    said = [parse_yes_no(answer) for answer in answers]
    golds = [item.answer for item in items]
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert figures[name] == pytest.approx(score(golds, said, pos_label="yes"))
        assert turned[name] == pytest.approx(score(golds, said, pos_label="no"))


def test_yes_no_metrics_by_category_and_their_edges():
    items = yes_no_items(["no", "no"], "first") + yes_no_items(["yes"], "second")
    table = yes_no_metrics(items, ["no", "no", "perhaps"]).set_index("category")
    assert list(table.index) == ["first", "second", "all"] and table.loc["second", "neither"] == 1
    assert table.loc["first", "precision"] != table.loc["first", "precision"]  # nothing said yes: NaN
    with pytest.raises(ValueError, match="an answer for each"):
        yes_no_metrics(items, ["yes"])
    with pytest.raises(ValueError, match="1 items are not yes/no"):
        yes_no_metrics([Question("1", "What?", "it")], ["it"])


@pytest.mark.parametrize(
    "question, noun",
    [
        ("Is there a dog in the image?", "dog"), ("Is there an orange bar?", "orange bar"), ("Are there red stripes?", "red stripes"),
        ("Is there direct contact between the man and the car?", ""), ("Is the sky blue in this image?", ""),
        ("What is there in the image?", ""), ("Is there a dining table in the image?", "dining table"),
    ],
)  # fmt: skip
def test_object_nouns(question, noun):
    assert object_noun(question) == noun


def test_scenes_and_exact_answers():
    items = load_scenes(12)
    assert len(items) == 12 and items[0].item is not None and {i.judge for i in items} == {"exact"}
    item = next(i for i in items if i.answer.isalpha())
    assert judge(item, f" {item.answer.upper()}.") and judge(item, item.answer + "s") is False and not judge(item, "")
    assert [i.id for i in load_scenes(12, start=10)] == [i.id for i in items[10:]]


def test_spread_takes_categories_in_turn():
    items = Benchmark(yes_no_items(["yes"] * 5, "a") + yes_no_items(["yes"] * 2, "b"), ["line 3"])
    with pytest.warns(LeftOut, match="5 of 7 are kept .category: a 3 of 5, b 2 of 2"):
        some = items.spread(5)
    assert [i.category for i in some] == ["a", "b", "a", "b", "a"]
    assert some.problems == ("line 3",) and len(items.spread(None)) == 7
