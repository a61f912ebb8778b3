// The map over the tile: asked for as numbers and drawn here, so that opacity, colours and view need no new request.

import { find, make, press } from "./dom.js";
import { save } from "./export.js";
import { Heads } from "./heads.js";
import { SUFFIX, chooseBox, drawBox, drawRuler, fade, readPicture } from "./picture.js";
import { SMALLEST_LIMIT, chooseScale, colour, findUniformLevel, paint } from "./scales.js";
import { explain } from "./problems.js";
import { enlarge } from "./smooth.js";
import { number, percent, signed } from "./words.js";

const PATCH_PX = 60; // of the canvas, per patch: sharp on screens of two pixels a point
const SMOOTH_PX = 15; // per patch, of a smooth map before the browser brings it to the canvas
const GREY_FROM = 0.25; // below this opacity the tile's own colours come back

export const METHODS = [
  { name: "evidence", title: "Evidence", isAboutClass: true },
  { name: "occlusion", title: "Occlusion", isAboutClass: true },
  { name: "attention", title: "Attention", isAboutClass: false },
  { name: "rollout", title: "Rollout", isAboutClass: false },
];

const ROUTING = "It shows where information was routed, not why, and is the same whatever class is asked about.";

const LOGIT = "The score, or logit, is what the probability is computed from.";

export class Heat {
  constructor(api, tiles) {
    this.view = { method: "evidence", target: "", layer: "", head: "mean", masks: "25", colormap: "viridis", form: "patches", alpha: 0.6 };
    this._api = api;
    this._tiles = tiles;
    this._tile = null;
    this._shownKey = "";
    this._picture = null; // ImageBitmap of the tile that is shown
    this._pictureProblem = ""; // or why there is none
    this._map = null;
    this._patch = null; // row and column under the pointer or the cursor
    this._controller = new AbortController();
    const askForHeads = (tile, options) => this._api.explain(tile.file, options, undefined, () => {});
    this._heads = new Heads(askForHeads, (layer, head) => this._chooseHead(layer, head), () => this._showHeads());
    this._card = null;
    this._offered = METHODS; // a network without tokens has neither attention nor rollout
    this._listen();
  }

  setCard(card) {
    this._card = card;
    this._shownKey = ""; // what a missing key has kept away may come now
    this._offered = METHODS.filter(({ name }) => card.maps?.methods?.includes(name) ?? true);
    const recommended = this._offered.find(({ name }) => name === card.maps?.default);
    this.view.method = (recommended ?? this._offered[0]).name;
    const classes = card.classes.map(({ name }) => make("option", { value: name }, name));
    find("target").replaceChildren(make("option", { value: "" }, "the predicted one"), ...classes);
    find("layer").replaceChildren(...numbers(card.layers, "", `last (${card.layers - 1})`));
    find("head").replaceChildren(...numbers(card.heads, "mean", "mean of all"));
    this._showControls();
  }

  /** Shows the tile, and the map of it as soon as there is an answer. */
  async show(tile) {
    if (tile !== this._tile) {
      this._controller.abort(); // a map that is on its way is of the tile before
      this._tile = tile;
      this._shownKey = "";
      this._map = null;
      this._patch = null;
      this._picture?.close();
      this._picture = null;
      this._pictureProblem = "";
      this._say("");
      this._tellSaving("");
      this._heads.clear();
      this._draw();
      if (tile) await this._readPicture(tile);
      if (tile !== this._tile) return; // another was chosen while this one's picture was read
    }
    this._showHeads();
    if (tile?.answer) await this._ask();
  }

  _showHeads() {
    const { layer, head, colormap } = this.view;
    const last = String((this._card?.layers ?? 1) - 1);
    const tile = this._tile?.answer ? this._tile : null;
    this._heads.show(tile, tile?.options(this._tiles.settings), { layer: layer === "" ? last : layer, head, colormap });
  }

  _chooseHead(layer, head) {
    find("layer").value = layer;
    find("head").value = head;
    this._change({ layer, head });
  }

  async _readPicture(tile) {
    try {
      const picture = await readPicture(tile.file);
      if (tile !== this._tile) return picture.close();
      this._picture = picture;
    } catch {
      if (tile === this._tile) this._pictureProblem = "This browser can't show such a file; the service can still read it.";
    }
    this._draw();
  }

  _options() {
    const { method, target, layer, head, masks } = this.view;
    const isAboutClass = METHODS.find(({ name }) => name === method).isAboutClass;
    const options = this._tile.options(this._tiles.settings);
    return {
      ...options,
      tta: method === "occlusion" ? false : options.tta, // which asks the model often enough already
      method,
      target: isAboutClass && target ? target : null,
      layer: method === "attention" && layer !== "" ? layer : null,
      head: method === "attention" && head !== "mean" ? head : null,
      masks: method === "occlusion" ? masks : null,
    };
  }

  async _ask() {
    const tile = this._tile;
    const options = this._options();
    const key = JSON.stringify(options);
    if (key === this._shownKey) return;
    this._shownKey = key;
    this._controller.abort();
    this._controller = new AbortController();
    const { signal } = this._controller;
    if (tile.maps.has(key)) return this._take(tile.maps.get(key));
    this._say("Asking for the map\u2026");
    find("viewer").ariaBusy = "true";
    try {
      const map = await this._api.explain(tile.file, options, signal, (problem) => this._say(explain(problem, "It is asked again.")));
      tile.maps.set(key, map);
      if (!signal.aborted) this._take(map);
    } catch (problem) {
      if (signal.aborted) return; // another map is on its way
      this._map = null; // it isn't asked for again by itself: another tile or option does that
      this._draw();
      this._say(explain(problem), true);
      find("viewer").ariaBusy = "false";
    }
  }

  _take(map) {
    this._map = map;
    find("viewer").ariaBusy = "false";
    this._say("");
    this._draw();
  }

  _say(text, isProblem = false) {
    const state = find("map-state");
    state.textContent = text;
    state.hidden = !text;
    state.classList.toggle("problem", isProblem);
  }

  /** As the service draws it, with the options that are shown. */
  async _savePicture() {
    const { name, file } = this._tile;
    const { method, colormap, form, alpha } = this.view;
    const to = `${name.replace(SUFFIX, "")}-${method}.png`;
    const options = { ...this._options(), colormap, alpha, upsample: form === "smooth" ? "bicubic" : "nearest" };
    this._tellSaving(`Asking for ${to}\u2026`);
    try {
      save(await this._api.draw(file, options, (problem) => this._tellSaving(explain(problem, "It is asked again."))), to);
      this._tellSaving(`Saved as ${to}.`);
    } catch (problem) {
      this._tellSaving(`${to} wasn't saved. ${explain(problem)}`, true);
    }
  }

  _tellSaving(text, isProblem = false) {
    find("save-state").textContent = text;
    find("save-state").classList.toggle("problem", isProblem);
  }

  // -- drawing --

  _draw() {
    const grid = this._map?.grid.length ?? this._card?.grid ?? 10;
    const side = grid * PATCH_PX;
    const box = this._map?.box ?? (this._picture && chooseBox(this._picture, this._tile?.answer));
    const [picture, map] = [find("picture"), find("map")];
    for (const canvas of [picture, map]) [canvas.width, canvas.height] = [side, side];
    this._scale = this._map && chooseScale(this._map.grid.flat(), {
      isSigned: this._map.signed,
      uniformLevel: findUniformLevel(this._map),
      colormap: this.view.colormap,
    });
    let mean = 128;
    if (this._picture) {
      const small = this._card?.tile_px ?? 150;
      drawBox(picture, this._picture, box, side);
      const seen = drawBox(make("canvas"), this._picture, box, small);
      const { faded, mean: grey } = fade(seen);
      mean = grey;
      this._cover(map.getContext("2d"), picture, faded, side, grid);
      const mpp = this._tile.answer?.input.mpp;
      if (mpp) drawRuler(picture, mpp * (box[2] - box[0]));
    } else {
      if (this._map) this._cover(map.getContext("2d"), null, null, side, grid);
      if (this._pictureProblem) this._say(this._pictureProblem);
    }
    find("save-map").disabled = !this._map;
    this._outline([picture, map]);
    this._drawScale(mean);
    this._describe(grid);
  }

  _cover(pen, tile, faded, side, grid) {
    const alpha = this._map ? this.view.alpha : 0;
    if (tile) {
      pen.drawImage(tile, 0, 0);
      pen.globalAlpha = this._map ? Math.min(1, alpha / GREY_FROM) : 0;
      pen.drawImage(faded, 0, 0, side, side);
    }
    if (this._map) {
      const isSmooth = this.view.form === "smooth"; // never by itself: it feigns a precision that isn't there
      const values = isSmooth ? enlarge(this._map.grid, SMOOTH_PX * grid) : this._map.grid;
      pen.imageSmoothingEnabled = isSmooth;
      pen.globalAlpha = tile ? alpha : 1;
      pen.drawImage(paint(values, this._scale), 0, 0, side, side);
      if (!isSmooth) rulePatches(pen, side, 0.2 * Math.min(1, alpha / GREY_FROM));
    }
    pen.globalAlpha = 1;
  }

  _outline(canvases) {
    if (!this._patch || !this._map) return;
    for (const canvas of canvases) {
      const pen = canvas.getContext("2d");
      const place = [this._patch.column * PATCH_PX, this._patch.row * PATCH_PX, PATCH_PX, PATCH_PX];
      for (const [style, width] of [["#ffffff", 7], ["#111111", 3]]) {
        pen.strokeStyle = style;
        pen.lineWidth = width;
        pen.strokeRect(...place);
      }
    }
  }

  /** The colours as the map wears them: mixed into the tile's mean grey. */
  _drawScale(mean) {
    find("scale").classList.toggle("empty", !this._scale);
    if (!this._scale) return;
    const bar = find("scale-bar");
    const pen = bar.getContext("2d");
    const image = pen.createImageData(1, bar.height);
    const { low, high, ticks } = this._scale;
    const alpha = this._picture ? this.view.alpha : 1;
    for (let y = 0; y < bar.height; y++) {
      const value = high - ((high - low) * y) / (bar.height - 1);
      const mixed = colour(this._scale, value).map((channel) => alpha * channel + (1 - alpha) * mean);
      image.data.set([...mixed, 255], 4 * y);
    }
    pen.putImageData(image, 0, 0);
    let lastAt = -1;
    const labels = ticks.map(({ value, label }) => {
      const at = (value - low) / (high - low);
      const labelAt = Math.max(at, lastAt + 0.075); // a label too near to the one below is moved up
      lastAt = labelAt;
      const item = make("li", {}, make("span", {}, label));
      item.style.setProperty("--at", `${100 * at}%`);
      item.style.setProperty("--label-at", `${100 * labelAt}%`);
      return item;
    });
    find("scale-ticks").replaceChildren(...labels);
    find("scale-quantity").textContent = this._map.quantity;
  }

  // -- words --

  _describe(grid) {
    const map = this._map;
    find("map").ariaLabel = map
      ? `Map of ${map.method}${map.target ? ` for ${map.target}` : ""}, ${grid} by ${grid} patches. Arrow keys read one.`
      : "Map";
    find("map-words").textContent = map ? this._tellMethod(map) : "";
    find("readout").textContent = map ? this._tellPatch(map) : "";
  }

  _tellMethod(map) {
    const sides = `orange speaks for ${map.target}, blue against it`;
    const exact = this._card?.maps?.evidence === "exact" ? "" : " An approximation: the patches don't add up to the logit exactly.";
    const gathered = map.logit_share < 1 ? `${percent(map.logit_share)} of the answer (the rest is read off the patches before)` : "the answer";
    const words = {
      attention: `What the class token, which gathers ${gathered}, looked at in layer ${map.layer} of 0 to ${(this._card?.layers ?? 1) - 1}, ${map.head === "mean" ? "mean of all heads" : `head ${map.head}`}. ${ROUTING}`,
      rollout: `Attention carried through all layers, which give ${gathered}. ${ROUTING}`,
      evidence: `What each patch adds to the score of ${map.target}: ${sides}. ${LOGIT}${exact}`,
      occlusion: `How far the score of ${map.target} falls when patches are taken away, group by group: ${sides}. ${LOGIT}`,
    };
    const drawn = this.view.form === "smooth" ? " Smoothed between the patches; the map has one number for each." : "";
    return (words[map.method] ?? "") + drawn;
  }

  _tellPatch(map) {
    const values = map.grid.flat();
    if (!this._patch) {
      return `${map.signed ? tellSides(map, values) : `Most in ${tellPlace(map, Math.max(...values))}.`} Point at a patch to read it.`;
    }
    const { row, column } = this._patch;
    return `Row ${row + 1}, column ${column + 1}: ${tellValue(map, map.grid[row][column])}`;
  }

  // -- what the reader does --

  _listen() {
    find("methods").replaceChildren(...METHODS.map((method) => this._makeMethod(method)));
    for (const name of ["target", "layer", "head", "masks", "colormap", "form"]) {
      find(name).addEventListener("change", ({ target }) => this._change({ [name]: target.value }));
    }
    find("alpha").addEventListener("input", ({ target }) => this._change({ alpha: target.value / 100 }));
    find("save-map").addEventListener("click", () => this._savePicture());
    for (const [id, view] of [["side-by-side", "side"], ["overlay", "over"]]) {
      find(id).addEventListener("click", ({ currentTarget }) => {
        press([find("side-by-side"), find("overlay")], currentTarget);
        find("viewer").dataset.view = view;
      });
    }
    for (const canvas of [find("picture"), find("map")]) {
      for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => this._pointAt(event));
      canvas.addEventListener("pointerleave", () => this._point(null));
    }
    find("map").addEventListener("keydown", (event) => this._step(event));
    find("map").addEventListener("blur", () => this._point(null));
  }

  _makeMethod({ name, title }) {
    const radio = make("input", { type: "radio", name: "method", value: name });
    radio.addEventListener("change", () => this._change({ method: name }));
    return make("label", {}, radio, title);
  }

  _change(values) {
    Object.assign(this.view, values);
    this._showControls();
    this._draw();
    this._showHeads();
    if (this._tile?.answer) this._ask();
  }

  _showControls() {
    const { method, alpha } = this.view;
    const isAboutClass = METHODS.find(({ name }) => name === method).isAboutClass;
    for (const radio of find("methods").querySelectorAll("input")) {
      radio.checked = radio.value === method;
      radio.closest("label").hidden = !this._offered.some(({ name }) => name === radio.value);
    }
    find("heads").hidden = method !== "attention";
    find("target").disabled = !isAboutClass;
    find("layer").disabled = find("head").disabled = method !== "attention";
    find("masks").disabled = method !== "occlusion";
    find("masks").querySelector("[value='100']").disabled = (this._card?.grid ?? 10) ** 2 < 100;
    find("colormap").disabled = isAboutClass; // signed maps are drawn from blue over white to orange
    for (const name of ["target", "layer", "head", "masks", "colormap"]) {
      find(name).closest("label").hidden = find(name).disabled;
    }
    find("alpha-text").textContent = percent(alpha);
  }

  _pointAt(event) {
    const place = event.currentTarget.getBoundingClientRect();
    const grid = this._map?.grid.length ?? 1;
    const at = (share) => Math.min(grid - 1, Math.max(0, Math.floor(grid * share)));
    this._point({
      row: at((event.clientY - place.top) / place.height),
      column: at((event.clientX - place.left) / place.width),
    });
  }

  _step(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return this._point(null);
    if (!steps[event.key] || !this._map) return;
    event.preventDefault();
    const last = this._map.grid.length - 1;
    const inside = (index) => Math.min(last, Math.max(0, index));
    const [down, right] = this._patch ? steps[event.key] : [0, 0]; // the first key only shows the cursor
    const { row, column } = this._patch ?? { row: 0, column: 0 };
    this._point({ row: inside(row + down), column: inside(column + right) });
  }

  _point(patch) {
    if (patch?.row === this._patch?.row && patch?.column === this._patch?.column) return;
    this._patch = patch;
    this._draw();
  }
}

function rulePatches(pen, side, alpha) {
  pen.globalAlpha = alpha;
  pen.strokeStyle = "#ffffff";
  pen.beginPath();
  for (let edge = PATCH_PX; edge < side; edge += PATCH_PX) {
    pen.moveTo(edge, 0);
    pen.lineTo(edge, side);
    pen.moveTo(0, edge);
    pen.lineTo(side, edge);
  }
  pen.stroke();
}

function tellPlace(map, value) {
  const at = map.grid.flat().indexOf(value);
  const [row, column] = [Math.floor(at / map.grid.length), at % map.grid.length];
  return `row ${row + 1}, column ${column + 1}: ${tellValue(map, value)}`;
}

/** Both ends of a signed map, neither of which need be on the side that its name says. */
function tellSides(map, values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (Math.max(high, -low) < SMALLEST_LIMIT) return `Nothing here speaks for or against ${map.target}.`;
  const most = high > 0 ? `Most for ${map.target} in` : `Nothing speaks for ${map.target}; least against it in`;
  const least = low < 0 ? "most against it in" : "nothing against it; least for it in";
  return `${most} ${tellPlace(map, high)}; ${least} ${tellPlace(map, low)}.`;
}

function tellValue(map, value) {
  const even = findUniformLevel(map);
  if (even) return `${number(value)}, ${number(value / even, 2)} times the even share`;
  return map.signed ? signed(value) : number(value);
}

function numbers(count, value, title) {
  const options = Array.from({ length: count }, (_, n) => make("option", { value: String(n) }, String(n)));
  return [make("option", { value }, title), ...options];
}
