// The service, asked by its public routes. Addresses are relative, so that a proxy may put the page under a path.

const KEY = "tissue-key"; // in the session storage: for this tab only
const MOST_TRIES = 20; // for a map, of a service that is busy

/** Why there is no answer, in the words of the service (RFC 9457) or in ours where it could say nothing. */
class Problem extends Error {
  constructor({ status, code, title, detail = "", requestId = null, retryAfterS = null }) {
    super(detail ? `${title}: ${detail}` : title);
    Object.assign(this, { status, code, title, detail, requestId, retryAfterS });
  }

  get isBusy() {
    return this.status === 503;
  }

  get wantsKey() {
    return this.status === 401;
  }
}

export class Api {
  constructor() {
    this.key = sessionStorage.getItem(KEY) ?? "";
  }

  keepKey(key) {
    this.key = key;
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  }

  async fetchCard() {
    return (await this.#request("model")).body;
  }

  async fetchReadiness() {
    return (await this.#request("readyz")).body;
  }

  /** One image; the file's name stays here. */
  async predict(file, options, signal) {
    return this.#request(`predict${writeQuery(options)}`, { method: "POST", body: await wrap(file), signal });
  }

  /** The map as numbers; `onWait` hears of the problem each time that a busy service is waited for. */
  fetchMap(file, options, signal, onWait) {
    return this.#askForMap(file, { ...options, format: "json" }, { signal }, onWait);
  }

  /** The map as the service draws it: a PNG with the tile, the scale and a caption. */
  fetchMapPicture(file, options, onWait) {
    return this.#askForMap(file, { ...options, format: "png" }, { read: readPng }, onWait);
  }

  async #askForMap(file, options, { read, signal }, onWait) {
    const body = await wrap(file);
    const address = `attention${writeQuery(options)}`;
    for (let tries = 1; ; tries++) {
      try {
        return (await this.#request(address, { method: "POST", body, signal }, read)).body;
      } catch (problem) {
        if (!problem.isBusy || tries === MOST_TRIES) throw problem;
        onWait(problem);
        await pause(1000 * (problem.retryAfterS ?? 1), signal);
      }
    }
  }

  /** @returns {Promise<{body: any, requestId: string | null, timing: string | null}>} */
  async #request(address, options = {}, read = readJson) {
    const headers = this.#writeHeaders();
    let response;
    let body;
    try {
      response = await fetch(address, { ...options, headers, cache: "no-store" });
      body = await (response.ok ? read(response) : readJson(response));
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({
        status: 0,
        code: "unreachable",
        title: "The service can't be reached",
        detail: "no answer came; is it still running, and is this machine connected to it?",
      });
    }
    const requestId = response.headers.get("X-Request-ID");
    if (!response.ok || body === null) throw readProblem(response, body, requestId);
    return { body, requestId, timing: response.headers.get("Server-Timing") };
  }

  #writeHeaders() {
    const key = String.fromCharCode(...new TextEncoder().encode(this.key)); // a header takes bytes, as letters of Latin-1
    return key ? { "X-API-Key": key, Accept: "application/json" } : { Accept: "application/json" };
  }
}

// Both give null for what the service never sends: something between here and there has answered.

async function readJson(response) {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

async function readPng(response) {
  return response.headers.get("Content-Type") === "image/png" ? response.blob() : null;
}

function readProblem(response, body, requestId) {
  const retryAfterS = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new Problem({
    status: response.status,
    code: body?.code ?? `http_${response.status}`,
    title: body?.title ?? `The service answered with status ${response.status}, which this page can't read`,
    detail: body?.detail,
    requestId: body?.request_id ?? requestId,
    retryAfterS: Number.isFinite(retryAfterS) ? retryAfterS : null,
  });
}

async function wrap(file) {
  const form = new FormData();
  try {
    form.append("file", new Blob([await file.arrayBuffer()], { type: file.type }), "image");
  } catch {
    throw new Problem({
      status: 400,
      code: "unreadable_file",
      title: "The file can't be read any more",
      detail: "it has been moved, changed or deleted since; drop it again",
    });
  }
  return form;
}

function writeQuery(options) {
  const given = Object.entries(options).filter(([, value]) => value !== null && value !== undefined && value !== false);
  return given.length ? `?${new URLSearchParams(given.map(([name, value]) => [name, String(value)]))}` : "";
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
