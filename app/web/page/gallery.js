// The review queue as pictures: a list box, one tab stop, arrows move and choose.

import { badge, make, redraw } from "./dom.js";
import { STATES, describeVerdict, percent } from "./words.js";

export class Gallery {
  #root;
  #choose;
  #colorOf;
  #options = new Map(); // by tile, as redraw keeps them
  #shown = [];

  /** @param {HTMLElement} root @param {(tile) => void} choose @param {(label: string) => string} colorOf */
  constructor(root, choose, colorOf) {
    this.#root = root;
    this.#choose = choose;
    this.#colorOf = colorOf;
    root.addEventListener("keydown", (event) => this.#move(event));
  }

  draw(tiles, selected) {
    redraw(this.#root, this.#options, tiles, selected, (tile, known) => this.#renew(tile, known));
    for (const tile of tiles) this.#optionOf(tile).setAttribute("aria-selected", String(tile === selected));
    this.#shown = tiles;
  }

  #optionOf(tile) {
    return this.#options.get(tile)?.item;
  }

  #renew(tile, known) {
    const option = known?.item ?? make("li", { role: "option", onclick: () => this.#choose(tile) });
    fillOption(option, tile, this.#colorOf);
    return { item: option, stop: option };
  }

  #move(event) {
    const focused = this.#shown.findIndex((tile) => this.#optionOf(tile) === document.activeElement);
    if (focused < 0) return;
    const columns = getComputedStyle(this.#root).gridTemplateColumns.split(" ").length;
    const last = this.#shown.length - 1;
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
    const tile = this.#shown[Math.min(last, Math.max(0, target))];
    this.#optionOf(tile).focus();
    this.#choose(tile);
  }
}

function fillOption(option, tile, colorOf) {
  const { answer, problem, name, shownState, verdict } = tile;
  const { mark: sign, short } = answer ? describeVerdict(verdict) : {};
  const title = answer?.label ?? STATES[tile.state];
  const spoken = answer ? `${title}, ${percent(answer.confidence)}, ${short}` : title;
  option.title = name;
  option.ariaLabel = `${name}: ${spoken}`;
  option.dataset.state = shownState;
  option.dataset.verdict = verdict ?? "";
  option.style.setProperty("--color", answer ? colorOf(answer.label) : "transparent");
  const mark = problem ? "!" : answer && verdict !== "ok" ? sign : "";
  option.replaceChildren(
    tile.thumbnail,
    make("span", { className: "name" }, title),
    make("span", { className: "share" }, answer ? percent(answer.confidence) : ""),
    ...(mark ? [badge(mark)] : []),
  );
}
