"use strict";
const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
const board = document.getElementById("board");

// Sorting: numbers by value, words by alphabet, what is missing last either way.
all("th[aria-sort] button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement;
  const column = Array.from(head.parentElement.children).indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  all("th[aria-sort]").forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => {
    const cell = row.children[column];
    return cell.classList.contains("none") ? null : cell.dataset.v || cell.textContent;
  };
  const rows = Array.from(board.rows).map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return up ? order : -order;
  });
  board.append(...rows.map(([, row]) => row));
}));

// Filtering: every word has to occur in the name of a run, every choice has to hold. Lines of tables, charts and the runs
// themselves are of runs (data-runs: their places), and what is of none that is chosen goes; so does what holds nothing else.
const runs = all("#all-runs>details");
const names = runs.map((run) => (run.firstElementChild.textContent + " " + run.dataset.status).toLowerCase());
const parts = all("[data-runs]").map((node) => [node, node.dataset.runs.split(" ").map(Number)]);
const words = document.getElementById("words");
const choices = all("#filters select");

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = runs.map((run, i) =>
    choices.every((c) => !c.value || run.dataset[c.dataset.by] === c.value) && wanted.every((word) => names[i].includes(word)));
  const show = (node, shown) => node.toggleAttribute("hidden", !shown);
  runs.forEach((run, i) => show(run, chosen[i]));
  parts.forEach(([node, places]) => show(node, places.some((i) => chosen[i])));
  all("th[data-runs]").forEach((head) => {
    const column = Array.from(head.parentElement.children).indexOf(head);
    Array.from(head.closest("table").tBodies[0].rows).forEach((row) => show(row.children[column], !head.hidden));
  });
  all(".chart g[data-runs]").forEach(join);
  all(".chart:has([data-row])").forEach(compact);
  const left = (node) => !node.querySelector("[data-runs]") || node.querySelector("[data-runs]:not([hidden])") !== null;
  const filtered = wanted.length > 0 || choices.some((c) => c.value);
  all("[data-holds]").forEach((node) => {
    show(node, left(node));
    if (filtered && node.tagName === "DETAILS") node.open = true;
  });
  all("main>section").forEach((section) => {
    const holder = section.querySelector("#all-runs");
    show(section.querySelector(".nothing"), holder ? !chosen.includes(true) : !left(section));
  });
  document.getElementById("count").textContent = chosen.filter(Boolean).length + " of " + runs.length + " runs";
  show(document.getElementById("filtered"), filtered);
}

// A line and its band go through the marks that are left.
function join(series) {
  const marks = all(".m[data-runs]:not([hidden])", series);
  const at = marks.map((mark) => mark.getAttribute("d").match(/^M([-\d.]+) ([-\d.]+)/).slice(1));
  const line = series.querySelector(".line"), band = series.querySelector(".band");
  if (line && all(".m[data-runs]", series).length) line.setAttribute("d", at.length > 1 ? "M" + at.map((p) => p.join(" ")).join(" ") : "");
  if (!band) return;
  const ends = marks.map((mark, i) => [at[i][0], mark.dataset.error]).filter(([, error]) => error).map(([x, error]) => [x, ...error.split(" ")]);
  if (!all(".m[data-error]", series).length) return;
  const there = ends.map(([x, , high]) => x + " " + high), back = ends.map(([x, low]) => x + " " + low).reverse();
  band.setAttribute("d", ends.length > 1 ? "M" + there.concat(back).join(" ") + "z" : "");
}

// The rows of a ranking close up where others have gone.
function compact(chart) {
  const rows = all("[data-row]", chart);
  let gone = 0;
  rows.forEach((row) => {
    row.setAttribute("transform", "translate(0 " + -gone + ")");
    if (row.hasAttribute("hidden")) gone += Number(row.dataset.row);
  });
  chart.querySelector(".below").setAttribute("transform", "translate(0 " + -gone + ")");
  const box = chart.dataset.box || (chart.dataset.box = chart.getAttribute("viewBox"));
  const [x, y, width, height] = box.split(" ").map(Number);
  chart.setAttribute("viewBox", [x, y, width, height - gone].join(" "));
}

const form = document.getElementById("filters");
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
document.getElementById("clear").addEventListener("click", () => {
  form.reset();
  filter();
  words.focus();
});
filter();

// A link to a run opens it.
function open() {
  const run = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (run && run.tagName === "DETAILS") {
    run.hidden = false;
    run.open = true;
    run.scrollIntoView();
    run.firstElementChild.focus({ preventScroll: true });
  }
}
addEventListener("hashchange", open);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#run-']");
  if (link && link.hash === location.hash) open();
});
open();

// A name in a legend brings its lines out in the charts of its panel.
all(".legend button").forEach((button) => button.addEventListener("click", () => {
  const panel = button.closest("figure") || button.closest(".panel");
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
  const names = all(".legend [aria-pressed=true]", panel).map((b) => b.dataset.s);
  all(".chart [data-s]", panel).forEach((g) => g.classList.toggle("faded", names.length > 0 && !names.includes(g.dataset.s)));
}));

// What a mark stands for.
const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
});
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

if (navigator.clipboard) all(".copy").forEach((button) => {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
});
