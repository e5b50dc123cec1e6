// Records: what a cell is at a position or a length.

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
