// Ticks outlive a change of page, and a caption is saved when its box is left or Ctrl+Enter is pressed in it.
const host = document.getElementById("dataset-images");
const picked = new Set();
let folder = null;

const cards = () => element.querySelector(".cards");
const boxes = () => [...element.querySelectorAll(".card input[type=checkbox]")];
const nameOf = part => part.closest(".card").dataset.name;

function tell() {
  document.querySelectorAll("#picked-count").forEach(line => {
    line.textContent = `${picked.size.toLocaleString("en")} ticked`;
  });
}

// What is ticked and still there, after another page, another filter or another folder is shown.
function restore() {
  if (!cards()) return;
  if (cards().dataset.folder !== folder) picked.clear();
  folder = cards().dataset.folder;
  boxes().forEach(box => { box.checked = picked.has(nameOf(box)); });
  tell();
}

host.picked = () => [...picked];
host.pick = which => {
  const page = boxes().map(nameOf);
  if (which === "none") picked.clear();
  else (which === "all" ? JSON.parse(cards().dataset.names) : page).forEach(name => picked.add(name));
  restore();
};

async function save(box) {
  const said = box.closest(".card").querySelector(".told");
  if (box.readOnly || box.value === box.dataset.was) return;
  const text = box.value;
  said.textContent = "saving";
  const answer = await server.save_caption({
    folder, name: nameOf(box), was: box.dataset.was, text, settings: host.settings ? host.settings() : [],
  }).catch(() => ({ error: "The server does not answer: this caption is not saved." }));
  if (!answer.error) box.dataset.was = text;
  said.textContent = answer.error || "saved";
  said.classList.toggle("bad", Boolean(answer.error));
  if (!answer.error) trigger("saved");
}

element.addEventListener("change", event => {
  const part = event.target;
  if (part.matches(".card input[type=checkbox]")) {
    picked[part.checked ? "add" : "delete"](nameOf(part));
    tell();
  }
  if (part.matches(".card textarea")) save(part);
});
element.addEventListener("keydown", event => {
  if (!event.target.matches(".card textarea")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event.target);
  if (event.key === "Escape") event.target.value = event.target.dataset.was;
});
watch("value", restore);
restore();
