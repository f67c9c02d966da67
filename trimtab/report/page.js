"use strict";
const tip = document.getElementById("tip");
let shown = null;

function hide() {
  shown = null;
  tip.hidden = true;
}

function show(element) {
  shown = element;
  const name = document.createElement("b");
  name.textContent = element.dataset.name;
  tip.replaceChildren(name, element.dataset.tip.replaceAll(" · ", "\n"));
  tip.hidden = false;
  place();
}

function place() {
  const at = shown.getBoundingClientRect();
  const centre = at.left + at.width / 2 - tip.offsetWidth / 2;
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(12, Math.min(centre, innerWidth - tip.offsetWidth - 12)) + "px";
  tip.style.top = (above < 8 ? at.bottom + 8 : above) + "px";
}

function choose(point) {
  for (const other of document.querySelectorAll(".point")) other.setAttribute("aria-pressed", String(other === point));
  document.getElementById("chosen-name").textContent = point.dataset.name;
  document.getElementById("chosen-numbers").textContent = point.dataset.tip;
  document.getElementById("chosen-plan").textContent = point.dataset.plan;
}

// The nearest cell in the direction of the arrow, a step aside costing more than a step ahead.
function neighbour(cell, key) {
  const across = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  const from = cell.getBoundingClientRect();
  let best = null, least = Infinity;
  for (const other of document.querySelectorAll(".cell.site")) {
    const to = other.getBoundingClientRect();
    const dx = to.left + to.width / 2 - from.left - from.width / 2;
    const dy = to.top + to.height / 2 - from.top - from.height / 2;
    const [ahead, aside] = across ? [sign * dx, Math.abs(dy)] : [sign * dy, Math.abs(dx)];
    const cost = ahead + 4 * aside;
    if (ahead > 1 && cost < least) [best, least] = [other, cost];
  }
  return best;
}

const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");
for (const kind of ["mouseover", "focusin"])
  document.addEventListener(kind, (event) => { const element = tipped(event); if (element) show(element); });
for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, hide);
addEventListener("scroll", () => { if (shown) place(); }, { capture: true, passive: true });
document.addEventListener("click", (event) => {
  const point = event.target.closest(".point");
  if (point) choose(point);
});
document.addEventListener("keydown", (event) => {
  const target = event.target;
  if (event.key === "Escape") hide();
  if (target.matches(".point") && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    choose(target);
  }
  if (target.matches(".cell.site") && event.key.startsWith("Arrow")) {
    const next = neighbour(target, event.key);
    if (!next) return;
    event.preventDefault();
    target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
});
