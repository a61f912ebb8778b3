// A map enlarged smoothly, as the service's own pictures are with upsample=bicubic (a test compares): Keys's cubic with
// Pillow's -0.5, cut off at the map's own ends, so that nothing is claimed that the map doesn't hold.

function weigh(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/** The share of each of `count` patches in the point that lies `at` patches from the edge. */
function share(count, at) {
  const weights = Array.from({ length: count }, (_, k) => weigh(k + 0.5 - at));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

const mix = (shares, value) => shares.reduce((sum, part, k) => (part ? sum + part * value(k) : sum), 0);

/**
 * @param {number[][]} grid
 * @param {number} side
 * @returns {number[][]} side rows of side numbers
 */
export function enlarge(grid, side) {
  const [low, high] = [Math.min(...grid.flat()), Math.max(...grid.flat())];
  const places = Array.from({ length: side }, (_, n) => share(grid.length, ((n + 0.5) * grid.length) / side));
  const wide = grid.map((row) => places.map((shares) => mix(shares, (k) => row[k])));
  return places.map((shares) => places.map((_, column) => Math.min(high, Math.max(low, mix(shares, (k) => wide[k][column])))));
}
