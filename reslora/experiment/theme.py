"""Style sheet and script of the report, which is a single HTML file."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1b1d21; --soft: #565b64;
  --edge: #d9dbdf; --accent: #1d5fbf; --good: #1f6b33; --bad: #a3301f; --good-back: #e3f3e6; --bad-back: #fbe7e3;
  --plain-back: #ecedef; --c0: #5c6370; --c1: #c2410c; --c2: #1d5fbf; --c3: #2b7a3d; --c4: #8a3ab9; --c5: #0b7285;
  --c6: #a61e4d; --c7: #7a5c00; --shade: #0004; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --text: #e9eaec; --soft: #a9aeb8;
  --edge: #3a3f48; --accent: #7db4ff; --good: #8fdfa3; --bad: #ffa696; --good-back: #17351f; --bad-back: #43201a;
  --plain-back: #2b2f37; --c0: #b0b7c3; --c1: #ff9d5c; --c2: #7db4ff; --c3: #7ddb95; --c4: #d9a6ff; --c5: #5fd4e3;
  --c6: #ff8fb1; --c7: #e8c65a; --shade: #fff4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1340px; margin: 0 auto; padding: 20px 16px 48px; }
header p { color: var(--soft); margin: 0; } header .lead { color: var(--text); font-size: 1.1rem; }
h1 { font-size: clamp(1.05rem, .7rem + 1.5vw, 2rem); line-height: 1.25; margin: 4px 0 10px; overflow-wrap: anywhere; }
h1 { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
h2 { font-size: 1.15rem; margin: 36px 0 10px; }
p { margin: 8px 0; max-width: 75ch; overflow-wrap: anywhere; }
/* A shadow at an edge beyond which the table goes on. */
.scroll { overflow-x: auto; border: 1px solid var(--edge); border-radius: 8px; background:
  linear-gradient(90deg, var(--card) 30%, transparent) 0 0 / 40px 100% no-repeat local,
  linear-gradient(270deg, var(--card) 30%, transparent) 100% 0 / 40px 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) 0 0 / 14px 100% no-repeat,
  linear-gradient(270deg, var(--shade), transparent) 100% 0 / 14px 100% no-repeat, var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; border-top: 1px solid var(--edge); }
td, thead th { white-space: nowrap; }
/* On a narrow screen, each row of the verdicts is a card. */
@media (max-width: 640px) { .cards thead { display: none; } .cards tr, .cards th, .cards td { display: block; }
  .cards td { display: flex; justify-content: space-between; gap: 12px; border: 0; padding: 3px 12px;
    white-space: normal; }
  .cards td::before { content: attr(data-name); color: var(--soft); }
  .cards tbody th { white-space: normal; overflow-wrap: anywhere; } .scroll:has(.cards) { max-height: none; } }
.reason { white-space: normal; width: 15rem; font-size: .85rem; overflow-wrap: anywhere; }
td.long { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; }
.gallery tbody th { white-space: normal; min-width: 8rem; max-width: 14rem; overflow-wrap: anywhere; }
.tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
ul { padding-left: 1.2rem; max-width: 75ch; overflow-wrap: anywhere; }
tr.chosen { background: var(--plain-back); }
.badge { display: inline-block; padding: 0 9px; border-radius: 10px; background: var(--plain-back);
  border: 1px solid currentColor; }
.better { background: var(--good-back); color: var(--good); } .worse, .failed { background: var(--bad-back);
  color: var(--bad); }
.copied { display: flex; gap: 8px; align-items: start; margin: 4px 0; }
.copied code { flex: 1; padding: 4px 8px; border: 1px solid var(--edge); border-radius: 6px; background: var(--card);
  font-size: .85rem; overflow-wrap: anywhere; }
button { font: inherit; font-size: .85rem; padding: 4px 10px; border: 1px solid var(--soft); border-radius: 6px;
  background: var(--plain-back); color: var(--text); cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; border: 1px solid var(--edge); border-radius: 8px; background: var(--card); }
.charts figure:only-child { max-width: 570px; }
figcaption { font-weight: 600; margin-bottom: 4px; }
.chart > svg { width: 100%; max-width: 500px; height: auto; display: block; }
.chart text { font-size: 13px; fill: var(--soft); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.chart text.name { fill: var(--text); font-weight: 600; }
.grid { stroke: var(--edge); fill: none; } .zero { stroke: var(--soft); stroke-dasharray: 4 3; fill: none; }
.line { stroke: var(--own); stroke-width: 2; fill: none; } .dot { fill: var(--own); }
.hollow { fill: var(--card); stroke: var(--own); stroke-width: 1.5; }
.ring { stroke: var(--text); stroke-width: 1.5; fill: none; }
.bar { stroke: var(--own); stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 0; padding: 0; list-style: none;
  font-size: .88rem; }
.legend svg { width: 24px; height: 12px; margin-right: 6px; }
.choices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); gap: 10px;
  max-width: 900px; margin-bottom: 12px; }
label { display: block; font-size: .88rem; color: var(--soft); }
select { display: block; width: 100%; font: inherit; color: var(--text); background: var(--card); padding: 7px;
  border: 1px solid var(--soft); border-radius: 6px; }
.pair { position: relative; width: min(100%, 512px); border-radius: 8px 8px 0 0; overflow: hidden; touch-action: pan-y;
  cursor: ew-resize; background: var(--plain-back); }
.pair img { display: block; width: 100%; height: auto; user-select: none; }
.pair img.over { position: absolute; inset: 0; height: 100%; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: calc(var(--at) - 1px); width: 2px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.pair span { position: absolute; bottom: 8px; max-width: 46%; padding: 1px 8px; border-radius: 4px; background: #000c;
  color: #fff; font-size: .85rem; pointer-events: none; overflow-wrap: anywhere; }
.pair .left { left: 8px; } .pair .right { right: 8px; }
input[type=range] { width: min(100%, 512px); height: 28px; margin: 4px 0; accent-color: var(--accent); display: block; }
.gallery td img { width: 128px; height: auto; display: block; border-radius: 4px; }
.by-image { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0; }
.by-image figure { padding: 6px; } .by-image figcaption { font-size: .85rem; margin: 4px 0 0; }
.by-image img { max-width: 128px; height: auto; display: block; border-radius: 4px; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; } summary h2 { display: inline; }
main > details { border-top: 1px solid var(--edge); padding: 6px 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
"""

SCRIPT = """
document.addEventListener('click', event => {
  const button = event.target.closest('button[data-copy]');
  if (!button) return;
  const text = document.createElement('textarea');
  text.value = button.dataset.copy;
  button.after(text);
  text.select();
  const done = document.execCommand('copy');
  text.remove();
  if (!done) getSelection().selectAllChildren(button.previousElementSibling);
  button.textContent = done ? 'Copied' : 'Press Ctrl+C';
});
const pair = document.querySelector('.pair');
if (pair) {
  const [left, right, prompt] = ['left', 'right', 'prompt'].map(id => document.getElementById(id));
  const slider = document.getElementById('slider');
  const show = (side, label) => {
    const from = document.querySelector(`.gallery img[data-cell="${prompt.value}-${label.value}"]`);
    const image = pair.querySelector(side), name = label.selectedOptions[0].textContent;
    image.hidden = !from;
    if (from) { image.src = from.src; image.alt = from.alt; }
    pair.querySelector(side === '.over' ? '.left' : '.right').textContent = from ? name : `${name}: no image`;
  };
  const update = () => { show('.over', left); show('.under', right); };
  const slide = () => {
    pair.style.setProperty('--at', `${slider.value}%`);
    slider.setAttribute('aria-valuetext', `${slider.value}% ${left.selectedOptions[0].textContent}`);
  };
  const drag = event => {
    if (event.type === 'pointerdown') pair.setPointerCapture(event.pointerId);
    if (!pair.hasPointerCapture(event.pointerId)) return;
    const box = pair.getBoundingClientRect();
    slider.value = 100 * (event.clientX - box.left) / box.width;
    slide();
  };
  for (const choice of [left, right, prompt]) choice.addEventListener('change', () => { update(); slide(); });
  slider.addEventListener('input', slide);
  pair.addEventListener('pointerdown', drag);
  pair.addEventListener('pointermove', drag);
  update(); slide();
  document.getElementById('comparing').hidden = false;
}
"""
STYLE += "".join(f".c{number} {{ --own: var(--c{number}); }}\n" for number in range(8))
