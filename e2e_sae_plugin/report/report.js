"use strict";
(() => {
  const root = document.documentElement;
  const darkColours = JSON.parse(document.getElementById("dark-colours").textContent);
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isNarrow = matchMedia("(max-width: 640px)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  // Charts: the figures come in the colours of the light theme.
  const recoloured = (value) => {
    if (Array.isArray(value)) return value.map(recoloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => {
      if (typeof entry !== "string" || !key.endsWith("color")) return [key, recoloured(entry)];
      const colour = entry.slice(0, 7);
      return [key, (darkColours[colour] ?? colour) + entry.slice(7)];
    }));
  };

  const draw = (place, dark) => {
    if (typeof Plotly === "undefined") return;
    const text = place.parentElement.querySelector("script.figure").textContent;
    const figure = dark ? recoloured(JSON.parse(text)) : JSON.parse(text);
    const narrow = isNarrow.matches;
    if (narrow) {
      figure.layout.font.size = 12;
      figure.layout.dragmode = false; // a finger that moves over a chart scrolls the page
    }
    Plotly.react(place, figure.data, figure.layout, {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false, // on by default: a button that uploads the chart's data
      plotlyServerURL: "",
      displayModeBar: narrow ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    });
  };
  const drawAll = (dark = isDark()) => document.querySelectorAll(".chart").forEach((place) => draw(place, dark));

  // Theme: the system's, until the button is used.
  const button = document.getElementById("theme");
  const showTheme = () => {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    drawAll();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  prefersDark.addEventListener("change", showTheme);
  isNarrow.addEventListener("change", () => drawAll());
  addEventListener("beforeprint", () => drawAll(false));
  addEventListener("afterprint", () => drawAll());

  // Tables: a click on a header sorts, a second one the other way round. What has no value stays at the end.
  const valueOf = (cell) => {
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  const sort = (header) => {
    const body = header.closest("table").tBodies[0];
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = direction === "ascending" ? 1 : -1;
    header.parentElement.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", direction);
    const rows = [...body.rows].map((row) => [valueOf(row.cells[header.cellIndex]), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  };
  document.querySelectorAll("button.sort").forEach((each) => {
    each.addEventListener("click", () => sort(each.closest("th")));
  });

  showTheme();
})();
