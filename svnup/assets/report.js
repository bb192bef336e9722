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

// Filtering: every word has to occur, every choice has to hold.
function filter(input, output, items, choices) {
  const text = items.map((item) => item.textContent.toLowerCase());
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    items.forEach((item, i) => {
      const chosen = choices.every((c) => !c.value || (" " + item.dataset[c.dataset.by] + " ").includes(" " + c.value + " "));
      item.hidden = !(chosen && words.every((word) => text[i].includes(word)));
      shown += !item.hidden;
    });
    output.textContent = shown + " of " + items.length;
  };
  [input, ...choices].forEach((control) => control.addEventListener("input", apply));
  input.form.addEventListener("submit", (event) => event.preventDefault());
  input.form.hidden = false;
  apply();
}
filter(document.getElementById("words"), document.getElementById("count"), Array.from(board.rows), all("#filters select"));
filter(document.getElementById("run-words"), document.getElementById("run-count"), all("#all-runs>details"), []);

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
