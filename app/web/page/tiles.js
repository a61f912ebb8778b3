// The tiles of this visit, and what is known of each.

/**
 * @typedef {"waiting" | "asked" | "answered" | "failed" | "cancelled"} State
 * @typedef {{mpp: number | null, coverage: number | null, tta: boolean}} Settings
 */

export class Tile {
  static #last = 0;

  /** @param {File} file */
  constructor(file) {
    this.number = ++Tile.#last;
    this.file = file;
    this.name = file.name || `pasted ${this.number}`;
    /** @type {State} */
    this.state = "waiting";
    this.version = 0; // grows with every change: what was drawn of an older one is drawn anew
    this.answer = null; // the service's prediction
    this.problem = null; // or why there is none
    this.requestId = null;
    this.timing = null;
    this.mpp = null; // given for this tile alone
    this.tries = 0;
    this.maps = new Map();
    this.thumbnail = document.createElement("canvas");
  }

  change(values) {
    Object.assign(this, values);
    this.version++;
  }

  /** One that had no answer is shown as failed until it has one, even while it is asked for again. */
  get shownState() {
    return this.problem ? "failed" : this.state;
  }

  get lacksScale() {
    return Boolean(this.answer?.warnings.some(({ code }) => code === "unknown_scale"));
  }

  /** The service's, but "unscaled" where "ok" holds only if the image has the scale that was supposed. */
  get verdict() {
    const verdict = this.answer?.verdict ?? null;
    return verdict === "ok" && this.lacksScale ? "unscaled" : verdict;
  }

  /** What the service is told beside the image. */
  options(settings) {
    return { mpp: this.mpp ?? settings.mpp, coverage: settings.coverage, tta: settings.tta };
  }
}

/** From 0 (one class has it all) to 1 (all are equally likely): the entropy, as a share of what it can be. */
export function measureDoubt(probabilities) {
  const shares = Object.values(probabilities);
  const entropy = shares.reduce((sum, share) => (share > 0 ? sum - share * Math.log(share) : sum), 0);
  return shares.length > 1 ? entropy / Math.log(shares.length) : 0;
}

const VERDICTS = ["out_of_scope", "uncertain", "unscaled", "ok"]; // as they want looking at: the most urgent first

/** What has no answer comes last; a verdict that this page has never heard of, first. */
export function rankVerdict({ verdict }) {
  return verdict ? VERDICTS.indexOf(verdict) : VERDICTS.length;
}

export const collator = new Intl.Collator("en", { numeric: true }); // tile 9 before tile 10

/** To sort by: whatever has no answer comes after all classes. */
export function labelOrLast({ answer }) {
  return answer?.label ?? "\uffff";
}

function confidenceOf({ answer }) {
  return answer?.confidence ?? 0;
}

export const ORDERS = {
  doubt: (a, b) => rankVerdict(a) - rankVerdict(b) || confidenceOf(a) - confidenceOf(b) || a.number - b.number,
  arrival: (a, b) => a.number - b.number,
  name: (a, b) => collator.compare(a.name, b.name) || a.number - b.number,
  label: (a, b) => collator.compare(labelOrLast(a), labelOrLast(b)) || ORDERS.doubt(a, b),
};

export class Tiles extends EventTarget {
  constructor() {
    super();
    /** @type {Tile[]} */
    this.all = [];
    /** @type {Tile | null} */
    this.selected = null;
    this.isTakenUp = false; // the reader has opened a tile, or has begun with the one that is shown
    /** @type {Settings} */
    this.settings = { mpp: null, coverage: null, tta: false };
  }

  add(tiles) {
    this.all.push(...tiles);
    this.selected ??= tiles[0] ?? null;
    this.tell();
  }

  clear() {
    this.all = [];
    this.selected = null;
    this.isTakenUp = false;
    this.tell();
  }

  select(tile) {
    this.selected = tile;
    this.isTakenUp = true;
    this.tell();
  }

  update(tile, values) {
    tile.change(values);
    this.tell();
  }

  tell() {
    this.dispatchEvent(new Event("change"));
  }
}
