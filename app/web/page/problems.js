// Why there is no answer, as sentences, with the request id that finds it in the service's log.

import { make } from "./dom.js";
import { asSentence } from "./words.js";

const ADVICE = {
  upload_stalled: "Ask again when the line is better.",
  deadline_exceeded: "Ask again when the service is less busy.",
};

export function explain(problem, then = "") {
  const said = asSentence(problem.title ? `${problem.title}${problem.detail ? `: ${problem.detail}` : ""}` : String(problem.message));
  return [said, ADVICE[problem.code], then, tellRequest(problem.requestId)].filter(Boolean).join(" ");
}

function tellRequest(requestId) {
  return requestId ? `(Request ${requestId})` : "";
}

/** The same as paragraphs, where there is room. */
export function show(problem) {
  const paragraphs = [make("p", {}, make("strong", {}, asSentence(problem.title ?? "Something went wrong in this page")))];
  const detail = problem.detail ?? problem.message;
  if (detail) paragraphs.push(make("p", {}, asSentence(detail.charAt(0).toUpperCase() + detail.slice(1)), " ", ADVICE[problem.code] ?? ""));
  if (problem.requestId) paragraphs.push(make("p", { className: "fine" }, "Request ", make("code", {}, problem.requestId)));
  return paragraphs;
}
