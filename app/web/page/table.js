// The same tiles as rows, sortable by every column.

import { make, swatch } from "./dom.js";
import { measureDoubt, rankDoubt } from "./tiles.js";
import { describeVerdict, number, percent } from "./words.js";

const STATES = { waiting: "waiting", asked: "asking", failed: "no answer", cancelled: "cancelled" };

const COLUMNS = [
  { key: "name", title: "File", value: (tile) => tile.name },
  { key: "label", title: "Class", value: (tile) => tile.answer?.label ?? "\uffff" },
  { key: "confidence", title: "Sure", hint: "Probability of the class", value: (tile) => tile.answer?.confidence ?? -1 },
  {
    key: "doubt",
    title: "Doubt",
    hint: "Entropy of the probabilities, as a share of the highest possible; what the model can't judge counts as more",
    value: rankDoubt,
  },
  { key: "verdict", title: "Verdict", value: (tile) => tile.answer?.verdict ?? tile.state },
];

const collator = new Intl.Collator("en", { numeric: true });

export class Table {
  constructor(root, choose, colorOf, onSort) {
    this.root = root;
    this.key = null; // null: in the order that the page has
    this.isDescending = false;
    this._choose = choose;
    this._colorOf = colorOf;
    this._rows = new Map(); // tile -> {row, version}
    this._headers = COLUMNS.map((column) => this._makeHeader(column, onSort));
    this._body = make("tbody");
    this._body.addEventListener("keydown", (event) => this._move(event));
    root.append(make("table", {}, make("thead", {}, make("tr", {}, ...this._headers)), this._body));
  }

  sort(tiles) {
    const column = COLUMNS.find(({ key }) => key === this.key);
    if (!column) return tiles;
    const sign = this.isDescending ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
    return tiles.toSorted((a, b) => sign * compare(column.value(a), column.value(b)) || a.number - b.number);
  }

  draw(tiles, selected) {
    const hadFocus = this._body.contains(document.activeElement);
    const rows = tiles.map((tile) => this._renew(tile));
    const shown = new Set(tiles);
    for (const tile of this._rows.keys()) if (!shown.has(tile)) this._rows.delete(tile);
    if (rows.length !== this._body.children.length || rows.some((row, n) => row !== this._body.children[n])) {
      this._body.replaceChildren(...rows);
    }
    const current = shown.has(selected) ? selected : tiles[0];
    for (const tile of tiles) {
      const { row, button } = this._rows.get(tile);
      row.classList.toggle("selected", tile === selected);
      button.tabIndex = tile === current ? 0 : -1;
      if (tile === selected) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    if (hadFocus && current) this._rows.get(current).button.focus({ preventScroll: true });
    for (const [n, header] of this._headers.entries()) {
      const isSorted = COLUMNS[n].key === this.key;
      header.setAttribute("aria-sort", isSorted ? (this.isDescending ? "descending" : "ascending") : "none");
    }
  }

  _makeHeader({ key, title, hint }, onSort) {
    const sort = () => {
      const startsDescending = key === "doubt" || key === "confidence";
      this.isDescending = this.key === key ? !this.isDescending : startsDescending;
      this.key = key;
      onSort();
    };
    return make("th", { scope: "col" }, make("button", { type: "button", title: hint ?? "", onclick: sort }, title));
  }

  _renew(tile) {
    const known = this._rows.get(tile);
    if (known?.version === tile.version) return known.row;
    const button = known?.button ?? make("button", { type: "button" }, tile.name);
    const row = known?.row ?? make("tr", { onclick: () => this._choose(tile) });
    const { answer } = tile;
    row.replaceChildren(
      make("th", { scope: "row" }, make("div", {}, tile.thumbnail, button)),
      make("td", {}, ...(answer ? [swatch(this._colorOf(answer.label)), answer.label] : [STATES[tile.state]])),
      make("td", { className: "number" }, answer ? percent(answer.confidence) : ""),
      make("td", { className: "number" }, answer ? number(measureDoubt(answer.probabilities), 2) : ""),
      make("td", {}, answer ? describeVerdict(answer.verdict).short : (tile.problem?.title ?? "")),
    );
    this._rows.set(tile, { row, button, version: tile.version });
    return row;
  }

  _move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = document.activeElement.closest("tr");
    if (!step || !row) return;
    event.preventDefault();
    const next = step > 0 ? row.nextElementSibling : row.previousElementSibling;
    next?.querySelector("button").focus();
    next?.click();
  }
}
