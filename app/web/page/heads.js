// All of a tile's attention at once: a row for each layer, a column for each head and their mean. One pressed is shown large.

import { find, make, press } from "./dom.js";
import { explain } from "./problems.js";
import { chooseScale, paint } from "./scales.js";
import { number } from "./words.js";

const QUANTILE = 0.99; // of all values the end of the scale: the sharpest would darken all the rest (app/overlay.py)

export class Heads {
  /**
   * @param {(tile, options: object) => Promise<{grid: number[][][][]}>} ask
   * @param {(layer: string, head: string) => void} choose
   * @param {() => void} whenOpened
   */
  constructor(ask, choose, whenOpened) {
    this._root = find("heads");
    this._ask = ask;
    this._choose = choose;
    this._wanted = ""; // what was asked for last: what comes late for anything else is left
    this._layers = null; // the answer to it
    this._colormap = ""; // in which it is drawn
    this._buttons = new Map(); // "layer.head" -> button
    this._root.addEventListener("toggle", () => this._root.open && whenOpened());
  }

  async show(tile, options, { layer, head, colormap }) {
    if (this._root.hidden || !this._root.open || !tile) return;
    const wanted = JSON.stringify([tile.number, tile.version, options]);
    if (wanted !== this._wanted) await this._fetch(tile, options, wanted);
    if (wanted !== this._wanted || !this._layers) return;
    if (colormap !== this._colormap) this._draw(this._layers, colormap);
    this._colormap = colormap;
    press([...this._buttons.values()], this._buttons.get(`${layer}.${head}`));
  }

  /** Hides them until others are there; their place is kept, so that nothing jumps. */
  clear() {
    this._wanted = "";
    this._layers = null;
    this._colormap = "";
    find("heads-grid").ariaBusy = "true";
    this._say("");
  }

  async _fetch(tile, options, wanted) {
    this.clear();
    this._wanted = wanted;
    this._say("Asking for all of them\u2026");
    try {
      const { grid } = await this._ask(tile, { ...options, method: "attention", layout: "heads" });
      if (wanted === this._wanted) this._layers = grid;
    } catch (problem) {
      if (wanted !== this._wanted) return;
      find("heads-grid").replaceChildren(); // not asked again by itself: another tile or setting does that
      find("heads-grid").ariaBusy = "false";
      this._say(explain(problem));
    }
  }

  _draw(layers, colormap) {
    const grids = layers.map((heads) => [...heads, average(heads)]);
    const values = grids.flat(3).sort((a, b) => a - b);
    const even = 1 / layers[0][0].length ** 2;
    const end = Math.floor(QUANTILE * (values.length - 1)) + 1;
    const scale = chooseScale(values.slice(0, end), { isSigned: false, uniformLevel: even, colormap });
    const names = [...layers[0].map((_, n) => String(n)), "mean"];
    this._buttons.clear();
    const rows = grids.map((row, layer) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `Layer ${layer}`),
        ...row.map((grid, n) => make("td", {}, this._makeButton(String(layer), names[n], paint(grid, scale)))),
      ),
    );
    const heads = ["", ...names.map((name) => (name === "mean" ? "Mean" : `Head ${name}`))];
    const titles = heads.map((title) => make(title ? "th" : "td", title ? { scope: "col" } : {}, title));
    find("heads-grid").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows)));
    find("heads-grid").ariaBusy = "false";
    this._say(`In the colours of one scale for all, from ${number(scale.low)} to ${number(scale.high)} and above; an even share is ${number(even)}. Press one to see it large.`);
  }

  _makeButton(layer, head, canvas) {
    const which = head === "mean" ? "mean of all heads" : `head ${head}`;
    const button = make("button", { type: "button", ariaLabel: `Layer ${layer}, ${which}`, onclick: () => this._choose(layer, head) }, canvas);
    this._buttons.set(`${layer}.${head}`, button);
    return button;
  }

  _say(text) {
    find("heads-words").textContent = text;
  }
}

function average(heads) {
  return heads[0].map((row, y) => row.map((_, x) => heads.reduce((sum, grid) => sum + grid[y][x], 0) / heads.length));
}
