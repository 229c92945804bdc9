// A search box for the options in the collapsed groups. Gradio only makes the fields of a group while it is open: fields
// are hidden by a style sheet, which also applies to those that come later.
const box = element.querySelector("input"), line = element.querySelector("p"), sheet = document.createElement("style");
const options = JSON.parse(element.querySelector("[data-options]").dataset.options);
const opened = new Set();  // groups that the search has opened
document.head.append(sheet);

const header = group => document.querySelector(`#${group} > button`);
const isOpen = group => header(group)?.classList.contains("open");

function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = options.filter(option => words.every(word => option.text.includes(word)));
  const groups = new Set(found.map(option => option.group)), all = new Set(options.map(option => option.group));
  groups.delete("");
  all.delete("");
  const others = options.filter(option => option.group && !found.includes(option)).map(option => `#flag-${option.name}`);
  const hidden = words.length ? [...others, ...[...all].filter(group => !groups.has(group)).map(group => `#${group}`)] : [];
  sheet.textContent = hidden.length ? `${hidden.join(",")} { display: none !important; }` : "";
  for (const group of all) {
    const wanted = Boolean(words.length && groups.has(group));
    if (wanted ? isOpen(group) : !(opened.has(group) && isOpen(group))) continue;
    header(group)?.click();
    opened[wanted ? "add" : "delete"](group);
  }
  const above = found.filter(option => !option.group).map(option => option.label), below = found.length - above.length;
  const parts = [`${below || "no"} option${below === 1 ? "" : "s"} below`];
  if (above.length) parts.push(`above: ${above.join(", ")}`);
  line.textContent = words.length ? parts.join("; ") : "";
}

box.addEventListener("input", search);
box.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  box.value = "";
  search();
});
