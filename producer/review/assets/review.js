"use strict";
// The page's data are in <script type="application/json"> blocks: #job, #rows, and one #i<N> with the images of each row.
// Those come last, so that the page works before they are read. Text of a row is never parsed as markup.
const $ = (id) => document.getElementById(id);
const job = JSON.parse($("job").textContent);
const rows = JSON.parse($("rows").textContent);
const STORAGE_KEY = `cutfleet-review:${job.id}`;
const WORDS = {
  failed: "Failed", empty: "Almost no subject was found", full: "Nearly all of the frame counts as subject",
  uncertain: "A large part of the mask is uncertain", cut_off: "The subject crosses the border of the frame", pieces: "The subject is in several pieces",
  holes: "The subject has many holes", rules: "A rendition fails its rules", unflagged: "Not flagged",
};
const percent = (share) => `${(100 * share).toFixed(share && share < 0.1 ? 1 : 0)} %`;
const FIGURES = [  // name, text of its value, reasons for a review that it explains, definition
  ["Subject, of the frame", (of) => percent(of.subject_share), ["empty", "full"], "sum of alpha / all pixels"],
  ["Uncertain, of the subject", (of) => percent(of.uncertain_share), ["uncertain"], "pixels with 5 to 95 % alpha / all above 5 %"],
  ["Crosses the border at", borders, ["cut_off"], "share of the frame's outermost line that is subject"],
  ["Pieces", (of) => of.pieces, ["pieces"], "regions with at least 1 % of the subject"],
  ["Holes", (of) => of.holes, ["holes"], "clear regions inside, with at least 0.1 % of the subject"],
  ["Edge width", (of) => `${of.edge_width_px.toFixed(1)} px`, [], "width of the soft edge, on average"],
];
const GROUNDS = ["checker", "white", "black", "colour"];
const ZOOMS = [1, 2, 4];

let verdicts = loadVerdicts();
let undone = [];
let shown = [];
let current = 0;
let ground = "checker";
let zoom = 1;
let reason = "";
const tiles = rows.map(makeTile);
const waiting = new Set();
const watcher = new IntersectionObserver(onVisible, { root: null, rootMargin: "400px" });

function loadVerdicts() {
  try { return JSON.parse(localStorage.getItem(STORAGE_KEY)) || {}; } catch { return {}; }
}

function saveVerdicts() {
  try { localStorage.setItem(STORAGE_KEY, JSON.stringify(verdicts)); } catch { /* private windows have no storage */ }
}

function reasonsOf(row) {
  return row.code ? ["failed"] : row.review.length ? row.review : row.complaints.length ? ["rules"] : ["unflagged"];
}

// Returns null while the browser still reads the page.
function imagesOf(row) {
  const block = $(`i${row.n}`);
  return block ? JSON.parse(block.textContent) : document.readyState === "loading" ? null : {};
}

const source = (image) => image ? `data:image/webp;base64,${image}` : "";

// Tiles

function makeTile(row, at) {
  const item = document.createElement("li");
  const tile = document.createElement("button");
  tile.className = "tile";
  tile.title = row.key;
  tile.addEventListener("click", () => show(at));
  if (row.code) tile.append(Object.assign(document.createElement("span"), { textContent: row.code }));
  item.append(tile);
  return item;
}

function onVisible(entries) {
  for (const { target, isIntersecting } of entries) {
    const at = Number(target.dataset.at);
    if (isIntersecting) drawTile(at);
    else { target.querySelector("img")?.remove(); waiting.delete(at); }
  }
}

function drawTile(at) {
  const tile = tiles[at].firstChild;
  const images = imagesOf(rows[at]);
  if (!images) { waiting.add(at); return; }
  waiting.delete(at);
  if (images.thumb && !tile.querySelector("img")) {
    tile.prepend(Object.assign(new Image(), { alt: "", decoding: "async", src: source(images.thumb) }));
  }
}

function drawWaiting() {
  for (const at of [...waiting]) drawTile(at);
  if ($("stage").dataset.waits) draw();
  if (document.readyState === "loading" || waiting.size) requestAnimationFrame(drawWaiting);
}

function fill() {
  const decided = $("decided").value, part = $("search").value.toLowerCase();
  const matches = (row) => (!reason || reasonsOf(row).includes(reason)) && row.key.toLowerCase().includes(part)
    && (!decided || (verdicts[row.key] || "open") === decided);
  const before = shown[current];
  shown = rows.map((_, at) => at).filter((at) => matches(rows[at]));
  $("tiles").replaceChildren(...shown.map((at) => tiles[at]));
  $("tiles").hidden = !shown.length;
  $("nothing").hidden = shown.length > 0;
  $("stage").hidden = !shown.length;
  if (shown.length) show(shown.includes(before) ? before : shown[0]);
}

function fillReasons() {
  const counts = { "": rows.length };
  for (const row of rows) for (const name of reasonsOf(row)) counts[name] = (counts[name] || 0) + 1;
  const order = ["", ...Object.keys(WORDS).filter((name) => counts[name]), ...Object.keys(counts).filter((name) => name && !WORDS[name])];
  $("reasons").replaceChildren(...order.map((name) => {
    const chip = document.createElement("button");
    chip.append(name.replace("_", " ") || "all", Object.assign(document.createElement("small"), { textContent: counts[name] }));
    chip.dataset.reason = name;
    chip.setAttribute("aria-pressed", name === reason);
    chip.addEventListener("click", () => { reason = name; fillReasons(); fill(); });
    return chip;
  }));
}

// The image

function show(at) {
  tiles[shown[current]]?.firstChild.removeAttribute("aria-current");
  current = shown.indexOf(at);
  const tile = tiles[at].firstChild;
  tile.setAttribute("aria-current", "true");
  tile.scrollIntoView({ block: "nearest", inline: "nearest" });
  draw();
}

function draw() {
  const row = rows[shown[current]], images = imagesOf(row);
  $("stage").dataset.waits = images ? "" : "yes";
  drawWords(row);
  drawVerdict(row);
  for (const [id, before, after, shape] of [
    ["whole", "before", "after", [row.width, row.height]],
    ["edge", "edge_before", "edge_after", row.edge ? row.edge.slice(2) : [1, 1]],
  ]) {
    const lens = $(id), has = images && (images[before] || images[after]);
    lens.parentElement.hidden = !has;
    if (!has) continue;
    put(lens.querySelector(".before"), images[before]);
    put(lens.querySelector(".after"), images[after]);
    lens.querySelector(".handle").hidden = !(images[before] && images[after]);
    if (shape[0]) reshape(lens, shape[0] / shape[1]);
    else lens.querySelector(".before").onload = ({ target }) => reshape(lens, target.naturalWidth / target.naturalHeight);
  }
  drawMark(row);
  setZoom(1);
}

function put(image, data) {
  image.onload = null;
  image.hidden = !data;
  image.src = source(data);
}

function reshape(lens, ratio) {
  lens.querySelector(".frame").style.setProperty("--shape", ratio);
  const row = rows[shown[current]], figure = lens.parentElement.style;
  figure.setProperty("--ratio", ratio);
  if (lens.id === "edge") figure.setProperty("--most", `${row.edge[2]}px`);
  else figure.setProperty("--most", row.width ? `${2 * row.width}px` : "640px");
}

function drawMark(row) {
  const mark = document.querySelector(".mark");
  const isPart = row.edge && (row.edge[2] < row.width || row.edge[3] < row.height);
  mark.hidden = !isPart;
  if (!isPart) return;
  const [left, top, width, height] = row.edge;
  for (const [side, share] of [["left", left / row.width], ["top", top / row.height], ["width", width / row.width], ["height", height / row.height]]) {
    mark.style[side] = `${100 * share}%`;
  }
}

function drawWords(row) {
  $("key").textContent = row.key;
  const badges = reasonsOf(row).map((name) => Object.assign(document.createElement("b"), {
    textContent: row.code || name.replace("_", " "), className: row.code ? "failed" : "",
  }));
  const [worst] = reasonsOf(row);
  $("why").replaceChildren(...(worst === "unflagged" ? [] : badges), row.code ? row.message : WORDS[worst] || "");
  $("complaints").textContent = row.complaints.join("; ");
  $("unseen").textContent = row.notes.join("\n");
  $("unseen").hidden = !row.notes.length;
  $("size").textContent = row.width ? `${row.width} × ${row.height}` : "";
  const measured = "subject_share" in row.figures ? FIGURES : [];
  $("figures").replaceChildren(...measured.map(([name, words, reasons, formula]) => {
    const line = document.createElement("tr");
    line.title = formula;
    line.className = row.review.some((given) => reasons.includes(given)) ? "flagged" : "";
    for (const text of [name, words(row.figures)]) line.append(Object.assign(document.createElement("td"), { textContent: text }));
    return line;
  }));
  const places = [["Source", row.source], ["Cutout", row.cutout], ["Mask", row.mask], ["Model", row.model], ["By job", row.by]];
  $("places").replaceChildren(...places.filter(([, text]) => text).flatMap(([name, text]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: text }),
  ]));
}

function borders(of) {
  const sides = ["top", "right", "bottom", "left"].filter((side) => of[`border_${side}`] > 0);
  return sides.map((side) => `${side} ${percent(of[`border_${side}`])}`).join(", ") || "no border";
}

// Decisions

function decide(verdict) {
  const row = rows[shown[current]];
  undone.push([row.key, verdicts[row.key]]);
  if (verdicts[row.key] === verdict) delete verdicts[row.key];
  else verdicts[row.key] = verdict;
  settle(row);
  if (verdicts[row.key]) step(1);
}

function undo() {
  const last = undone.pop();
  if (!last) return;
  const at = rows.findIndex((row) => row.key === last[0]);
  if (last[1]) verdicts[last[0]] = last[1];
  else delete verdicts[last[0]];
  settle(rows[at]);
  if (shown.includes(at)) show(at);
}

function settle(row) {
  saveVerdicts();
  tiles[rows.indexOf(row)].firstChild.dataset.verdict = verdicts[row.key] || "";
  drawVerdict(rows[shown[current]]);
  count();
}

function drawVerdict(row) {
  $("approve").setAttribute("aria-pressed", verdicts[row.key] === "approved");
  $("reject").setAttribute("aria-pressed", verdicts[row.key] === "rejected");
}

function count() {
  const of = (verdict) => rows.filter((row) => verdicts[row.key] === verdict);
  for (const button of document.querySelectorAll(".save")) {
    const number = of(button.dataset.verdict).length;
    button.querySelector("b").textContent = number;
    button.disabled = !number;
  }
  const decided = rows.filter((row) => verdicts[row.key]).length;
  $("progress").textContent = `${decided} of ${rows.length} decided`;
}

// `cutfleet submit --from` reads key and etag; the other fields are for people.
function save(verdict) {
  const lines = rows.filter((row) => verdicts[row.key] === verdict).map((row) => JSON.stringify({
    key: row.key, etag: row.etag, verdict, reason: reasonsOf(row).join(","), job: job.id,
  }));
  const name = `${job.id}-${verdict}.jsonl`;
  const link = Object.assign(document.createElement("a"), {
    download: name, href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "application/jsonl" })),
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $("saved-title").textContent = `${name}: ${lines.length} ${lines.length === 1 ? "image" : "images"}`;
  const isRejected = verdict === "rejected";
  $("saved-next").textContent = isRejected ? "Cut them out again with another model:" : "A list for your records.";
  $("command").hidden = $("copy").hidden = !isRejected;
  $("command").textContent = `${job.command} --from ${name} --model OTHER`;
  $("saved").showModal();
}

// View

function step(by) {
  const to = Math.max(0, Math.min(shown.length - 1, current + by));
  if (to !== current) show(shown[to]);
}

function setAt(share) {
  const at = Math.max(0, Math.min(100, 100 * share));
  $("slider").value = at;
  $("stage").style.setProperty("--at", `${at}%`);
}

function setGround(name) {
  ground = name;
  for (const frame of document.querySelectorAll(".frame")) frame.className = `frame ground-${name}`;
  for (const button of $("grounds").children) button.setAttribute("aria-pressed", button.dataset.ground === name);
}

function setZoom(level) {
  zoom = level;
  const frame = $("edge").querySelector(".frame");
  frame.style.setProperty("--zoom", level);
  for (const axis of ["--x", "--y"]) frame.style.setProperty(axis, "50%");
  $("edge").classList.toggle("zoomed", level > 1);
  $("zoom").textContent = `${100 * level} %`;
}

// A drag moves the slider. Over the enlarged edge, moving the pointer (on a touch screen: a drag) pans the image.
function point(event) {
  const lens = event.currentTarget, box = lens.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
  const enlarged = lens.id === "edge" && zoom > 1;
  const frame = lens.querySelector(".frame");
  if (enlarged && (event.pointerType === "touch" || !event.buttons)) {
    frame.style.setProperty("--x", `${100 * x}%`);
    frame.style.setProperty("--y", `${100 * y}%`);
  } else if (event.buttons) {
    const origin = enlarged ? parseFloat(frame.style.getPropertyValue("--x")) / 100 : 0;
    setAt(enlarged ? origin + (x - origin) / zoom : x);
  }
}

const KEYS = {
  a: () => decide("approved"), r: () => decide("rejected"), u: undo,
  ArrowRight: () => step(1), ArrowLeft: () => step(-1),
  " ": () => setAt($("slider").value > 50 ? 0 : 1),
  b: () => setGround(GROUNDS[(GROUNDS.indexOf(ground) + 1) % GROUNDS.length]),
  z: () => setZoom(ZOOMS[(ZOOMS.indexOf(zoom) + 1) % ZOOMS.length]),
  "?": () => $("help").showModal(),
};

function press(event) {
  const typing = event.target.matches("input, select") && event.target.type !== "range";
  if (event.ctrlKey || event.metaKey || event.altKey || typing || document.querySelector("dialog[open]")) return;
  const act = KEYS[event.key] || KEYS[event.key.toLowerCase()];
  if (!act || (event.target.id === "slider" && event.key.startsWith("Arrow")) || (!shown.length && event.key !== "?")) return;
  event.preventDefault();
  act();
}

function begin() {
  $("name").textContent = job.name;
  $("line").textContent = job.line;
  rows.forEach((row, at) => {
    tiles[at].firstChild.dataset.at = at;
    tiles[at].firstChild.dataset.verdict = verdicts[row.key] || "";
    watcher.observe(tiles[at].firstChild);
  });
  $("approve").addEventListener("click", () => decide("approved"));
  $("reject").addEventListener("click", () => decide("rejected"));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("zoom").addEventListener("click", KEYS.z);
  $("show-help").addEventListener("click", KEYS["?"]);
  $("slider").addEventListener("input", (event) => setAt(event.target.value / 100));
  $("decided").addEventListener("change", fill);
  $("search").addEventListener("input", fill);
  $("colour").addEventListener("input", (event) => { $("stage").style.setProperty("--ground", event.target.value); setGround("colour"); });
  for (const button of $("grounds").children) button.addEventListener("click", () => setGround(button.dataset.ground));
  for (const button of document.querySelectorAll(".save")) button.addEventListener("click", () => save(button.dataset.verdict));
  for (const lens of document.querySelectorAll(".lens")) {
    lens.addEventListener("pointerdown", (event) => { lens.setPointerCapture(event.pointerId); point(event); });
    lens.addEventListener("pointermove", point);
  }
  $("copy").addEventListener("click", () => navigator.clipboard.writeText($("command").textContent));
  document.addEventListener("keydown", press);
  fillReasons();
  setGround(ground);
  setAt(0.5);
  fill();
  count();
  requestAnimationFrame(drawWaiting);
}

begin();
