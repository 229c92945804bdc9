// Rows with buttons, and notes that are saved when their box is left. What is written and not saved yet, and the place
// where one is by the keyboard, outlive an update, which leaves the page's elements and gives them other contents.
const drafts = new Map();
const sent = new Map();  // notes on their way to the server, by name
let at = null;

const rowOf = part => part.closest("[data-name]");
const nameOf = part => rowOf(part).dataset.name;
const named = name => [...element.querySelectorAll("[data-name]")].find(row => row.dataset.name === name);

async function save(box) {
  const name = nameOf(box), said = rowOf(box).querySelector(".told"), text = box.value;
  if (text === box.dataset.was) return drafts.delete(name);
  if (text === sent.get(name)) return;  // Ctrl+Enter, and the box was left before the answer
  sent.set(name, text);
  said.textContent = "saving";
  const answer = await server.save_notes({ name, was: box.dataset.was, text })
    .catch(() => ({ error: "The server does not answer: these notes are not saved." }));
  sent.delete(name);
  if (!answer.error) {
    if (drafts.get(name)?.text === text) drafts.delete(name);
    else if (drafts.has(name)) drafts.get(name).was = answer.notes;
  }
  const row = named(name);  // which may be another one by now
  if (!row) return;
  if (!answer.error) row.querySelector("textarea").dataset.was = answer.notes;
  row.querySelector(".told").textContent = answer.error || "saved";
  row.querySelector(".told").classList.toggle("bad", Boolean(answer.error));
}

function restore() {
  for (const box of element.querySelectorAll("textarea")) {
    const draft = drafts.get(nameOf(box));
    if (draft) box.dataset.was = draft.was;
    const text = draft ? draft.text : box.dataset.was;
    if (box.value !== text) box.value = text;
  }
  const here = document.activeElement;
  if (!at || (here !== document.body && !element.contains(here))) return;
  const row = named(at.name) || element.querySelector("[data-name]");
  const part = row?.querySelector(`${at.what}:not(:disabled)`) || row?.querySelector("button:not(:disabled)");
  if (!part || part === here) return;
  part.focus();
  if (part.matches("textarea")) part.setSelectionRange(...at.range);
}

// An update gives a button to another row: who presses one and finds another under the finger has not meant that.
let pressed = null;
element.addEventListener("pointerdown", event => {
  const part = event.target.closest("button[data-do]");
  pressed = part && { do: part.dataset.do, name: nameOf(part) };
});
element.addEventListener("click", event => {
  const part = event.target.closest("button[data-do]");
  if (!part) return;
  const found = { do: part.dataset.do, name: nameOf(part) };
  const byPointer = event.detail > 0;
  if (byPointer && pressed && (pressed.do !== found.do || pressed.name !== found.name)) return;
  if (found.do === "trash" && !confirm(`Move ${found.name} to the trash?`)) return;
  if (found.do === "rename") found.to = prompt(`New name of ${found.name}:`, found.name);
  if (found.do === "rename" && (!found.to || found.to === found.name)) return;
  trigger("acted", found);
});
element.addEventListener("input", event => {
  if (event.target.matches("textarea"))
    drafts.set(nameOf(event.target), { text: event.target.value, was: event.target.dataset.was });
});
element.addEventListener("change", event => event.target.matches("textarea") && save(event.target));
element.addEventListener("keydown", event => {
  if (event.target.matches("textarea") && event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event.target);
});
// Where one is; a click elsewhere takes one away.
for (const kind of ["focusin", "keyup", "pointerup"]) element.addEventListener(kind, event => {
  if (!event.target.matches("textarea, button[data-do]")) return;
  const { selectionStart, selectionEnd, dataset } = event.target;
  at = { name: nameOf(event.target), what: dataset.do ? `[data-do="${dataset.do}"]` : "textarea",
    range: [selectionStart, selectionEnd] };
});
document.addEventListener("pointerdown", event => { if (!element.contains(event.target)) at = null; });
watch("value", restore);
