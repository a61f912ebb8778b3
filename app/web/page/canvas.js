// The tile, the map over it and the bar of its colours, as pixels.

import { find, make } from "./dom.js";
import { drawBox, fade } from "./picture.js";
import { colour, paint } from "./scales.js";
import { enlarge } from "./smooth.js";

const PATCH_PX = 60; // of the canvas, per patch: sharp on screens of two pixels a point
const SMOOTH_PX = 15; // per patch, of a smooth map before the browser brings it to the canvas
const GREY_FROM = 0.25; // below this opacity the tile's own colours come back
const RULE_OPACITY = 0.2;
const LABEL_GAP = 0.075; // of the bar's height: labels that are nearer would touch

/** Takes away what was drawn, and makes room for so many patches each way. */
export function empty(canvas, grid) {
  canvas.width = canvas.height = grid * PATCH_PX;
}

/**
 * The tile alone.
 * @returns {{tile: HTMLCanvasElement, faded: HTMLCanvasElement, mean: number}} what a map is laid over: the tile as it
 * was drawn, the same without its colours, and its mean grey
 */
export function drawTile(canvas, picture, box, { tile_px: tilePx }) {
  drawBox(canvas, picture, box, canvas.width);
  return { tile: canvas, ...fade(drawBox(make("canvas"), picture, box, tilePx)) };
}

/** The tile, with fewer of its own colours the more of the map lies over it. */
export function layTile(canvas, { tile, faded }, alpha) {
  const pen = canvas.getContext("2d");
  pen.drawImage(tile, 0, 0);
  pen.globalAlpha = greyness(alpha);
  pen.drawImage(faded, 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 1;
}

/** The map, over whatever is there. */
export function layMap(canvas, map, scale, { form, alpha }, opacity) {
  const isSmooth = form === "smooth"; // never by itself: it feigns a precision that isn't there
  const values = isSmooth ? enlarge(map.grid, SMOOTH_PX * map.grid.length) : map.grid;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = isSmooth;
  pen.globalAlpha = opacity;
  pen.drawImage(paint(values, scale), 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = RULE_OPACITY * greyness(alpha);
  if (!isSmooth) rulePatches(pen, canvas.width);
  pen.globalAlpha = 1;
}

function greyness(alpha) {
  return Math.min(1, alpha / GREY_FROM);
}

function rulePatches(pen, side) {
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

/** Dark within light, so that it shows on every colour. */
export function outlinePatch(canvas, { row, column }) {
  const pen = canvas.getContext("2d");
  for (const [style, width] of [["#ffffff", 7], ["#111111", 3]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.strokeRect(column * PATCH_PX, row * PATCH_PX, PATCH_PX, PATCH_PX);
  }
}

/** The colours as the map wears them: mixed into the tile's mean grey. */
export function drawScale(scale, quantity, opacity, grey) {
  const bar = find("scale-bar");
  const pen = bar.getContext("2d");
  const image = pen.createImageData(1, bar.height);
  for (let y = 0; y < bar.height; y++) {
    const value = scale.high - ((scale.high - scale.low) * y) / (bar.height - 1);
    const mixed = colour(scale, value).map((channel) => opacity * channel + (1 - opacity) * grey);
    image.data.set([...mixed, 255], 4 * y);
  }
  pen.putImageData(image, 0, 0);
  find("scale-ticks").replaceChildren(...placeTicks(scale));
  find("scale-quantity").textContent = quantity;
}

/** From the lowest up: a label too near to the one below is moved up. */
function placeTicks({ low, high, ticks }) {
  let labelAt = -1;
  return ticks.map(({ value, label }) => {
    const at = (value - low) / (high - low);
    labelAt = Math.max(at, labelAt + LABEL_GAP);
    const item = make("li", {}, make("span", {}, label));
    item.style.setProperty("--at", `${100 * at}%`);
    item.style.setProperty("--label-at", `${100 * labelAt}%`);
    return item;
  });
}
