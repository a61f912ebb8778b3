// Numbers and findings as people read them.

export function percent(share) {
  if (share > 0.995 && share < 1) return "> 99 %";
  if (share > 0 && share < 0.005) return "< 1 %";
  return `${Math.round(100 * share)} %`;
}

export function number(value, digits = 3) {
  if (value === 0) return "0";
  const text = Number(value.toPrecision(digits)).toString();
  return text.replace("-", "\u2212");
}

export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

export function count(n, one, many = `${one}s`) {
  return `${n} ${n === 1 ? one : many}`;
}

export function list(words, last = "and") {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} ${last} ${words.at(-1)}`;
}

export function asSentence(text) {
  const trimmed = text.trim();
  return trimmed && !/[.!?]$/.test(trimmed) ? `${trimmed}.` : trimmed;
}

/** "tissue_share" -> "Tissue share": fields that this page has never heard of still read well. */
export function asLabel(name) {
  const words = name.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** "debris: necrosis, bleeding" of Debris -> "necrosis, bleeding": the name stands beside it. */
export function omitName(description, name) {
  const start = `${name}: `;
  return description.toLowerCase().startsWith(start.toLowerCase()) ? description.slice(start.length) : description;
}

/** Of a tile without an answer. */
export const STATES = { waiting: "waiting", asked: "asking", failed: "no answer", cancelled: "cancelled" };

export function nameHead(head) {
  return head === "mean" ? "mean of all heads" : `head ${head}`;
}

const VERDICTS = {
  ok: { mark: "\u2713", title: "Within the model's limits", short: "ok" },
  unscaled: { mark: "?", title: "Within the model's limits, if the scale is right", short: "ok, if the scale is right" },
  uncertain: { mark: "?", title: "Uncertain: look for yourself", short: "uncertain" },
  out_of_scope: { mark: "\u2715", title: "Not an image for this model: don't rely on the class", short: "out of scope" },
};

export function describeVerdict(verdict) {
  return VERDICTS[verdict] ?? { mark: "?", title: asLabel(verdict), short: verdict.replaceAll("_", " ") };
}
