// Builds elements. Whatever comes from a file name or from the service ends up as text, never as HTML.

/**
 * @param {string} tag
 * @param {Record<string, unknown>} [properties] properties of the element where it has one of that name, else attributes
 * @param {...(Node | string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

/** @returns {any} the element of that id, which index.html promises */
export function find(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no element #${id}`);
  return element;
}

const REST_MS = 80; // from one drawing to the next: a queue of hundreds changes something all the time

/** Calls `draw` before the next frame, once however often it is asked for, and not again until it has rested. */
export function atNextFrame(draw) {
  let isAsked = false;
  let drawnAt = -REST_MS;
  const drawNow = () => {
    isAsked = false;
    drawnAt = performance.now();
    draw();
  };
  return () => {
    if (isAsked) return;
    isAsked = true;
    const rest = drawnAt + REST_MS - performance.now();
    if (rest > 0) setTimeout(() => requestAnimationFrame(drawNow), rest);
    else requestAnimationFrame(drawNow);
  };
}

/** Makes these the element's only children, and touches nothing where they are so already. */
export function placeChildren(root, children) {
  const isSame = children.length === root.children.length && children.every((child, n) => child === root.children[n]);
  if (!isSame) root.replaceChildren(...children);
}

/**
 * Draws tiles as a list that is one stop for the tab key: the selected tile, or the first.
 * @param {HTMLElement} root
 * @param {Map<Tile, {version: number, item: HTMLElement, stop: HTMLElement}>} known what is drawn of each tile, and which
 *   part of it takes the focus; kept up to date here
 * @param {Tile[]} tiles in the order of the list
 * @param {Tile | null} selected
 * @param {(tile: Tile, known?: object) => {item: HTMLElement, stop: HTMLElement}} renew draws one that is new or changed
 */
export function redraw(root, known, tiles, selected, renew) {
  const hadFocus = root.contains(document.activeElement);
  for (const tile of tiles) {
    const { version } = tile;
    if (known.get(tile)?.version !== version) known.set(tile, { ...renew(tile, known.get(tile)), version });
  }
  const shown = new Set(tiles);
  for (const tile of known.keys()) if (!shown.has(tile)) known.delete(tile);
  placeChildren(root, tiles.map((tile) => known.get(tile).item));
  const current = shown.has(selected) ? selected : tiles[0];
  for (const tile of tiles) known.get(tile).stop.tabIndex = tile === current ? 0 : -1;
  if (hadFocus && current) known.get(current).stop.focus({ preventScroll: true });
}

/** A small square of a class's colour; the name always stands beside it. */
export function swatch(color) {
  const square = make("span", { className: "swatch", ariaHidden: "true" });
  square.style.setProperty("--color", color);
  return square;
}

/** What marks a tile of some verdict or state, which an element around it names as data: it has the badge's colours. */
export function badge(sign) {
  return make("span", { className: "mark", ariaHidden: "true" }, sign);
}

/** Marks one of several buttons as pressed. */
export function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
}
