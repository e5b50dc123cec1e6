// Words and numbers, and elements that hold them: text is text, whatever is in it.

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
