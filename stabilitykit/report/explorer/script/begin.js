// The explorer: a map of layers × sites, and the record of the cell that is chosen in it.
//
// The files of this folder are parts of one function, which scripts.html.jinja puts together in the order of assets.py.
// Records come in columns (explorer/data.py). A group is the runs of one prompt that differ in dtype alone: of kind "run",
// with a record a tensor, or of kind "lengths", with the peaks of one text at every length.

const root = document.getElementById("explorer");
const packed = document.getElementById("explorer-data");
const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
const data = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
packed.remove();

const find = (selector) => root.querySelector(selector);
const form = find("form"), map = find(".map"), workbench = find(".workbench");
const formats = new Map(data.formats.map((format) => [format.name, format]));
const state = { group: data.start[0], run: data.start[1], side: false, at: 0, format: data.form, filter: "", inside: false };
let chosen = null; // the cell whose record is shown
let grid = null; // what is drawn: its runs, columns, rows of cells
