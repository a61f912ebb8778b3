// The same tiles as rows, sortable by every column.

import { make, redraw, swatch } from "./dom.js";
import { collator, labelOrLast, measureDoubt, rankVerdict } from "./tiles.js";
import { STATES, describeVerdict, number, percent } from "./words.js";

const COLUMNS = [
  { key: "name", title: "File", value: (tile) => tile.name },
  { key: "label", title: "Class", value: labelOrLast },
  { key: "confidence", title: "Sure", hint: "Probability of the class", value: (tile) => tile.answer?.confidence ?? -1 },
  {
    key: "doubt",
    title: "Doubt",
    hint: "Entropy of the probabilities, as a share of the highest possible; what the model can't judge counts as more",
    value: rankDoubt,
  },
  { key: "verdict", title: "Verdict", value: rankVerdict },
];

/** To sort by: failures have less than the surest. */
function rankDoubt({ answer }) {
  if (!answer) return -1;
  return measureDoubt(answer.probabilities) + (answer.verdict === "out_of_scope" ? 1 : 0);
}

export class Table {
  key = null; // of the column that sorts; null: in the order that the page has
  #isDescending = false;
  #choose;
  #colorOf;
  #headers;
  #body = make("tbody");
  #rows = new Map(); // by tile, as redraw keeps them

  constructor(root, choose, colorOf, onSort) {
    this.#choose = choose;
    this.#colorOf = colorOf;
    this.#headers = COLUMNS.map((column) => this.#makeHeader(column, onSort));
    this.#body.addEventListener("keydown", (event) => this.#move(event));
    root.append(make("table", {}, make("thead", {}, make("tr", {}, ...this.#headers)), this.#body));
  }

  sort(tiles) {
    const column = COLUMNS.find(({ key }) => key === this.key);
    if (!column) return tiles;
    const sign = this.#isDescending ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
    return tiles.toSorted((a, b) => sign * compare(column.value(a), column.value(b)) || a.number - b.number);
  }

  draw(tiles, selected) {
    redraw(this.#body, this.#rows, tiles, selected, (tile, known) => this.#renew(tile, known));
    for (const tile of tiles) {
      const { item: row, stop: button } = this.#rows.get(tile);
      row.classList.toggle("selected", tile === selected);
      if (tile === selected) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    for (const [n, header] of this.#headers.entries()) {
      const isSorted = COLUMNS[n].key === this.key;
      header.setAttribute("aria-sort", isSorted ? (this.#isDescending ? "descending" : "ascending") : "none");
    }
  }

  #makeHeader({ key, title, hint }, onSort) {
    const sort = () => {
      const startsDescending = key === "doubt" || key === "confidence";
      this.#isDescending = this.key === key ? !this.#isDescending : startsDescending;
      this.key = key;
      onSort();
    };
    return make("th", { scope: "col" }, make("button", { type: "button", title: hint ?? "", onclick: sort }, title));
  }

  #renew(tile, known) {
    const button = known?.stop ?? make("button", { type: "button" }, tile.name);
    const row = known?.item ?? make("tr", { onclick: () => this.#choose(tile) });
    const { answer } = tile;
    row.replaceChildren(
      make("th", { scope: "row" }, make("div", {}, tile.thumbnail, button)),
      make("td", {}, ...(answer ? [swatch(this.#colorOf(answer.label)), answer.label] : [STATES[tile.state]])),
      make("td", { className: "number" }, answer ? percent(answer.confidence) : ""),
      make("td", { className: "number" }, answer ? number(measureDoubt(answer.probabilities), 2) : ""),
      make("td", {}, answer ? describeVerdict(tile.verdict).short : (tile.problem?.title ?? "")),
    );
    return { item: row, stop: button };
  }

  #move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = document.activeElement.closest("tr");
    if (!step || !row) return;
    event.preventDefault();
    const next = step > 0 ? row.nextElementSibling : row.previousElementSibling;
    next?.querySelector("button").focus();
    next?.click();
  }
}
