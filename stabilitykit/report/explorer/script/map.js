// The map: a grid of cells for the keyboard and for screen readers, and under it a canvas that holds what is seen, so that
// ten thousand cells can change at once.

const canvas = element("canvas", { "aria-hidden": "true" });

const rowName = ([stack, label, path]) => (text(stack) ? `${text(stack)}: ` : "") + (text(label) ?? text(path));
const placeOf = (cell) => (cell.layer < 0 ? "" : `layer ${cell.layer}, `) + rowName(cell.line.row);
const judgedRows = (run) => (run.judgedRows ??= new Set(run.row.filter((_, index) => run.judged[index])));
const isJudged = (run, index) => isLengths() || run.judged[index] === 1;
const recordsAt = (run, cell) => run.cells.get(cell.line.number * (grid.part.layers + 1) + cell.layer + 1);

const grids = new Map(); // made once, by group and by what is shown of it
const build = () => {
  const part = open(group());
  const side = state.side && part.runs.length > 1;
  const rows = part.rows.map((_, at) => at)
    .filter((at) => state.inside || isLengths() || part.runs.some((run) => judgedRows(run).has(at)));
  const kind = [state.group, side, state.inside].join();
  if (!grids.has(kind)) {
    const runs = side ? part.runs.map((_, at) => at) : [-1]; // -1: whichever run is chosen
    const columns = runs.flatMap((run) => Array.from({ length: part.layers + 1 }, (_, at) => ({ run, layer: at - 1 })));
    grids.set(kind, { part, columns, heading: headingOf(part, columns, side), lines: rows.map((at) => lineOf(part, at, columns)) });
  }
  if (grid !== grids.get(kind)) {
    grid = grids.get(kind);
    map.replaceChildren(...(side ? [dtypesOf(part)] : []), grid.heading, ...grid.lines.map((line) => line.element), canvas);
    map.setAttribute("aria-label", `Headroom by site and layer: ${part.name}`);
    root.classList.toggle("side", side);
  }
  for (const line of grid.lines) {
    for (const cell of line.cells) {
      cell.run = grid.columns[cell.column].run < 0 ? state.run : grid.columns[cell.column].run;
      cell.records = recordsAt(part.runs[cell.run], cell);
      cell.head = grid.heading.children[cell.column + 1];
      cell.look = cell.numeral = undefined;
      if (cell.records) cell.element.tabIndex = -1;
      else cell.element.removeAttribute("tabindex");
    }
  }
  fit();
  filter();
};

const headingOf = (part, columns, side) => {
  const heading = element("div", { role: "row", className: "line head" }, element("div", { role: "columnheader", className: "name" }, "site"));
  for (const { run, layer } of columns) {
    const spoken = `${side ? `${part.runs[run].dtype}, ` : ""}${layer < 0 ? "outside the layers" : `layer ${layer}`}`;
    heading.append(element("div", { role: "columnheader", className: "cell", "aria-label": spoken, title: spoken }, layer < 0 ? "–" : String(layer)));
  }
  return heading;
};
const dtypesOf = (part) => {
  const line = element("div", { role: "row", className: "line head dtypes" }, element("div", { role: "columnheader", className: "name" }, "dtype"));
  for (const run of part.runs) {
    const head = line.appendChild(element("div", { role: "columnheader", className: "over-all", "aria-colspan": part.layers + 1 }, run.dtype));
    head.style.width = `calc(${part.layers + 1} * var(--cell))`;
  }
  return line;
};
const lineOf = (part, number, columns) => {
  const row = part.rows[number];
  const line = { row, number, cells: [], hidden: false, element: element("div", { role: "row", className: "line" }) };
  line.element.append(element("div", { role: "rowheader", className: "name", title: text(row[2]) }, rowName(row)));
  columns.forEach(({ layer }, column) => {
    const cell = { line, layer, column, element: document.createElement("div") };
    cell.element.className = "cell";
    cell.element.setAttribute("role", "gridcell");
    cell.element.cell = cell;
    line.cells.push(cell);
    line.element.append(cell.element);
  });
  const sites = part.runs.flatMap((run) => run.row.flatMap((at, index) => (at === number ? [text(run.site[index])] : [])));
  line.words = `${rowName(row)} ${text(row[2])} ${[...new Set(sites)].join(" ")}`.toLowerCase();
  return line;
};

// Cells as wide as there is room for, with their numbers where these can be read.
const fit = () => {
  const names = grid.heading.firstChild.getBoundingClientRect().width;
  const each = Math.max(8, Math.min(34, Math.floor((map.clientWidth - names - 2) / grid.columns.length)));
  grid.each = each;
  grid.left = names;
  map.style.setProperty("--cell", `${each}px`);
  const step = Math.ceil(17 / each);
  [...grid.heading.children].slice(1).forEach((head, at) => head.classList.toggle("quiet", grid.columns[at].layer % step !== 0));
};

// What each cell is now, then all of it drawn; the names of the cells that screen readers say follow when there is time.
const paint = () => {
  for (const line of grid.lines) {
    for (const cell of line.cells) {
      if (!cell.records) continue;
      const seen = lookUp(grid.part.runs[cell.run], cell.records, state.at);
      cell.look = classOf(seen);
      cell.numeral = numeral(seen);
    }
  }
  draw();
  nameCells();
};

const draw = () => {
  const shown = grid.lines.filter((line) => !line.hidden);
  const high = grid.heading.getBoundingClientRect().height, { each, left } = grid;
  const width = each * grid.columns.length, height = high * shown.length;
  const scale = Math.min(devicePixelRatio, 30000 / Math.max(width, height, 1));
  canvas.width = width * scale;
  canvas.height = height * scale;
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px`, left: `${left}px`, top: `${grid.heading.offsetTop + high}px` });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const groups = new Map();
  shown.forEach((line, row) => {
    for (const cell of line.cells) {
      if (!cell.look || cell.look === "none") continue;
      if (!groups.has(cell.look)) groups.set(cell.look, []);
      groups.get(cell.look).push([cell.column * each, row * high, cell.numeral]);
    }
  });
  const rim = each < 12 ? 0.5 : 1;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [look, places] of groups) {
    const { ground, ink, hatch } = lookOf(look);
    pen.fillStyle = ground;
    for (const [x, y] of places) pen.fillRect(x, y, each - rim, high - rim);
    if (hatch && (look === "lost" || each < 17)) {
      pen.fillStyle = pen.createPattern(hatched(hatch, scale), "repeat");
      pen.fillStyle.setTransform(new DOMMatrix().scale(1 / scale));
      for (const [x, y] of places) pen.fillRect(x, y, each - rim, high - rim);
    }
    if (look === "lost" || (each < 17 && look !== "breaks")) continue;
    pen.fillStyle = ink;
    pen.font = look === "breaks" ? "700 15px system-ui, sans-serif" : `${look === "over" ? "700 " : ""}10.5px system-ui, sans-serif`;
    for (const [x, y, said] of places) pen.fillText(said, x + (each - rim) / 2, y + high / 2 + 0.5);
  }
};
const lookOf = (look) => {
  const faint = mixed("--over", 0.07), strong = mixed("--over", 0.3);
  if (look === "lost") return { ground: faint, hatch: strong };
  const name = { breaks: "over", zero: "h5" }[look] ?? look;
  return { ground: ink(`--${name}`), ink: ink(`--${name}-ink`), hatch: look === "over" && mixed("--over", 0.55) };
};
const mixed = (name, share) => {
  const [r, g, b] = [name, "--paper"].map((part) => ink(part).match(/[\da-f]{2}/gi).map((pair) => parseInt(pair, 16)))
    .reduce((over, under) => over.map((value, at) => Math.round(share * value + (1 - share) * under[at])));
  return `rgb(${r} ${g} ${b})`;
};
const hatched = (colour, scale) => {
  const size = Math.round(6 * scale);
  const tile = new OffscreenCanvas(size, size);
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  pen.lineWidth = 1.3 * scale;
  for (const shift of [-size, 0, size]) {
    pen.moveTo(shift - 1, size + 1);
    pen.lineTo(shift + size + 1, -1);
  }
  pen.stroke();
  return tile;
};

const idle = window.requestIdleCallback?.bind(window) ?? ((work) => setTimeout(() => work({ timeRemaining: () => 8 }), 60));
let naming = 0; // which painting the names are of
const nameCells = () => {
  const turn = (naming += 1);
  const left = grid.lines.flatMap((line) => line.cells);
  let next = 0;
  const some = (deadline) => {
    while (turn === naming && next < left.length && (next % 50 || deadline.timeRemaining() > 2)) nameCell(left[next++]);
    if (turn === naming && next < left.length) idle(some);
  };
  idle(some);
};
const nameCell = (cell) => {
  const said = { breaks: "breaks here", lost: "inf or NaN, or after a break", zero: "zeros", none: "not known" }[cell.look];
  const name = cell.records ? said ?? `${cell.numeral} bits${cell.look === "over" ? ", past the maximum" : ""}` : "";
  if (name === cell.name) return;
  cell.name = name;
  if (name) cell.element.setAttribute("aria-label", name);
  else cell.element.removeAttribute("aria-label");
};

const filter = () => {
  const wanted = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const line of grid.lines) {
    const hidden = !wanted.every((word) => line.words.includes(word));
    if (hidden !== line.hidden) line.element.hidden = line.hidden = hidden;
    found += !hidden;
  }
  find(".found").textContent = wanted.length ? `${whole(found)} of ${plural(grid.lines.length, "site")}` : "";
  rove(chosen && !chosen.line.hidden ? chosen : firstCell());
  paint();
};
const firstCell = () => grid.lines.find((line) => !line.hidden && line.cells.some((cell) => cell.records))?.cells.find((cell) => cell.records) ?? null;

let roving = null; // the one cell that the keyboard stops at
const rove = (cell) => {
  if (roving) roving.element.tabIndex = -1;
  roving = cell;
  if (cell) cell.element.tabIndex = 0;
};

const choose = (cell, { focus = false } = {}) => {
  if (chosen) {
    chosen.element.classList.remove("chosen");
    chosen.element.removeAttribute("aria-selected");
    chosen.line.element.classList.remove("chosen");
    chosen.head.classList.remove("chosen");
  }
  chosen = cell;
  if (cell) {
    cell.element.classList.add("chosen");
    cell.element.setAttribute("aria-selected", "true");
    cell.line.element.classList.add("chosen");
    cell.head.classList.add("chosen");
    nameCell(cell);
    rove(cell);
    if (focus) cell.element.focus();
  }
  show();
};

// The same place in the map as it is now; else the first break, else the least headroom.
const chooseAgain = (before) => {
  const same = before && grid.lines.find((line) => line.number === before.number);
  const cell = same?.cells.find((found) => found.records && found.layer === before.layer && (found.run === before.run || !state.side));
  choose(cell ?? notable());
};
const placeNow = () => chosen && { number: chosen.line.number, layer: chosen.layer, run: chosen.run };
const notable = () => {
  let best = null, least = Infinity;
  for (const line of grid.lines) {
    for (const cell of line.cells) {
      if (!cell.records || cell.run !== state.run) continue;
      const run = grid.part.runs[cell.run];
      const seen = lookUp(run, cell.records, state.at);
      if (seen.kind !== "breaks" && (seen.kind !== "value" || !isJudged(run, seen.index))) continue;
      const rank = seen.kind === "breaks" ? run.order[seen.index] - 1e12 : headroom(formats.get(state.format), seen.amax);
      if (rank < least) [best, least] = [cell, rank];
    }
  }
  return best ?? firstCell();
};
