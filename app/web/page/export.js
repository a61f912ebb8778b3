// What was answered, to take along: CSV for spreadsheets, JSON as `tissue predict --format json` writes it.

import { measureDoubt } from "./tiles.js";

// Whatever was answered; `tissue predict --format csv` has the same. "p_" stands for a column for each class.
const COLUMNS = [
  ...["file", "status", "label", "confidence", "doubt", "verdict", "reasons", "warnings", "p_", "set", "coverage"],
  ...["quality_tissue_share", "quality_sharpness", "quality_brightness", "quality_odd_share"],
  ...["quality_blue_absorption", "quality_foreign_share", "quality_distance"],
  ...["tta_views", "tta_disagreement", "tta_spread"],
  ...["input_width", "input_height", "input_format", "input_mpp", "input_mpp_source", "input_sha256", "input_box"],
  ...["model_name", "model_version", "model_digest", "model_device", "model_precision"],
  ...["request_id", "error_code", "error"],
];
const BYTE_ORDER_MARK = "\ufeff"; // without it spreadsheets take UTF-8 for something else

export function writeJson(tiles) {
  return JSON.stringify(finished(tiles).map(describe), null, 2);
}

function describe({ name, answer, problem }) {
  if (answer) return { file: name, ...answer };
  const { title, detail, status, code, requestId } = problem;
  return { file: name, error: { title, detail, status, code, request_id: requestId } };
}

export function writeCsv(tiles) {
  const rows = finished(tiles).map(flatten);
  const classes = new Set(tiles.flatMap(({ answer }) => Object.keys(answer?.probabilities ?? {})));
  const columns = COLUMNS.flatMap((name) => (name === "p_" ? [...classes].map((label) => name + label) : name));
  const lines = [columns, ...rows.map((row) => columns.map((column) => row[column] ?? ""))];
  return BYTE_ORDER_MARK + lines.map((cells) => `${cells.map(writeCell).join(",")}\r\n`).join("");
}

function finished(tiles) {
  return tiles.filter(({ answer, problem }) => answer || problem);
}

function flatten({ name, answer, problem, requestId }) {
  const start = { file: name, status: answer ? "answered" : "failed" };
  const end = { request_id: requestId, error_code: problem?.code, error: problem?.message };
  if (!answer) return { ...start, ...end };
  return {
    ...start,
    label: answer.label,
    confidence: answer.confidence,
    doubt: measureDoubt(answer.probabilities),
    verdict: answer.verdict,
    reasons: answer.reasons.map(({ code }) => code).join(" "),
    warnings: answer.warnings.map(({ code }) => code).join(" "),
    ...prefix("p_", answer.probabilities),
    set: answer.prediction_set?.labels.join(" "),
    coverage: answer.prediction_set?.coverage,
    ...prefix("quality_", answer.quality),
    ...prefix("tta_", answer.tta ?? {}),
    ...prefix("input_", { ...answer.input, box: answer.input.box.join(" ") }),
    ...prefix("model_", answer.model),
    ...end,
  };
}

function prefix(word, values) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [word + name, value]));
}

/**
 * A spreadsheet runs text that starts like a formula: an apostrophe stops it. Where `;` separates, a text without quotes
 * would be cut at its own, and the rest could be a formula. Numbers stay numbers.
 */
function writeCell(value) {
  if (typeof value === "number") return String(value);
  const text = String(value);
  const harmless = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return `"${harmless.replaceAll('"', '""')}"`;
}

export function saveList(text, type, ending) {
  save(new Blob([text], { type }), `tissue-${new Date().toISOString().slice(0, 10)}.${ending}`);
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
