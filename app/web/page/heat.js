// The map over the tile: asked for as numbers and drawn here, so that opacity, colours and view need no new request.

import { drawScale, drawTile, empty, layMap, layTile, outlinePatch } from "./canvas.js";
import { nameMap, tellJudgement, tellMethod, tellPatch } from "./captions.js";
import { find, make, press } from "./dom.js";
import { save } from "./export.js";
import { Heads } from "./heads.js";
import { SUFFIX, chooseBox, drawRuler, readPicture } from "./picture.js";
import { explain } from "./problems.js";
import { chooseScale, findUniformLevel } from "./scales.js";
import { percent } from "./words.js";

const METHODS = [
  { name: "evidence", title: "Evidence", isAboutClass: true },
  { name: "occlusion", title: "Occlusion", isAboutClass: true },
  { name: "attention", title: "Attention", isAboutClass: false },
  { name: "rollout", title: "Rollout", isAboutClass: false },
];

const NO_CARD = { layers: 1, grid: 10, tile_px: 150 }; // of the shipped artefact, until the service's own is here

export class Heat {
  #view = {
    method: "evidence",
    target: "",
    layer: "",
    head: "mean",
    masks: "25",
    colormap: "viridis",
    form: "patches",
    alpha: 0.6,
  };
  #api;
  #tiles;
  #heads;
  #card = NO_CARD;
  #offered = METHODS; // a network without tokens has neither attention nor rollout
  #tile = null;
  #picture = null; // ImageBitmap of the tile that is shown
  #pictureProblem = ""; // or why there is none
  #map = null;
  #asked = ""; // the options of the map that was asked for last
  #patch = null; // row and column under the pointer or the cursor
  #controller = new AbortController();

  constructor(api, tiles) {
    this.#api = api;
    this.#tiles = tiles;
    const askForHeads = (tile, options) => api.fetchMap(tile.file, options, undefined, () => {});
    this.#heads = new Heads(askForHeads, (layer, head) => this.#chooseHead(layer, head), () => this.#showHeads());
    this.#listen();
  }

  setCard(card) {
    this.#card = card;
    this.#asked = ""; // what a missing key has kept away may come now
    this.#offered = METHODS.filter(({ name }) => card.maps?.methods?.includes(name) ?? true);
    const recommended = this.#offered.find(({ name }) => name === card.maps?.default);
    this.#view.method = (recommended ?? this.#offered[0]).name;
    const classes = card.classes.map(({ name }) => make("option", { value: name }, name));
    find("target").replaceChildren(make("option", { value: "" }, "the predicted one"), ...classes);
    find("layer").replaceChildren(...offerNumbers(card.layers, "", `last (${card.layers - 1})`));
    find("head").replaceChildren(...offerNumbers(card.heads, "mean", "mean of all"));
    this.#showControls();
  }

  /** Shows the tile, and the map of it as soon as there is an answer. */
  async show(tile) {
    if (tile !== this.#tile) {
      this.#startOver(tile);
      if (tile) await this.#readPicture(tile);
      if (tile !== this.#tile) return; // another was chosen while this one's picture was read
    }
    this.#showHeads();
    if (tile?.answer) await this.#ask();
  }

  #startOver(tile) {
    this.#controller.abort(); // a map that is on its way is of the tile before
    this.#tile = tile;
    this.#asked = "";
    this.#map = null;
    this.#patch = null;
    this.#picture?.close();
    this.#picture = null;
    this.#pictureProblem = "";
    this.#say("");
    this.#tellSaving("");
    this.#heads.clear();
    this.#draw();
  }

  async #readPicture(tile) {
    try {
      const picture = await readPicture(tile.file);
      if (tile !== this.#tile) return picture.close();
      this.#picture = picture;
    } catch {
      if (tile === this.#tile) this.#pictureProblem = "This browser can't show such a file; the service can still read it.";
    }
    this.#draw();
  }

  #showHeads() {
    const { layer, head, colormap } = this.#view;
    const last = String(this.#card.layers - 1);
    const tile = this.#tile?.answer ? this.#tile : null;
    this.#heads.show(tile, tile?.options(this.#tiles.settings), { layer: layer === "" ? last : layer, head, colormap });
  }

  #chooseHead(layer, head) {
    find("layer").value = layer;
    find("head").value = head;
    this.#change({ layer, head });
  }

  // -- asking --

  #options() {
    const { method, target, layer, head, masks } = this.#view;
    const options = this.#tile.options(this.#tiles.settings);
    return {
      ...options,
      tta: method === "occlusion" ? false : options.tta, // it asks the model often enough already
      method,
      target: isAboutClass(method) && target ? target : null,
      layer: method === "attention" && layer !== "" ? layer : null,
      head: method === "attention" && head !== "mean" ? head : null,
      masks: method === "occlusion" ? masks : null,
    };
  }

  async #ask() {
    const tile = this.#tile;
    const options = this.#options();
    const key = JSON.stringify(options);
    if (key === this.#asked) return;
    this.#asked = key;
    this.#controller.abort();
    this.#controller = new AbortController();
    const { signal } = this.#controller;
    if (tile.maps.has(key)) return this.#take(tile.maps.get(key));
    this.#say("Asking for the map\u2026");
    find("viewer").ariaBusy = "true";
    try {
      const map = await this.#api.fetchMap(tile.file, options, signal, (problem) => this.#say(explainWait(problem)));
      tile.maps.set(key, map);
      if (!signal.aborted) this.#take(map);
    } catch (problem) {
      if (signal.aborted) return; // another map is on its way
      this.#map = null; // it isn't asked for again by itself: another tile or option does that
      this.#draw();
      this.#say(explain(problem), true);
      find("viewer").ariaBusy = "false";
    }
  }

  #take(map) {
    this.#map = map;
    find("viewer").ariaBusy = "false";
    this.#say("");
    this.#draw();
  }

  #say(text, isProblem = false) {
    const state = find("map-state");
    state.textContent = text;
    state.hidden = !text;
    state.classList.toggle("problem", isProblem);
  }

  /** As the service draws it, with the options that are shown. */
  async #savePicture() {
    const { name, file } = this.#tile;
    const { method, colormap, form, alpha } = this.#view;
    const to = `${name.replace(SUFFIX, "")}-${method}.png`;
    const options = { ...this.#options(), colormap, alpha, upsample: form === "smooth" ? "bicubic" : "nearest" };
    this.#tellSaving(`Asking for ${to}\u2026`);
    try {
      save(await this.#api.fetchMapPicture(file, options, (problem) => this.#tellSaving(explainWait(problem))), to);
      this.#tellSaving(`Saved as ${to}.`);
    } catch (problem) {
      this.#tellSaving(`${to} wasn't saved. ${explain(problem)}`, true);
    }
  }

  #tellSaving(text, isProblem = false) {
    find("save-state").textContent = text;
    find("save-state").classList.toggle("problem", isProblem);
  }

  // -- drawing --

  #draw() {
    this.#drawCanvases();
    const map = this.#map;
    if (this.#pictureProblem) this.#say(this.#pictureProblem);
    find("save-map").disabled = !map;
    find("map").ariaLabel = map ? nameMap(map) : "Map";
    find("map-words").textContent = map ? tellMethod(map, this.#view, this.#card) : "";
    find("map-judged").textContent = map ? tellJudgement(map, this.#card) : "";
    find("readout").textContent = map ? tellPatch(map, this.#patch) : "";
  }

  #drawCanvases() {
    const map = this.#map;
    const { alpha, colormap } = this.#view;
    const canvases = [find("picture"), find("map")];
    for (const canvas of canvases) empty(canvas, map?.grid.length ?? this.#card.grid);
    const ground = this.#picture && this.#drawTile(...canvases);
    find("scale").classList.toggle("empty", !map);
    if (!map) return;
    const scale = chooseScale(map.grid.flat(), { isSigned: map.signed, uniformLevel: findUniformLevel(map), colormap });
    const opacity = ground ? alpha : 1; // there is nothing to be seen through it
    layMap(find("map"), map, scale, this.#view, opacity);
    drawScale(scale, map.quantity, opacity, ground?.mean ?? 0);
    if (this.#patch) for (const canvas of canvases) outlinePatch(canvas, this.#patch);
  }

  /** @returns what the map is laid over */
  #drawTile(tileCanvas, mapCanvas) {
    const { answer } = this.#tile;
    const box = this.#map?.box ?? chooseBox(this.#picture, answer);
    const ground = drawTile(tileCanvas, this.#picture, box, this.#card);
    layTile(mapCanvas, ground, this.#map ? this.#view.alpha : 0);
    if (answer?.input.mpp) drawRuler(tileCanvas, answer.input.mpp * (box[2] - box[0])); // on the map it would hide a part
    return ground;
  }

  // -- what the reader does --

  #listen() {
    find("methods").replaceChildren(...METHODS.map((method) => this.#makeMethod(method)));
    for (const name of ["target", "layer", "head", "masks", "colormap", "form"]) {
      find(name).addEventListener("change", ({ target }) => this.#change({ [name]: target.value }));
    }
    find("alpha").addEventListener("input", ({ target }) => this.#change({ alpha: target.value / 100 }));
    find("save-map").addEventListener("click", () => this.#savePicture());
    for (const [id, view] of [["side-by-side", "side"], ["overlay", "over"]]) {
      find(id).addEventListener("click", ({ currentTarget }) => {
        press([find("side-by-side"), find("overlay")], currentTarget);
        find("viewer").dataset.view = view;
      });
    }
    for (const canvas of [find("picture"), find("map")]) {
      for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => this.#pointAt(event));
      canvas.addEventListener("pointerleave", () => this.#point(null));
    }
    find("map").addEventListener("keydown", (event) => this.#step(event));
    find("map").addEventListener("blur", () => this.#point(null));
  }

  #makeMethod({ name, title }) {
    const radio = make("input", { type: "radio", name: "method", value: name });
    radio.addEventListener("change", () => this.#change({ method: name }));
    return make("label", {}, radio, title);
  }

  #change(values) {
    Object.assign(this.#view, values);
    this.#showControls();
    this.#draw();
    this.#showHeads();
    if (this.#tile?.answer) this.#ask();
  }

  #showControls() {
    const { method, alpha } = this.#view;
    for (const radio of find("methods").querySelectorAll("input")) {
      radio.checked = radio.value === method;
      radio.closest("label").hidden = !this.#offered.some(({ name }) => name === radio.value);
    }
    find("heads").hidden = method !== "attention";
    find("target").disabled = !isAboutClass(method);
    find("layer").disabled = find("head").disabled = method !== "attention";
    find("masks").disabled = method !== "occlusion";
    find("masks").querySelector("[value='100']").disabled = this.#card.grid ** 2 < 100; // a group has a patch at least
    find("colormap").disabled = isAboutClass(method); // signed maps are drawn from blue over white to orange
    for (const name of ["target", "layer", "head", "masks", "colormap"]) {
      find(name).closest("label").hidden = find(name).disabled;
    }
    find("alpha-text").textContent = percent(alpha);
  }

  #pointAt(event) {
    const place = event.currentTarget.getBoundingClientRect();
    const last = (this.#map?.grid.length ?? 1) - 1;
    const at = (share) => clamp(Math.floor((last + 1) * share), last);
    this.#point({
      row: at((event.clientY - place.top) / place.height),
      column: at((event.clientX - place.left) / place.width),
    });
  }

  #step(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return this.#point(null);
    if (!steps[event.key] || !this.#map) return;
    event.preventDefault();
    const last = this.#map.grid.length - 1;
    const [down, right] = this.#patch ? steps[event.key] : [0, 0]; // the first key only shows the cursor
    const { row, column } = this.#patch ?? { row: 0, column: 0 };
    this.#point({ row: clamp(row + down, last), column: clamp(column + right, last) });
  }

  #point(patch) {
    if (patch?.row === this.#patch?.row && patch?.column === this.#patch?.column) return;
    this.#patch = patch;
    this.#draw();
  }
}

function isAboutClass(method) {
  return METHODS.find(({ name }) => name === method).isAboutClass;
}

function explainWait(problem) {
  return explain(problem, "It is asked again.");
}

function clamp(index, last) {
  return Math.min(last, Math.max(0, index));
}

function offerNumbers(count, value, title) {
  const options = Array.from({ length: count }, (_, n) => make("option", { value: String(n) }, String(n)));
  return [make("option", { value }, title), ...options];
}
