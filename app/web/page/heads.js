// All of a tile's attention at once: a row for each layer, a column for each head and their mean. One that is pressed is
// shown large.

import { find, make, press } from "./dom.js";
import { explain } from "./problems.js";
import { chooseScale, paint } from "./scales.js";
import { nameHead, number } from "./words.js";

const QUANTILE = 0.99; // of all values ends the scale: the sharpest would darken all the rest (app/overlay.py has the same)

export class Heads {
  #root = find("heads");
  #ask;
  #choose;
  #wanted = ""; // what was asked for last: what comes late for anything else is left
  #layers = null; // the answer to it
  #colormap = ""; // in which it is drawn
  #buttons = new Map(); // "layer.head" -> button

  /**
   * @param {(tile, options: object) => Promise<{grid: number[][][][]}>} ask
   * @param {(layer: string, head: string) => void} choose
   * @param {() => void} whenOpened
   */
  constructor(ask, choose, whenOpened) {
    this.#ask = ask;
    this.#choose = choose;
    this.#root.addEventListener("toggle", () => this.#root.open && whenOpened());
  }

  async show(tile, options, { layer, head, colormap }) {
    if (this.#root.hidden || !this.#root.open || !tile) return;
    const wanted = JSON.stringify([tile.number, tile.version, options]);
    if (wanted !== this.#wanted) await this.#fetch(tile, options, wanted);
    if (wanted !== this.#wanted || !this.#layers) return;
    if (colormap !== this.#colormap) this.#draw(this.#layers, colormap);
    this.#colormap = colormap;
    press([...this.#buttons.values()], this.#buttons.get(`${layer}.${head}`));
  }

  /** Hides them until others are there; their place is kept, so that nothing jumps. */
  clear() {
    this.#wanted = "";
    this.#layers = null;
    this.#colormap = "";
    find("heads-grid").ariaBusy = "true";
    this.#say("");
  }

  async #fetch(tile, options, wanted) {
    this.clear();
    this.#wanted = wanted;
    this.#say("Asking for all of them\u2026");
    try {
      const { grid } = await this.#ask(tile, { ...options, method: "attention", layout: "heads" });
      if (wanted === this.#wanted) this.#layers = grid;
    } catch (problem) {
      if (wanted !== this.#wanted) return;
      find("heads-grid").replaceChildren(); // not asked again by itself: another tile or setting does that
      find("heads-grid").ariaBusy = "false";
      this.#say(explain(problem));
    }
  }

  #draw(layers, colormap) {
    const grids = layers.map((heads) => [...heads, average(heads)]);
    const values = grids.flat(3).sort((a, b) => a - b);
    const even = 1 / layers[0][0].length ** 2;
    const end = Math.floor(QUANTILE * (values.length - 1)) + 1;
    const scale = chooseScale(values.slice(0, end), { isSigned: false, uniformLevel: even, colormap });
    const names = [...layers[0].map((_, n) => String(n)), "mean"];
    this.#buttons.clear();
    const rows = grids.map((row, layer) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `Layer ${layer}`),
        ...row.map((grid, n) => make("td", {}, this.#makeButton(String(layer), names[n], paint(grid, scale)))),
      ),
    );
    const heads = ["", ...names.map((name) => (name === "mean" ? "Mean" : `Head ${name}`))];
    const titles = heads.map((title) => make(title ? "th" : "td", title ? { scope: "col" } : {}, title));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
    find("heads-grid").replaceChildren(table);
    find("heads-grid").ariaBusy = "false";
    const colours = `In the colours of one scale for all, from ${number(scale.low)} to ${number(scale.high)} and above`;
    this.#say(`${colours}; an even share is ${number(even)}. Press one to see it large.`);
  }

  #makeButton(layer, head, canvas) {
    const ariaLabel = `Layer ${layer}, ${nameHead(head)}`;
    const button = make("button", { type: "button", ariaLabel, onclick: () => this.#choose(layer, head) }, canvas);
    this.#buttons.set(`${layer}.${head}`, button);
    return button;
  }

  #say(text) {
    find("heads-words").textContent = text;
  }
}

function average(heads) {
  return heads[0].map((row, y) => row.map((_, x) => heads.reduce((sum, grid) => sum + grid[y][x], 0) / heads.length));
}
