"use strict";
// A cell's number, memory in megabytes; what is no number stays below all numbers.
function numberOf(text) {
  const number = parseFloat(text);
  return Number.isNaN(number) ? -Infinity : / GB$/.test(text) ? 1000 * number : number;
}
for (const heading of document.querySelectorAll("th")) {
  heading.firstElementChild.addEventListener("click", () => {
    const table = heading.closest("table"), column = heading.cellIndex;
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    const text = (row) => row.cells[column].textContent;
    const compare = heading.classList.contains("number")
      ? (a, b) => numberOf(text(a)) - numberOf(text(b))
      : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
    const rows = [...table.tBodies[0].rows].sort((a, b) => (order === "ascending" ? compare(a, b) : compare(b, a)));
    table.tBodies[0].append(...rows);
    for (const each of heading.parentElement.cells) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
  });
}
