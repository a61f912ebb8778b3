// Which number has which colour. The rules are those of the service's own pictures (app/overlay.py): a scale never
// starts at the map's own minimum, signed ones are even on both sides of zero, and uniform attention is mid-scale,
// so that a flat map looks flat.

import { TABLES } from "./colours.js";
import { make } from "./dom.js";
import { number, signed } from "./words.js";

export const SMALLEST_LIMIT = 1e-3; // a map weaker than this is rounding and must look like nothing

/**
 * @typedef {{low: number, high: number, table: Uint8ClampedArray, ticks: {value: number, label: string}[]}} Scale
 * @param {number[]} values
 * @returns {Scale}
 */
export function chooseScale(values, { isSigned, uniformLevel, colormap }) {
  const peak = Math.max(...values.map(Math.abs));
  if (isSigned) {
    const limit = Math.max(peak, SMALLEST_LIMIT);
    const ticks = [
      { value: -limit, label: number(-limit) },
      { value: 0, label: "0" },
      { value: limit, label: signed(limit) },
    ];
    return { low: -limit, high: limit, table: TABLES.diverging, ticks };
  }
  const high = Math.max(peak, uniformLevel ? 2 * uniformLevel : SMALLEST_LIMIT);
  const low = Math.min(0, ...values);
  const middle = (low + high) / 2;
  const ticks = [low, high].map((value) => ({ value, label: number(value) }));
  if (uniformLevel) ticks.push({ value: uniformLevel, label: `${number(uniformLevel)} even` });
  // The middle gives way where its label would touch that of the even level.
  if (!uniformLevel || Math.abs(middle - uniformLevel) > 0.1 * (high - low)) {
    ticks.push({ value: middle, label: number(middle) });
  }
  ticks.sort((a, b) => a.value - b.value);
  return { low, high, table: TABLES[colormap], ticks };
}

/** @returns {number[]} red, green and blue */
export function colour(scale, value) {
  const level = Math.round((255 * (value - scale.low)) / (scale.high - scale.low));
  const at = 3 * Math.min(255, Math.max(0, level));
  return [scale.table[at], scale.table[at + 1], scale.table[at + 2]];
}

/** Square numbers as a canvas with a pixel for each. */
export function paint(values, scale) {
  const canvas = make("canvas", { width: values.length, height: values.length });
  const image = new ImageData(values.length, values.length);
  values.flat().forEach((value, k) => image.data.set([...colour(scale, value), 255], 4 * k));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** What every patch would have if attention were spread evenly; null where that means nothing. */
export function findUniformLevel(map) {
  if (map.signed) return null;
  const values = map.grid.flat();
  if (map.method === "attention") return 1 / values.length;
  if (map.method !== "rollout") return null;
  return values.reduce((sum, value) => sum + value, 0) / values.length; // the class token keeps a part of it
}
