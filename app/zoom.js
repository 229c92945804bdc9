// A click on an image of a table enlarges it; left and right flip between the columns, up and down between the rows.
(() => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const places = "#grid, #xy", tiles = () => [...place.querySelectorAll("button.tile")];
  let dialog, place, at;

  function make() {
    dialog = document.createElement("dialog");
    dialog.id = "zoom";
    dialog.innerHTML = `<img alt=""><p role="status"></p><div>
      <button type="button" data-key="ArrowLeft" aria-label="column before">←</button>
      <button type="button" data-key="ArrowRight" aria-label="next column">→</button>
      <button type="button" data-key="ArrowUp" aria-label="row before">↑</button>
      <button type="button" data-key="ArrowDown" aria-label="next row">↓</button>
      <button type="button" data-key="Escape">Close</button></div>`;
    dialog.setAttribute("aria-label", "Enlarged image");
    dialog.addEventListener("keydown", event => move(event.key) && event.preventDefault());
    dialog.addEventListener("click", event => {
      if (event.target === dialog || event.target.dataset.key === "Escape") dialog.close();
      else move(event.target.dataset.key);
    });
    document.body.append(dialog);
  }

  // A small image at a whole multiple of its size, with clear edges; a large one as it fits.
  function fit(image, width, height) {
    const { naturalWidth, naturalHeight } = image;
    if (!naturalWidth) return;
    const times = Math.floor(Math.min(width / naturalWidth, height / naturalHeight));
    image.style.width = times >= 1 ? `${times * naturalWidth}px` : "";
    image.style.height = times >= 1 ? `${times * naturalHeight}px` : "";
    image.style.imageRendering = times > 1 ? "pixelated" : "";
  }

  const LARGEST = 512;
  function fitAll() {
    document.querySelectorAll("#gallery :is(.thumbnail-item, .preview) img").forEach(image => {
      const width = image.closest("#gallery").clientWidth / (image.closest(".thumbnail-lg") ? columns() : 1) - 24;
      fit(image, Math.min(width, LARGEST), LARGEST);
    });
    document.querySelectorAll("#zoom img").forEach(image => fit(image, Math.min(innerWidth * .9, 768), innerHeight * .7));
  }
  const columns = () => {
    const grid = document.querySelector("#gallery .grid-container");
    return grid ? getComputedStyle(grid).gridTemplateColumns.split(" ").length : 1;
  };
  document.addEventListener("load", event => {
    if (event.target.matches?.("#zoom img, #gallery img")) requestAnimationFrame(fitAll);
  }, true);
  addEventListener("resize", fitAll);

  function show(tile) {
    const image = tile.querySelector("img"), step = tile.closest("table").dataset.step;
    at = [Number(tile.dataset.row), Number(tile.dataset.column)];
    dialog.querySelector("img").src = image.src;
    dialog.querySelector("img").alt = image.alt;
    dialog.querySelector("p").textContent = step ? `${image.alt} · step ${step}` : image.alt;
  }

  // On to the next image that way, and at the end round to the first.
  function move(key) {
    if (!moves[key]) return false;
    const [down, right] = moves[key], along = right ? "column" : "row", across = right ? "row" : "column";
    const line = tiles().filter(tile => Number(tile.dataset[across]) === at[right ? 0 : 1]);
    const here = line.findIndex(tile => Number(tile.dataset[along]) === at[right ? 1 : 0]);
    if (line.length) show(line[(here + down + right + line.length) % line.length]);
    return true;
  }

  document.addEventListener("click", event => {
    const tile = event.target.closest?.("button.tile");
    if (!tile?.closest(places)) return;
    place = tile.closest(places);
    if (!dialog) make();
    show(tile);
    dialog.showModal();
  });
})();
