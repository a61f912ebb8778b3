// Asks for many tiles, a few at a time. A busy service sets the pace: 503 holds everything for as long as Retry-After
// says, and fewer are asked at once from then on, until answers come again.

const MOST_LANES = 4; // a browser has six connections to a host; maps need some of them
const ANSWERS_PER_LANE = 8; // so many answers in a row open one more lane
const MOST_TRIES = { 503: 100, 504: 3, 0: 4 }; // by status; 0: the service wasn't reached

export class Queue extends EventTarget {
  heldUntil = 0; // ms on the page's clock
  problem = null; // why it is held, or has stopped
  hasStopped = false;
  #ask;
  #tiles;
  #waiting = [];
  #asked = new Map(); // tile -> AbortController
  #lanes = MOST_LANES;
  #inARow = 0;
  #timer = 0;

  /** @param {(tile, signal: AbortSignal) => Promise<object>} ask */
  constructor(ask, tiles) {
    super();
    this.#ask = ask;
    this.#tiles = tiles;
  }

  get isIdle() {
    return !this.#waiting.length && !this.#asked.size;
  }

  add(tiles) {
    for (const tile of tiles) {
      this.#withdraw(tile);
      tile.change({ state: "waiting", tries: 0 });
      this.#waiting.push(tile);
    }
    this.#tiles.tell();
    this.#pump();
  }

  /** Whatever has no answer yet gets none. */
  cancel() {
    const dropped = [...this.#waiting, ...this.#asked.keys()];
    for (const controller of this.#asked.values()) controller.abort();
    this.#waiting = [];
    this.#asked.clear();
    this.#release();
    for (const tile of dropped) tile.change({ state: tile.answer ? "answered" : "cancelled" });
    this.#tiles.tell();
    this.#tell();
  }

  resume() {
    this.#release();
    this.#pump();
  }

  #withdraw(tile) {
    this.#asked.get(tile)?.abort();
    this.#asked.delete(tile);
    this.#waiting = this.#waiting.filter((other) => other !== tile);
  }

  #pump() {
    while (this.#waiting.length && this.#asked.size < this.#lanes && !this.problem) this.#start(this.#waiting.shift());
    this.#tell();
  }

  async #start(tile) {
    const controller = new AbortController();
    this.#asked.set(tile, controller);
    tile.change({ state: "asked" });
    let outcome;
    try {
      outcome = { state: "answered", problem: null, ...(await this.#ask(tile, controller.signal)) };
      this.#speedUp();
    } catch (problem) {
      if (controller.signal.aborted) return; // withdrawn: whoever did it has said what becomes of the tile
      outcome = this.#take(tile, problem);
    }
    if (controller.signal.aborted) return;
    this.#asked.delete(tile);
    this.#tiles.update(tile, outcome);
    this.#pump();
  }

  /** What becomes of a tile that met a problem, and of all others. */
  #take(tile, problem) {
    tile.tries++;
    if (problem.wantsKey) {
      this.#stop(problem);
    } else if (tile.tries < (MOST_TRIES[problem.status] ?? 0)) {
      this.#hold(problem, problem.retryAfterS ?? Math.min(30, 2 ** (tile.tries - 1)));
    } else if (problem.status === 0) {
      tile.tries = 0;
      this.#stop(problem);
    } else {
      return { state: "failed", problem, answer: null, requestId: problem.requestId };
    }
    this.#waiting.unshift(tile);
    return { state: "waiting" };
  }

  #speedUp() {
    this.#inARow++;
    if (this.#inARow % ANSWERS_PER_LANE === 0) this.#lanes = Math.min(MOST_LANES, this.#lanes + 1);
  }

  #hold(problem, seconds) {
    this.#inARow = 0;
    this.#lanes = Math.max(1, Math.floor(this.#lanes / 2));
    const until = performance.now() + 1000 * seconds;
    if (this.hasStopped || until <= this.heldUntil) return;
    this.problem = problem;
    this.heldUntil = until;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.resume(), 1000 * seconds);
  }

  #stop(problem) {
    clearTimeout(this.#timer);
    this.problem = problem;
    this.hasStopped = true;
  }

  #release() {
    clearTimeout(this.#timer);
    this.problem = null;
    this.hasStopped = false;
    this.heldUntil = 0;
  }

  #tell() {
    this.dispatchEvent(new Event("change"));
  }
}
