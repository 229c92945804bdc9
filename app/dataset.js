// Ticks, and captions that are written and not saved yet, outlive an update, which leaves the page's elements and gives
// them other contents. A caption is saved when its box is left or Ctrl+Enter is pressed in it.
const host = document.getElementById("dataset-images");
const picked = new Set();
const drafts = new Map();  // of all folders, each with what its caption was when it was begun
let folder = null;  // which the images are of: another one may be chosen by now
let at = null;
let asked = "";  // of which images the last page was
let page = 1;  // which is wanted: the one that is shown may be on its way still
let turned = false;  // to that page, which is read from its top
const saved = new Map();  // captions that were written here

const cards = () => element.querySelector(".cards");
const boxes = () => [...element.querySelectorAll(".card input[type=checkbox]")];
const texts = () => [...element.querySelectorAll(".card textarea")];
const nameOf = part => part.closest(".card").dataset.name;
const keyOf = part => JSON.stringify([folder, nameOf(part)]);
const boxOf = key => texts().find(box => keyOf(box) === key);

function tell() {
  document.querySelectorAll("#picked-count").forEach(line => {
    line.textContent = `${picked.size.toLocaleString("en")} selected`;
  });
}

function say(box, line, bad) {
  const said = box.closest(".card").querySelector(".told");
  said.textContent = line;
  said.classList.toggle("bad", Boolean(bad));
}

// A box that has been typed in does not follow its text in the page.
function fill(box) {
  const draft = drafts.get(keyOf(box)), text = draft ? draft.text : box.dataset.was;
  if (box.value !== text) box.value = text;
  if (draft) say(box, draft.refused || "not saved yet", draft.refused);
  else if (saved.get(keyOf(box)) === text) say(box, "saved");
}

// Who types goes on in the box of the same image, never in another one's.
function follow(here, range) {
  const box = boxOf(at);
  if (box === here) return;
  if (!box) return here.blur();
  box.focus();
  box.setSelectionRange(...range);
}

// What is ticked or written and still there, after another page, another filter or another folder is shown.
function restore() {
  if (!cards()) return;
  const here = texts().find(box => box === document.activeElement);
  const range = here && [here.selectionStart, here.selectionEnd];
  if (cards().dataset.folder !== folder) picked.clear();
  folder = cards().dataset.folder;
  boxes().forEach(box => { box.checked = picked.has(nameOf(box)); });
  texts().forEach(fill);
  if (here) follow(here, range);
  if (turned && host.getBoundingClientRect().top < 0) host.scrollIntoView();
  turned = false;
  tell();
}

host.picked = () => ({ folder, names: [...picked] });
host.pick = which => {
  const page = boxes().map(nameOf);
  if (which === "none") picked.clear();
  else (which === "all" ? JSON.parse(cards().dataset.names) : page).forEach(name => picked.add(name));
  restore();
};

// Other images begin with their first page.
host.asks = values => {
  const images = JSON.stringify(values.slice(0, -1));
  if (images !== asked) page = 1;
  asked = images;
  return [...values.slice(0, -1), page];
};
host.renew = () => trigger("submit");  // a name of Gradio's own, which can be one of several
host.turn = number => {
  page = number;
  turned = true;
  host.renew();
};
host.next = by => {
  const last = Number(cards()?.dataset.last || 1);
  host.turn(Math.min(Math.max(Math.min(page, last) + by, 1), last));
};

async function save(box) {
  const key = keyOf(box), name = nameOf(box), draft = drafts.get(key);
  if (!draft || draft.sent) return;
  if (draft.text === draft.was) return drop(box);
  const { was, text } = draft, [chosen, ...settings] = host.chosen || [folder];
  draft.sent = true;
  say(box, "saving");
  const answer = await server.save_caption({ folder, chosen, name, was, text, settings })
    .catch(() => ({ error: "The server does not answer: this caption is not saved." }));
  draft.sent = false;
  draft.refused = answer.error;
  const now = drafts.get(key), row = boxOf(key);  // which may be another one by now, or on another page
  if (answer.error) {
    if (row && now) fill(row);
    else if (now) trigger("refused", { line: `${name}: ${answer.error}` });
    return;
  }
  saved.set(key, answer.text);
  if (now?.text === text) drafts.delete(key);
  else if (now) now.was = answer.text;
  if (row) {
    row.dataset.was = answer.text;
    say(row, "saved");
    fill(row);
    if (row !== document.activeElement) save(row);  // what was written while this was on its way
  }
  host.renew();
}

// An image as large as it fits, with its reference image beside it if it has one.
const enlarged = document.createElement("dialog");
enlarged.id = "enlarged";
enlarged.className = "enlarged";
enlarged.addEventListener("click", () => enlarged.close());
document.body.append(enlarged);

async function enlarge(button) {
  const name = nameOf(button), [chosen, ...settings] = host.chosen || [folder];
  const answer = await server.enlarge({ folder, chosen, name, settings })
    .catch(() => ({ error: "The server does not answer." }));
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

// The caption as it is, for what was written instead.
function drop(box) {
  drafts.delete(keyOf(box));
  say(box, "");
  fill(box);
}

element.addEventListener("change", event => {
  const part = event.target;
  if (!part.matches(".card input[type=checkbox]")) return;
  picked[part.checked ? "add" : "delete"](nameOf(part));
  tell();
});
element.addEventListener("click", event => {
  const button = event.target.closest(".card .enlarge");
  if (button) enlarge(button);
});
element.addEventListener("input", event => {
  const box = event.target;
  if (!box.matches(".card textarea")) return;
  const draft = drafts.get(keyOf(box));
  if (draft) draft.text = box.value;
  else drafts.set(keyOf(box), { text: box.value, was: box.dataset.was });
});
element.addEventListener("focusin", event => { if (event.target.matches(".card textarea")) at = keyOf(event.target); });
element.addEventListener("focusout", event => event.target.matches(".card textarea") && save(event.target));
element.addEventListener("keydown", event => {
  if (!event.target.matches(".card textarea")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event.target);
  if (event.key === "Escape") drop(event.target);
});
watch("value", restore);
restore();
