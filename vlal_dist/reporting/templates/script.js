"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const numeric = !heading.classList.contains("name");
    const ascending = heading.getAttribute("aria-sort") ? heading.getAttribute("aria-sort") === "descending" : !numeric;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const value = (row) => row.cells[column].textContent;
    const rows = [...body.rows].sort((left, right) => {
      if (!numeric) return ascending ? value(left).localeCompare(value(right)) : value(right).localeCompare(value(left));
      const a = parseFloat(value(left)), b = parseFloat(value(right));
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return ascending ? a - b : b - a;
    });
    body.append(...rows);
  }));
}
const box = document.getElementById("filter");
const rows = [...document.getElementById("attribute-table").tBodies[0].rows];
const filter = () => {
  const wanted = box.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const text = [0, 1, 2].map((column) => row.cells[column].textContent.toLowerCase()).join(" ");
    row.hidden = !text.includes(wanted);
    shown += Number(!row.hidden);
  }
  document.querySelector(".filter output").textContent = `${shown} of ${rows.length} attributes`;
};
box.addEventListener("input", filter);
box.parentElement.hidden = false;
filter();
