// The record of the chosen cell: a sentence, and tables with a column for each dtype.

const show = () => {
  const at = find("#explorer-place"), path = find(".path"), said = find(".said");
  if (!chosen) {
    at.textContent = "No tensor chosen";
    for (const part of [path, said, find(".charts"), find(".tables"), find(".brief span")]) part.replaceChildren();
    return;
  }
  const run = grid.part.runs[chosen.run];
  const seen = lookUp(run, chosen.records, state.at);
  const index = seen.index ?? chosen.records[0];
  at.textContent = placeOf(chosen);
  path.replaceChildren(element("code", {}, text(run.site[index])));
  const operator = run.operator && text(run.operator[index]);
  if (operator) path.append(", operator ", element("code", {}, operator));
  if (run.shape) path.append(`, ${text(run.shape[index])}`);
  said.textContent = `${run.dtype}${moment()}: ${sentence(run, seen)}`;
  find(".brief span").textContent = `${placeOf(chosen)}, ${said.textContent}`;
  later(() => {
    drawCharts(run, index);
    find(".tables").replaceChildren(...(isLengths() ? lengthTables(seen) : recordTables(run, index)));
  });
  remember();
};
let waiting = null;
const later = (work) => {
  if (!waiting) requestAnimationFrame(() => {
    const now = waiting;
    waiting = null;
    now();
  });
  waiting = work;
};

const token = (run, position) => {
  const known = run.tokens?.[position];
  return `token ${whole(position)}${known === undefined ? "" : ` ${quoted(known)}`}`;
};
const moment = () => {
  const run = grid.part.runs[chosen.run];
  if (isLengths()) return ` at ${plural(state.at, "token")}`;
  return state.at === 0 ? "" : ` at ${token(run, state.at - 1)}`;
};

const sentence = (run, seen) => {
  const format = formats.get(state.format);
  const size = seen.amax && (seen.part ? `about ${near(seen.amax)}` : number(seen.amax));
  const room = seen.amax && overflows(format, seen.amax)
    ? `past the ${format.name} maximum, ${number(format.largest)}`
    : seen.amax && `${bits(headroom(format, seen.amax))} bits of headroom in ${format.name}`;
  switch (seen.kind) {
    case "breaks": {
      const broke = isLengths() ? seen.span : run.breaks[seen.index];
      return `the run breaks here${broke.where ? `, at ${broke.where.replace(/^at /, "")}` : ""}: ${broke.said}.`;
    }
    case "lost": {
      if (isLengths()) return `not known: the run breaks before it, in ${seen.span.place}.`;
      const [nan, plus, minus, positions] = run.lost[seen.index];
      const what = [[nan, "NaN"], [plus, "inf"], [minus, "−inf"]].filter(([count]) => count);
      return `${what.map(([count, name]) => `${whole(count)} ${name}`).join(", ")} of ${plural(run.elements[seen.index], "element")}, at ${plural(positions, "position")}.`;
    }
    case "zero":
      return "every element is zero.";
    case "none":
      return state.at && !isLengths() ? "not known at this position." : "not known at this length.";
    default: {
      const inside = isJudged(run, seen.index) ? "" : ` It is computed in ${text(run.type[seen.index])} on purpose, so this is no overflow.`;
      const where = isLengths() ? `, at ${token(run, seen.position)}` : state.at === 0 ? peakAt(run, seen.index) : "";
      return `largest magnitude ${size}${where}; ${room}.${inside}`;
    }
  }
};
const peakAt = (run, index) => {
  const [row, position, channel] = run.at[index];
  const parts = [];
  if (position >= 0) parts.push(`at token ${whole(position)}${run.token[index] < 0 ? "" : ` ${quoted(text(run.token[index]))}`}`);
  if (channel >= 0) parts.push(`channel ${whole(channel)}`);
  if (row > 0 || (row === 0 && run.rows > 1)) parts.push(`row ${row}`);
  return parts.length ? `, ${parts.join(", ")}` : "";
};

// The same place in every dtype's run: [run, index or null].
const beside = (run, index) =>
  grid.part.runs.map((other) => {
    if (other === run) return [run, index];
    const records = recordsAt(other, chosen);
    return [other, records ? lookUp(other, records, state.at).index ?? records[0] : null];
  });

const table = (title, headings, rows, { note = "", alarming = () => false, sites = false } = {}) => {
  const head = element("tr", {}, ...headings.map((name, at) => element("th", { scope: "col", className: at ? "number" : "" }, name)));
  const entry = (cell) => element("td", { className: typeof cell === "string" && !/['"]/.test(cell) ? "number" : "number words" }, cell ?? "–");
  const body = rows.map(([name, ...cells]) =>
    element("tr", { className: alarming([name, ...cells]) ? "alarming" : "" }, element("th", { scope: "row" }, name), ...cells.map(entry)));
  const made = element("table", { className: sites ? "sites" : "" }, element("caption", {}, title), element("thead", {}, head), element("tbody", {}, ...body));
  return note ? [made, element("p", { className: "note" }, note)] : [made];
};

const ROWS = [
  ["stored as", (run, at) => text(run.type[at])],
  ["largest magnitude", (run, at) => run.largest[at] !== null && number(run.largest[at])],
  ["headroom [bits]", (run, at) => run.largest[at] && bits(headroom(formats.get(state.format), run.largest[at]))],
  ["at token", (run, at) => run.at[at][1] >= 0 && `${whole(run.at[at][1])}${run.token[at] < 0 ? "" : ` ${quoted(text(run.token[at]))}`}`],
  ["at channel", (run, at) => run.at[at][2] >= 0 && whole(run.at[at][2])],
  ["maximum", (run, at) => run.most[at] !== null && number(run.most[at])],
  ["minimum", (run, at) => run.least[at] !== null && number(run.least[at])],
  ["smallest magnitude", (run, at) => run.smallest[at] !== null && number(run.smallest[at])],
  ["mean", (run, at) => run.mean[at] !== null && number(run.mean[at])],
  ["rms", (run, at) => run.rms[at] !== null && number(run.rms[at])],
  ["elements", (run, at) => whole(run.elements[at])],
  ["inf", (run, at) => run.lost[at] && whole(run.lost[at][1] + run.lost[at][2])],
  ["NaN", (run, at) => run.lost[at] && whole(run.lost[at][0])],
  ["masked", (run, at) => run.masked[at] && whole(run.masked[at])],
  ["zeros", (run, at) => run.zero[at] > 0 && whole(run.zero[at])],
  ["subnormal in it", (run, at) => run.subnormal[at] > 0 && whole(run.subnormal[at])],
  ["SQNR against float32 [dB]", (run, at) => run.deviation[at]?.[0] != null && dB(run.deviation[at][0])],
  ["largest error", (run, at) => run.deviation[at]?.[1] != null && number(run.deviation[at][1])],
  ["largest error [ulp]", (run, at) => run.deviation[at]?.[2] != null && number(run.deviation[at][2])],
  ["largest logit", (run, at) => run.softmax[at]?.[0] != null && number(run.softmax[at][0])],
  ["range of a row's logits", (run, at) => run.softmax[at]?.[1] != null && number(run.softmax[at][1])],
  ["least entropy [nats]", (run, at) => run.softmax[at]?.[2] != null && number(run.softmax[at][2])],
  ["mean entropy [nats]", (run, at) => run.softmax[at]?.[3] != null && number(run.softmax[at][3])],
  ["largest probability", (run, at) => run.softmax[at]?.[4] != null && number(run.softmax[at][4])],
  ["largest |Σp − 1|", (run, at) => run.softmax[at]?.[5] != null && number(run.softmax[at][5])],
  ["probabilities of zero", (run, at) => run.softmax[at]?.[6] != null && percent(run.softmax[at][6])],
  ["rows fully masked", (run, at) => run.softmax[at]?.[7] > 0 && whole(run.softmax[at][7])],
];
const dB = (value) => (typeof value === "string" ? number(value) : value.toFixed(1).replace("-", "−"));

const recordTables = (run, index) => {
  const across = beside(run, index);
  const statistics = Object.entries(run.statistics).map(([name, unit], at) => [
    unit ? `${name} [${unit}]` : name,
    (other, record) => other.extra[record]?.[at] != null && number(other.extra[record][at]),
  ]);
  const rows = [];
  for (const [name, value] of [...ROWS, ...statistics]) {
    const cells = across.map(([other, record]) => (record === null ? null : value(other, record) || null));
    if (cells.some((cell) => cell !== null)) rows.push([name, ...cells]);
  }
  const tables = table(state.at ? "Record, all positions" : "Record", ["statistic", ...across.map(([other]) => other.dtype)], rows, {
    note: across.length > 1 ? "" : "This prompt ran in one dtype alone.",
  });
  const casts = run.casts[index];
  if (casts.length) {
    const each = run.formats.map((name, at) => {
      const format = formats.get(name), amax = run.largest[index];
      const [past, subnormal, zero] = casts.slice(3 * at, 3 * at + 3);
      return [name, amax ? bits(headroom(format, amax)) : null, ...[past, subnormal, zero].map((count) => (count ? whole(count) : "0"))];
    });
    tables.push(...table(`Cast from the ${run.dtype} run to`, ["format", "bits", "overflow", "subnormal", "to zero"], each, {
      note: `Headroom in bits; elements that a cast changes, of ${whole(run.elements[index])}.`,
      alarming: (row) => row[2] !== "0",
    }));
  }
  const operands = run.breaks[index]?.operands;
  if (operands?.length) tables.push(...table("Operands of what broke", ["from", "value"], operands.map(([value, site]) => [site, value === null ? null : number(value)]), { sites: true }));
  return tables;
};

const lengthTables = (seen) => {
  const rows = grid.part.runs.map((run) => {
    const records = recordsAt(run, chosen);
    const found = state.at <= run.longest ? lookUp(run, records, state.at) : NONE;
    return [run.dtype, found.amax ? near(found.amax) : null, found.amax ? bits(headroom(formats.get(state.format), found.amax)) : null, found.position === undefined ? null : token(run, found.position)];
  });
  const link = (run, found) => element("a", { href: addressOf(run.dtype, grid.part.key, `length-${found.first}`, found.site) }, found.place);
  const spans = grid.part.runs.flatMap((run) => run.spans.map((found) => [
    run.dtype, found.first === found.last ? whole(found.first) : `${whole(found.first)} to ${whole(found.last)}`,
    found.place ? link(run, found) : "none", found.where?.replace(/^at /, "") ?? null]));
  return [
    ...table(`At ${plural(state.at, "token")}`, ["dtype", "largest", "bits", "at"], rows, { note: `Finite magnitudes, within 1%; headroom in ${state.format}, in bits.` }),
    ...table("First break by length", ["dtype", "tokens", "first break", "at"], spans),
  ];
};
