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

const REST_MS = 80; // between two drawings: a queue of hundreds changes something all the time

/** Calls `draw` before the next picture, once however often it is asked for, and not again at once. */
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

/** A small square of a class's colour; the name always stands beside it. */
export function swatch(color) {
  const square = make("span", { className: "swatch", ariaHidden: "true" });
  square.style.setProperty("--color", color);
  return square;
}

/** Marks one of several buttons as pressed. */
export function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
}
