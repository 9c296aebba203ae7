// Copyright 2026 The stellar_hf authors.
// Licensed under the Apache License, Version 2.0.

// Encoder and decoder in ONNX Runtime Web, and the edits of stellar_hf.pipelines.editing between them. A picture is S,
// (r, d), what is there, and L, where it is: here an array of r maps, each with the shares of N = side * side patches.

const RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/ort.wasm.bundle.min.mjs";
const [SIZE, MEAN, STD] = [128, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]; // of the image processor
const [REACH, LEAST_MASS] = [2, 1e-6]; // of stellar_hf.pipelines.editing

const element = (id) => document.getElementById(id);
const say = (sentence) => (element("status").textContent = sentence);
const range = (length) => Array.from({ length }, (_, index) => index);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const clip = (number, least, most) => Math.min(Math.max(number, least), most);

let ort, encoder, decoder;
let scene; // of the picture: sparseTokens (r * d), maps, side
let moves, off; // token to [rows, columns], where later ones cover earlier ones; tokens that are switched off
let maps; // after these edits
let [lit, drag] = [null, null]; // the token that is pointed at; the one that is dragged, and from where

// Edits --------------------------------------------------------------------------------------------------------------

/** Gives a token another map, which covers the others, and leaves them the place that it had. */
function cover(maps, token, arriving) {
  const others = range(maps.length).filter((other) => other !== token);
  const near = maps.map((map) => around(map, scene.side));
  const covered = maps.map(() => new Float32Array(arriving.length));
  covered[token] = arriving;
  for (const patch of arriving.keys()) {
    const mass = sum(others.map((other) => maps[other][patch]));
    const total = sum(others.map((other) => near[other][patch] + LEAST_MASS));
    const freed = maps[token][patch] - arriving[patch];
    const shrink = clip((mass + freed) / Math.max(mass, LEAST_MASS), 0, 1);
    for (const other of others) {
      const refill = (near[other][patch] + LEAST_MASS) / total;
      covered[other][patch] = maps[other][patch] * shrink + Math.max(freed, 0) * refill;
    }
  }
  return covered;
}

/** Means of a map around each patch, weighted by a Gaussian of its distance. */
function around(map, side) {
  const weights = range(side).map((to) => range(side).map((from) => Math.exp(-((to - from) ** 2) / (2 * REACH ** 2))));
  const mean = (to, valueAt) => sum(weights[to].map((weight, from) => weight * valueAt(from))) / sum(weights[to]);
  const inRows = map.map((_, patch) => mean(patch % side, (column) => map[patch - (patch % side) + column]));
  return inRows.map((_, patch) => mean(Math.floor(patch / side), (row) => inRows[row * side + (patch % side)]));
}

/** A map moved by patches, also by parts of them, bilinearly; what leaves the picture is gone. */
function shift(map, [rows, columns], side) {
  const isInside = (row, column) => Math.min(row, column) >= 0 && Math.max(row, column) < side;
  const at = (row, column) => (isInside(row, column) ? map[row * side + column] : 0);
  const [top, left] = [Math.floor(-rows), Math.floor(-columns)];
  const [below, right] = [-rows - top, -columns - left];
  return map.map((_, patch) => {
    const [row, column] = [Math.floor(patch / side) + top, (patch % side) + left];
    const upper = (1 - right) * at(row, column) + right * at(row, column + 1);
    const lower = (1 - right) * at(row + 1, column) + right * at(row + 1, column + 1);
    return (1 - below) * upper + below * lower;
  });
}

const tokensThatAreOn = () => range(scene.maps.length).filter((token) => !off.has(token));

/** The maps after the edits: tokens that are off are erased, then others are moved, unless one alone fills all. */
function edit() {
  let edited = scene.maps;
  for (const token of off) edited = cover(edited, token, new Float32Array(edited[token].length));
  for (const [token, by] of tokensThatAreOn().length > 1 ? moves : []) {
    if (!off.has(token)) edited = cover(edited, token, shift(edited[token], by, scene.side));
  }
  return edited;
}

function move(token, [rows, columns]) {
  if (tokensThatAreOn().length === 1) return say("One token alone fills the picture: switch on another one.");
  moves.delete(token); // from its turn; it comes last now
  moves.set(token, [rows, columns]);
  const patches = (number, less, more) => `${Math.abs(number).toFixed(1)} ${number < 0 ? less : more}`;
  say(`Token ${token} is moved, in patches: ${patches(columns, "left", "right")}, ${patches(rows, "up", "down")}.`);
  draw();
}

function toggle(token) {
  if (off.has(token)) off.delete(token);
  else if (tokensThatAreOn().length > 1) off.add(token);
  else return say("One token must stay on.");
  element("tokens").children[token].ariaPressed = !off.has(token);
  say(`Token ${token} is ${off.has(token) ? "off" : "on"}.`);
  draw();
}

function undo() {
  [moves, off] = [new Map(), new Set()];
  for (const button of element("tokens").children) button.ariaPressed = true;
  say("Drag a token of the reconstruction.");
  draw();
}

// Pictures -----------------------------------------------------------------------------------------------------------

/** Shows and encodes an image file, stretched to the square that the model sees. */
async function open(file, name) {
  const bitmap = await or(createImageBitmap(file), `${name} is no picture that this browser can read.`);
  const context = element("picture").getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // under transparent pictures
  context.fillRect(0, 0, SIZE, SIZE);
  context.drawImage(bitmap, 0, 0, SIZE, SIZE);
  const levels = context.getImageData(0, 0, SIZE, SIZE).data; // red, green, blue and alpha of each pixel
  const values = [0, 1, 2].flatMap((channel) =>
    range(SIZE * SIZE).map((pixel) => (levels[4 * pixel + channel] / 255 - MEAN[channel]) / STD[channel]),
  );
  const pixelValues = new ort.Tensor("float32", values, [1, 3, SIZE, SIZE]);
  const outputs = await encoder.run({ pixel_values: pixelValues }, ["sparse_tokens", "localization"]);
  const [, numPatches, numTokens] = outputs.localization.dims;
  const mapOf = (token) => outputs.localization.data.filter((_, index) => index % numTokens === token);
  const sparseTokens = outputs.sparse_tokens.data;
  scene = { sparseTokens, maps: range(numTokens).map(mapOf), side: Math.sqrt(numPatches) };
  if (!element("tokens").hasChildNodes()) element("tokens").append(...range(numTokens).map(tokenButton));
  undo();
}

/** Red, green and blue, (3 * SIZE * SIZE) in [0, 1], of S and the edited maps of the tokens that are on. */
async function decode() {
  const on = tokensThatAreOn();
  const [numPatches, width] = [scene.side ** 2, scene.sparseTokens.length / scene.maps.length];
  const tokens = on.flatMap((token) => [...scene.sparseTokens.slice(token * width, (token + 1) * width)]);
  const shares = range(numPatches).flatMap((patch) => on.map((token) => maps[token][patch]));
  const outputs = await decoder.run({
    sparse_tokens: new ort.Tensor("float32", tokens, [1, on.length, width]),
    localization: new ort.Tensor("float32", shares, [1, numPatches, on.length]),
  });
  return outputs.reconstruction.data;
}

let [isDrawing, isStale] = [false, false];

/** Decodes and shows the edited picture. Of the edits that are made meanwhile, the last one is decoded next. */
async function draw() {
  isStale = true;
  if (isDrawing) return;
  isDrawing = true;
  while (isStale) {
    isStale = false;
    maps = edit();
    drawMaps();
    const colors = await decode();
    const level = (channel, pixel) => 255 * colors[channel * SIZE * SIZE + pixel];
    paint(element("reconstruction"), SIZE, (pixel) => [level(0, pixel), level(1, pixel), level(2, pixel), 255]);
    await new Promise(requestAnimationFrame); // the pointer's turn
  }
  isDrawing = false;
}

/** The maps on the buttons, and a veil over all but the token that is lit. */
function drawMaps() {
  maps.forEach((map, token) => {
    const gray = (patch) => [...Array(3).fill(off.has(token) ? 0 : 255 * map[patch]), 255];
    paint(element("tokens").children[token].firstChild, scene.side, gray);
  });
  const shade = (patch) => (lit === null || off.has(lit) ? 0 : 150 * (1 - maps[lit][patch]));
  paint(element("veil"), scene.side, (patch) => [0, 0, 0, shade(patch)]);
}

/** A square of pixels, each [red, green, blue, alpha] up to 255. */
function paint(canvas, side, color) {
  [canvas.width, canvas.height] = [side, side];
  const pixels = Uint8ClampedArray.from(range(side * side).flatMap(color));
  canvas.getContext("2d").putImageData(new ImageData(pixels, side), 0, 0);
}

// Mouse and keyboard -------------------------------------------------------------------------------------------------

function light(token) {
  lit = token;
  drawMaps();
}

/** Where the pointer is in the reconstruction, in patches: [row, column]. */
function place(event) {
  const box = element("stage").getBoundingClientRect();
  return [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width].map((y) => y * scene.side);
}

/** The token that has most of the patch under the pointer. */
function tokenAt(event) {
  const [row, column] = place(event).map((number) => clip(Math.floor(number), 0, scene.side - 1));
  const share = (token) => maps[token][row * scene.side + column];
  return tokensThatAreOn().reduce((best, token) => (share(token) > share(best) ? token : best));
}

function tokenButton(token) {
  const button = document.createElement("button");
  button.ariaLabel = `Token ${token}`;
  button.append(document.createElement("canvas"), token);
  button.onclick = () => toggle(token);
  button.onfocus = button.onpointerenter = () => light(token);
  button.onblur = button.onpointerleave = () => light(null);
  button.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault(); // of scrolling
    move(token, (moves.get(token) ?? [0, 0]).map((number, axis) => number + step[axis]));
  };
  return button;
}

function listen() {
  const stage = element("stage");
  stage.onpointerdown = (event) => {
    const token = tokenAt(event);
    drag = { token, start: place(event), from: moves.get(token) ?? [0, 0] };
    stage.setPointerCapture(event.pointerId);
    light(null); // all of the picture is seen meanwhile
  };
  stage.onpointermove = (event) => {
    if (!drag) return light(tokenAt(event));
    move(drag.token, place(event).map((number, axis) => drag.from[axis] + number - drag.start[axis]));
  };
  stage.onpointerup = stage.onpointercancel = () => (drag = null);
  stage.onpointerleave = () => light(null);
  element("undo").onclick = undo;
  element("file").onchange = () => [...element("file").files].forEach((file) => open(file, file.name).catch(explain));
  for (const image of document.images) image.parentElement.onclick = () => openScene(image).catch(explain);
}

// Start --------------------------------------------------------------------------------------------------------------

const explain = (error) => say(error.message);
/** What is promised; where that fails, an error with a sentence for people. */
const or = (promise, sentence) => promise.catch(() => Promise.reject(new Error(sentence)));

async function download(url) {
  const response = await or(fetch(url), `${url} cannot be loaded. Is there a connection?`);
  return response.ok ? response.arrayBuffer() : Promise.reject(new Error(`${url} is not on this site.`));
}

const loadModel = async (url) =>
  or(ort.InferenceSession.create(await download(url)), "ONNX Runtime does not start in this browser.");

const openScene = async (image) => open(new Blob([await download(image.getAttribute("src"))]), image.alt);

async function start() {
  if (typeof WebAssembly === "undefined") throw new Error("This browser has no WebAssembly, which runs the model.");
  ort = await or(import(RUNTIME), `${RUNTIME} cannot be loaded. Is there a connection?`);
  ort.env.wasm.numThreads = 1; // more of them need headers that a static site may not send
  [encoder, decoder] = await Promise.all(["encoder.onnx", "decoder.onnx"].map(loadModel));
  [element("picture").width, element("picture").height] = [SIZE, SIZE];
  await openScene(document.images[0]);
  listen();
}

start().catch(explain);
