// Baseline TIFF, which browsers can't show and slides are full of: 8 or 16 bits, grey, RGB or palette, in strips or
// tiles, uncompressed, LZW, PackBits or Deflate. Anything else is refused; the service may still read it.

// By a value's type: its bytes, and how DataView calls the numbers that have more than one.
const SIZES = { 1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 12: 8 };
const READERS = { 3: "getUint16", 4: "getUint32" };
const TAGS = {
  256: "width",
  257: "height",
  258: "bits",
  259: "compression",
  262: "photometric",
  273: "stripOffsets",
  274: "orientation",
  277: "samples",
  278: "rowsPerStrip",
  279: "stripBytes",
  284: "planar",
  317: "predictor",
  320: "palette",
  322: "tileWidth",
  323: "tileHeight",
  324: "tileOffsets",
  325: "tileBytes",
};
const LISTS = new Set(["bits", "palette", "stripOffsets", "stripBytes", "tileOffsets", "tileBytes"]);
const MOST_PIXELS = 1e8;
const MOST_BLOCK_PIXELS = 2048 ** 2; // of a tile, where that is more than the picture: a file must not stall the page

export function isTiff(bytes) {
  const start = String.fromCharCode(...bytes.subarray(0, 4));
  return start === "II*\0" || start === "MM\0*";
}

/**
 * @param {Uint8Array} bytes
 * @returns {Promise<ImageData>} the first page, upright
 */
export async function readTiff(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = view.getUint8(0) === 0x49;
  const tags = readTags(view, little);
  const { width, height, samples } = tags;
  require(width > 0 && height > 0 && width * height <= MOST_PIXELS, "its size");
  require(tags.bits.every((bits) => bits === tags.bits[0]) && [8, 16].includes(tags.bits[0]), "its bits per sample");
  require([1, 2, 3, 4].includes(samples), "its samples");
  require(tags.planar === 1 || samples === 1, "its planes");
  require([0, 1, 2, 3].includes(tags.photometric) && [1, 2].includes(tags.predictor), "its colours");

  const pixels = new Uint8ClampedArray(4 * width * height).fill(255);
  for (const block of listBlocks(tags)) {
    const packed = bytes.subarray(block.offset, block.offset + block.bytes);
    const size = (block.width * block.height * samples * tags.bits[0]) / 8;
    const raw = await unpack(packed, tags.compression, size);
    copyBlock(readSamples(raw, block, tags, little), block, tags, pixels);
  }
  return turnUpright(pixels, tags);
}

function require(isMet, what) {
  if (!isMet) throw new Error(`this page can't draw such a TIFF (${what})`);
}

function readTags(view, little) {
  const start = view.getUint32(4, little);
  const tags = { bits: [1], compression: 1, photometric: 2, samples: 1, planar: 1, predictor: 1 };
  const seen = new Set();
  for (let n = 0; n < view.getUint16(start, little); n++) {
    const entry = start + 2 + 12 * n;
    const name = TAGS[view.getUint16(entry, little)];
    if (!name || seen.has(name)) continue;
    seen.add(name);
    const type = view.getUint16(entry + 2, little);
    const length = view.getUint32(entry + 4, little);
    require(SIZES[type] && length <= MOST_PIXELS / 100, "its tags");
    const at = SIZES[type] * length > 4 ? view.getUint32(entry + 8, little) : entry + 8;
    const read = READERS[type] ?? "getUint8";
    const values = Array.from({ length }, (_, k) => view[read](at + SIZES[type] * k, little));
    tags[name] = LISTS.has(name) ? values : values[0];
  }
  return tags;
}

function* listBlocks({ width, height, rowsPerStrip = height, stripOffsets, stripBytes, ...tags }) {
  const [offsets, sizes] = tags.tileOffsets ? [tags.tileOffsets, tags.tileBytes] : [stripOffsets, stripBytes];
  require(offsets && sizes, "its layout");
  const blockWidth = tags.tileOffsets ? tags.tileWidth : width;
  const blockHeight = tags.tileOffsets ? tags.tileHeight : Math.min(rowsPerStrip, height);
  const mostPixels = Math.max(width * height, MOST_BLOCK_PIXELS);
  require(blockWidth > 0 && blockHeight > 0 && blockWidth * blockHeight <= mostPixels, "its blocks");
  const across = Math.ceil(width / blockWidth);
  require(offsets.length <= across * Math.ceil(height / blockHeight) && sizes.length >= offsets.length, "its layout");
  for (let n = 0; n < offsets.length; n++) {
    const left = (n % across) * blockWidth;
    const top = Math.floor(n / across) * blockHeight;
    const isStrip = !tags.tileOffsets;
    const rows = isStrip ? Math.min(blockHeight, height - top) : blockHeight;
    yield { left, top, width: blockWidth, height: rows, offset: offsets[n], bytes: sizes[n] };
  }
}

async function unpack(packed, compression, size) {
  if (compression === 1) return packed;
  if (compression === 5) return unpackLzw(packed, size);
  if (compression === 32773) return unpackBits(packed, size);
  require(compression === 8 || compression === 32946, "its compression");
  return inflate(packed, size);
}

/** No more than `size` bytes of it, however many more there are. */
async function inflate(packed, size) {
  const reader = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const raw = new Uint8Array(size);
  for (let to = 0; to < size; ) {
    const { done, value } = await reader.read();
    if (done) break;
    raw.set(value.subarray(0, size - to), to);
    to += value.length;
  }
  await reader.cancel();
  return raw;
}

function unpackBits(packed, size) {
  const raw = new Uint8Array(size);
  let to = 0;
  for (let from = 0; from < packed.length && to < size; ) {
    const head = (packed[from++] << 24) >> 24; // signed
    if (head >= 0) {
      raw.set(packed.subarray(from, from + Math.min(head + 1, size - to)), to);
      from += head + 1;
      to += head + 1;
    } else if (head !== -128) {
      raw.fill(packed[from++], to, to + 1 - head);
      to += 1 - head;
    }
  }
  return raw;
}

const LZW_CLEAR = 256;
const LZW_END = 257;

/** Codes of 9 to 12 bits, widened one code early, as TIFF has it. A code is the string of `prefix` and one byte more. */
function unpackLzw(packed, size) {
  const raw = new Uint8Array(size);
  const prefix = new Uint16Array(4097);
  const suffix = new Uint8Array(4097);
  const length = new Uint16Array(4097).fill(1);
  for (let code = 0; code < 256; code++) suffix[code] = code;
  let [to, next, bits, held, holding, previous] = [0, 258, 9, 0, 0, -1];
  for (const byte of packed) {
    held = ((held << 8) | byte) & 0xffffff;
    holding += 8;
    if (holding < bits) continue;
    holding -= bits;
    const code = (held >> holding) & ((1 << bits) - 1);
    if (code === LZW_END || to >= size) break;
    if (code === LZW_CLEAR) {
      [next, bits, previous] = [258, 9, -1];
      continue;
    }
    require(code <= next && next <= 4096, "its LZW codes");
    if (previous >= 0) {
      let first = code === next ? previous : code;
      while (first >= 258) first = prefix[first];
      prefix[next] = previous;
      suffix[next] = suffix[first];
      length[next] = length[previous] + 1;
      next++;
    }
    for (let at = to + length[code] - 1, rest = code; at >= to; at--, rest = prefix[rest]) raw[at] = suffix[rest];
    to += length[code];
    previous = code;
    if (next >= (1 << bits) - 1 && bits < 12) bits++;
  }
  return raw;
}

/** The block's samples, with the horizontal differences summed up. */
function readSamples(raw, block, { bits, samples, predictor }, little) {
  const count = block.width * block.height * samples;
  const values = bits[0] === 16 ? readPairs(raw, count, little) : raw.slice(0, count);
  if (predictor === 2) {
    const row = block.width * samples;
    for (let k = 0; k < Math.min(count, values.length); k++) if (k % row >= samples) values[k] += values[k - samples];
  }
  return values;
}

function readPairs(raw, count, little) {
  const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  return Uint16Array.from({ length: count }, (_, k) => view.getUint16(2 * k, little));
}

function copyBlock(values, block, tags, pixels) {
  const shift = tags.bits[0] - 8;
  for (let y = 0; y < block.height && block.top + y < tags.height; y++) {
    for (let x = 0; x < block.width && block.left + x < tags.width; x++) {
      const from = (y * block.width + x) * tags.samples;
      const to = 4 * ((block.top + y) * tags.width + block.left + x);
      for (let channel = 0; channel < 3; channel++) pixels[to + channel] = pick(values, from, channel, tags, shift);
    }
  }
}

function pick(values, from, channel, { photometric, palette, bits }, shift) {
  if (photometric === 2) return values[from + channel] >> shift;
  if (photometric === 3) return palette[channel * 2 ** bits[0] + values[from]] >> 8;
  const grey = values[from] >> shift;
  return photometric === 0 ? 255 - grey : grey;
}

/** Of the upright picture, by EXIF's orientation: where its first pixel is stored, how far on the next to its right and
 * the next below. */
function findUpright(orientation, width, height) {
  const right = width - 1;
  const bottom = width * (height - 1);
  const places = {
    2: [right, -1, width],
    3: [bottom + right, -1, -width],
    4: [bottom, 1, -width],
    5: [0, width, 1],
    6: [bottom, -width, 1],
    7: [bottom + right, -width, -1],
    8: [right, width, -1],
  };
  return places[orientation];
}

function turnUpright(pixels, { width, height, orientation }) {
  const places = findUpright(orientation, width, height);
  if (!places) return new ImageData(pixels, width, height);
  const [first, toRight, below] = places;
  const upright = orientation < 5 ? new ImageData(width, height) : new ImageData(height, width);
  const [from, to] = [pixels, upright.data].map(({ buffer }) => new Uint32Array(buffer)); // a pixel each
  for (let y = 0, at = 0; y < upright.height; y++) {
    for (let x = 0; x < upright.width; x++) to[at++] = from[first + x * toRight + y * below];
  }
  return upright;
}
