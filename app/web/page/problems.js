// Why there is no answer, as sentences, with the request id that finds it in the service's log.

import { make } from "./dom.js";
import { asSentence } from "./words.js";

const ADVICE = {
  upload_stalled: "Ask again when the line is better.",
  deadline_exceeded: "Ask again when the service is less busy.",
};

/** @param {Error} problem the service's (api.js), or one of this page @param {string} [then] what comes of it */
export function explain(problem, then = "") {
  const request = problem.requestId ? `(Request ${problem.requestId})` : "";
  return [asSentence(problem.message), ADVICE[problem.code], then, request].filter(Boolean).join(" ");
}

/** The same as paragraphs, where there is room. */
export function explainInParagraphs(problem) {
  const paragraphs = [make("p", {}, make("strong", {}, asSentence(problem.title ?? "Something went wrong in this page")))];
  const detail = problem.detail ?? problem.message;
  if (detail) paragraphs.push(make("p", {}, asSentence(detail.charAt(0).toUpperCase() + detail.slice(1)), " ", ADVICE[problem.code] ?? ""));
  if (problem.requestId) paragraphs.push(make("p", { className: "fine" }, "Request ", make("code", {}, problem.requestId)));
  return paragraphs;
}
