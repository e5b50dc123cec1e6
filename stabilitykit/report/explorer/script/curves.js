// Curves, drawn by uPlot; under each the same numbers as a table.

const charts = [];
const ink = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const colour = (dtype) => formats.get(dtype).colour ?? ink("--ink");

const drawCharts = (run, index) => {
  while (charts.length) charts.pop().destroy();
  const place = find(".charts");
  const openAlready = new Set([...place.querySelectorAll("details[open]")].map((part) => part.dataset.name));
  place.replaceChildren();
  const across = beside(run, index).filter(([, record]) => record !== null);
  place.append(key(across.map(([other]) => other.dtype)));
  const parts = isLengths() ? [byLength(across)] : [exponents(across), byPosition(across)];
  for (const part of parts.filter(Boolean)) {
    const figure = element("figure", {}, element("figcaption", {}, part.title));
    const box = figure.appendChild(element("div", { className: "plot", role: "img", "aria-label": part.spoken }));
    figure.append(element("p", { className: "readout", "aria-hidden": "true" }));
    const detail = element("details", {}, element("summary", {}, `${part.title}, as a table`));
    detail.dataset.name = part.name;
    const fill = () => detail.open && detail.children.length === 1 && detail.append(element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": part.title }, ...part.table()));
    detail.addEventListener("toggle", fill);
    figure.append(detail);
    place.append(figure);
    plot(box, figure.querySelector(".readout"), part);
    if (openAlready.has(part.name)) {
      detail.open = true;
      fill();
    }
  }
};
const key = (dtypes) => {
  const list = element("ul", { className: "key", "aria-label": "Lines" });
  for (const dtype of dtypes) {
    const { dash } = formats.get(dtype);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    line.setAttribute("width", "26");
    line.setAttribute("height", "8");
    line.setAttribute("aria-hidden", "true");
    const path = line.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    path.setAttribute("d", "M0 4H26");
    path.setAttribute("stroke", colour(dtype));
    path.setAttribute("stroke-width", "2");
    path.setAttribute("stroke-dasharray", dash.join(" "));
    list.append(element("li", {}, line, dtype));
  }
  return list;
};

const plot = (box, readout, part) => {
  const faint = ink("--faint"), muted = ink("--muted");
  const axis = (label, values, extra = {}) => ({
    label, values, stroke: muted, labelSize: 16, labelGap: 0, size: 24, gap: 3, font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif",
    grid: { stroke: faint, width: 0.5 }, ticks: { stroke: faint, width: 0.5, size: 3 }, ...extra,
  });
  const made = new uPlot({
    width: Math.max(200, box.clientWidth), height: 168, padding: [10, 16, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { size: 5 }, drag: { x: false, y: false } },
    scales: { x: { time: false, range: part.x }, y: { range: part.y } },
    axes: [axis(part.across, part.xs, { incrs: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536] }), axis(part.up, part.ys, { size: 42, incrs: [1, 2, 4, 8, 16, 32, 64, 128] })],
    series: [{}, ...part.dtypes.map((dtype, at) => ({
      label: dtype, stroke: colour(dtype), width: Math.max(1, 2.2 - 0.5 * at), dash: formats.get(dtype).dash, points: { show: false },
      paths: part.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined, spanGaps: false,
    }))],
    hooks: {
      draw: [(u) => part.marks.forEach((mark) => drawMark(u, mark))],
      setCursor: [(u) => { readout.textContent = u.cursor.idx === null || u.cursor.idx === undefined ? "" : part.read(u.cursor.idx); }],
    },
  }, part.data, box);
  charts.push(made);
};
// A line across the plot, at { x or y, label }.
const drawMark = (u, mark) => {
  const { ctx, bbox } = u, across = mark.y !== undefined;
  const at = Math.round(u.valToPos(across ? mark.y : mark.x, across ? "y" : "x", true));
  if (across ? at < bbox.top || at > bbox.top + bbox.height : at < bbox.left || at > bbox.left + bbox.width) return;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = mark.strong ? ink("--over") : ink("--muted");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash(mark.strong ? [] : [3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  if (across) [[bbox.left, at], [bbox.left + bbox.width, at]].forEach(([x, y], end) => (end ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  else [[at, bbox.top], [at, bbox.top + bbox.height]].forEach(([x, y], end) => (end ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.stroke();
  if (mark.label) {
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    const width = ctx.measureText(mark.label).width, room = 4 * devicePixelRatio;
    const left = across ? bbox.left + room : at + room + width > bbox.left + bbox.width ? at - room - width : at + room;
    const top = across ? at - room : bbox.top + 9 * devicePixelRatio;
    ctx.globalAlpha = 0.85;
    ctx.fillStyle = ink("--paper");
    ctx.fillRect(left - 2, top - 9 * devicePixelRatio, width + 4, 12 * devicePixelRatio);
    ctx.globalAlpha = 1;
    ctx.fillStyle = mark.strong ? ink("--over") : ink("--muted");
    ctx.fillText(mark.label, left, top);
  }
  ctx.restore();
};

const exponents = (across) => {
  const held = across.filter(([run, index]) => run.exponents[index].length);
  if (!held.length) return null;
  const format = formats.get(state.format);
  const first = Math.min(...held.map(([run, index]) => run.first[index]));
  const last = Math.max(...held.map(([run, index]) => run.first[index] + run.exponents[index].length));
  const xs = Array.from({ length: last - first + 1 }, (_, at) => first + at);
  const counts = held.map(([run, index]) => xs.map((x) => run.exponents[index][x - run.first[index]] ?? 0));
  const shares = held.map(([run, index], at) => counts[at].map((count) => (count ? Math.log10(count / run.elements[index]) : null)));
  const floor = Math.floor(Math.min(...shares.flat().filter((share) => share !== null)));
  const top = Math.log2(format.largest), bottom = Math.log2(format.normal);
  const stepped = shares.map((line) => line.map((share, at) => share ?? (line[at - 1] != null || line[at + 1] != null ? floor : null)));
  const names = held.map(([run]) => run.dtype);
  return {
    name: "exponents", title: "Elements by exponent", across: "exponent, log2 |x|", up: "share of elements",
    spoken: `Share of elements by power of two, from ${power(first)} to ${power(last)}, with the range of ${format.name}; the numbers are in the table below.`,
    dtypes: names, data: [xs, ...stepped], stepped: true,
    x: () => [Math.min(first, Math.max(bottom, first - 4)) - 0.5, Math.max(last, Math.min(top, last + 6)) + 0.5], y: () => [floor, 0.15],
    xs: (_, splits) => splits.map((x) => String(x).replace("-", "−")), ys: (_, splits) => splits.map((y) => (Number.isInteger(y) ? percent(10 ** y) : "")),
    marks: [{ x: top, label: `${format.name} maximum`, strong: true }, { x: bottom, label: "smallest normal" }],
    read: (at) => `${power(xs[at])} to ${power(xs[at] + 1)}: ${names.map((name, line) => `${name} ${whole(counts[line][at])}`).join(", ")}`,
    table: () => table("Elements by exponent", ["from", ...names], xs.slice(0, -1).map((x, at) => [power(x), ...counts.map((line) => whole(line[at]))])),
  };
};

const byPosition = (across) => {
  const held = across.filter(([run, index]) => run.profile[index]?.length > 1);
  if (!held.length) return null;
  const format = formats.get(state.format);
  const [base, record] = held[0];
  const begin = start(base, record);
  const xs = base.profile[record].map((_, at) => begin + at);
  const ys = held.map(([run, index]) => run.profile[index].map((steps) => (steps <= data.nothing / 2 ? null : steps / data.steps.run)));
  return magnitudes({
    name: "position", title: "Largest magnitude by position", across: "position [tokens]", names: held.map(([run]) => run.dtype), xs, ys, format,
    more: state.at ? [{ x: state.at - 1 }] : [], at: (x) => token(base, x), column: "position",
  });
};
const byLength = (across) => {
  const format = formats.get(state.format);
  const longest = Math.max(...across.map(([run]) => run.longest));
  const lines = across.map(([run]) => {
    const records = recordsAt(run, chosen);
    return (length) => {
      const seen = length <= run.longest ? lookUp(run, records, length) : NONE;
      return seen.amax ? Math.log2(seen.amax) : null;
    };
  });
  const points = new Set([1, longest, state.at]);
  across.forEach(([run]) => run.spans.forEach((found) => [found.first, found.last].forEach((length) => points.add(length))));
  across.forEach(([run, index]) => chosen.records && run.curves[index].positions.forEach((position) => [position, position + 1].forEach((length) => length && points.add(length))));
  const xs = [...points].filter((length) => length >= 1 && length <= longest).sort((a, b) => a - b);
  return magnitudes({
    name: "length", title: "Largest magnitude by length", across: "length [tokens]", names: across.map(([run]) => run.dtype), xs,
    ys: lines.map((line) => xs.map(line)), format, more: [{ x: state.at }], at: (x) => plural(x, "token"), column: "tokens", stepped: true, doubling: true,
  });
};
const magnitudes = ({ name, title, across, names, xs, ys, format, more, at, column, stepped = false, doubling = false }) => {
  const scaled = doubling ? Math.log2 : (x) => x;
  const places = xs.map(scaled);
  const known = ys.flat().filter((y) => y !== null);
  const limit = Math.log2(format.largest);
  const high = Math.max(...known), low = Math.min(...known);
  const inSight = limit - high < 8; // the format's maximum, which is drawn where there is room for it
  const top = inSight ? Math.max(high, limit) : high;
  return {
    name, title, across, up: "magnitude", dtypes: names, data: [places, ...ys], stepped,
    spoken: `${title}, from ${near(2 ** low)} to ${near(2 ** high)}; the numbers are in the table below.`,
    x: () => [places[0], Math.max(places.at(-1), places[0] + 1)], y: () => [Math.floor(low - 0.2), Math.max(Math.ceil(top + (inSight ? 0.9 : 0.2)), Math.floor(low) + 2)],
    xs: (_, splits) => splits.map((x) => (Number.isInteger(x) ? whole(doubling ? 2 ** x : x) : "")), ys: (_, splits) => splits.map((y) => (Number.isInteger(y) ? power(y) : "")),
    marks: [{ y: limit, label: `${format.name} maximum`, strong: true }, ...more.map(({ x }) => ({ x: scaled(x) }))],
    read: (x) => `${at(xs[x])}: ${names.map((dtype, line) => `${dtype} ${ys[line][x] === null ? "–" : near(2 ** ys[line][x])}`).join(", ")}`,
    table: () => table(title, [column, ...names], xs.map((x, row) => [whole(x), ...ys.map((line) => (line[row] === null ? null : near(2 ** line[row])))])),
  };
};
