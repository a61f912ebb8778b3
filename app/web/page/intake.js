// Images in: dropped (folders too), pasted, chosen, or samples that come with the page.

import { find, make } from "./dom.js";

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
    take(await readDrop(event.dataTransfer));
  });
}

function holdsFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

async function readDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const files = await Promise.all(entries.map(readEntry));
  return files.flat();
}

/** A file, or all of a folder but what hides behind a dot. */
async function readEntry(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const files = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return files;
    const seen = some.filter(({ name }) => !name.startsWith("."));
    files.push(...(await Promise.all(seen.map(readEntry))).flat());
  }
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
