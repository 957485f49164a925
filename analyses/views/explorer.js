"use strict";
// One state, and functions that draw it. A place is an index into the prompt's positions; layer l of 0..L is the
// residual stream before block l, L after the last; block l reads layer l, so maps over blocks have nothing at the last layer.
// Every text of the model's goes in through textContent.

const $ = (id) => document.getElementById(id);
const MODES = { lens: "logit lens", contextual: "contextual", attention: "attention", recovery: "patching" };
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const RED_BLUE = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"];
const RAMP_SIZE = 256;
const MOST_CHIPS = 6;
const REST = 120; // ms without a move
const LABEL = [40, 22]; // pixels of a cell with room for a word
const PLAIN = /^[\x21-\x7e]*$/;
const state = { mode: "lens", layer: 0, place: 0, image: 0, shade: "top", same: false, opacity: 0.85, held: false, chips: [], log: false,
  query: 0, moved: false, zoom: 1, left: 0, top: 0 }; // left, top: of what is seen, in pixels of the zoomed picture
let data, ramps;

// ---- reading the data ---------------------------------------------------------------------------

async function unpack(base64) {
  const zipped = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, bytes: Uint8Array };
  const arrays = {};
  for (const [name, about] of Object.entries(header.arrays)) {
    const kind = kinds[about.kind];
    arrays[name] = new kind(buffer, 4 + length + about.offset, about.bytes / kind.BYTES_PER_ELEMENT);
    arrays[name].about = about;
  }
  return { ...header, arrays };
}

function prepare() {
  const { arrays } = data;
  let id = 0;
  data.ids = data.ids.map((step) => (id += step));
  data.n = data.prompt.length;
  data.nLayers = data.layers.length;
  data.shown = new Array(data.texts.length);
  data.imageOf = new Int16Array(data.n).fill(-1);
  data.images.forEach((image, number) => {
    image.url = URL.createObjectURL(new Blob([arrays[image.array]], { type: image.type }));
    data.imageOf.fill(number, image.start, image.start + image.rows * image.cols);
  });
  data.keptAt = new Map(Array.from(arrays.kept, (index, at) => [index, at]));
  data.queryAt = new Map(data.queries.map((place, at) => [place, at]));
  data.others.forEach((other) => (other.url = URL.createObjectURL(new Blob([arrays[other.array]], { type: other.type }))));
  data.followedAt = new Map(Array.from(arrays.followed ?? [], (index, at) => [index, at]));
}

const probability = (array, at) => (array[at] === 0 ? 0 : 10 ** (data.floor * (1 - array[at] / 65535)));
const linear = (array, at) => array.about.low + ((array.about.high - array.about.low) * array[at]) / 65535;
const topAt = (layer, place) => (layer * data.n + place) * data.k;

/** {p, known}: the probability of a token of the table, or, where it was not kept, the most it can be. */
function probabilityOf(token, layer, place) {
  const { followed, followedProbs, keptProbs, restProb, top, topProbs } = data.arrays;
  const start = topAt(layer, place);
  for (let rank = 0; rank < data.k; rank++)
    if (top[start + rank] === token) return { p: probability(topProbs, start + rank), known: true };
  if (data.followedAt.has(token))
    return { p: probability(followedProbs, (layer * data.n + place) * followed.length + data.followedAt.get(token)), known: true };
  const least = probability(topProbs, start + data.k - 1);
  if (place !== data.last) return { p: least, known: false };
  if (data.keptAt.has(token)) return { p: probability(keptProbs, layer * data.keptAt.size + data.keptAt.get(token)), known: true };
  return { p: Math.min(least, probability(restProb, layer)), known: false };
}

// ---- the maps -----------------------------------------------------------------------------------

/** The value that the map shows at a place, NaN where it has none. */
function valueAt(layer, place) {
  const { attention, contextual, recovery, entropy } = data.arrays;
  if (state.mode === "contextual") return linear(contextual, layer * data.n + place);
  if (state.mode === "lens") {
    if (state.shade === "top") return probability(data.arrays.topProbs, topAt(layer, place));
    if (state.shade === "entropy") return linear(entropy, layer * data.n + place);
    const { p, known } = probabilityOf(Number(state.shade), layer, place);
    return known ? p : NaN;
  }
  if (state.mode === "attention" && state.shade === "all") return meanOfBlocks(place);
  if (layer >= data.blocks) return NaN;
  if (state.mode === "recovery") return recovery[layer * data.n + place];
  return attentionAt(layer, Number(state.shade), place);
}

/** From the chosen query, of a head (0: the mean of heads, h + 1: head h). */
function attentionAt(block, head, place) {
  const { attention } = data.arrays;
  const query = data.queryAt.get(state.query);
  const map = (block * data.queries.length + query) * (data.heads + 1) + head;
  return attention.about.largest[block][query][head] * (attention[map * data.n + place] / 255) ** 2;
}

function meanOfBlocks(place) {
  let sum = 0;
  for (let block = 0; block < data.blocks; block++) sum += attentionAt(block, 0, place);
  return sum / data.blocks;
}

/** The share of the attention that goes to images. */
function shareOfImages() {
  let sum = 0;
  for (let place = 0; place < data.n; place++) if (data.imageOf[place] >= 0) sum += valueAt(state.layer, place);
  return sum;
}

/** The last layer at which a map has at least half of the most that it has on the images at any: before that layer is seen there
 *  is little to see after it. */
function lastOfInterest() {
  if (state.mode === "lens") return data.nLayers - 1;
  const most = [...data.layers.keys()].map((layer) => {
    let found = 0;
    for (const { start, rows, cols } of data.images)
      for (let place = start; place < start + rows * cols; place++) {
        const value = valueAt(layer, place);
        if (!Number.isNaN(value)) found = Math.max(found, state.mode === "recovery" ? Math.abs(value) : value);
      }
    return found;
  });
  const enough = Math.max(...most) / 2;
  return most.findLastIndex((value) => value >= enough);
}

/** [low, high] of the colours. Only places on images count: text would drown them. */
function limits() {
  if (state.mode === "lens" && state.shade === "top") return [0, 1];
  const key = [state.mode, state.shade, state.same ? "all" : state.layer, state.mode === "attention" ? state.query : ""].join();
  if (limits.known.has(key)) return limits.known.get(key);
  let low = Infinity, high = -Infinity;
  const layers = state.same ? [...data.layers.keys()] : [state.layer];
  for (const layer of layers)
    for (const { start, rows, cols } of data.images)
      for (let place = start; place < start + rows * cols; place++) {
        const value = valueAt(layer, place);
        if (value < low) low = value;
        if (value > high) high = value;
      }
  if (state.mode === "attention" || state.mode === "lens") low = 0;
  if (state.mode === "recovery") { high = Math.max(Math.abs(low), Math.abs(high)); low = -high; }
  const found = high > low ? [low, high] : Number.isFinite(high) ? [high - 1e-6, high + 1e-6] : [0, 1];
  limits.known.set(key, found);
  return found;
}
limits.known = new Map();

function makeRamp(colours) {
  const parsed = colours.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: RAMP_SIZE }, (_, step) => {
    const at = (step / (RAMP_SIZE - 1)) * (parsed.length - 1);
    const left = Math.min(Math.floor(at), parsed.length - 2);
    const colour = parsed[left].map((part, channel) => Math.round(part + (parsed[left + 1][channel] - part) * (at - left)));
    return Object.assign(colour, { css: rgb(colour) });
  });
}

const ramp = () => (state.mode === "recovery" ? ramps.signed : ramps.plain);
const rgb = (colour) => `rgb(${colour.join()})`;
const linearLight = (part) => (part <= 10 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * linearLight(r) + 0.7152 * linearLight(g) + 0.0722 * linearLight(b);
const inkOn = (colour) => (luminance(colour) > 0.179 ? "#000" : "#fff"); // either has a contrast of at least 4.5

function colourOf(value, [low, high]) {
  if (Number.isNaN(value)) return null;
  const at = Math.round(((value - low) / (high - low)) * (RAMP_SIZE - 1));
  return ramp()[Math.max(0, Math.min(RAMP_SIZE - 1, at))];
}

// ---- text ---------------------------------------------------------------------------------------

const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "\\r" };
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Zs}]/u;

/** Blanks and characters that draw nothing as signs or escapes, as analyses.views.text has them. */
function visible(text) {
  let shown = "";
  for (const c of text) shown += SIGNS[c] ?? (UNPRINTABLE.test(c) ? escapeOf(c.codePointAt(0)) : c);
  return shown || "∅";
}

function escapeOf(code) {
  const [letter, digits] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
  return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}

const tokenText = (token) => (data.shown[token] ??= visible(data.texts[token]));
const placeText = (place) => visible(data.prompt[place]);

const minus = (digits) => digits.replace(/-/g, "−");

function number(value) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  return minus(size >= 0.0995 ? value.toFixed(2) : size >= 0.00095 ? value.toFixed(3) : value.toExponential(0));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function whereIs(place) {
  const image = data.imageOf[place];
  if (image < 0) return null;
  const { start, cols } = data.images[image];
  return { image, row: Math.floor((place - start) / cols), col: (place - start) % cols };
}

function nameOf(place) {
  const at = whereIs(place);
  if (!at) return `“${placeText(place)}” (${data.segments[place]})`;
  const which = data.images.length > 1 ? ` of ${data.images[at.image].name}` : "";
  return `image token, row ${at.row + 1}, column ${at.col + 1}${which}`;
}

// ---- the picture --------------------------------------------------------------------------------

async function loadPictures() {
  for (const image of data.images) {
    const picture = new Image();
    picture.src = image.url;
    await picture.decode();
    image.picture = picture;
    [image.grey, image.detail] = greyAndDetail(picture);
  }
}

/** The picture in grey, and its detail: mid-grey where it is as light as what is around it. */
function greyAndDetail(picture) {
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  const [grey, detail, around] = Array.from({ length: 3 }, () => Object.assign(document.createElement("canvas"), { width, height }));
  const small = Object.assign(document.createElement("canvas"), { width: 12, height: Math.max(1, Math.round((12 * height) / width)) });
  small.getContext("2d").drawImage(picture, 0, 0, small.width, small.height);
  around.getContext("2d").drawImage(small, 0, 0, width, height); // smoothed: a blur that every browser has
  const pixels = (canvas, drawn) => {
    if (drawn) canvas.getContext("2d").drawImage(drawn, 0, 0);
    return canvas.getContext("2d").getImageData(0, 0, width, height);
  };
  const [own, mean] = [pixels(grey, picture), pixels(around)];
  const high = new ImageData(width, height);
  for (let at = 0; at < own.data.length; at += 4) {
    const [here, there] = [own, mean].map(({ data: d }) => 0.299 * d[at] + 0.587 * d[at + 1] + 0.114 * d[at + 2]);
    own.data.fill(here, at, at + 3);
    high.data.fill(128 + 0.6 * (here - there), at, at + 3);
    high.data[at + 3] = 255;
  }
  grey.getContext("2d").putImageData(own, 0, 0);
  detail.getContext("2d").putImageData(high, 0, 0);
  return [grey, detail];
}

function fitStage() {
  const { width, height } = data.images[state.image];
  const room = $("picture").clientWidth - 2;
  const shown = Math.min(room, 620, (width / height) * Math.max(260, window.innerHeight * 0.68));
  const scale = window.devicePixelRatio || 1;
  const canvas = $("map");
  const size = [Math.round(shown), Math.round((shown * height) / width)];
  [canvas.style.width, canvas.style.height] = size.map((side) => `${side}px`);
  [canvas.width, canvas.height] = size.map((side) => Math.round(side * scale));
  const grown = size[0] / (state.width || size[0]); // what is seen stays in sight
  [state.width, state.height, state.left, state.top] = [...size, state.left * grown, state.top * grown];
  setZoom(state.zoom);
}

// ---- zooming and panning ------------------------------------------------------------------------

/** As many times as large, the point (x, y) of the stage staying where it is. */
function setZoom(zoom, x = state.width / 2, y = state.height / 2) {
  const { rows, cols } = data.images[state.image];
  const most = Math.max(4, (4 * LABEL[0] * cols) / state.width, (4 * LABEL[1] * rows) / state.height);
  const bounded = Math.max(1, Math.min(most, zoom));
  const by = bounded / state.zoom;
  state.zoom = bounded;
  panTo((state.left + x) * by - x, (state.top + y) * by - y);
  $("stage").classList.toggle("zoomed", bounded > 1);
  $("zoom-name").textContent = `${bounded.toFixed(1)}×`;
}

function panTo(left, top) {
  state.left = Math.max(0, Math.min(state.width * (state.zoom - 1), left));
  state.top = Math.max(0, Math.min(state.height * (state.zoom - 1), top));
  soon(drawMap, moveCursor);
}

/** The selected token in sight. */
function panToSelected() {
  const at = whereIs(state.place);
  if (state.zoom === 1 || !at || at.image !== state.image) return;
  const [w, h] = cellSize();
  const inside = (from, low, size, room) => Math.min(low, Math.max(from, low + size - room));
  panTo(inside(state.left, at.col * w, w, state.width), inside(state.top, at.row * h, h, state.height));
}

/** Pixels that a token is wide and high on the stage. */
function cellSize() {
  const { rows, cols } = data.images[state.image];
  return [(state.width * state.zoom) / cols, (state.height * state.zoom) / rows];
}

function drawMap() {
  const { start, rows, cols } = data.images[state.image];
  const context = $("map").getContext("2d");
  const scale = $("map").width / state.width;
  const [w, h] = cellSize();
  const range = limits();
  context.setTransform(scale, 0, 0, scale, -state.left * scale, -state.top * scale);
  paint(context, state.image, cols * w, rows * h, range);
  const [from, to] = [[state.left, state.top], [state.left + state.width, state.top + state.height]];
  const labelled = state.mode === "lens" && state.opacity > 0 && w >= LABEL[0] && h >= LABEL[1];
  for (let row = Math.floor(from[1] / h); labelled && row < Math.min(rows, to[1] / h); row++)
    for (let col = Math.floor(from[0] / w); col < Math.min(cols, to[0] / w); col++) label(context, start + row * cols + col, col * w, row * h, w, h);
  context.globalAlpha = 0.35;
  context.strokeStyle = "#fff";
  context.lineWidth = 0.5;
  context.beginPath();
  for (let col = 1; col < cols; col++) { context.moveTo(col * w, 0); context.lineTo(col * w, rows * h); }
  for (let row = 1; row < rows; row++) { context.moveTo(0, row * h); context.lineTo(cols * w, row * h); }
  context.stroke();
  drawLegend(range);
  drawPictures(range);
}

/** An image's map over the image: the bar's colours, lighter or darker where the image has detail. */
function paint(context, number, width, height, range) {
  const { start, rows, cols, picture, grey, detail } = data.images[number];
  const [w, h] = [width / cols, height / rows];
  context.globalAlpha = 1;
  context.drawImage(state.opacity > 0 ? grey : picture, 0, 0, width, height);
  context.globalAlpha = state.opacity;
  for (let cell = 0; cell < rows * cols && state.opacity > 0; cell++) {
    const [x, y] = [(cell % cols) * w, Math.floor(cell / cols) * h];
    const colour = colourOf(valueAt(state.layer, start + cell), range);
    if (colour) {
      context.fillStyle = rgb(colour);
      context.fillRect(x, y, w, h);
    } else hatch(context, x, y, w, h);
  }
  if (state.opacity > 0) {
    context.globalCompositeOperation = "soft-light";
    context.drawImage(detail, 0, 0, width, height);
    context.globalCompositeOperation = "source-over";
  }
  context.globalAlpha = 1;
}

/** Under the stage: the image in its own colours, with what the stage shows of it; several images' maps side by side. */
function drawPictures(range) {
  const { picture, width, height } = data.images[state.image];
  const own = sized($("own"), width / height, 96);
  own.drawImage(picture, 0, 0, own.width, own.height);
  const at = whereIs(state.place);
  own.strokeStyle = getComputedStyle($("own")).getPropertyValue("--mark");
  own.lineWidth = 2;
  if (state.zoom > 1) {
    const [x, y] = [own.width / state.width / state.zoom, own.height / state.height / state.zoom];
    own.strokeRect(state.left * x, state.top * y, state.width * x, state.height * y);
  }
  data.images.forEach((image, number) => {
    if (image.small) paint(sized(image.small, image.width / image.height, 84), number, image.small.width / pixelRatio(), image.small.height / pixelRatio(), range);
  });
}

const pixelRatio = () => window.devicePixelRatio || 1;

/** A small canvas's context, whose own `width` and `height` are in pixels of the page. */
function sized(canvas, ratio, height) {
  const width = Math.min(220, Math.round(height * ratio));
  const [w, h] = [width, Math.round(width / ratio)];
  if (canvas.dataset.size !== `${w} ${h}`) {
    canvas.dataset.size = `${w} ${h}`;
    [canvas.width, canvas.height] = [w * pixelRatio(), h * pixelRatio()];
    [canvas.style.width, canvas.style.height] = [`${w}px`, `${h}px`];
  }
  const context = canvas.getContext("2d");
  context.setTransform(pixelRatio(), 0, 0, pixelRatio(), 0, 0);
  return Object.assign(context, { width: w, height: h });
}

function hatch(context, x, y, w, h) {
  context.strokeStyle = "#999";
  context.lineWidth = 0.7;
  context.beginPath();
  context.moveTo(x, y + h);
  context.lineTo(x + w, y);
  context.stroke();
}

function label(context, place, x, y, w, h) {
  let text = tokenText(data.arrays.top[topAt(state.layer, place)]);
  const size = Math.min(13, h / 2.2, w / 4.2);
  context.font = `${size}px system-ui, "DejaVu Sans", sans-serif`;
  const letters = Array.from(text);
  while (letters.length > 1 && context.measureText(text).width > w - 4) {
    letters.pop();
    text = `${letters.join("")}…`;
  }
  context.globalAlpha = 1;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.strokeStyle = "rgba(0,0,0,.8)"; // an edge: it must read on every colour, over every picture
  context.lineWidth = 2.5;
  context.lineJoin = "round";
  context.strokeText(text, x + w / 2, y + h / 2);
  context.fillStyle = "#fff";
  context.fillText(text, x + w / 2, y + h / 2);
}

function drawLegend([low, high]) {
  const context = $("ramp").getContext("2d");
  ramp().forEach((colour, at) => { context.fillStyle = rgb(colour); context.fillRect(at, 0, 1, 1); });
  $("low").textContent = number(low);
  $("high").textContent = number(high);
  const block = state.layer < data.blocks ? `block ${state.layer}` : "no block reads the last layer";
  const from = state.query === data.last ? "the last position" : `“${placeText(state.query)}”`;
  const mean = state.shade === "all" ? "mean of heads and blocks" : block;
  const share = state.mode === "attention" && (state.shade === "all" || state.layer < data.blocks) ? `; ${Math.round(100 * shareOfImages())} % of it to images` : "";
  const units = {
    lens: { top: "probability of the top token", entropy: "entropy, nats" }[state.shade] ?? "its probability; hatched: not among those kept",
    contextual: "cosine with the answer",
    attention: `attention from ${from}, ${mean}${share}`,
    recovery: `recovery of the answer's margin, ${block}`,
  };
  $("unit").textContent = units[state.mode];
}

function moveCursor() {
  const at = whereIs(state.place);
  const cursor = $("cursor");
  cursor.hidden = !at || at.image !== state.image;
  if (cursor.hidden) return;
  const [w, h] = cellSize();
  if (moveCursor.size !== `${w} ${h}`) {
    moveCursor.size = `${w} ${h}`;
    cursor.style.width = `${w}px`;
    cursor.style.height = `${h}px`;
  }
  cursor.style.transform = `translate(${at.col * w - state.left}px, ${at.row * h - state.top}px)`;
  cursor.classList.toggle("held", state.held);
}

// ---- the table of the selected position ---------------------------------------------------------

// The cells are drawn on a canvas: laying out 290 new texts takes ten times as long as drawing them. The table's own text lies
// over it, transparent, and follows when the pointer rests: for selecting, searching and reading aloud.

function makeTable() {
  makeTable.rows = [];
  for (let layer = data.nLayers - 1; layer >= 0; layer--) {
    const row = $("table").appendChild(element("tr"));
    const head = row.appendChild(element("th", "", data.layers[layer]));
    head.scope = "row";
    head.dataset.layer = layer;
    const cells = Array.from({ length: data.k }, (_, rank) => {
      const cell = row.appendChild(element("td")).appendChild(element("div", "cell"));
      Object.assign(cell.dataset, { layer, rank });
      return { cell, text: cell.appendChild(element("span", "text")), p: cell.appendChild(element("span", "p")) };
    });
    makeTable.rows[layer] = { row, cells };
  }
}

/** Where the cells lie, and how much text is room for: read once, not at every move. */
function fitTable() {
  const canvas = $("cells");
  const [width, height] = [$("table").offsetWidth, $("table").offsetHeight];
  const scale = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const { text, p } = makeTable.rows[0].cells[0];
  const [textStyle, pStyle] = [getComputedStyle(text), getComputedStyle(p)];
  const columns = makeTable.rows[0].cells.map(({ cell }) => [cell.parentElement.offsetLeft, cell.offsetWidth]);
  const tops = makeTable.rows.map(({ row }) => row.offsetTop);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.textBaseline = "middle";
  const font = (style) => `${style.fontSize} ${style.fontFamily}`;
  context.font = font(textStyle);
  const box = getComputedStyle(text.parentElement);
  const [left, right] = [parseFloat(box.paddingLeft), parseFloat(box.paddingRight)];
  fitTable.found = {
    context, columns, tops, left, height: text.parentElement.offsetHeight, fonts: [font(textStyle), font(pStyle)],
    room: columns[0][1] - left - right, letter: context.measureText("0").width, withP: pStyle.display !== "none",
  };
}

function fillTable() {
  const { context, columns, tops, left, height, fonts, room, letter, withP } = fitTable.found;
  const { top, topProbs } = data.arrays;
  const inks = new Array(data.nLayers * data.k);
  context.font = fonts[0];
  context.textAlign = "left";
  for (let layer = 0; layer < data.nLayers; layer++)
    for (let rank = 0; rank < data.k; rank++) {
      const at = topAt(layer, state.place) + rank;
      const colour = ramps.plain[Math.round(probability(topProbs, at) * (RAMP_SIZE - 1))];
      const ink = (inks[layer * data.k + rank] = inkOn(colour));
      const [x, width] = columns[rank];
      context.fillStyle = colour.css;
      context.fillRect(x, tops[layer], width, height);
      context.fillStyle = ink;
      context.fillText(fitted(context, tokenText(top[at]), room, letter), x + left, tops[layer] + height / 2);
    }
  context.font = fonts[1];
  context.textAlign = "right";
  for (let layer = 0; withP && layer < data.nLayers; layer++)
    for (let rank = 0; rank < data.k; rank++) {
      const [x, width] = columns[rank];
      context.fillStyle = inks[layer * data.k + rank];
      context.fillText(number(probability(topProbs, topAt(layer, state.place) + rank)), x + width - left, tops[layer] + height / 2);
    }
  atRest();
}

/** A text with an ellipsis where it is wider than its room; a letter of the table's font is as wide as any other. */
function fitted(context, text, room, letter) {
  const plain = PLAIN.test(text);
  if (text.length * letter <= room && plain) return text;
  if (plain) return `${text.slice(0, Math.max(1, Math.floor(room / letter) - 1))}…`;
  const letters = Array.from(text);
  if (context.measureText(text).width <= room) return text;
  while (letters.length > 1 && context.measureText(`${letters.join("")}…`).width > room) letters.pop();
  return `${letters.join("")}…`;
}

/** What need not follow every move of the pointer: the table's text, and what is read aloud. */
function atRest() {
  clearTimeout(atRest.timer);
  atRest.timer = setTimeout(() => {
    const { top, topProbs } = data.arrays;
    makeTable.rows.forEach(({ cells }, layer) => cells.forEach(({ text, p }, rank) => {
      const at = topAt(layer, state.place) + rank;
      text.textContent = tokenText(top[at]);
      p.textContent = number(probability(topProbs, at));
    }));
    $("said").textContent = `${nameOf(state.place)}, ${data.layers[state.layer]}: ${$("now").textContent}`;
    document.documentElement.dataset.rested = state.place;
  }, REST);
}

function markLayer() {
  makeTable.rows.forEach(({ row }, layer) => row.classList.toggle("now", layer === state.layer));
  const words = `${state.layer}/${data.nLayers - 1} ${data.layers[state.layer]}`;
  $("layer").value = state.layer;
  $("layer-name").textContent = words;
  $("layer").setAttribute("aria-valuetext", words);
}

function fillFacts() {
  const { entropy, top, topProbs } = data.arrays;
  const start = topAt(state.layer, state.place);
  $("place").textContent = `Position ${data.positions[state.place]}: ${nameOf(state.place)}`;
  const value = valueAt(state.layer, state.place);
  const shown = state.mode === "lens" ? "" : ` · ${number(value)}: ${$("unit").textContent}`;
  const held = state.held ? "held · " : "";
  $("facts").textContent = `${held}entropy ${linear(entropy, state.layer * data.n + state.place).toFixed(2)} nats${shown}`;
  const spans = fillFacts.spans ?? makeFacts();
  spans[0].textContent = `${data.layers[state.layer]} `;
  for (let rank = 0; rank < data.k; rank++) {
    spans[2 * rank + 1].textContent = tokenText(top[start + rank]);
    spans[2 * rank + 2].textContent = ` ${number(probability(topProbs, start + rank))}${rank + 1 < data.k ? ",  " : ""}`;
  }
  atRest();
}

function makeFacts() {
  fillFacts.spans = Array.from({ length: 2 * data.k + 1 }, (_, at) => element("span", at % 2 ? "text" : "quiet"));
  $("now").replaceChildren(...fillFacts.spans);
  return fillFacts.spans;
}

// ---- probability by layer -----------------------------------------------------------------------

/** The table's token for what was typed: an id, the text itself, then any token that differs in case or space only. */
function findToken(typed) {
  if (/^#\d+$/.test(typed)) return data.ids.indexOf(Number(typed.slice(1)));
  const exact = data.texts.indexOf(typed);
  if (exact >= 0) return exact;
  const shown = data.texts.findIndex((text) => visible(text) === typed);
  if (shown >= 0 || !typed.trim()) return shown;
  const word = typed.trim().toLowerCase();
  return data.texts.findIndex((text) => text.trim().toLowerCase() === word);
}

function addChip(token) {
  if (state.chips.includes(token)) return;
  state.chips.push(token);
  if (state.chips.length > MOST_CHIPS) state.chips.shift();
  fillShades();
  drawChips();
  drawPlot();
}

function addTyped(typed) {
  const token = typed ? findToken(typed) : -1;
  const shown = `“${visible(typed)}”`;
  const absent = data.whole
    ? `${shown} is no token of this model's: its text may be several tokens (a blank before a word makes another token), which have no one probability.`
    : `${shown} is not on this page. If it is one token, then at the position that predicts the answer it stays below ${number(most())} at every layer; if it is several, they have no one probability.`;
  $("not-found").textContent = !typed || token >= 0 ? "" : absent;
  if (token < 0) return;
  addChip(token);
  $("typed").value = "";
}

const most = () => Math.max(...Array.from({ length: data.nLayers }, (_, layer) => probability(data.arrays.restProb, layer)));

function suggest() {
  const word = $("typed").value.trim().toLowerCase();
  const found = [];
  for (let token = 0; word && token < data.texts.length && found.length < 12; token++)
    if (data.texts[token].trim().toLowerCase().startsWith(word)) found.push(token);
  $("found").replaceChildren(...found.map((token) => Object.assign(element("option"), { value: tokenText(token) })));
}

function drawChips() {
  drawChips.p = [];
  $("chips").replaceChildren(...state.chips.map((token, at) => {
    const chip = element("span", "chip");
    chip.title = `id ${data.ids[token]}`;
    chip.append(Object.assign(element("i"), { style: `background: var(--c${at % MOST_CHIPS})` }));
    chip.append(element("span", "text", tokenText(token)), (drawChips.p[at] = element("span", "p")));
    const remove = chip.appendChild(element("button", "", "×"));
    remove.setAttribute("aria-label", `remove ${tokenText(token)}`);
    remove.dataset.token = token;
    return chip;
  }));
  fillChips();
}

function fillChips() {
  state.chips.forEach((token, at) => {
    const { p, known } = probabilityOf(token, state.layer, state.place);
    drawChips.p[at].textContent = `${known ? "" : "≤ "}${number(p)}`;
  });
}

function shape(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function fitPlot() {
  plotScales.size = [$("plot").clientWidth, $("plot").clientHeight];
}

function plotScales() {
  const [width, height] = plotScales.size;
  const [left, right, top, bottom] = [44, 8, 8, 34];
  const x = (layer) => left + ((width - left - right) * layer) / (data.nLayers - 1);
  const decades = 6;
  const share = (p) => (state.log ? Math.max(0, 1 + Math.log10(Math.max(p, 1e-12)) / decades) : p);
  const y = (p) => height - bottom - (height - top - bottom) * share(p);
  const ticks = state.log ? [1, 1e-2, 1e-4, 1e-6] : [0, 0.25, 0.5, 0.75, 1];
  return { width, height, left, right, bottom, x, y, ticks };
}

function drawPlot() {
  const svg = $("plot");
  const { width, height, left, right, bottom, x, y, ticks } = plotScales();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const drawn = ticks.flatMap((tick) => [
    shape("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), style: "stroke: var(--line)" }),
    shape("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, state.log && tick < 1 ? minus(tick.toExponential(0)) : String(tick)),
  ]);
  const step = Math.ceil(data.nLayers / (width / 34));
  for (let layer = 0; layer < data.nLayers; layer += step)
    drawn.push(shape("text", { x: x(layer), y: height - bottom + 14, "text-anchor": "middle" }, String(layer)));
  drawn.push(shape("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "layer of the residual stream"));
  drawn.push(shape("line", { id: "plot-now", x1: x(state.layer), x2: x(state.layer), y1: y(1), y2: height - bottom, style: "stroke: var(--mark)", "stroke-width": 1.5, "stroke-dasharray": "3 3" }));
  drawPlot.series = state.chips.map((_, at) => {
    const colour = `var(--c${at % MOST_CHIPS})`;
    const line = shape("path", { class: "line", style: `fill: none; stroke: ${colour}; stroke-width: 1.8` });
    const known = shape("path", { class: "known", style: `fill: ${colour}` });
    const bounds = shape("path", { class: "bounds", style: `fill: none; stroke: ${colour}` });
    drawn.push(line, known, bounds);
    return { line, known, bounds };
  });
  svg.replaceChildren(...drawn);
  fillPlot();
}

/** The lines alone: a dot where the probability is known, a triangle where it is a bound. */
function fillPlot() {
  const { x, y } = plotScales();
  let anywhere = false;
  state.chips.forEach((token, at) => {
    let line = "", dots = "", triangles = "", joined = false;
    for (let layer = 0; layer < data.nLayers; layer++) {
      const { p, known } = probabilityOf(token, layer, state.place);
      const [cx, cy] = [x(layer).toFixed(1), y(p).toFixed(1)];
      if (known) {
        line += `${joined ? "L" : "M"}${cx} ${cy}`;
        dots += `M${cx} ${cy}m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0`;
      } else triangles += `M${cx} ${cy}m-3.2 -2h6.4l-3.2 5z`;
      joined = known;
    }
    anywhere ||= triangles !== "";
    const series = drawPlot.series[at];
    series.line.setAttribute("d", line);
    series.known.setAttribute("d", dots);
    series.bounds.setAttribute("d", triangles);
  });
  $("plot-place").textContent = `at position ${data.positions[state.place]}, ${nameOf(state.place)}`;
  $("plot-note").style.visibility = anywhere ? "visible" : "hidden";
}

// ---- the prompt ---------------------------------------------------------------------------------

function makeStrip() {
  const strip = $("strip");
  makeStrip.tokens = new Map();
  for (let place = 0; place < data.n; place++) {
    const image = data.imageOf[place];
    if (image >= 0) {
      if (place === data.images[image].start) addImage(strip, image);
      continue;
    }
    const token = strip.appendChild(element("button", `token text ${data.segments[place].replace(/[^a-z_]/g, "")}`, placeText(place)));
    Object.assign(token, { tabIndex: -1, title: `position ${data.positions[place]}, ${data.segments[place]}` });
    token.setAttribute("role", "option");
    token.dataset.place = place;
    makeStrip.tokens.set(place, token);
    if (data.prompt[place].endsWith("\n")) strip.append(element("span", "break"));
  }
}

function addImage(strip, number) {
  const { url, rows, cols } = data.images[number];
  const thumb = strip.appendChild(element("button", "thumb"));
  thumb.append(Object.assign(element("img"), { src: url, alt: "" }), element("span", "", `${data.images[number].name} · ${rows * cols} tokens`));
  thumb.setAttribute("aria-expanded", "false");
  const frame = strip.appendChild(element("div", "tiles-frame"));
  frame.hidden = true;
  thumb.addEventListener("click", () => {
    if (!frame.firstChild) frame.append(makeTiles(number));
    frame.hidden = !frame.hidden;
    thumb.setAttribute("aria-expanded", String(!frame.hidden));
    markStrip();
  });
}

/** The image cut into its tokens, in their order. */
function makeTiles(number) {
  const { url, start, rows, cols, width, height } = data.images[number];
  const tiles = element("div", "tiles");
  const side = Math.max(14, Math.min(34, ($("strip").clientWidth - 20) / cols - 2));
  tiles.style.gridTemplateColumns = `repeat(${cols}, ${side}px)`;
  const across = (at, of) => (of > 1 ? (100 * at) / (of - 1) : 0);
  for (let cell = 0; cell < rows * cols; cell++) {
    const tile = tiles.appendChild(element("span"));
    tile.style.height = `${(side * height * cols) / (width * rows)}px`;
    tile.style.background = `url(${url}) ${across(cell % cols, cols)}% ${across(Math.floor(cell / cols), rows)}% / ${cols * 100}% ${rows * 100}%`;
    tile.dataset.place = start + cell;
    makeStrip.tokens.set(start + cell, tile);
  }
  return tiles;
}

function markStrip() {
  markStrip.marked?.classList.remove("chosen");
  markStrip.marked?.setAttribute("aria-selected", "false");
  markStrip.marked = makeStrip.tokens.get(state.place);
  markStrip.marked?.classList.add("chosen");
  markStrip.marked?.setAttribute("aria-selected", "true");
}

/** Text tokens are underlined in the map's colours. */
function colourStrip() {
  const range = limits();
  for (const [place, token] of makeStrip.tokens) {
    if (token.tagName !== "BUTTON") continue;
    const colour = colourOf(valueAt(state.layer, place), range);
    token.style.borderBottomColor = colour ? rgb(colour) : "transparent";
  }
}

// ---- changes ------------------------------------------------------------------------------------

/** Draws at most once a frame, only what changed. */
function soon(...what) {
  what.forEach((draw) => soon.waiting.add(draw));
  soon.frame ??= requestAnimationFrame(() => {
    for (const draw of soon.waiting) { // what a draw asks for is done in the same frame
      soon.waiting.delete(draw);
      draw();
    }
    soon.frame = null;
  });
}
soon.waiting = new Set();

function select(place) {
  if (place === state.place || place < 0 || place >= data.n) return;
  state.place = place;
  const image = data.imageOf[place];
  if (image >= 0 && image !== state.image) showImage(image);
  soon(moveCursor, fillTable, fillFacts, fillChips, fillPlot, markStrip);
}

function setLayer(layer) {
  state.layer = Math.max(0, Math.min(data.nLayers - 1, layer));
  soon(markLayer, drawMap, fillFacts, fillChips, drawPlot, colourStrip);
}

function setMode(mode) {
  if (!modes().includes(mode)) return;
  state.mode = mode;
  document.querySelector(`#modes input[value=${mode}]`).checked = true;
  state.same = mode === "contextual" || mode === "recovery";
  $("same-scale").checked = state.same;
  $("other").hidden = mode !== "recovery" || !data.others.length;
  fillShades();
  const empty = state.layer >= data.blocks && (mode === "attention" || mode === "recovery");
  setLayer(state.moved && !empty ? state.layer : lastOfInterest());
  soon(drawMap, fillFacts, colourStrip, markQuery);
}

/** The token whose attention is shown. */
function setQuery(place) {
  const kept = data.queryAt.has(place);
  $("not-kept").textContent = kept ? "" : `The attention of ${nameOf(place)} is not on this page, which holds that of ${data.queries.length} tokens: those under “from”.`;
  if (!kept) return;
  state.query = place;
  $("query").value = place;
  soon(drawMap, fillFacts, colourStrip, markQuery);
}

function markQuery() {
  markQuery.marked?.classList.remove("query");
  markQuery.marked = state.mode === "attention" ? makeStrip.tokens.get(state.query) : null;
  markQuery.marked?.classList.add("query");
}

const modes = () => Object.keys(MODES).filter((mode) => mode === "lens" || data.arrays[mode]);

function showImage(number) {
  state.image = number;
  state.zoom = 1;
  $("image").value = number;
  data.images.forEach(({ small }, at) => small?.parentElement.setAttribute("aria-pressed", String(at === number)));
  fitStage();
  soon(drawMap, moveCursor);
}

function fillShades() {
  const options = {
    lens: [["top", "top token"], ["entropy", "entropy"], ...shadeTokens().map((token) => [String(token), `token ${tokenText(token)}`])],
    attention: [["0", "mean of heads"], ["all", "mean of heads and blocks"], ...Array.from({ length: data.heads }, (_, head) => [String(head + 1), `head ${head}`])],
  }[state.mode] ?? [];
  $("shade").replaceChildren(...options.map(([value, text]) => Object.assign(element("option", "", text), { value })));
  $("shade").parentElement.hidden = !options.length;
  if (!options.some(([value]) => value === state.shade)) state.shade = options[0]?.[0] ?? "";
  $("shade").value = state.shade;
  const fixed = (state.mode === "lens" && state.shade === "top") || state.shade === "all";
  $("query").parentElement.hidden = state.mode !== "attention";
  $("same-scale").parentElement.hidden = fixed;
}

const shadeTokens = () => [...new Set([...(data.arrays.followed ?? []), ...state.chips])];

function hold(held) {
  state.held = held;
  if (held && state.mode === "attention") setQuery(state.place);
  soon(moveCursor, fillFacts);
}

function placeUnder(event) {
  const { start, rows, cols } = data.images[state.image];
  const box = $("map").getBoundingClientRect();
  const col = Math.floor(((event.clientX - box.left + state.left) / (box.width * state.zoom)) * cols);
  const row = Math.floor(((event.clientY - box.top + state.top) / (box.height * state.zoom)) * rows);
  return row < 0 || col < 0 || row >= rows || col >= cols ? -1 : start + row * cols + col;
}

function followPointer() {
  if (!state.held) select(placeUnder(followPointer.event));
}

function step(key) {
  const at = whereIs(state.place);
  const image = data.images[state.image];
  if (!at || at.image !== state.image) return select(image.start);
  const row = at.row + ({ ArrowDown: 1, ArrowUp: -1 }[key] ?? 0);
  const col = at.col + ({ ArrowRight: 1, ArrowLeft: -1 }[key] ?? 0);
  if (row >= 0 && col >= 0 && row < image.rows && col < image.cols) select(image.start + row * image.cols + col);
  panToSelected();
}

/** Along the prompt; an image that is not unfolded is stepped over. */
function stepPrompt(by) {
  let place = state.place + by;
  while (place >= 0 && place < data.n && !makeStrip.tokens.has(place)) place += by;
  select(place);
  makeStrip.tokens.get(place)?.scrollIntoView({ block: "nearest" });
}

// ---- listening ----------------------------------------------------------------------------------

function listen() {
  const stage = $("stage");
  listenToZoom(stage);
  stage.addEventListener("pointermove", (event) => {
    if (state.held || event.pointerType === "touch" || listenToZoom.pointers.size) return;
    followPointer.event = event; // the last one before the frame
    soon(followPointer);
  });
  stage.addEventListener("click", (event) => {
    const place = placeUnder(event);
    if (place < 0 || listenToZoom.dragged) return;
    const again = state.held && place === state.place;
    select(place);
    choose(event, again);
  });
  $("strip").addEventListener("pointerover", (event) => {
    if (!state.held && event.pointerType !== "touch" && event.target.dataset.place) select(Number(event.target.dataset.place));
  });
  $("strip").addEventListener("click", (event) => {
    if (!event.target.dataset.place) return;
    const place = Number(event.target.dataset.place);
    const again = state.held && place === state.place;
    select(place);
    choose(event, again);
  });
  $("layer").addEventListener("input", (event) => moveLayer(Number(event.target.value)));
  $("query").addEventListener("change", (event) => setQuery(Number(event.target.value)));
  $("closer").addEventListener("click", () => setZoom(state.zoom * 1.5));
  $("farther").addEventListener("click", () => setZoom(state.zoom / 1.5));
  $("whole").addEventListener("click", () => setZoom(1));
  $("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  $("shade").addEventListener("change", (event) => { state.shade = event.target.value; fillShades(); soon(drawMap, fillFacts, colourStrip); });
  $("image").addEventListener("change", (event) => { showImage(Number(event.target.value)); select(data.images[state.image].start); });
  $("same-scale").addEventListener("change", (event) => { state.same = event.target.checked; soon(drawMap, colourStrip); });
  $("log").addEventListener("change", (event) => { state.log = event.target.checked; soon(drawPlot); });
  $("typed").addEventListener("input", suggest);
  $("add").addEventListener("submit", (event) => { event.preventDefault(); addTyped($("typed").value); });
  $("chips").addEventListener("click", (event) => {
    if (!event.target.dataset.token) return;
    state.chips = state.chips.filter((token) => token !== Number(event.target.dataset.token));
    fillShades();
    soon(drawChips, drawPlot, drawMap);
  });
  $("table").addEventListener("click", (event) => {
    const { layer, rank } = event.target.closest("[data-layer]")?.dataset ?? {};
    if (rank !== undefined) addChip(data.arrays.top[topAt(Number(layer), state.place) + Number(rank)]);
    else if (layer !== undefined) moveLayer(Number(layer));
  });
  $("plot").addEventListener("click", (event) => {
    const { left, right, width } = plotScales();
    const x = event.clientX - $("plot").getBoundingClientRect().left;
    setLayer(Math.round(((x - left) / (width - left - right)) * (data.nLayers - 1)));
  });
  document.addEventListener("keydown", pressed);
  window.addEventListener("resize", () => { fitStage(); soon(drawMap, moveCursor); });
  new ResizeObserver(() => { fitTable(); fitPlot(); soon(fillTable, drawPlot); }).observe($("reading"));
}

/** A click holds a token; a finger has nothing to hold, it chooses whose attention is shown. */
function choose(event, again) {
  if (event.pointerType !== "touch") hold(!again);
  else if (state.mode === "attention") setQuery(state.place);
}

/** A layer that the reader chose: other views then open at it, too. */
function moveLayer(layer) {
  state.moved = true;
  setLayer(layer);
}

/** The wheel and two fingers zoom, where they are; a drag pans what is zoomed. */
function listenToZoom(stage) {
  const pointers = (listenToZoom.pointers = new Map());
  const at = ({ clientX, clientY }) => {
    const box = $("map").getBoundingClientRect();
    return [clientX - box.left, clientY - box.top];
  };
  const apart = ([[a, b], [c, d]]) => ({ middle: [(a + c) / 2, (b + d) / 2], far: Math.hypot(a - c, b - d) });
  stage.addEventListener("wheel", (event) => {
    if (state.zoom === 1 && event.deltaY >= 0) return; // the page scrolls on
    event.preventDefault();
    setZoom(state.zoom * Math.exp(-0.002 * event.deltaY * (event.deltaMode ? 30 : 1)), ...at(event));
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button !== 0) return;
    if (!pointers.size) listenToZoom.dragged = false;
    pointers.set(event.pointerId, at(event));
  });
  stage.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    if (pointers.size === 2) {
      const old = apart([...pointers.values()]);
      pointers.set(event.pointerId, now);
      const { middle, far } = apart([...pointers.values()]);
      panTo(state.left + old.middle[0] - middle[0], state.top + old.middle[1] - middle[1]);
      setZoom((state.zoom * far) / Math.max(1, old.far), ...middle);
      listenToZoom.dragged = true;
    } else if (state.zoom > 1 && (listenToZoom.dragged || Math.hypot(now[0] - before[0], now[1] - before[1]) > 4)) {
      if (!listenToZoom.dragged) stage.setPointerCapture?.(event.pointerId);
      listenToZoom.dragged = true;
      panTo(state.left + before[0] - now[0], state.top + before[1] - now[1]);
      pointers.set(event.pointerId, now);
    }
  });
  for (const kind of ["pointerup", "pointercancel", "pointerleave"])
    stage.addEventListener(kind, (event) => { if (kind !== "pointerleave" || !listenToZoom.dragged) pointers.delete(event.pointerId); });
}

function setOpacity(opacity) {
  state.opacity = opacity;
  $("opacity-name").textContent = `${Math.round(opacity * 100)} %`;
  soon(drawMap);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("#typed, select");
  const { key } = event;
  if (typing) { if (key === "Escape") event.target.blur(); return; }
  const inPrompt = $("strip").contains(event.target);
  const arrows = key.startsWith("Arrow") && !event.target.matches("input");
  if (arrows && inPrompt) stepPrompt({ ArrowRight: 1, ArrowDown: 1 }[key] ?? -1);
  else if (arrows) step(key);
  else if (key === "PageUp" || key === "PageDown") moveLayer(state.layer + (key === "PageUp" ? 1 : -1));
  else if (key === "+" || key === "=") zoomToSelected(1.5);
  else if (key === "-") zoomToSelected(1 / 1.5);
  else if (key === "0") setZoom(1);
  else if (/^[1-4]$/.test(key)) setMode(modes()[key - 1]);
  else if (key === "/") $("typed").focus();
  else if (key === "Escape") hold(false);
  else if (key === "Enter" && event.target === $("stage")) hold(!state.held);
  else return;
  event.preventDefault();
}

/** Zooms around the selected token, or the middle. */
function zoomToSelected(by) {
  const at = whereIs(state.place);
  const [w, h] = cellSize();
  if (at?.image === state.image) setZoom(state.zoom * by, (at.col + 0.5) * w - state.left, (at.row + 0.5) * h - state.top);
  else setZoom(state.zoom * by);
  panToSelected();
}

// ---- beginning ----------------------------------------------------------------------------------

function begin() {
  $("question").textContent = data.question || "Explorer";
  const none = data.segments.includes("answer") ? "(none: the model ended at once)" : "(none was given)";
  $("answer").textContent = `answer: ${data.answer || none}`;
  $("model").textContent = `· model: ${data.model} · ${data.n} positions, ${data.blocks} layers`;
  $("layer").max = data.nLayers - 1;
  $("modes").replaceChildren(...modes().map((mode) => {
    const label = element("label", "", MODES[mode]);
    const radio = label.appendChild(Object.assign(element("input"), { type: "radio", name: "mode", value: mode }));
    radio.addEventListener("change", () => setMode(mode));
    return label;
  }));
  $("image-choice").hidden = data.images.length < 2;
  $("image").replaceChildren(...data.images.map((_, number) => Object.assign(element("option", "", data.images[number].name), { value: number })));
  $("query").replaceChildren(...data.queries.filter((place) => data.imageOf[place] < 0 || place === data.last).map((place) =>
    Object.assign(element("option", "", place === data.last ? `the last position (predicts the answer)` : `${placeText(place)} (${data.segments[place]})`), { value: place })));
  state.query = data.last;
  makePictures();
  $("main").hidden = false;
  state.layer = data.nLayers - 1;
  state.place = data.last;
  const final = data.arrays.top[topAt(state.layer, data.last)];
  state.chips = [...new Set([...(data.arrays.followed ?? []).slice(0, 1), final, data.arrays.top[topAt(state.layer, data.last) + Math.min(1, data.k - 1)]])];
  makeTable();
  makeStrip();
  fitStage();
  fitTable();
  fitPlot();
  listen();
  setOpacity(state.opacity);
  setMode("lens");
  [markLayer, fillTable, drawMap, moveCursor, fillFacts, drawChips, drawPlot, markStrip, colourStrip].forEach((draw) => draw());
  document.documentElement.dataset.ready = "yes";
}

function makePictures() {
  if (data.images.length > 1)
    data.images.forEach((image, number) => {
      const button = $("film").appendChild(element("button"));
      image.small = button.appendChild(element("canvas"));
      button.append(element("span", "", image.name));
      button.setAttribute("aria-pressed", String(number === 0));
      button.addEventListener("click", () => { showImage(number); select(image.start); });
    });
  $("film").hidden = data.images.length < 2;
  $("own-name").textContent = data.answer ? `answered “${data.answer.trim()}”` : "the image";
  if (data.others.length) {
    $("other").querySelector("img").src = data.others[0].url;
    $("other-name").textContent = `the other image, answered “${data.otherAnswer.trim()}”: the shown one's stream is put into its run`;
  }
}

(async () => {
  try {
    data = await unpack($("data").textContent);
    ramps = { plain: makeRamp(CIVIDIS), signed: makeRamp(RED_BLUE) };
    prepare();
    await loadPictures();
    begin();
  } catch (error) {
    $("problem").hidden = false;
    $("problem").textContent = typeof DecompressionStream === "undefined"
      ? "This browser is too old for the page: it needs DecompressionStream (Chrome 80, Firefox 113, Safari 16.4)."
      : `The page could not be drawn: ${error.message}`;
    throw error;
  }
})();
