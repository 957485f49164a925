"""Pictures and pages: what they show, and how they behave in a browser without network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import chromium, why_not
from conftest import picture
from explorer_pages import NASTY, large

from analyses.views.attention import attention_on_image, maps_on_image
from analyses.views.circuits import MOST_TOKENS, Page, as_text, strip
from analyses.views.text import readable

TOKENS = [*NASTY, *["<|image_pad|>"] * 12, "What", " is", "?"]
NAMES = ["system"] * len(NASTY) + ["image[0]"] * 12 + ["question"] * 3
FIRST = len(NASTY)
N = len(TOKENS)


def pattern(heads: int = 3, n: int = N) -> torch.Tensor:
    """A causal pattern whose rows sum to 1."""
    scores = torch.randn(heads, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def props(page: Page) -> list[tuple[str, dict]]:
    """(component, props) of every figure of a page."""
    return [(name, json.loads(data)) for call in page.calls for name, data in re.findall(r"CircuitsVis\.(\w+), (.*)\);$", call)]


# ---- the prompt as circuitsvis sees it ----------------------------------------------------------


def test_image_tokens_are_pooled_and_groups_by_name():
    shown = strip(TOKENS, NAMES, groups={"circle": [FIRST + 2, FIRST + 3]})
    assert shown.tokens[FIRST : FIRST + 2] == ("[rest of image[0] ×10]", "[circle ×2]")
    assert sorted(place for places in shown.members for place in places) == list(range(N))
    assert len(strip(TOKENS, NAMES, pool=False)) == N
    assert strip(TOKENS, NAMES, only=["question", "image[0]"]).tokens == ("[image[0] ×12]", "What", " is", "?")


def test_pooled_attention_by_hand():
    shown, given = strip(TOKENS, NAMES, groups={"circle": [FIRST + 2, FIRST + 3]}), pattern()
    pooled = shown.attention(given)
    for a, queries in enumerate(shown.members):
        for b, keys in enumerate(shown.members):
            by_hand = sum(given[:, q, k] for q in queries for k in keys) / len(queries)
            assert torch.allclose(pooled[:, a, b], by_hand, atol=1e-6)
    assert torch.allclose(pooled.sum(-1), torch.ones(3, len(shown)), atol=1e-5)
    values = torch.randn(N)
    assert torch.allclose(shown.values(values)[FIRST + 1], values[FIRST + 2 : FIRST + 4].mean())
    assert shown.values(values, "max")[FIRST + 1] == values[FIRST + 2 : FIRST + 4].max()


def test_strips_that_make_no_sense():
    for groups, words in (({"a": [0]}, "no image token"), ({"a": [FIRST], "b": [FIRST]}, "in the groups")):
        with pytest.raises(ValueError, match=words):
            strip(TOKENS, NAMES, groups=groups)
    with pytest.raises(ValueError, match="nothing to show"):
        strip(TOKENS, NAMES, only=["answer"])
    with pytest.raises(ValueError, match="a segment for each"):
        strip(TOKENS, NAMES[1:])
    with pytest.raises(ValueError, match="whole prompt"):
        strip(TOKENS, NAMES).values(torch.zeros(3))


def test_too_many_tokens_for_an_attention_figure_are_refused():
    n = MOST_TOKENS + 1
    shown = strip(["a"] * n, ["image[0]"] * n, pool=False)
    for draw in (Page("").attention_patterns, Page("").attention_heads):
        with pytest.raises(ValueError, match="pool the image tokens"):
            draw(pattern(1, n), shown)
    with pytest.raises(ValueError, match="fewer layers or neurons"):
        Page("").neuron_activations(torch.zeros(n, 29, 4096), shown)


# ---- the same props as circuitsvis's own functions ----------------------------------------------


def circuitsvis_props(rendered) -> dict:
    """What circuitsvis hands its component: the last argument of its call."""
    return json.loads(re.search(r"CircuitsVis\.\w+,\s+(.*?)\s+\)\s+</script>", rendered.local_src[-300_000:], re.DOTALL)[1])


def test_props_are_those_of_circuitsvis():
    from circuitsvis.activations import text_neuron_activations
    from circuitsvis.logits import token_log_probs
    from circuitsvis.topk_tokens import topk_tokens

    words = ["zero", "one", "two", "three", "four"]
    shown = strip(words, ["question"] * 5)
    activations, log_probs, ids = torch.randn(5, 2, 3), torch.randn(5, 5).log_softmax(-1), torch.tensor([3, 1, 4, 0, 2])
    page = Page("")
    page.neuron_activations(activations, shown)
    page.topk_tokens(activations, shown, k=3)
    page.token_log_probs(log_probs, ids, words.__getitem__, shown, top_k=4)
    ours = [given for _, given in props(page)]
    theirs = [
        circuitsvis_props(text_neuron_activations(words, activations)),
        circuitsvis_props(topk_tokens([words], [activations.movedim(0, 1).numpy()], max_k=3)),
        circuitsvis_props(token_log_probs(ids, log_probs, words.__getitem__, top_k=4)),
    ]
    assert ours[:2] == theirs[:2]
    theirs[2]["prompt"][0] = ""  # it is not shown
    assert ours[2] == theirs[2]


# ---- matplotlib ---------------------------------------------------------------------------------


def test_attention_on_the_image(tmp_path):
    attention = torch.rand(5, 3, 12) / 12
    figure = attention_on_image(attention, (3, 4), picture(80, 60), tmp_path / "a.pdf", layers=[0, 4])
    assert (tmp_path / "a.pdf").stat().st_size > 0
    panels = np.array(figure.axes).reshape(2, 4)
    assert panels[0, 0].get_ylabel().startswith("layer 4") and panels[1, 0].get_ylabel().startswith("layer 0")
    assert [axes.get_xlabel() for axes in panels[1]] == ["mean", "head 0", "head 1", "head 2"]
    drawn = panels[0, 2].images[1]
    assert np.allclose(drawn.get_array(), attention[4, 1].reshape(3, 4)) and drawn.get_clim() == (0, float(attention[4, 1].max()))
    assert f"{100 * attention[4].mean(0).sum():.0f} % to image" in panels[0, 0].get_ylabel()
    with pytest.raises(ValueError, match="3×5 image tokens"):
        attention_on_image(attention, (3, 5), picture(80, 60))


def test_maps_on_the_image():
    signed = torch.randn(9, 12)
    signed[3, 2] = torch.nan
    figure = maps_on_image({"p": torch.rand(9, 12), "signed": signed}, (3, 4), picture(80, 60), title="costs $5 and $6")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels[:5]] == [f"layer {layer}" for layer in (0, 2, 4, 6, 8)]
    low, high = panels[5].images[1].get_clim()
    assert low == -high and high == pytest.approx(float(signed[~signed.isnan()].abs().max()))
    assert panels[0].images[1].get_clim()[0] == 0


def test_no_layer_is_drawn_twice():
    figure = maps_on_image({"p": torch.rand(3, 12), "q": torch.rand(2, 12)}, (3, 4), picture(80, 60))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [f"layer {layer}" for layer in (0, 1, 2, 0, 1)]


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    reason = why_not()
    if reason:
        pytest.skip(f"no browser to open pages in: {reason}")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    """A small made-up page with every map, and what it was made from."""
    import dataclasses

    result = large(rows=6, cols=8, layers=7, heads=2, d_vocab=400)
    recovered = dataclasses.replace(result, recovery=torch.randn(len(result.attention), len(result.segments)))
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    recovered.page(path)
    return recovered, path


def shown_tokens(browser, layer: int) -> list[str]:
    """The row of the table at a layer, once it follows the pointer."""
    browser.wait("document.documentElement.dataset.rested === String(state.place)")
    return browser.js(
        "return [...document.querySelectorAll(`#table .cell[data-layer='${arguments[0]}'] .text`)].map(e => e.textContent)", layer
    )


def nothing_wrong(browser) -> None:
    assert browser.requests_that_left() == []
    assert browser.errors() == []


# What the module of the page says of how its numbers are kept.
TOLERANCES = {
    "lens": lambda given: 3e-4 * given,
    "contextual": lambda given: 1e-5 * np.ptp(given),
    "attention": lambda given: 0.004 * given.max(-1, keepdims=True),
    "recovery": lambda given: 1e-6 * np.abs(given),
}
READY = "document.documentElement.dataset.ready"


def test_the_explorer_driven(browser, explorer):
    from selenium.webdriver.common.keys import Keys

    result, path = explorer
    browser.open(path, READY)
    lens, image = result.lens, result.starts[0]

    def expected(layer, place):
        return [readable(token) for token in lens.top_tokens[layer][place]]

    def table(layer):
        return shown_tokens(browser, layer)

    assert table(6) == expected(6, result.last) and "Position" in browser.text("#place")
    for row, col in ((0, 0), (5, 7), (2, 3)):  # hover
        browser.hover("#map", (col + 0.5) / 8, (row + 0.5) / 6)
        assert f"row {row + 1}, column {col + 1}" in browser.text("#place")
        for layer in range(7):
            assert table(layer) == expected(layer, image + 8 * row + col)
    browser.keys("#stage", Keys.ARROW_DOWN, Keys.ARROW_RIGHT)  # keys
    assert "row 4, column 5" in browser.text("#place") and table(2) == expected(2, image + 8 * 3 + 4)
    browser.keys("#stage", Keys.PAGE_DOWN)
    assert browser.text("#layer-name") == "5/6 5_pre"
    browser.keys("#layer", Keys.HOME)  # the slider
    assert browser.text("#layer-name") == "0/6 0_pre"
    for key, words in (("2", "cosine"), ("3", "attention"), ("4", "recovery"), ("1", "top token")):
        before = browser.js("return document.querySelector('#map').toDataURL()")
        browser.keys("#stage", key)
        assert words in browser.text("#unit") and browser.js("return document.querySelector('#map').toDataURL()") != before
    nothing_wrong(browser)


def test_the_explorers_numbers(browser, explorer):
    """What the page computes from its data, at every place, is what went in."""
    result, path = explorer
    browser.open(path, READY)
    maps = {
        "lens": result.lens.top_probs[..., 0], "contextual": result.contextual, "attention": result.attention.mean(1),
        "recovery": result.recovery,
    }  # fmt: skip
    for mode, values in maps.items():
        browser.js("setMode(arguments[0])", mode)
        found = browser.js("return [...Array(data.blocks).keys()].map(l => [...Array(data.n).keys()].map(p => valueAt(l, p)))")
        given = values[: len(found)].numpy()
        assert (np.abs(np.array(found) - given) <= TOLERANCES[mode](given)).all(), mode
    browser.js("setMode('attention'); state.shade = '2'")  # the second head
    found = browser.js("return [...Array(data.n).keys()].map(p => valueAt(3, p))")
    assert np.abs(np.array(found) - result.attention[3, 1].numpy()).max() <= 0.004 * float(result.attention[3, 1].max())
    assert np.isnan(float(browser.js("return String(valueAt(data.blocks, 0))")))  # no block reads the last layer
    ids, kept = result.kept_ids.tolist(), result.kept_probs
    for token in (ids[30], ids[100]):
        for layer in (0, 6):
            found = browser.js("return probabilityOf(data.ids.indexOf(arguments[0]), arguments[1], data.last)", token, layer)
            top = dict(zip(result.lens.top_ids[layer, result.last].tolist(), result.lens.top_probs[layer, result.last].tolist()))
            assert found["known"] and found["p"] == pytest.approx(top.get(token, float(kept[layer, ids.index(token)])), rel=1e-3)
    unknown = browser.js("return probabilityOf(data.ids.length + 5, 2, 0)")
    assert not unknown["known"] and unknown["p"] == pytest.approx(float(result.lens.top_probs[2, 0, -1]), rel=1e-3)


def test_page_and_figures_show_the_same_signs(browser, explorer):
    """Blanks and unprintable characters, of every kind: what the page's script shows is what analyses.views.text says."""
    browser.open(explorer[1], READY)
    codes = [*range(0x378), *range(0x2000, 0x2066), 0x3000, 0xE000, 0xFEFF, 0xFFFD, 0xFFFF, 0x4E2D, 0x1F600, 0xE0001]
    texts = [chr(code) for code in codes]
    shown = browser.js("return arguments[0].map((code) => visible(String.fromCodePoint(code)))", codes)
    assert [(hex(code), a) for code, a in zip(codes, shown)] == [(hex(code), readable(text)) for code, text in zip(codes, texts)]
    assert browser.js("return visible('')") == readable("")


def test_a_hover_lays_the_page_out_once(browser, explorer):
    """No layout is forced in the middle of a frame, whatever is written."""
    browser.open(explorer[1], READY)
    browser.sweep(3)
    before = browser.counters()
    browser.sweep(40)
    after = browser.counters()
    assert 20 < after["LayoutCount"] - before["LayoutCount"] <= 44 and after["RecalcStyleCount"] - before["RecalcStyleCount"] <= 44
    nothing_wrong(browser)


def test_several_moves_in_a_frame_are_drawn_once(browser, explorer):
    browser.open(explorer[1], READY)
    drawn = browser.driver.execute_async_script(
        """const done = arguments[0], map = document.querySelector("#map"), box = map.getBoundingClientRect(), real = fillTable;
        let drawn = 0;
        fillTable = () => { drawn += 1; real(); };
        for (const share of [0.1, 0.3, 0.6, 0.9])
          map.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: box.left + share * box.width, clientY: box.top + 9 }));
        requestAnimationFrame(() => requestAnimationFrame(() => { fillTable = real; done([drawn, whereIs(state.place).col]); }));"""
    )
    assert drawn == [1, 7]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_tables_canvas_shows_what_the_table_says(browser, explorer, width):
    result, path = explorer
    browser.open(path, READY, width=width)
    place = result.starts[0] + 9
    browser.js("select(arguments[0])", place)
    browser.frames()
    where = "const { columns, tops, height, context } = fitTable.found, scale = window.devicePixelRatio;"
    for layer in (0, 3, 6):
        for rank in range(2):
            at = f"context.getImageData(Math.round((columns[{rank}][0] + 1) * scale), Math.round((tops[{layer}] + 1) * scale), 1, 1).data"
            pixel = browser.js(f"{where} return [...{at}].slice(0, 3)")
            value = browser.js(f"return probability(data.arrays.topProbs, topAt({layer}, state.place) + {rank})")
            assert value == pytest.approx(float(result.lens.top_probs[layer, place, rank]), rel=1e-3)
            assert pixel == browser.js(f"return [...ramps.plain[Math.round({value} * 255)]]")
            boxes = browser.js(
                f"const c = makeTable.rows[{layer}].cells[{rank}].cell.getBoundingClientRect(), o = $('cells').getBoundingClientRect();"
                f"{where} return [c.left - o.left - columns[{rank}][0], c.top - o.top - tops[{layer}], c.height - height]"
            )
            assert max(map(abs, boxes)) < 2, boxes  # the transparent text lies over what is drawn
    written = []
    browser.js(
        "window.real = fitTable.found.context.fillText; window.said = []; fitTable.found.context.fillText = (text) => said.push(text)"
    )
    browser.js("select(arguments[0])", place + 1)
    browser.frames()
    written = browser.js("return said")
    tokens = [readable(tokens) for layer in result.lens.top_tokens for tokens in layer[place + 1]]
    assert len(written) == (1 if width == 360 else 2) * len(tokens)
    for text, token in zip(written, tokens):
        assert text == token or (text.endswith("…") and token.startswith(text[:-1]) and len(text) > 1)


def test_tokens_typed_into_the_explorer(browser, explorer):
    from selenium.webdriver.common.keys import Keys

    result, path = explorer
    browser.open(path, READY)
    browser.js("state.chips = []; drawChips()")
    for typed in ("</script>", "<b>", f"#{int(result.kept_ids[40])}"):
        browser.keys("#typed", typed, Keys.ENTER)
    chips = browser.js("return [...document.querySelectorAll('.chip .text')].map(e => e.textContent)")
    assert chips == ["</script>", "<b>", readable(result.kept_tokens[40])]
    dots = "return [...document.querySelectorAll('#plot .known')].map(e => e.getAttribute('d').split('M').length - 1)"
    assert browser.js(dots) == [7] * 3
    browser.keys("#typed", "not-a-token-at-all", Keys.ENTER)
    assert "is not on this page" in browser.text("#not-found")
    browser.keys("#stage", Keys.ARROW_LEFT)  # at an image token fewer are known: bounds, and it says so
    assert browser.js("return document.querySelectorAll('#plot path[d*=h6]').length") > 0
    assert browser.js("return document.querySelector('#plot-note').style.visibility") == "visible"
    nothing_wrong(browser)


PLACE_AT = """const box = $("map").getBoundingClientRect();
return placeUnder({ clientX: box.left + arguments[0] * box.width, clientY: box.top + arguments[1] * box.height });"""
POINT = """const [kind, pointerId, pointerType, x, y, more] = arguments, box = $("map").getBoundingClientRect();
const event = kind === "wheel" ? WheelEvent : PointerEvent;
$("map").dispatchEvent(new event(kind, { bubbles: true, cancelable: true, pointerId, pointerType, clientX: box.left + x * box.width,
                                         clientY: box.top + y * box.height, ...more }));"""


def test_the_explorer_zooms_and_pans(browser, explorer):
    """Wheel, keys, drag and two fingers; what lies under the pointer is what is selected, at every zoom."""
    from selenium.webdriver.common.keys import Keys

    result, path = explorer
    browser.open(path, READY)
    start = result.starts[0]

    def zoom():
        browser.frames()
        return browser.js("return state.zoom")

    for _ in range(3):
        under = browser.js(PLACE_AT, 0.3, 0.7)
        browser.js(POINT, "wheel", 1, "mouse", 0.3, 0.7, {"deltaY": -120})
        assert browser.js(PLACE_AT, 0.3, 0.7) == under == start + 8 * 4 + 2  # the point under the pointer stays
    assert zoom() == pytest.approx(np.exp(0.24 * 3))
    browser.hover("#map", 0.3, 0.7)
    cursor, at = browser.js(
        "const c = $('cursor').getBoundingClientRect(), b = $('map').getBoundingClientRect();"
        "return [[c.left, c.top, c.right, c.bottom], [b.left + .3 * b.width, b.top + .7 * b.height]]"
    )
    assert browser.js("return state.place") == under
    assert cursor[0] - 1 <= at[0] <= cursor[2] + 1 and cursor[1] - 1 <= at[1] <= cursor[3] + 1
    for _ in range(8):  # the selected token is kept in sight
        browser.keys("#stage", Keys.ARROW_RIGHT)
    inside = "const c = $('cursor').getBoundingClientRect(), b = $('map').getBoundingClientRect();"
    assert (
        browser.js(f"{inside} return c.left > b.left - 1 && c.right < b.right + 1") and browser.js("return whereIs(state.place).col") == 7
    )
    before = browser.js(PLACE_AT, 0.5, 0.5)
    for kind, x in (("pointerdown", 0.5), ("pointermove", 0.7), ("pointermove", 0.9), ("pointerup", 0.9), ("click", 0.9)):
        browser.js(POINT, kind, 1, "mouse", x, 0.5, {"button": 0})
    assert browser.js(PLACE_AT, 0.5, 0.5) < before and not browser.js("return state.held")  # a drag is no click
    browser.keys("#stage", "0")
    assert zoom() == 1 and browser.js("return [state.left, state.top]") == [0, 0]
    browser.keys("#stage", "+")
    assert zoom() == 1.5
    browser.keys("#stage", "-")
    assert zoom() == pytest.approx(1)
    for kind, finger, x in (("pointerdown", 1, 0.4), ("pointerdown", 2, 0.6), ("pointermove", 1, 0.2), ("pointermove", 2, 0.8)):
        browser.js(POINT, kind, finger, "touch", x, 0.5, {})
    assert zoom() == pytest.approx(3)  # three times as far apart
    for finger in (1, 2):
        browser.js(POINT, "pointerup", finger, "touch", 0.5, 0.5, {})
    nothing_wrong(browser)


def test_words_come_when_there_is_room(browser, tmp_path):
    large(rows=20, cols=30, layers=3, heads=1, d_vocab=400).page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", READY)
    browser.js("window.words = 0; const real = label; label = (...given) => { words += 1; real(...given); }")
    written = []
    for zoom in (1, 4):
        browser.js("words = 0; setZoom(arguments[0])", zoom)
        browser.frames()
        written.append(browser.js("return words"))
    assert written[0] == 0 and 20 < written[1] < 80  # those in sight, no others


def header(browser) -> str:
    return browser.js("return document.querySelector('header p').innerText")


def test_the_header_tells_answer_from_model(browser, explorer, tmp_path):
    """And says so if there is no answer: because the model ended at once, or none was given."""
    import dataclasses

    result, path = explorer
    browser.open(path, READY)
    assert header(browser) == "answer: this · model: made up · 79 positions, 6 layers"
    mute = dataclasses.replace(result, answer=(), answer_text="", contextual=None)
    for segments, words in ((mute.segments, "(none: the model ended at once)"), (["question"] * len(mute.segments), "(none was given)")):
        dataclasses.replace(mute, segments=tuple(segments)).page(tmp_path / "page.html")
        browser.open(tmp_path / "page.html", READY)
        assert header(browser).startswith(f"answer: {words} · model: made up")


@pytest.mark.parametrize("width", [360, 1280])
def test_facts_of_a_position_are_not_cut_and_minus_is_a_minus(browser, explorer, width):
    result, path = explorer
    browser.open(path, READY, width=width)
    seen = []
    for mode in ("lens", "contextual", "attention", "recovery"):
        browser.js("setMode(arguments[0])", mode)
        for place in (0, 3, 14, 20, 40, 66, 70):
            browser.js("select(arguments[0]); hold(true)", place)
            browser.frames()
            facts = browser.text("#facts")
            seen += [facts, browser.text("#low")]
            assert re.search(r"entropy \d+\.\d\d nats", facts)
            room = browser.js("const f = $('facts'); return [f.scrollHeight <= f.clientHeight, f.scrollWidth <= f.clientWidth]")
            assert all(room), (mode, facts)
            browser.js("hold(false)")
    assert any("−" in text for text in seen) and not any(re.search(r"-\d", text) for text in seen)


def test_each_view_opens_where_there_is_something(browser, explorer):
    from selenium.webdriver.common.keys import Keys

    result, path = explorer
    browser.open(path, READY)
    here = slice(result.starts[0], result.starts[0] + 48)
    maps = {"3": result.attention.mean(1), "4": result.recovery.abs(), "2": result.contextual}
    for key, values in maps.items():
        most = values[:, here].amax(-1)
        browser.keys("#stage", key)
        layer = browser.js("return state.layer")
        assert most[layer] >= 0.498 * most.max() and (most[layer + 1 :] < 0.502 * most.max()).all(), key
    browser.keys("#stage", Keys.PAGE_UP)
    chosen = browser.js("return state.layer")
    browser.keys("#stage", "1")
    assert browser.js("return state.layer") == chosen  # a layer that was chosen stays


def test_attention_of_any_token(browser, explorer):
    """Of every position that is kept: generated ones, text and image tokens; of others the page says that it has none."""
    result, path = explorer
    browser.open(path, READY)
    assert set(result.queries) == set(range(len(result.segments)))  # a small page holds all
    browser.js("setMode('attention')")
    for shade, given in (("0", result.attention_from[2].mean(1)), ("2", result.attention_from[2, :, 1])):
        for at in (0, 1, 20, len(result.queries) - 1):
            browser.js("state.shade = arguments[0]; setQuery(arguments[1]); setLayer(2)", shade, result.queries[at])
            found = browser.js("return [...Array(data.n).keys()].map(p => valueAt(2, p))")
            assert np.abs(np.array(found) - given[at].numpy()).max() <= 0.004 * float(given[at].max()), (shade, at)
    browser.js("state.shade = 'all'; setQuery(arguments[0])", result.queries[3])
    found = browser.js("return [...Array(data.n).keys()].map(p => valueAt(2, p))")
    mean = result.attention_from[:, 3].mean((0, 1))
    assert np.abs(np.array(found) - mean.numpy()).max() <= 0.004 * float(result.attention_from[:, 3].mean(1).max())
    token = result.answer[0]
    browser.js("hold(false); document.querySelector(`#strip [data-place='${arguments[0]}']`).click()", token)
    browser.frames()
    assert browser.js("return state.query") == token and browser.js("return $('query').value") == str(token)
    here = result.attention_from[:, result.queries.index(token)].mean((0, 1))[result.starts[0] : result.starts[0] + 48].sum()
    assert f"{100 * float(here):.0f} % of it to images" in browser.text("#unit")
    nothing_wrong(browser)


def test_attention_that_is_not_kept_says_so(browser, tmp_path):
    import dataclasses

    result = large(rows=4, cols=5, layers=3, heads=1, d_vocab=400)
    few = dataclasses.replace(result, queries=result.queries[:2], attention_from=result.attention_from[:, :2])
    few.page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", READY)
    browser.js("setMode('attention'); select(0); hold(true)")
    browser.frames()
    assert "is not on this page" in browser.text("#not-kept") and browser.js("return state.query") == result.last


def test_the_other_image_of_patching_and_what_is_no_token(browser, explorer, tmp_path):
    import dataclasses

    from selenium.webdriver.common.keys import Keys

    result, _ = explorer
    with_other = dataclasses.replace(result, other_images=(picture(80, 60),), other_answer="that", rest_prob=torch.zeros(7))
    with_other.page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", READY)
    seen = "return $('other').getBoundingClientRect().height > 50 && $('other').querySelector('img').naturalWidth"
    assert not browser.js(seen)
    browser.keys("#stage", "4")
    browser.wait("$('other').querySelector('img').complete")
    assert browser.js(seen) == 80 and "“that”" in browser.text("#other-name")
    browser.keys("#typed", "no such thing", Keys.ENTER)
    assert "is no token of this model" in browser.text("#not-found")


def test_frames_stand_side_by_side(browser, explorer, tmp_path):
    import dataclasses

    result, _ = explorer
    frames = dataclasses.replace(
        result, images=(picture(80, 30), picture(80, 30, 2)), starts=(15, 39), grids=((3, 8), (3, 8)), image_names=("frame 0", "frame 2")
    )
    frames.page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", READY)
    boxes = browser.js("return [...document.querySelectorAll('#film canvas')].map(c => [c.getBoundingClientRect().top, c.clientWidth])")
    assert len(boxes) == 2 and boxes[0][0] == boxes[1][0] and min(width for _, width in boxes) > 40
    browser.js("document.querySelectorAll('#film button')[1].click()")
    browser.frames()
    assert browser.js("return state.place") == 39 and "of frame 2" in browser.text("#place")
    nothing_wrong(browser)


# Of every text that is seen: its contrast with what is behind it (WCAG 2.1).
CONTRASTS = r"""
const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const found = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()), box = e.getBoundingClientRect();
  if (!own || !box.width || e.closest(".cell, .unseen, script, style")) continue;
  const style = getComputedStyle(e);
  const [a, b] = [numbers(e.closest("svg") ? style.fill : style.color), behind(e)].map(light).sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40), e.tagName]);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_contrast(browser, explorer, tmp_path, dark):
    from analyses.views.index import index_page

    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    index = index_page("lens", "hooked-qwen2vl lens", {"question": "what?"}, "found", [tmp_path / "a.csv", tmp_path / "lens.html"])
    (tmp_path / "index.html").write_text(index, encoding="utf-8")
    for page, ready in ((explorer[1], READY), (tmp_path / "index.html", "document.querySelector('details')")):
        browser.open(page, ready, dark=dark)
        browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = browser.js(CONTRASTS)
        assert len(found) > 8 and min(found)[0] >= 4.5, min(found)
    browser.open(explorer[1], READY, dark=dark)
    inks = browser.js("return ramps.plain.map(c => [luminance(c), inkOn(c)])")
    assert all((1.05 / (light + 0.05) if ink == "#fff" else (light + 0.05) / 0.05) >= 4.5 for light, ink in inks)


@pytest.mark.parametrize("dark", [False, True])
def test_the_pages_of_lens_and_explain_have_contrast(browser, tmp_path, dark):
    """And the rows of circuitsvis are aligned, in the blue that their caption names."""
    from every_result import RESULTS, image, lens

    from analyses.saliency import Saliency
    from analyses.views.circuits import lens_page
    from analyses.views.saliency import saliency_page

    made = lens(3)
    made.top_probs[0, :2, 0] = torch.tensor([0.0, 1.0])
    lens_page(made, tmp_path / "lens.html")
    saliency_page(RESULTS[Saliency](), [image()], tmp_path / "explain.html")
    drawn = "[...document.querySelectorAll('[id^=figure-]')].every(f => f.textContent.length > 5)"
    for name, ready in (("explain", "document.querySelector('#tokens button')"), ("lens", drawn)):
        browser.open(tmp_path / f"{name}.html", ready, dark=dark)
        found = browser.js(CONTRASTS)
        assert len(found) > 8 and min(found)[0] >= 4.5, (name, min(found))
        colour = browser.js("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == dark
        control = browser.js(
            "return getComputedStyle(document.body.appendChild(document.createElement('input'))).color"
        )  # the browser's own
        assert control == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)"), name
    lefts = browser.js("""return [...document.querySelectorAll("[id^=figure-]")].map(f => [...f.querySelectorAll("span")]
      .filter(s => getComputedStyle(s).backgroundColor !== "rgba(0, 0, 0, 0)").map(s => Math.round(s.getBoundingClientRect().left)))""")
    assert len(lefts) == len(made.layer_labels) and all(len(set(column)) == 1 for column in zip(*lefts, strict=True))
    shades = browser.js("""return [...document.querySelectorAll("[id^=figure-]")].map(f => [...f.querySelectorAll("span")]
      .map(s => getComputedStyle(s).backgroundColor).filter(c => c !== "rgba(0, 0, 0, 0)"))""")
    shown = np.array([[list(map(int, re.findall(r"\d+", shade)[:3])) for shade in row] for row in shades])
    probs = made.top_probs.flip(0)[..., 0].numpy()
    assert (shown[probs == 1] == [0x56, 0xB4, 0xE9]).all() and (shown[probs == 0] == 255).all()  # as the table's
    assert (np.diff(shown[..., 0].flat[probs.argsort(axis=None)]) <= 0).all()


def test_the_prompt_unfolds_and_tokens_are_text(browser, explorer):
    result, path = explorer
    browser.open(path, READY)
    assert browser.js("return document.querySelectorAll('main b, main script').length") == 0
    strip_text = browser.js("return [...document.querySelectorAll('#strip .token')].map(e => e.textContent)")
    assert strip_text[2:5] == ["</script>", "<b>", "&amp;"]
    assert browser.js("return document.querySelectorAll('.tiles span').length") == 0
    browser.js("document.querySelector('.thumb').click()")
    browser.frames()
    assert browser.js("return document.querySelectorAll('.tiles span').length") == 48
    browser.hover(f".tiles span[data-place='{result.starts[0] + 10}']", 0.5, 0.5)
    assert "row 2, column 3" in browser.text("#place")
    nothing_wrong(browser)


@pytest.mark.parametrize("dark", [False, True])
def test_the_explorer_on_a_phone(browser, explorer, dark):
    _, path = explorer
    browser.open(path, READY, width=360, height=740, dark=dark)
    assert browser.js("return document.documentElement.scrollWidth") <= 360
    colour = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == dark
    assert browser.js("return document.querySelector('#map').getBoundingClientRect().width") > 280


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_moves_under_the_pointer(browser, explorer, width):
    """Whatever is selected, the parts of the page stay where they are."""
    _, path = explorer
    browser.open(path, READY, width=width)
    where = "return [...document.querySelectorAll('section, #table, #plot, #chips')].map(e => e.getBoundingClientRect().top)"
    places = []
    for place in (0, 3, 14, 20, 40, 66, 70):
        browser.js("select(arguments[0])", place)
        browser.frames()
        places.append(browser.js(where))
    assert places.count(places[0]) == len(places)


def test_circuitsvis_without_network(browser, tmp_path):
    """Every figure draws, with tokens as text, from one copy of the library."""
    shown = strip(TOKENS, NAMES, groups={"circle": [FIRST + 2, FIRST + 3]})
    page = Page("</script><b>figures</b>")
    page.attention_patterns(pattern(), shown)
    page.attention_heads(pattern(), shown)
    page.colored_tokens(torch.randn(N), shown)
    page.topk_tokens(torch.randn(N, 2, 4), shown, k=20)
    page.neuron_activations(torch.randn(N, 2, 4), shown)
    words = [*TOKENS[:20]]
    page.token_log_probs(torch.randn(N, 20).log_softmax(-1), torch.arange(N) % 20, words.__getitem__, shown)
    page.write(tmp_path / "page.html")
    figures = "[...document.querySelectorAll('[id^=figure-]')]"
    browser.open(tmp_path / "page.html", f"{figures}.length === 6 && {figures}.every(f => f.textContent.length > 20)")
    assert browser.js("return document.querySelectorAll('b').length") == 0 and browser.text("h1") == "</script><b>figures</b>"
    for figure in (0, 2, 3, 4):
        text = browser.text(f"#figure-{figure}")
        assert all(readable(token) in text for token in NASTY) and "[circle␣×2]" in text, figure
    assert props(page)[1][1]["tokens"][:2] == ["</script>", "<b>"]  # on a canvas: nothing to escape
    assert (tmp_path / "page.html").stat().st_size < 1_500_000  # the library once
    nothing_wrong(browser)


class _Srcdoc(HTMLParser):
    """What a browser takes the frame's document to be."""

    def handle_starttag(self, tag, attributes):
        self.srcdoc = dict(attributes)["srcdoc"]


def test_a_notebook_shows_the_page_itself(browser, tmp_path):
    page = Page("In a notebook")
    page.colored_tokens(torch.randn(N), strip(TOKENS, NAMES))
    parser = _Srcdoc()
    parser.feed(page._repr_html_())
    assert parser.srcdoc == page.html()
    (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset=utf-8><div>{page._repr_html_()}</div>", encoding="utf-8")
    inside = "document.querySelector('iframe').contentDocument"
    browser.open(tmp_path / "cell.html", f"{inside}.querySelector('#figure-0')?.textContent.length > 20")
    assert as_text("<b>") == "&lt;b&gt;" and "<b>" in browser.js(f"return {inside}.querySelector('#figure-0').textContent")
    nothing_wrong(browser)


def test_a_notebook_shows_a_figure_without_pyplot():
    from analyses.views.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    assert figure._repr_png_().startswith(b"\x89PNG")
