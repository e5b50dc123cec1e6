// The address of a view, and the view of an address.

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
  refresh();
  if (index >= 0) {
    const own = part.runs[state.run];
    const line = grid.lines.find((known) => known.number === own.row[index]);
    if (line?.hidden) {
      state.filter = form.filter.value = "";
      filter();
    }
    choose(line?.cells.find((cell) => cell.run === state.run && cell.layer === own.layer[index]) ?? notable());
  } else choose(notable());
  return true;
};
const usualLength = (run) => run.spans.find((found) => found.place)?.first ?? run.longest;
