// What a map shows, in words: for readers who can't see its colours, and so that none reads too much into them.

import { SMALLEST_LIMIT, findUniformLevel } from "./scales.js";
import { list, nameHead, number, percent, signed } from "./words.js";

const ROUTING = "It shows where information was routed, not why, and is the same whatever class is asked about.";
const LOGIT = "The score, or logit, is what the probability is computed from.";
const SMOOTHED = "Smoothed between the patches; the map has one number for each.";

const TOLD_METHODS = {
  attention(map, { layers }) {
    const where = `in layer ${map.layer} of 0 to ${layers - 1}, ${nameHead(map.head)}`;
    return `What the class token, which gathers ${tellGathered(map)}, looked at ${where}. ${ROUTING}`;
  },
  rollout(map) {
    return `Attention carried through all layers, which give ${tellGathered(map)}. ${ROUTING}`;
  },
  evidence(map, { maps }) {
    const exact = maps?.evidence === "exact" ? "" : " An approximation: the patches don't add up to the logit exactly.";
    return `What each patch adds to the score of ${map.target}: ${tellColours(map)}. ${LOGIT}${exact}`;
  },
  occlusion(map) {
    const taken = "when patches are taken away, group by group";
    return `How far the score of ${map.target} falls ${taken}: ${tellColours(map)}. ${LOGIT}`;
  },
};

/** For the map as a whole, as a screen reader announces it. */
export function nameMap({ method, target, grid }) {
  const whose = target ? ` for ${target}` : "";
  return `Map of ${method}${whose}, ${grid.length} by ${grid.length} patches. Arrow keys read one.`;
}

/** What its method computes, and what must not be read into it. */
export function tellMethod(map, { form }, card) {
  const told = TOLD_METHODS[map.method]?.(map, card) ?? "";
  return form === "smooth" ? `${told} ${SMOOTHED}` : told;
}

const QUESTIONS = { removal: "which patches the answer rests on", focus: "which patches are of which class" };
const JUDGED_FORMS = { attention: " (last layer, mean of all heads)", occlusion: " (25 groups)" }; // docs/maps.md

/** How its method did beside maps that no model drew, where the artefact says so. */
export function tellJudgement({ method }, { maps }) {
  const scores = maps?.judged?.scores ?? [];
  const asked = Object.keys(QUESTIONS).filter((metric) => scores.some((score) => score.map === method && score.metric === metric));
  if (!asked.length) return "";
  const isBetter = (metric) => isBeyondChance(scores.filter((score) => score.metric === metric), method);
  const { better = [], rest = [] } = Object.groupBy(asked, (metric) => (isBetter(metric) ? "better" : "rest"));
  const tell = (metrics, word) => list(metrics.map((metric) => QUESTIONS[metric]), word);
  const start = `Judged${JUDGED_FORMS[method] ?? ""}:`;
  if (!better.length) return `${start} no better than a map drawn without the model at telling ${tell(rest, "or")}.`;
  const but = rest.length ? `, but no better at telling ${tell(rest, "or")}` : "";
  return `${start} better than a map drawn without the model at telling ${tell(better, "and")}${but}.`;
}

/** Is its whole interval above those of all maps that are no method's? As `tissue-train judge-maps` decides. */
function isBeyondChance(scores, method) {
  const own = scores.find(({ map }) => map === method);
  return scores.every(({ map, high }) => map in TOLD_METHODS || own.low > high);
}

function tellGathered({ logit_share: share }) {
  return share < 1 ? `${percent(share)} of the answer (other heads read the rest before)` : "the answer";
}

function tellColours({ target }) {
  return `orange speaks for ${target}, blue against it`;
}

/** The number of one patch, or of none the map's ends. */
export function tellPatch(map, patch) {
  if (!patch) return `${map.signed ? tellSides(map) : tellMost(map)} Point at a patch to read it.`;
  const { row, column } = patch;
  return `Row ${row + 1}, column ${column + 1}: ${tellValue(map, map.grid[row][column])}`;
}

function tellMost(map) {
  return `Most in ${tellPlace(map, Math.max(...map.grid.flat()))}.`;
}

/** Both ends of a signed map, neither of which need be on the side that its name says. */
function tellSides(map) {
  const values = map.grid.flat();
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (Math.max(high, -low) < SMALLEST_LIMIT) return `Nothing here speaks for or against ${map.target}.`;
  const most = high > 0 ? `Most for ${map.target} in` : `Nothing speaks for ${map.target}; least against it in`;
  const least = low < 0 ? "most against it in" : "nothing against it; least for it in";
  return `${most} ${tellPlace(map, high)}; ${least} ${tellPlace(map, low)}.`;
}

/** Where the map first has this value. */
function tellPlace(map, value) {
  const at = map.grid.flat().indexOf(value);
  const [row, column] = [Math.floor(at / map.grid.length), at % map.grid.length];
  return `row ${row + 1}, column ${column + 1}: ${tellValue(map, value)}`;
}

function tellValue(map, value) {
  const even = findUniformLevel(map);
  if (even) return `${number(value)}, ${number(value / even, 2)} times the even share`;
  return map.signed ? signed(value) : number(value);
}
