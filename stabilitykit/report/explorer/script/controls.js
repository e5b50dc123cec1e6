// Controls, the mouse and the keyboard; and how it all begins.

const refresh = () => {
  const part = open(group());
  state.run = Math.min(state.run, part.runs.length - 1);
  const last = isLengths() ? Math.max(...part.runs.map((run) => run.longest)) : tokensIn(part);
  state.at = Math.max(isLengths() ? 1 : 0, Math.min(state.at, last));
  form.group.value = String(state.group);
  form.format.value = state.format;
  form.filter.value = state.filter;
  form.inside.checked = state.inside;
  form.at.min = isLengths() ? 1 : 0;
  form.at.max = last;
  form.at.value = state.at;
  form.at.disabled = last <= Number(form.at.min);
  find(".of-at .name").textContent = isLengths() ? "Length" : "Position";
  find(".of-inside").hidden = isLengths() || !part.rows.some((_, row) => !part.runs.some((run) => judgedRows(run).has(row)));
  const choices = part.runs.map((run, index) => [String(index), run.dtype, !state.side && index === state.run]);
  if (part.runs.length > 1) choices.push(["side", "side by side", state.side]);
  find(".choices").replaceChildren(...choices.map(([value, name, checked]) =>
    element("label", {}, element("input", { type: "radio", name: "dtype", value, checked }), element("span", {}, name))));
  say();
  build();
};
const tokensIn = (part) =>
  Math.max(0, ...part.runs.map((run) => Math.max(0, ...Object.entries(run.profile).map(([index, profile]) => start(run, index) + profile.length))));
const say = () => {
  const run = open(group()).runs[state.run];
  const said = isLengths() ? plural(state.at, "token") : state.at === 0 ? `all ${plural(Number(form.at.max), "position")}` : token(run, state.at - 1);
  form.querySelector("output").textContent = said;
  form.at.setAttribute("aria-valuetext", said);
};

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", (event) => {
  const { name, value, checked } = event.target;
  const before = placeNow();
  settled = true;
  if (name === "filter") {
    state.filter = value;
    filter();
    return remember();
  }
  if (name === "at") {
    state.at = Number(value);
    say();
    paint();
    return show();
  }
  if (name === "format") {
    state.format = value;
    paint();
    return show();
  }
  if (name === "inside") state.inside = checked;
  else if (name === "dtype") {
    state.side = value === "side";
    if (!state.side) state.run = Number(value);
  } else if (name === "group") {
    const dtype = group().runs[state.run].dtype;
    state.group = Number(value);
    const part = open(group());
    state.run = Math.max(0, part.runs.findIndex((run) => run.dtype === dtype));
    state.at = isLengths() ? usualLength(part.runs[state.run]) : 0;
    refresh();
    return choose(notable());
  }
  refresh();
  if (name === "dtype") find(`[name="dtype"][value="${value}"]`).focus();
  return chooseAgain(before);
});

map.addEventListener("click", (event) => {
  const cell = event.target.closest(".cell")?.cell;
  if (!cell?.records) return;
  settled = true;
  column = null;
  if (state.side) state.run = cell.run;
  choose(cell, { focus: true });
});
// Arrows go to the next cell that holds a record, up and down to the nearest one of the column from which they set out;
// Home and End go to the ends of a row, with Control to those of the map.
let column = null;
map.addEventListener("keydown", (event) => {
  const cell = event.target.cell;
  if (!cell) return;
  const lines = grid.lines.filter((line) => !line.hidden);
  const at = lines.indexOf(cell.line);
  const inRow = (line, cells = line.cells) => cells.find((found) => found.records);
  if (!event.key.startsWith("Arrow") || /Left|Right/.test(event.key)) column = null;
  const from = column ?? cell.column;
  const nearest = (line) => line?.cells.filter((found) => found.records)
    .reduce((best, found) => (!best || Math.abs(found.column - from) < Math.abs(best.column - from) ? found : best), null);
  const next = {
    ArrowRight: () => inRow(cell.line, cell.line.cells.slice(cell.column + 1)),
    ArrowLeft: () => inRow(cell.line, cell.line.cells.slice(0, cell.column).reverse()),
    ArrowDown: () => nearest(lines.slice(at + 1).find((line) => inRow(line))),
    ArrowUp: () => nearest(lines.slice(0, at).findLast((line) => inRow(line))),
    Home: () => inRow(event.ctrlKey ? lines[0] : cell.line),
    End: () => inRow(event.ctrlKey ? lines.at(-1) : cell.line, (event.ctrlKey ? lines.at(-1) : cell.line).cells.toReversed()),
  }[event.key]?.();
  if (!next) return;
  event.preventDefault();
  settled = true;
  column = /Up|Down/.test(event.key) ? from : null;
  if (state.side) state.run = next.run;
  choose(next, { focus: true });
});

find(".share button").addEventListener("click", async () => {
  const link = new URL(address(), location.href).href;
  const said = find(".share span");
  try {
    await navigator.clipboard.writeText(link);
    said.textContent = "Copied.";
  } catch {
    settled = true;
    history.replaceState(null, "", address());
    said.textContent = "The link is in the address bar.";
  }
  setTimeout(() => { said.textContent = ""; }, 4000);
});

const arrive = () => {
  if (!restore(location.hash)) return;
  root.closest("section").scrollIntoView();
  chosen?.element.focus({ preventScroll: true });
};
addEventListener("hashchange", arrive);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  draw();
  show();
});
let width = 0;
new ResizeObserver(() => {
  if (!grid || workbench.clientWidth === width) return;
  width = workbench.clientWidth;
  fit();
  draw();
  show();
}).observe(workbench);

// Sites that the page names lead here.
const linkSites = () => {
  const known = new Set(data.groups.flatMap((part) => part.runs.flatMap((run) => run.site)).map(text));
  for (const part of document.querySelectorAll("main td, main code")) {
    const site = part.textContent;
    if (!known.has(site) || part.closest("#explorer, a, button, summary")) continue;
    const link = element("a", { className: "to-explorer", href: addressOf("-", "-", "-", site), title: "Show in the explorer" });
    link.append(...part.childNodes);
    part.append(link);
  }
};

const legend = [["breaks", "breaks here"], ["lost", "inf or NaN, or after a break"], ...data.classes.map((found) => [found.key, found.label]), ["none", "not recorded"]];
find(".legend").append(...legend.map(([name, label]) => element("li", {}, element("span", { className: `cell ${name}`, "aria-hidden": "true" }, { breaks: "×", lost: "–" }[name] ?? ""), label)));
form.group.append(...data.groups.map((part, index) => element("option", { value: String(index) }, part.name)));
form.format.append(...data.formats.map((format) => element("option", { value: format.name }, format.name)));
root.hidden = false;
if (isLengths()) state.at = usualLength(open(group()).runs[state.run]);
if (restore(location.hash)) arrive();
else {
  refresh();
  choose(notable());
}
linkSites();
root.dataset.ready = "true";
