// Images in: dropped (folders too), pasted, chosen, or samples that come with the page.

import { find, make } from "./dom.js";
import { SUFFIX } from "./picture.js";
import { count } from "./words.js";

// Drawn by training/synthetic.py; docs/images/make.py writes them. None is tissue.
const SAMPLES = [
  { file: "tumor.png", title: "Tumour" },
  { file: "stroma.png", title: "Stroma" },
  { file: "complex.png", title: "Complex stroma" },
  { file: "lympho.png", title: "Lymphoid" },
  { file: "debris.png", title: "Debris" },
  { file: "mucosa.png", title: "Mucosa" },
  { file: "empty.png", title: "Empty glass" },
];

/** @param {(files: File[], remark?: string) => void} take with a remark where it isn't all that was dropped */
export function listenForImages(take) {
  const input = find("files");
  find("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // the same file may be chosen again
  });

  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return; // text goes where it was meant to
    event.preventDefault();
    take(files);
  });

  const veil = find("dropping");
  let depth = 0; // drags enter and leave every element on their way
  const show = (change) => {
    depth = Math.max(0, depth + change);
    veil.hidden = !depth;
  };
  document.addEventListener("dragenter", (event) => holdsFiles(event) && show(1));
  document.addEventListener("dragleave", (event) => holdsFiles(event) && show(-1));
  document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener("drop", async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    show(-depth);
    const found = await readDrop(event.dataTransfer);
    take(found.filter(Boolean), remark(found));
  });
}

function holdsFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

/** @returns {Promise<(File | null)[]>} null for each file or folder that can't be read */
async function readDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  return readEntries(entries);
}

/** One that can't be read takes no other with it. */
async function readEntries(entries) {
  const outcomes = await Promise.allSettled(entries.map(readEntry));
  return outcomes.flatMap(({ value = null }) => value);
}

async function readEntry(entry) {
  if (entry.isFile) return new Promise((resolve, reject) => entry.file(resolve, reject));
  return readEntries((await listFolder(entry)).filter(isWanted));
}

async function listFolder(folder) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!some.length) return entries;
    entries.push(...some);
  }
}

/** Of a folder, which holds other things too: what was dropped by itself is asked about whatever it is called. */
function isWanted({ name, isFile }) {
  if (!name) return true; // its name isn't UTF-8, so it can't be read: it is counted among what couldn't be
  return !name.startsWith(".") && (!isFile || SUFFIX.test(name));
}

function remark(found) {
  if (!found.length) return "No images there: of a folder only PNG, JPEG, TIFF, WebP and BMP are taken, by their file names.";
  const unread = found.filter((file) => !file).length;
  return unread ? `${count(unread, "file or folder", "files or folders")} couldn't be read.` : "";
}

export function offerSamples(take) {
  const buttons = SAMPLES.map((sample) => {
    const image = make("img", { src: `static/samples/${sample.file}`, alt: "", width: 72, height: 72, draggable: false });
    const button = make("button", { type: "button" }, image, sample.title);
    button.addEventListener("click", async () => take([await fetchSample(sample)]));
    return button;
  });
  const all = make("button", { type: "button", className: "all" }, "All of them");
  all.addEventListener("click", async () => take(await Promise.all(SAMPLES.map(fetchSample))));
  find("samples").replaceChildren(...buttons, all);
}

async function fetchSample({ file }) {
  const response = await fetch(`static/samples/${file}`);
  return new File([await response.blob()], `drawn-${file}`, { type: "image/png" });
}
