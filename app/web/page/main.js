// Puts the page together: what the reader does -> tiles -> queue -> answers -> what is drawn.

import { Api } from "./api.js";
import { describeCard } from "./card.js";
import { Detail } from "./detail.js";
import { atNextFrame, badge, find, make, placeChildren, press, swatch } from "./dom.js";
import { saveList, writeCsv, writeJson } from "./export.js";
import { Gallery } from "./gallery.js";
import { Heat } from "./heat.js";
import { listenForImages, offerSamples } from "./intake.js";
import { listenForKey } from "./key.js";
import { chooseBox, drawBox, readPicture } from "./picture.js";
import { explain } from "./problems.js";
import { Queue } from "./queue.js";
import { Table } from "./table.js";
import { ORDERS, Tile, Tiles } from "./tiles.js";
import { count, describeVerdict, list, omitName, percent } from "./words.js";

const THUMBNAIL_PX = 144;
const UNKNOWN_COLOR = "#808080";
const SHOWN_COVERAGES = [0.8, 0.9, 0.95, 0.99]; // the artefact may have fifty
const SORT_EVERY_MS = 1000; // while answers come: pictures that jump about can't be looked at

const api = new Api();
const tiles = new Tiles();
let card = null;

const colorOf = (label) => card?.classes.find(({ name }) => name === label)?.color ?? UNKNOWN_COLOR;
const describeClass = (label) => omitName(card?.classes.find(({ name }) => name === label)?.description ?? "", label);

const heat = new Heat(api, tiles);
const detail = new Detail(colorOf, describeClass);
const gallery = new Gallery(find("gallery"), choose, colorOf);
const table = new Table(find("table"), choose, colorOf, () => arrange(true));
const queue = new Queue(askFor, tiles);
const askForKey = listenForKey(api, openService);

let arranged = []; // the tiles that are shown, in their order
let arrangedAt = 0;
let hasArrangedAll = false; // nothing was under way any more at that time
let filter = null; // {title, admits}
let isTable = false;

// -- the service --

async function openService() {
  card = await api.fetchCard();
  heat.setCard(card);
  find("card-body").replaceChildren(...describeCard(card));
  const known = card.classes.map(({ name, color }) => make("span", {}, swatch(color), name));
  find("knows").replaceChildren("It tells apart:", ...known);
  offerCoverages(card.conformal);
  for (const tile of tiles.all) tile.change({}); // its colours are known now
  warn(null);
  tiles.tell();
  if (queue.hasStopped) queue.resume();
}

async function start() {
  showHealth();
  try {
    await openService();
  } catch (problem) {
    if (problem.wantsKey) askForKey();
    else warn(problem);
  }
}

async function showHealth() {
  const chip = find("health");
  try {
    const { device, precision } = await api.fetchReadiness();
    chip.textContent = `Ready, on ${device} (${precision})`;
    chip.dataset.state = "ready";
  } catch (problem) {
    chip.textContent = problem.isBusy ? "Not ready" : "It doesn't say whether it is ready";
    chip.title = explain(problem);
    chip.dataset.state = "unready";
  }
}

function warn(problem) {
  find("alarm").hidden = !problem;
  find("alarm-text").textContent = problem ? explain(problem) : "";
}

async function askFor(tile, signal) {
  const { body, requestId, timing } = await api.predict(tile.file, tile.options(tiles.settings), signal);
  tile.maps.clear();
  const { box, width, height } = body.input;
  if (box[2] - box[0] < Math.min(width, height)) drawThumbnail(tile, body); // it looked at less than was drawn
  return { answer: body, requestId, timing };
}

// -- what comes in --

function take(files, remark = "") {
  find("intake-remark").textContent = remark;
  find("intake-remark").hidden = !remark;
  if (!files.length) return;
  const added = files.map((file) => new Tile(file));
  delete document.body.dataset.empty;
  tiles.add(added);
  queue.add(added);
  for (const tile of added) drawThumbnail(tile);
}

let thumbnails = Promise.resolve(); // one at a time: hundreds of large pictures would fill the memory

function drawThumbnail(tile, answer = null) {
  thumbnails = thumbnails.then(async () => {
    try {
      const picture = await readPicture(tile.file);
      drawBox(tile.thumbnail, picture, chooseBox(picture, answer), THUMBNAIL_PX);
      picture.close();
    } catch {
      tile.thumbnail.className = "blank"; // not for this browser; whether it is for the service, the service says
    }
  });
}

function choose(tile) {
  tiles.select(tile);
  if (matchMedia("(max-width: 60rem)").matches) find("tile").scrollIntoView({ block: "start", behavior: "instant" });
}

function step(by) {
  const at = arranged.indexOf(tiles.selected) + by;
  if (arranged[at]) tiles.select(arranged[at]);
}

// -- settings: a change of them asks for everything again --

function offerCoverages(conformal) {
  const known = conformal?.coverages ?? [];
  const few = known.filter((coverage) => SHOWN_COVERAGES.some((shown) => Math.abs(shown - coverage) < 1e-9));
  const offered = [...new Set([...(few.length ? few : known), ...(conformal ? [conformal.default] : [])])].sort();
  find("coverage-field").hidden = !offered.length;
  const isDefault = (coverage) => coverage === conformal.default;
  const options = offered.map((coverage) =>
    make("option", { value: isDefault(coverage) ? "" : String(coverage), defaultSelected: isDefault(coverage) }, percent(coverage)),
  );
  find("coverage").replaceChildren(...options);
}

function set(values) {
  Object.assign(tiles.settings, values);
  queue.add([...tiles.all]);
}

/** For all tiles, whatever was given for one of them alone. */
function setScale(mpp) {
  for (const tile of tiles.all) tile.mpp = null;
  set({ mpp });
}

function listenForSettings() {
  const mpp = find("mpp");
  find("settings").addEventListener("submit", (event) => event.preventDefault());
  mpp.addEventListener("change", () => {
    if (mpp.reportValidity()) setScale(mpp.value ? Number(mpp.value) : null);
  });
  find("coverage").addEventListener("change", ({ target }) => set({ coverage: target.value ? Number(target.value) : null }));
  find("tta").addEventListener("change", ({ target }) => set({ tta: target.checked }));
  find("scale-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tiles.selected.mpp = Number(find("tile-mpp").value);
    queue.add([tiles.selected]);
  });
  find("mpp-for-all").addEventListener("click", () => {
    if (!find("tile-mpp").reportValidity()) return;
    mpp.value = find("tile-mpp").value;
    setScale(Number(mpp.value));
    find("tile").focus({ preventScroll: true }); // the form goes away with the warning
  });
}

// -- what is drawn --

const draw = atNextFrame(() => {
  arrange(false);
  drawFilters();
  drawProgress();
  detail.draw(tiles.selected);
  heat.show(tiles.selected);
  document.body.toggleAttribute("data-empty", !tiles.all.length);
});

function arrange(isWanted) {
  const isOld = performance.now() - arrangedAt > SORT_EVERY_MS;
  const hasSettled = queue.isIdle && !hasArrangedAll;
  const shown = filter ? tiles.all.filter(filter.admits) : tiles.all;
  const known = new Set(arranged);
  const isOther = shown.length !== known.size || shown.some((tile) => !known.has(tile));
  if (isWanted || hasSettled || isOld || isOther) {
    arranged = isTable && table.key ? table.sort(shown) : shown.toSorted(ORDERS[find("order").value]);
    hasArrangedAll = queue.isIdle;
    arrangedAt = performance.now();
  }
  openFirst();
  if (isTable) table.draw(arranged, tiles.selected);
  else gallery.draw(arranged, tiles.selected);
  const at = arranged.indexOf(tiles.selected);
  find("previous").disabled = at <= 0;
  find("next").disabled = at < 0 || at === arranged.length - 1;
  find("order").disabled = isTable && Boolean(table.key);
}

/**
 * Which tile wants looking at first is known when all are answered. Until then the one that came first is shown; if the
 * reader has taken that up, or opened another, it stays.
 */
function openFirst() {
  if (queue.isIdle && arranged.length && !tiles.isTakenUp) tiles.select(arranged[0]);
}

/** Without an answer, and without any hope of one unless it is asked for again. */
function isLeft({ state }) {
  return state === "failed" || state === "cancelled";
}

/** How many there are of each kind; pressing one shows only those. */
function drawFilters() {
  const answered = tiles.all.filter(({ answer }) => answer);
  const names = card ? card.classes.map(({ name }) => name) : [...new Set(answered.map(({ answer }) => answer.label))].sort();
  const kinds = [
    ...names.map((name) => ({ title: name, sign: swatch(colorOf(name)), admits: ({ answer }) => answer?.label === name })),
    ...["out_of_scope", "uncertain", "unscaled"].map((verdict) => ({
      title: describeVerdict(verdict).short,
      sign: badge(describeVerdict(verdict).mark),
      data: { verdict },
      admits: (tile) => tile.verdict === verdict,
    })),
    { title: "no answer", sign: badge("!"), data: { state: "failed" }, admits: isLeft },
  ];
  const root = find("filters");
  const buttons = kinds.map(({ title, sign, data, admits }) => {
    const n = tiles.all.filter(admits).length;
    const known = [...root.children].find((button) => button.dataset.title === title);
    const button = known ?? make("button", { type: "button" });
    Object.assign(button.dataset, { title, ...data });
    button.onclick = () => {
      filter = filter?.title === title ? null : { title, admits };
      arrange(true);
      drawFilters();
    };
    button.hidden = !n && filter?.title !== title;
    button.setAttribute("aria-pressed", String(filter?.title === title));
    button.replaceChildren(sign, `${title} `, make("b", {}, String(n)));
    return button;
  });
  placeChildren(root, buttons);
}

let toldAbout = "";

function drawProgress() {
  const by = Object.groupBy(tiles.all, ({ state }) => state);
  const n = (state) => by[state]?.length ?? 0;
  const done = n("answered") + n("failed") + n("cancelled");
  find("progress-bar").value = tiles.all.length ? done / tiles.all.length : 0;
  find("progress").dataset.done = String(queue.isIdle);
  const parts = [`${n("answered")} of ${count(tiles.all.length, "tile")} answered`];
  if (n("failed")) parts.push(`${n("failed")} failed`);
  if (n("cancelled")) parts.push(`${n("cancelled")} cancelled`);
  find("progress-text").textContent = `${list(parts)}.`;
  const hold = tellHold();
  find("progress-note").textContent = hold;
  find("cancel").hidden = queue.isIdle;
  find("resume").hidden = !queue.hasStopped;
  find("again").hidden = !queue.isIdle || !(n("failed") + n("cancelled"));
  const news = queue.isIdle && tiles.all.length ? `${list(parts)}.` : hold;
  if (news !== toldAbout) find("news").textContent = toldAbout = news;
}

function tellHold() {
  if (!queue.problem) return "";
  if (queue.problem.wantsKey) return "The service wants a key.";
  if (queue.hasStopped) return explain(queue.problem);
  const seconds = Math.max(1, Math.ceil((queue.heldUntil - performance.now()) / 1000));
  return `${queue.problem.title}: going on in ${seconds} s.`;
}

function setForm(asTable) {
  isTable = asTable;
  press([find("as-gallery"), find("as-table")], find(asTable ? "as-table" : "as-gallery"));
  find("gallery").hidden = asTable;
  find("table").hidden = !asTable;
  arrange(true);
}

function listenForButtons() {
  find("as-gallery").addEventListener("click", () => setForm(false));
  find("as-table").addEventListener("click", () => setForm(true));
  for (const kind of ["pointerdown", "wheel", "focusin"]) {
    find("tile").addEventListener(kind, () => (tiles.isTakenUp = true), { passive: true });
  }
  find("order").addEventListener("change", () => arrange(true));
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("cancel").addEventListener("click", () => queue.cancel());
  find("resume").addEventListener("click", () => (queue.problem?.wantsKey ? askForKey() : queue.resume()));
  find("again").addEventListener("click", () => queue.add(tiles.all.filter(isLeft)));
  find("clear").addEventListener("click", () => {
    queue.cancel();
    filter = null;
    find("intake-remark").hidden = true;
    tiles.clear();
    find("choose").focus();
  });
  find("save-csv").addEventListener("click", () => saveList(writeCsv(arranged), "text/csv", "csv"));
  find("save-json").addEventListener("click", () => saveList(writeJson(arranged), "application/json", "json"));
  find("show-card").addEventListener("click", () => (card ? find("card").showModal() : start()));
  find("close-card").addEventListener("click", () => find("card").close());
  find("alarm-again").addEventListener("click", start);
}

tiles.addEventListener("change", draw);
queue.addEventListener("change", () => {
  if (queue.problem?.wantsKey) askForKey();
  draw();
});
setInterval(() => (queue.problem || !queue.isIdle) && draw(), 500); // the seconds that are left
listenForImages(take);
offerSamples(take);
listenForSettings();
listenForButtons();
start();
