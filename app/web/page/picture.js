// Files to pixels, for showing them: the service reads the file itself.

import { isTiff, readTiff } from "./tiff.js";

export const SUFFIX = /\.(png|jpe?g|tiff?|webp|bmp)$/i; // of what the service reads (app/client.py has the same)

const HEAD_BYTES = 4;

/**
 * Upright, as the service sees it.
 * @param {Blob} file
 * @returns {Promise<ImageBitmap>}
 */
export async function readPicture(file) {
  const head = new Uint8Array(await file.slice(0, HEAD_BYTES).arrayBuffer());
  if (isTiff(head)) return createImageBitmap(await readTiff(new Uint8Array(await file.arrayBuffer())));
  return createImageBitmap(file, { imageOrientation: "from-image" });
}

/** The pixels that the service used, or before it has said which, the centre square. */
export function chooseBox(picture, answer) {
  const { width, height } = picture;
  if (answer && answer.input.width === width && answer.input.height === height) return answer.input.box;
  const side = Math.min(width, height);
  const left = Math.floor((width - side) / 2);
  const top = Math.floor((height - side) / 2);
  return [left, top, left + side, top + side];
}

/** Draws the box of the picture all over the canvas, which gets `side` pixels each way. */
export function drawBox(canvas, picture, [left, top, right, bottom], side) {
  canvas.width = side;
  canvas.height = side;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, left, top, right - left, bottom - top, 0, 0, side, side);
  return canvas;
}

/** Without colour and with half its contrast, so that white glass doesn't pass for a high value. */
export function fade(canvas) {
  const faded = document.createElement("canvas");
  faded.width = canvas.width;
  faded.height = canvas.height;
  const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const greys = new Float32Array(image.data.length / 4);
  greys.forEach((_, k) => {
    greys[k] = 0.299 * image.data[4 * k] + 0.587 * image.data[4 * k + 1] + 0.114 * image.data[4 * k + 2];
  });
  const mean = greys.reduce((sum, grey) => sum + grey, 0) / greys.length;
  greys.forEach((grey, k) => image.data.fill((grey + mean) / 2, 4 * k, 4 * k + 3));
  faded.getContext("2d").putImageData(image, 0, 0);
  return { faded, mean };
}

/** 1, 2 or 5 times a power of ten, at most a third of the field. */
function chooseRuler(fieldUm) {
  const longest = fieldUm / 3;
  const power = 10 ** Math.floor(Math.log10(longest));
  return Math.max(...[1, 2, 5].map((step) => step * power).filter((length) => length <= longest));
}

export function drawRuler(canvas, fieldUm) {
  const lengthUm = chooseRuler(fieldUm);
  const pen = canvas.getContext("2d");
  const side = canvas.width;
  const inset = side / 30;
  const length = (side * lengthUm) / fieldUm;
  const [left, bottom] = [inset, side - inset];
  pen.fillStyle = "#202020";
  pen.strokeStyle = "#ffffff";
  pen.lineWidth = side / 200;
  pen.strokeRect(left, bottom - side / 80, length, side / 80);
  pen.fillRect(left, bottom - side / 80, length, side / 80);
  pen.font = `600 ${Math.round(side / 24)}px system-ui, sans-serif`;
  pen.textAlign = "center";
  pen.lineWidth = side / 100;
  pen.lineJoin = "round";
  const at = [`${lengthUm} µm`, left + length / 2, bottom - side / 40];
  pen.strokeText(...at);
  pen.fillText(...at);
}
