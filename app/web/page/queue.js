// Asks for many tiles, a few at a time. A busy service sets the pace: 503 holds everything for as long as Retry-After
// says, and fewer are asked at once from then on, until answers come again.

const MOST_LANES = 4; // a browser has six connections to a host; maps need some of them
const ANSWERS_PER_LANE = 8; // so many answers in a row open one more lane
const MOST_TRIES = { 503: 100, 504: 3, 0: 4 }; // by status; 0: the service wasn't reached

export class Queue extends EventTarget {
  /** @param {(tile, signal: AbortSignal) => Promise<object>} ask */
  constructor(ask, tiles) {
    super();
    this.waiting = [];
    this.asked = new Map(); // tile -> AbortController
    this.heldUntil = 0; // ms on the page's clock
    this.problem = null; // why it is held, or has stopped
    this.hasStopped = false;
    this._ask = ask;
    this._tiles = tiles;
    this._lanes = MOST_LANES;
    this._inARow = 0;
    this._timer = 0;
  }

  get isIdle() {
    return !this.waiting.length && !this.asked.size;
  }

  add(tiles) {
    for (const tile of tiles) {
      this._withdraw(tile);
      tile.change({ state: "waiting", tries: 0 });
      this.waiting.push(tile);
    }
    this._tiles.tell();
    this._pump();
  }

  /** Whatever has no answer yet gets none. */
  cancel() {
    const dropped = [...this.waiting, ...this.asked.keys()];
    for (const controller of this.asked.values()) controller.abort();
    this.waiting = [];
    this.asked.clear();
    this._release();
    for (const tile of dropped) tile.change({ state: tile.answer ? "answered" : "cancelled" });
    this._tiles.tell();
    this._tell();
  }

  resume() {
    this._release();
    this._pump();
  }

  _withdraw(tile) {
    this.asked.get(tile)?.abort();
    this.asked.delete(tile);
    this.waiting = this.waiting.filter((other) => other !== tile);
  }

  _pump() {
    while (this.waiting.length && this.asked.size < this._lanes && !this.problem) this._start(this.waiting.shift());
    this._tell();
  }

  async _start(tile) {
    const controller = new AbortController();
    this.asked.set(tile, controller);
    tile.change({ state: "asked" });
    let outcome;
    try {
      outcome = { state: "answered", problem: null, ...(await this._ask(tile, controller.signal)) };
      this._speedUp();
    } catch (problem) {
      if (controller.signal.aborted) return; // withdrawn: whoever did it has said what becomes of the tile
      outcome = this._take(tile, problem);
    }
    if (controller.signal.aborted) return;
    this.asked.delete(tile);
    this._tiles.update(tile, outcome);
    this._pump();
  }

  /** What becomes of a tile that met a problem, and of all others. */
  _take(tile, problem) {
    tile.tries++;
    if (problem.wantsKey) {
      this._stop(problem);
    } else if (tile.tries < (MOST_TRIES[problem.status] ?? 0)) {
      this._hold(problem, problem.retryAfterS ?? Math.min(30, 2 ** (tile.tries - 1)));
    } else if (problem.status === 0) {
      tile.tries = 0;
      this._stop(problem);
    } else {
      return { state: "failed", problem, answer: null, requestId: problem.requestId };
    }
    this.waiting.unshift(tile);
    return { state: "waiting" };
  }

  _speedUp() {
    this._inARow++;
    if (this._inARow % ANSWERS_PER_LANE === 0) this._lanes = Math.min(MOST_LANES, this._lanes + 1);
  }

  _hold(problem, seconds) {
    this._inARow = 0;
    this._lanes = Math.max(1, Math.floor(this._lanes / 2));
    const until = performance.now() + 1000 * seconds;
    if (this.hasStopped || until <= this.heldUntil) return;
    this.problem = problem;
    this.heldUntil = until;
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.resume(), 1000 * seconds);
  }

  _stop(problem) {
    clearTimeout(this._timer);
    this.problem = problem;
    this.hasStopped = true;
  }

  _release() {
    clearTimeout(this._timer);
    this.problem = null;
    this.hasStopped = false;
    this.heldUntil = 0;
  }

  _tell() {
    this.dispatchEvent(new Event("change"));
  }
}
