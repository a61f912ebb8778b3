// The review queue as pictures: a list box, one tab stop, arrows move and choose.

import { make } from "./dom.js";
import { describeVerdict, percent } from "./words.js";

export class Gallery {
  /** @param {HTMLElement} root @param {(tile) => void} choose @param {(label: string) => string} colorOf */
  constructor(root, choose, colorOf) {
    this.root = root;
    this._choose = choose;
    this._colorOf = colorOf;
    this._options = new Map(); // tile -> {option, version}
    this._shown = [];
    root.addEventListener("keydown", (event) => this._move(event));
  }

  draw(tiles, selected) {
    const hadFocus = this.root.contains(document.activeElement);
    const options = tiles.map((tile) => this._renew(tile));
    const shown = new Set(tiles);
    for (const tile of this._options.keys()) if (!shown.has(tile)) this._options.delete(tile);
    if (options.length !== this.root.children.length || options.some((option, n) => option !== this.root.children[n])) {
      this.root.replaceChildren(...options);
    }
    this._shown = tiles;
    const current = shown.has(selected) ? selected : tiles[0];
    for (const tile of tiles) {
      const { option } = this._options.get(tile);
      option.setAttribute("aria-selected", String(tile === selected));
      option.tabIndex = tile === current ? 0 : -1;
    }
    if (hadFocus && current) this._options.get(current).option.focus({ preventScroll: true });
  }

  _renew(tile) {
    const known = this._options.get(tile);
    if (known?.version === tile.version) return known.option;
    const option = known?.option ?? make("li", { role: "option", onclick: () => this._choose(tile) });
    fillOption(option, tile, this._colorOf);
    this._options.set(tile, { option, version: tile.version });
    return option;
  }

  _move(event) {
    const focused = this._shown.findIndex((tile) => this._options.get(tile)?.option === document.activeElement);
    if (focused < 0) return;
    const columns = getComputedStyle(this.root).gridTemplateColumns.split(" ").length;
    const last = this._shown.length - 1;
    const targets = {
      ArrowRight: focused + 1,
      ArrowLeft: focused - 1,
      ArrowDown: focused + columns,
      ArrowUp: focused - columns,
      Home: 0,
      End: last,
      Enter: focused,
      " ": focused,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const tile = this._shown[Math.min(last, Math.max(0, target))];
    this._options.get(tile).option.focus();
    this._choose(tile);
  }
}

function fillOption(option, tile, colorOf) {
  const { answer, problem } = tile;
  const verdict = answer && describeVerdict(answer.verdict);
  const state = answer ? answer.label : { failed: "no answer", cancelled: "cancelled", asked: "asking", waiting: "waiting" }[tile.state];
  const spoken = answer ? `${answer.label}, ${percent(answer.confidence)}, ${verdict.short}` : state;
  option.title = tile.name;
  option.ariaLabel = `${tile.name}: ${spoken}`;
  option.dataset.state = problem ? "failed" : tile.state;
  option.dataset.verdict = answer?.verdict ?? "";
  option.style.setProperty("--color", answer ? colorOf(answer.label) : "transparent");
  const mark = problem ? "!" : answer && answer.verdict !== "ok" ? verdict.mark : "";
  option.replaceChildren(
    tile.thumbnail,
    make("span", { className: "name" }, state),
    make("span", { className: "share" }, answer ? percent(answer.confidence) : ""),
    ...(mark ? [make("span", { className: "mark", ariaHidden: "true" }, mark)] : []),
  );
}
