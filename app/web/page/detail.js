// One tile in full: the class, how sure, whether to rely on it, and the facts behind.

import { find, make, swatch } from "./dom.js";
import { explainInParagraphs } from "./problems.js";
import { measureDoubt } from "./tiles.js";
import { asLabel, asSentence, describeVerdict, list, number, percent } from "./words.js";

const STATE_TITLES = { waiting: "Waiting for its turn", asked: "Asking the service", cancelled: "Cancelled before it was answered" };
const SOURCES = { request: "given with the request", tag: "from the file's tag", unknown: "unknown" };

const UNDOUBTED = "No reason for doubt was found. The class can still be wrong: see below how likely each is.";

export class Detail {
  #colorOf;
  #describeClass;
  #drawn = ""; // the tile and its version

  constructor(colorOf, describeClass) {
    this.#colorOf = colorOf;
    this.#describeClass = describeClass;
  }

  draw(tile) {
    const drawn = tile ? `${tile.number}.${tile.version}` : "";
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    find("tile").hidden = !tile;
    if (!tile) return;
    const { answer, mpp } = tile;
    find("tile-file").textContent = tile.name;
    find("tile").dataset.state = tile.shownState;
    find("looked").hidden = !answer;
    for (const part of [".likely", ".facts"]) document.querySelector(part).hidden = !answer;
    find("scale-form").hidden = mpp === null && !tile.lacksScale; // what was given can be corrected
    find("tile-mpp").value = mpp ?? "";
    if (answer) this.#drawAnswer(tile);
    else this.#drawProblem(tile);
  }

  #drawProblem({ state, problem }) {
    find("tile-label").textContent = problem ? "No answer" : STATE_TITLES[state];
    find("tile-description").textContent = "";
    find("verdict").dataset.verdict = problem ? "failed" : "";
    find("verdict").replaceChildren(...(problem ? [mark("!"), make("div", {}, ...explainInParagraphs(problem))] : []));
  }

  #drawAnswer(tile) {
    const { answer } = tile;
    find("tile-label").replaceChildren(
      swatch(this.#colorOf(answer.label)),
      make("span", {}, answer.label),
      " ",
      make("span", { className: "share" }, percent(answer.confidence)),
    );
    find("tile-description").textContent = asSentence(asLabel(this.#describeClass(answer.label)));
    this.#drawVerdict(tile);
    this.#drawBars(answer);
    find("set").textContent = tellSet(answer.prediction_set, answer.probabilities);
    find("facts").replaceChildren(...listFacts(tile));
  }

  #drawVerdict({ answer, verdict }) {
    const { reasons, warnings, tta } = answer;
    const { mark: sign, title } = describeVerdict(verdict);
    const heading = verdict === "ok" && warnings.length ? `${title}, but:` : title;
    const remarks = [...reasons, ...warnings].map(({ text }) => make("li", {}, asSentence(text)));
    if (tta) remarks.push(make("li", {}, tellViews(tta)));
    find("verdict").dataset.verdict = verdict;
    const below = remarks.length ? make("ul", {}, ...remarks) : make("p", {}, UNDOUBTED);
    find("verdict").replaceChildren(mark(sign), make("div", {}, make("p", {}, make("strong", {}, heading)), below));
  }

  #drawBars({ probabilities, prediction_set: set }) {
    const rows = Object.entries(probabilities)
      .sort(([, a], [, b]) => b - a)
      .map(([name, share]) => {
        const isInSet = Boolean(set?.labels.includes(name));
        const bar = make("span", { className: "fill" });
        bar.style.setProperty("--share", `${100 * share}%`);
        bar.style.setProperty("--color", this.#colorOf(name));
        const track = make("span", { className: "track", ariaHidden: "true" }, bar);
        return make(
          "tr",
          { className: isInSet ? "inside" : "", title: this.#describeClass(name) },
          make("th", { scope: "row" }, name),
          make("td", {}, track, make("span", { className: "number" }, percent(share))),
          make("td", {}, ...(set ? [make("span", { className: "dot" }, isInSet ? "in the set" : "")] : [])),
        );
      });
    find("bars").tBodies[0].replaceChildren(...rows);
  }
}

function mark(sign) {
  return make("span", { className: "sign", ariaHidden: "true" }, sign);
}

function tellViews({ views, disagreement }) {
  const differing = Math.round(disagreement * views);
  const said = differing ? `${differing} of the views say another class` : "all views say the same class";
  return `Turned and mirrored ${views} ways, ${said}.`;
}

function tellSet(set, probabilities) {
  if (!set) return "This model has no measured sets of classes, so none is named.";
  const said = [
    `Can't be ruled out (the set): ${list(set.labels, "or")}.`,
    `Of tiles like those it was measured on, ${percent(set.coverage)} have their true class in such a set.`,
  ];
  const outside = Object.keys(probabilities).filter((name) => !set.labels.includes(name));
  const isSkipped = outside.some((name) => set.labels.some((inside) => probabilities[inside] < probabilities[name]));
  if (isSkipped) said.push("Each class has a threshold of its own, so a likelier one may be left out.");
  if (!outside.length) said.push("That is all of them: it can't tell.");
  return said.join(" ");
}

function listFacts({ answer, requestId, timing }) {
  const { input, quality, model, probabilities } = answer;
  return [
    group("Tile", { Doubt: `${number(measureDoubt(probabilities), 2)} of 1`, ...mapFields(quality, showValue) }),
    group("File", {
      Size: `${input.width} × ${input.height} px, ${input.format}`,
      Scale: input.mpp ? `${number(input.mpp)} µm per pixel, ${SOURCES[input.mpp_source] ?? input.mpp_source}` : "unknown",
      "Looked at": `${input.box[2] - input.box[0]} × ${input.box[3] - input.box[1]} px from ${input.box[0]}, ${input.box[1]}`,
      "SHA-256": input.sha256,
    }),
    group("Model", mapFields(model, String)),
    group("Request", { Id: requestId ?? "none", ...(timing ? { Took: timing.replaceAll(";dur=", " ") + " ms" } : {}) }),
  ];
}

function mapFields(fields, show) {
  const known = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
  return Object.fromEntries(known.map(([name, value]) => [asLabel(name), show(value, name)]));
}

function showValue(value, name) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  return name.endsWith("share") ? percent(value) : number(value);
}

function group(title, fields) {
  const entries = Object.entries(fields).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("section", {}, make("h4", {}, title), make("dl", {}, ...entries));
}
