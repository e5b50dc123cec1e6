"use strict";

// The explorer: a grid of layers × sites, and the record of the cell that is chosen in it.
//
// Records come in columns (explorer/data.py). A group is the runs of one prompt that differ in dtype alone: of kind "run",
// with a record a tensor, or of kind "lengths", with the peaks of one text at every length. State is in the address:
// #explore/DTYPE/RUN/AT/SITE, where AT is all, token-12 or length-143, and "-" keeps what is chosen.
(async () => {
  const root = document.getElementById("explorer");
  const packed = document.getElementById("explorer-data");
  if (!root || !packed) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  const data = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  packed.remove();

  const find = (selector) => root.querySelector(selector);
  const form = find("form"), map = find(".map"), workbench = find(".workbench");
  const formats = new Map(data.formats.map((format) => [format.name, format]));
  const state = { group: data.start[0], run: data.start[1], side: false, at: 0, format: data.form, filter: "", inside: false };
  let chosen = null; // the cell whose record is shown
  let grid = null; // what is drawn: its runs, columns, rows of cells

  // Words and numbers

  const text = (number) => (number < 0 ? null : data.texts[number]);
  const number = (value) => {
    if (typeof value === "string") return { nan: "NaN", inf: "inf", "-inf": "−inf" }[value];
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(3).replace(/\.?0*e\+?/, "e").replaceAll("-", "−");
    const said = size >= 1000 ? Math.round(value).toLocaleString("en-GB") : String(Number(value.toPrecision(4)));
    return said.replace("-", "−");
  };
  const near = (value) => number(Number(value.toPrecision(3))); // of what is kept within 2%
  const whole = (value) => value.toLocaleString("en-GB");
  const bits = (value) => (Math.abs(value) < 1 ? value.toFixed(2) : value.toFixed(1)).replace("-", "−");
  const percent = (share) => `${Number((100 * share).toPrecision(share < 0.01 ? 2 : 3))}%`;
  const power = (exponent) => `2${String(exponent).replace(/[-\d]/g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"[sign === "-" ? 0 : Number(sign) + 1])}`;
  const quoted = (token) => {
    if (/^\(id \d+\)$/.test(token)) return token;
    const shown = token.replace(/[\p{Cc}\p{Zl}\p{Zp}]/gu, (letter) => JSON.stringify(letter).slice(1, -1));
    return shown.includes("'") && !shown.includes('"') ? `"${shown}"` : `'${shown}'`;
  };
  const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

  const element = (tag, properties = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  // Records

  const summed = (steps) => {
    let sum = 0;
    return steps.map((step) => (sum += step));
  };

  const group = () => data.groups[state.group];
  const isLengths = () => group().kind === "lengths";

  // Once for each group: the differences undone, and of each run its records by row and layer.
  const opened = new Set();
  const open = (part) => {
    if (opened.has(part)) return part;
    opened.add(part);
    const firstProfiles = new Map();
    part.layers = 1 + Math.max(-1, ...part.runs.flatMap((run) => [run.layer.reduce((a, b) => Math.max(a, b), -1)]));
    for (const run of part.runs) {
      run.order = summed(run.order);
      run.cells = new Map();
      run.row.forEach((row, index) => {
        const place = row * (part.layers + 1) + run.layer[index] + 1;
        if (!run.cells.has(place)) run.cells.set(place, []);
        run.cells.get(place).push(index);
      });
      if (part.kind === "lengths") {
        const peaks = summed(run.peaks);
        let from = 0;
        run.curves = run.grows.map((count) => {
          const curve = { positions: summed(run.positions.slice(from, from + count)), peaks: peaks.slice(from, from + count) };
          from += count;
          return curve;
        });
        continue;
      }
      for (const [key, profile] of Object.entries(run.profile)) {
        const index = Number(key);
        const place = [run.row[index], run.layer[index], run.step[index], run.positions[index]].join();
        const first = firstProfiles.get(place);
        if (first) profile.forEach((step, at) => (profile[at] = step + first[at]));
        else firstProfiles.set(place, profile);
      }
      run.largest = run.least.map((least, index) => run.amax[index] ?? (least === null ? null : Math.max(-least, run.most[index])));
    }
    return part;
  };

  const magnitude = (steps, kind) => (steps <= data.nothing / 2 ? 0 : 2 ** (steps / data.steps[kind]));
  const start = (run, index) => run.starts[run.step[index]] ?? 0;
  const span = (run, length) => run.spans.find((found) => found.first <= length && length <= found.last);

  // What a cell is at a position or a length: { kind: breaks, lost, value, zero or none; index; amax; part }.
  const NONE = { kind: "none" };
  const lookUp = (run, records, at) => {
    if (!records) return NONE;
    if (isLengths()) return lookUpLength(run, records, at);
    return at === 0 ? worst(run, records) : lookUpToken(run, records, at - 1);
  };
  const worst = (run, records) => {
    let best = records[0];
    for (const index of records) {
      if (run.breaks[index]) return { kind: "breaks", index, amax: run.largest[index] };
      if (run.lost[index] && !run.lost[best]) best = index;
      else if (!run.lost[best] && (run.largest[index] ?? -1) > (run.largest[best] ?? -1)) best = index;
    }
    const amax = run.largest[best];
    const kind = run.lost[best] ? "lost" : amax === null ? "none" : amax === 0 ? "zero" : "value";
    return { kind, index: best, amax };
  };
  const lookUpToken = (run, records, position) => {
    for (const index of records) {
      const at = position - start(run, index);
      const profile = run.profile[index];
      if (!profile || at < 0 || at >= profile.length) continue;
      const amax = magnitude(profile[at], "run");
      if (run.breaks[index]?.positions.includes(position)) return { kind: "breaks", index, amax, part: true };
      const kind = amax > 0 ? "value" : run.lost[index] ? "lost" : "zero";
      return { kind, index, amax, part: true };
    }
    return NONE;
  };
  const lookUpLength = (run, records, length) => {
    const found = span(run, length);
    if (!found) return NONE;
    const index = records.find((record) => run.pass[record] === found.pass);
    const known = index ?? records[0]; // what a broken pass holds after its break is not kept
    if (run.order[known] > (found.order ?? Infinity)) return { kind: "lost", index: known, amax: null, span: found };
    if (index === undefined) return NONE;
    const curve = run.curves[index];
    let step = -1;
    while (step + 1 < curve.positions.length && curve.positions[step + 1] < length) step += 1;
    if (step < 0) return NONE;
    const amax = magnitude(curve.peaks[step], "lengths");
    const kind = found.order === run.order[index] ? "breaks" : amax > 0 ? "value" : "zero";
    return { kind, index, amax, position: curve.positions[step], span: found, part: true };
  };

  const overflows = (format, amax) =>
    format.edge !== "inf" && (amax > format.edge || (format.tie && amax === format.edge));
  const headroom = (format, amax) => Math.log2(format.largest / amax);
  const classOf = (seen) => {
    if (seen.kind !== "value") return seen.kind;
    const format = formats.get(state.format);
    if (overflows(format, seen.amax)) return "over";
    const room = Math.max(headroom(format, seen.amax), 0);
    return data.classes.findLast((found) => room >= found.least).key;
  };
  const numeral = (seen) => {
    if (seen.kind === "breaks") return "×";
    if (seen.kind === "lost") return "–";
    if (seen.kind === "zero") return "0s";
    if (seen.kind === "none") return "";
    const format = formats.get(state.format);
    const room = headroom(format, seen.amax);
    if (overflows(format, seen.amax)) return `−${Math.max(1, Math.ceil(-room))}`;
    return String(Math.max(0, Math.floor(room)));
  };

  // The map

  const rowName = (row) => {
    const [stack, label, path] = row;
    const prefix = text(stack) ? `${text(stack)}: ` : "";
    return prefix + (text(label) ?? text(path));
  };
  const placeOf = (cell) => {
    const named = rowName(cell.line.row);
    return cell.layer < 0 ? named : `layer ${cell.layer}, ${named}`;
  };

  const build = () => {
    const part = open(group());
    const runs = state.side ? part.runs.map((_, index) => index) : [state.run];
    const columns = runs.flatMap((run) => Array.from({ length: part.layers + 1 }, (_, at) => ({ run, layer: at - 1 })));
    const shown = part.rows.map((_, row) => part.runs.some((run) => isLengths() || judgedRows(run).has(row)));
    const heading = element("div", { role: "row", className: "line head" }, element("div", { role: "columnheader", className: "name" }, "site"));
    for (const { run, layer } of columns) {
      const spoken = `${state.side ? `${part.runs[run].dtype}, ` : ""}${layer < 0 ? "outside the layers" : `layer ${layer}`}`;
      const name = layer < 0 ? "–" : String(layer);
      const head = element("div", { role: "columnheader", className: layer < 0 ? "cell outside" : "cell", "aria-label": spoken, title: spoken }, name);
      heading.append(head);
    }
    const lines = [];
    part.rows.forEach((row, at) => {
      if (!shown[at] && !state.inside) return;
      const sites = new Set();
      const line = { row, cells: [], element: element("div", { role: "row", className: "line" }), hidden: false };
      line.element.append(element("div", { role: "rowheader", className: "name", title: text(row[2]) }, rowName(row)));
      for (const { run, layer } of columns) {
        const records = part.runs[run].cells.get(at * (part.layers + 1) + layer + 1);
        const cell = { line, run, layer, records, look: "cell none", numeral: "", column: line.cells.length };
        cell.element = element("div", { role: "gridcell", className: cell.look }, "");
        if (records) {
          cell.element.tabIndex = -1;
          for (const index of records) sites.add(text(part.runs[run].site[index]));
        }
        cell.element.cell = cell;
        cell.text = cell.element.appendChild(document.createTextNode(""));
        line.cells.push(cell);
        line.element.append(cell.element);
      }
      line.words = `${rowName(row)} ${text(row[2])} ${[...sites].join(" ")}`.toLowerCase();
      lines.push(line);
    });
    const heads = state.side && part.runs.length > 1 ? [dtypeHeads(part)] : [];
    map.replaceChildren(...heads, heading, ...lines.map((line) => line.element));
    map.setAttribute("aria-label", `Headroom by site and layer: ${part.name}`);
    root.classList.toggle("side", state.side && part.runs.length > 1);
    grid = { part, runs, columns, lines, heading };
    fit();
    filter();
    paint();
  };
  const judgedRows = (run) => (run.judgedRows ??= new Set(run.row.filter((_, index) => run.judged[index])));
  const dtypeHeads = (part) => {
    const line = element("div", { role: "row", className: "line head dtypes" }, element("div", { role: "columnheader", className: "name" }, "dtype"));
    for (const run of part.runs) {
      const head = element("div", { role: "columnheader", className: "over-all", "aria-colspan": part.layers + 1 }, run.dtype);
      head.style.gridColumn = `span ${part.layers + 1}`;
      line.append(head);
    }
    return line;
  };

  // Cells as wide as there is room for, with their numbers where these can be read.
  const fit = () => {
    const names = parseFloat(getComputedStyle(map).getPropertyValue("--names")) * parseFloat(getComputedStyle(document.documentElement).fontSize);
    const each = Math.max(8, Math.min(34, Math.floor((map.clientWidth - names - 2) / grid.columns.length)));
    map.style.setProperty("--cell", `${each}px`);
    map.style.setProperty("--columns", grid.columns.length);
    map.classList.toggle("narrow", each < 17);
    const step = each < 17 ? Math.ceil(17 / each) : 1;
    [...grid.heading.children].slice(1).forEach((head, at) => head.classList.toggle("quiet", grid.columns[at].layer % step !== 0));
  };

  const paint = () => {
    for (const line of grid.lines) {
      for (const cell of line.cells) {
        if (!cell.records) continue;
        const seen = lookUp(grid.part.runs[cell.run], cell.records, state.at);
        const look = `cell ${classOf(seen)}${cell === chosen ? " chosen" : ""}`;
        if (look !== cell.look) cell.element.className = cell.look = look;
        const said = numeral(seen);
        if (said !== cell.numeral) cell.text.data = cell.numeral = said;
      }
    }
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
    if (!chosen || chosen.line.hidden) rove(firstCell());
    else rove(chosen);
  };
  const firstCell = () => grid.lines.find((line) => !line.hidden)?.cells.find((cell) => cell.records) ?? null;
  let roving = null;
  const rove = (cell) => {
    if (roving) roving.element.tabIndex = -1;
    roving = cell;
    if (cell) cell.element.tabIndex = 0;
  };

  const choose = (cell, { focus = false } = {}) => {
    if (chosen) {
      chosen.element.className = chosen.look = chosen.look.replace(" chosen", "");
      chosen.element.removeAttribute("aria-selected");
      headOf(chosen)?.classList.remove("chosen");
      chosen.line.element.classList.remove("chosen");
    }
    chosen = cell;
    if (!cell) return show();
    cell.element.className = cell.look = `${cell.look} chosen`;
    cell.element.setAttribute("aria-selected", "true");
    headOf(cell)?.classList.add("chosen");
    cell.line.element.classList.add("chosen");
    rove(cell);
    if (focus) cell.element.focus({ preventScroll: false });
    return show();
  };
  const headOf = (cell) => grid.heading.children[cell.column + 1];

  // The cell of the same place once the map was built anew; else that of the first break, else of the least headroom.
  const chooseAgain = (before) => {
    chosen = null;
    const same = before && grid.lines.find((line) => line.row === before.row || (line.row[2] === before.row[2] && line.row[0] === before.row[0]));
    const cell = same?.cells.find((found) => found.records && found.layer === before.layer && (found.run === before.run || !state.side));
    choose(cell ?? notable());
  };
  const notable = () => {
    let best = null, least = Infinity;
    for (const line of grid.lines) {
      for (const cell of line.cells) {
        if (!cell.records || cell.run !== state.run) continue;
        const run = grid.part.runs[cell.run];
        const seen = lookUp(run, cell.records, state.at);
        if (seen.kind === "none" || (seen.kind !== "breaks" && (seen.kind !== "value" || !isJudged(run, seen.index)))) continue;
        const rank = seen.kind === "breaks" ? run.order[seen.index] - 1e12 : headroom(formats.get(state.format), seen.amax);
        if (rank < least) [best, least] = [cell, rank];
      }
    }
    return best ?? firstCell();
  };
  const isJudged = (run, index) => isLengths() || run.judged[index] === 1;
  const placeBefore = () => chosen && { row: chosen.line.row, layer: chosen.layer, run: chosen.run };

  // The record

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
      const records = other.cells.get(chosen.line.cells.length && grid.part.rows.indexOf(chosen.line.row) * (grid.part.layers + 1) + chosen.layer + 1);
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
      const records = run.cells.get(grid.part.rows.indexOf(chosen.line.row) * (grid.part.layers + 1) + chosen.layer + 1);
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

  // Curves, drawn by uPlot; under each the same numbers as a table

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
      const records = run.cells.get(grid.part.rows.indexOf(chosen.line.row) * (grid.part.layers + 1) + chosen.layer + 1);
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

  // The address

  let noted = null;
  const remember = () => {
    clearTimeout(noted);
    noted = setTimeout(() => {
      if (!settled) return;
      try {
        history.replaceState(null, "", address());
      } catch {
        // Where the page may not change its address, the button still gives the link.
      }
    }, 350);
  };
  let settled = false; // whether the reader has chosen anything: a page that is only read keeps its address
  const address = () => {
    const at = isLengths() ? `length-${state.at}` : state.at ? `token-${state.at - 1}` : "all";
    const seen = chosen && lookUp(grid.part.runs[chosen.run], chosen.records, state.at);
    const site = chosen ? text(grid.part.runs[chosen.run].site[seen.index ?? chosen.records[0]]) : "-";
    const dtype = grid.part.runs[chosen ? chosen.run : state.run].dtype;
    const more = new URLSearchParams();
    if (state.format !== data.form) more.set("format", state.format);
    if (state.filter) more.set("filter", state.filter);
    if (state.side) more.set("view", "dtypes");
    return `${addressOf(dtype, grid.part.key, at, site)}${more.size ? `?${more}` : ""}`;
  };
  const addressOf = (dtype, run, at, site) => `#explore/${[dtype, run, at, ...site.split("/")].map(encodeURIComponent).join("/")}`;
  const restore = (hash) => {
    const [, path, query = ""] = /^#explore\/([^?]*)\??(.*)$/.exec(hash) ?? [];
    if (path === undefined) return false;
    let parts;
    try {
      parts = path.split("/").map(decodeURIComponent);
    } catch {
      return false;
    }
    const [dtype = "-", run = "-", at = "-"] = parts;
    const site = parts.slice(3).join("/") || "-";
    const more = new URLSearchParams(query);
    if (formats.has(more.get("format"))) state.format = more.get("format");
    state.filter = more.get("filter") ?? "";
    state.side = more.get("view") === "dtypes";
    const named = data.groups.findIndex((part) => part.key === run);
    const holds = (part) => site === "-" || part.runs.some((found) => found.site.some((known) => text(known) === site));
    if (named >= 0) state.group = named;
    else if (!holds(group())) state.group = Math.max(0, data.groups.findIndex(holds));
    const part = open(group());
    const found = part.runs.findIndex((known) => known.dtype === dtype);
    const has = (index) => part.runs[index].site.some((known) => text(known) === site);
    if (found >= 0) state.run = found;
    else if (state.run >= part.runs.length || (site !== "-" && !has(state.run))) state.run = Math.max(0, part.runs.findIndex((_, index) => has(index)));
    const [, count] = /^(?:token|length)-(\d+)$/.exec(at) ?? [];
    if (count !== undefined) state.at = isLengths() ? Number(count) : Number(count) + 1;
    else if (at === "all" || named >= 0) state.at = isLengths() ? usualLength(part.runs[state.run]) : 0;
    const index = part.runs[state.run].site.findIndex((known) => text(known) === site);
    if (index >= 0 && !isLengths() && !judgedRows(part.runs[state.run]).has(part.runs[state.run].row[index])) state.inside = true;
    chosen = null;
    refresh();
    if (index >= 0) {
      const own = part.runs[state.run];
      const line = grid.lines.find((known) => known.row === part.rows[own.row[index]]);
      if (line?.hidden) {
        state.filter = form.filter.value = "";
        filter();
      }
      choose(line?.cells.find((cell) => cell.run === state.run && cell.layer === own.layer[index]) ?? notable());
    } else choose(notable());
    return true;
  };
  const usualLength = (run) => run.spans.find((found) => found.place)?.first ?? run.longest;

  // Controls

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
    const before = placeBefore();
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
      chosen = null;
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
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show());
  let width = 0;
  new ResizeObserver(() => {
    if (!grid || workbench.clientWidth === width) return;
    width = workbench.clientWidth;
    fit();
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
})();
