// The model card in words: what it knows, how well, on what data, what it must not be used for.

import { make, swatch } from "./dom.js";
import { asLabel, asSentence, count, list, number, omitName, percent } from "./words.js";

const BASELINE = "accuracy of "; // begins the names of such figures
const COUNTED = /^(size|nll|brier|ece|macro)/; // metrics that are no shares
const NAMES = {
  macro_f1: "F1, mean of the classes",
  macro_auroc: "AUROC, mean of the classes",
  nll: "Negative log-likelihood",
  brier: "Brier score",
  ece: "Expected calibration error",
};

export function describeCard(card) {
  const fieldUm = Math.round(card.tile_px * card.tile_mpp);
  return [
    make("p", { className: "lead" }, asSentence(card.summary)),
    part("What it is for, and what not", make("p", { className: "use" }, asSentence(card.intended_use)), points(card.limits)),
    part(
      "What it knows",
      make("ul", { className: "classes" }, ...card.classes.map(describeClass)),
      make(
        "p",
        {},
        `It sees squares of ${card.tile_px} pixels at ${number(card.tile_mpp)} µm per pixel, ${fieldUm} µm wide, `,
        `as ${card.grid} × ${card.grid} patches. `,
        "An image of known scale is brought to that scale; of one without, the whole centre square is taken.",
      ),
    ),
    part("How well", ...describeMetrics(card)),
    part("On what data", describeData(card.data ?? [])),
    part("Which model this is", describeModel(card)),
  ];
}

function part(title, ...children) {
  return make("section", {}, make("h3", {}, title), ...children);
}

function points(texts) {
  return make("ul", {}, ...texts.map((text) => make("li", {}, asSentence(text))));
}

function describeClass({ name, description, color }) {
  return make("li", {}, swatch(color), make("strong", {}, name), ` ${omitName(description, name)}`);
}

/** Each protocol by itself: figures of different ones must not be compared. */
function describeMetrics({ metrics }) {
  if (!metrics.length) return [make("p", {}, "Nothing was measured. Don't rely on any of its answers.")];
  const protocols = Map.groupBy(metrics, ({ protocol }) => protocol.split(";")[0]);
  return [...protocols].map(([protocol, all], n) =>
    make(
      "details",
      { open: n === 0 },
      make("summary", {}, make("strong", {}, asLabel(protocol)), ` ${tellAccuracy(all)}`),
      makeMetricTable(all, protocol),
    ),
  );
}

function tellAccuracy(metrics) {
  const accuracy = metrics.find(({ name }) => name === "accuracy");
  if (!accuracy) return "";
  const isBaseline = ({ name, protocol }) => name.startsWith(BASELINE) && protocol === accuracy.protocol;
  const baselines = metrics.filter(isBaseline); // others are of some of the answers only, and their protocol says of which
  const [best] = baselines.sort((a, b) => b.value - a.value);
  const [right, low, high] = [accuracy.value, accuracy.low, accuracy.high].map(ofHundred);
  const told = `Right for ${right} of 100 tiles (${low} to ${high}).`;
  if (!best) return told;
  return `${told} The best baseline without a network (${best.name.slice(BASELINE.length)}): ${ofHundred(best.value)}.`;
}

function ofHundred(share) {
  return Math.round(100 * share);
}

function makeMetricTable(metrics, protocol) {
  const rows = metrics.map(({ name, value, low, high, n, protocol: own }) => {
    const write = COUNTED.test(name) ? (figure) => number(figure) : percent;
    const added = own.slice(protocol.length).replace(/^; */, "");
    const title = (NAMES[name] ?? asLabel(name)) + (added ? ` (${added})` : "");
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, title),
      make("td", { className: "number" }, write(value)),
      make("td", { className: "number" }, `${write(low)} to ${write(high)}`),
      make("td", { className: "number" }, String(n)),
    );
  });
  const heads = ["Figure", "Value", "95 % interval", "n"].map((title, n) =>
    make("th", { scope: "col", className: n ? "number" : "" }, title),
  );
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  return make("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: `Figures: ${protocol}` }, table);
}

function describeData(sources) {
  if (!sources.length) return make("p", {}, "The artefact doesn't say.");
  return make(
    "ul",
    {},
    ...sources.map(({ name, use, n, licence, origin }) =>
      make("li", {}, make("strong", {}, name), ` (${count(n, "image")}): ${use}. ${asSentence(origin)} Licence: ${asSentence(licence)}`),
    ),
  );
}

function describeModel({ name, version, digest, device, precision, weights_licence: licence, architecture, versions }) {
  const made = architecture ? `${architecture.kind}, ${(architecture.parameters / 1e6).toFixed(1)} million weights` : null;
  const fields = {
    Name: `${name} ${version}`,
    Network: made,
    "Runs on": `${device}, ${precision}`,
    Weights: licence,
    "Made with": versions ? list(Object.entries(versions).map(([tool, which]) => `${tool} ${which}`)) : null,
    Digest: digest,
  };
  const known = Object.entries(fields).filter(([, value]) => value);
  return make("dl", {}, ...known.flatMap(([title, value]) => [make("dt", {}, title), make("dd", {}, value)]));
}
