// Ticks, and the caption that is being typed, outlive an update, which leaves the page's elements and gives them other
// contents. A caption is saved when its box is left or Ctrl+Enter is pressed in it.
const host = document.getElementById("dataset-images");
const picked = new Set();
let folder = null;  // whose images are shown
let typing = null;  // the name of the image whose caption box has the focus
let last = Promise.resolve();  // of the captions to save: they are sent one after the other

const cards = () => element.querySelector(".cards");
const boxes = () => [...element.querySelectorAll(".card input[type=checkbox]")];
const texts = () => [...element.querySelectorAll(".card textarea")];
const nameOf = part => part.closest(".card").dataset.name;

function say(box, line, bad) {
  const status = box.closest(".card").querySelector(".told");
  status.textContent = line;
  status.classList.toggle("bad", Boolean(bad));
}

function count() {
  document.getElementById("picked-count").textContent = `${picked.size.toLocaleString("en")} selected`;
}

function show() {
  if (!cards()) return;
  if (cards().dataset.folder !== folder) picked.clear();
  folder = cards().dataset.folder;
  boxes().forEach(box => { box.checked = picked.has(nameOf(box)); });
  for (const box of texts()) {
    if (box === document.activeElement && nameOf(box) === typing) continue;
    box.value = box.dataset.was;
    say(box, "");
    if (box === document.activeElement) box.blur();
  }
  count();
}

host.picked = () => ({ folder, names: [...picked] });
host.pick = which => {
  if (which === "none") picked.clear();
  else (which === "all" ? JSON.parse(cards().dataset.names) : boxes().map(nameOf)).forEach(name => picked.add(name));
  show();
};
host.top = (...values) => {
  if (host.getBoundingClientRect().top < 0) host.scrollIntoView();
  return values;
};

function save(box) {
  const edit = { folder, name: nameOf(box), was: box.dataset.was, text: box.value };
  if (edit.text === edit.was) return;
  box.dataset.was = edit.text;
  say(box, "saving");
  last = last.then(() => send(edit));
}

async function send(edit) {
  const answer = await server.save_caption(edit)
    .catch(() => ({ error: "The server does not answer: this caption is not saved." }));
  const box = folder === edit.folder && texts().find(box => nameOf(box) === edit.name);
  if (!answer.error) trigger("saved");
  else if (!box) trigger("refused", { line: `${edit.name}: ${answer.error}` });
  if (!box) return;
  if (box.dataset.was === edit.text) box.dataset.was = answer.error ? edit.was : answer.text;
  if (box.value === edit.text && !answer.error) box.value = answer.text;
  say(box, answer.error || "saved", answer.error);
}

// An image as large as it fits, with its reference image beside it if it has one.
const enlarged = document.createElement("dialog");
enlarged.id = "enlarged";
enlarged.className = "enlarged";
enlarged.addEventListener("click", () => enlarged.close());
document.body.append(enlarged);

async function enlarge(name) {
  const answer = await server.enlarge({ folder, name }).catch(() => ({ error: "The server does not answer." }));
  if (answer.error) return trigger("refused", { line: answer.error });
  const figures = answer.images.map(([title, source]) => {
    const figure = document.createElement("figure"), image = new Image(), line = document.createElement("figcaption");
    image.addEventListener("load", () => {
      image.classList.toggle("small", image.naturalWidth <= 144);
      // The style sheet shows a small image at a whole multiple of its size: of at most these widths.
      for (const [name, most] of [["times", 400], ["few", 150]])
        image.style.setProperty(`--${name}`, Math.max(1, Math.floor(most / image.naturalWidth)));
      image.style.setProperty("--own", `${image.naturalWidth}px`);
    });
    image.src = source;
    image.alt = `${title} of ${name}`;
    line.textContent = answer.images.length > 1 ? title : name;
    figure.append(image, line);
    return figure;
  });
  const close = document.createElement("div");
  close.innerHTML = '<button type="button">Close</button>';
  enlarged.setAttribute("aria-label", name);
  enlarged.replaceChildren(...figures.reverse(), close);  // the reference image first: it becomes the image
  enlarged.showModal();
}

element.addEventListener("change", event => {
  if (!event.target.matches(".card input[type=checkbox]")) return;
  picked[event.target.checked ? "add" : "delete"](nameOf(event.target));
  count();
});
element.addEventListener("click", event => {
  const button = event.target.closest(".card .enlarge");
  if (button) enlarge(nameOf(button));
});
element.addEventListener("focusin", event => {
  if (event.target.matches(".card textarea")) typing = nameOf(event.target);
});
element.addEventListener("focusout", event => event.target.matches(".card textarea") && save(event.target));
element.addEventListener("keydown", event => {
  const box = event.target;
  if (!box.matches(".card textarea")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(box);
  if (event.key !== "Escape") return;
  box.value = box.dataset.was;
  say(box, "");
});
watch("value", show);
show();
