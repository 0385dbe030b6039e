"use strict";
const find = id => document.getElementById(id);
const all = JSON.parse(find("relations").textContent);
const canvas = find("cells"), pen = canvas.getContext("2d");
const stops = [[84, 39, 136], [178, 171, 210], [247, 247, 247], [253, 184, 99], [179, 88, 6]];
let own, top_, cell, left, above, font;

const short = name => name.length > 20 ? name.slice(0, 12) + "\u2026" + name.slice(-6) : name;
function colour(weight) {
  const place = weight <= 0 ? 0 : weight <= 1 ? 2 * weight : 2 + 2 * (weight - 1) / (top_ - 1);
  const from = Math.min(Math.floor(place), 3), part = place - from;
  return "rgb(" + stops[from].map((value, index) => Math.round(value + part * (stops[from + 1][index] - value))) + ")";
}
function draw() {
  const count = own.tasks.length, threshold = Number(find("threshold").value), scale = window.devicePixelRatio || 1;
  const style = getComputedStyle(document.body), room = Math.min(canvas.parentElement.clientWidth, count > 60 ? 640 : 4000);
  font = size => size + "px " + style.fontFamily;
  pen.font = font(12);
  const names = own.tasks.map(short);
  const width = count > 60 ? 0 : Math.max(...names.map(name => pen.measureText(name).width)) + 8;
  left = above = Math.ceil(width);
  cell = Math.max(count > 60 ? 3 : 15, Math.min(38, Math.floor((room - left - 2) / count)));
  const wide = left + cell * count + 1, high = above + cell * count + 1;
  canvas.width = wide * scale; canvas.height = high * scale;
  canvas.style.width = wide + "px"; canvas.style.height = high + "px";
  pen.scale(scale, scale);
  pen.textBaseline = "middle";
  own.weights.forEach((row, down) => row.forEach((weight, across) => {
    const x = left + across * cell, y = above + down * cell, gap = cell > 10 ? 1 : 0;
    pen.fillStyle = style.getPropertyValue("--line");
    if (down === across) { pen.fillRect(x, y, cell - gap, cell - gap); return; }
    if (weight < threshold) { pen.fillRect(x + cell / 2 - 1, y + cell / 2 - 1, 2, 2); return; }
    pen.fillStyle = colour(weight);
    pen.fillRect(x, y, cell - gap, cell - gap);
    if (cell < 28) return;
    pen.fillStyle = weight < 0.45 || weight > 1 + 0.75 * (top_ - 1) ? "#fff" : "#111";
    pen.font = font(11); pen.textAlign = "center";
    pen.fillText(weight >= 9.95 ? weight.toFixed(0) : weight.toFixed(1), x + cell / 2, y + cell / 2);
  }));
  if (!width) return;
  pen.fillStyle = style.color; pen.font = font(12);
  names.forEach((name, index) => {
    pen.textAlign = "right";
    pen.fillText(name, left - 5, above + (index + .5) * cell);
    pen.save(); pen.translate(left + (index + .5) * cell, above - 5); pen.rotate(-Math.PI / 2); pen.textAlign = "left";
    pen.fillText(name, 0, 0); pen.restore();
  });
}
function beside() {
  const scale = window.devicePixelRatio || 1, line = getComputedStyle(document.body).getPropertyValue("--line");
  document.querySelectorAll("canvas[data-of]").forEach(small => {
    const one = all[Number(small.dataset.of)], order = all[Number(small.dataset.order)].tasks;
    const place = order.map(name => one.tasks.indexOf(name)), size = Math.max(1, Math.floor(150 / place.length)), ink = small.getContext("2d");
    const high = Math.max(2, ...one.weights.map(row => Math.max(...row))), before = top_, wide = size * place.length;
    small.width = small.height = wide * scale;
    small.style.width = small.style.height = wide + "px";
    ink.scale(scale, scale);
    top_ = high;
    place.forEach((a, down) => place.forEach((b, across) => {
      ink.fillStyle = a === b ? line : colour(one.weights[a][b]);
      ink.fillRect(across * size, down * size, size - (size > 5 ? 1 : 0), size - (size > 5 ? 1 : 0));
    }));
    top_ = before;
  });
}
function choose() {
  const index = Number(find("which").value);
  own = all[index];
  top_ = Math.max(2, ...own.weights.map(row => Math.max(...row)));
  find("threshold").max = top_.toFixed(2); find("top").textContent = top_.toPrecision(3);
  document.querySelectorAll("section > .of").forEach((part, place) => { part.hidden = place !== index; });
  document.querySelectorAll(".relations .of").forEach((part, place) => { part.hidden = place !== index; });
  slide();
}
function slide() { find("shown").textContent = Number(find("threshold").value).toFixed(2); find("value").textContent = ""; draw(); }
function read(event) {
  const across = Math.floor((event.offsetX - left) / cell), down = Math.floor((event.offsetY - above) / cell);
  const row = own.weights[down], known = row !== undefined && row[across] !== undefined && down !== across;
  const text = known ? own.tasks[down] + " \u2013 " + own.tasks[across] + ": " + row[across].toFixed(2) : "";
  if (text || event.type !== "pointerdown") find("value").textContent = canvas.title = text;
}
find("which").addEventListener("change", choose);
find("threshold").addEventListener("input", slide);
canvas.addEventListener("pointermove", read);
canvas.addEventListener("pointerdown", read);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); beside(); });
choose();
beside();
