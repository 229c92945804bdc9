"""Make the emoji image sets from npm packages: 64x64 RGB images on white, with captions.

    pip install resvg-py                       # draws vector images
    python assets/make/make_data.py            # needs npm; writes assets/build/noto, assets/build/noto-128 and so on
    python assets/make/make_data.py --select assets/twemoji    # then: the fine-tuning set, 260 images

All sets show the same emoji under the same file names and captions, the CLDR short names in lower case; skin tones,
flags and components are left out. Noto has them all, the others what they draw. Their licences are in assets/README.md.
Beside each set lies the same at 128x128, from which trainings vary images: turning those of 64x64 would blur them.
"""

import argparse
import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from captions import VALIDATION_PROMPTS, is_known
from PIL import Image
from set_names import OTHER_NAMES
from tqdm import tqdm

PACKAGES = {"keys": "emoji-datasource@16.0.0", "openmoji": "openmoji@17.0.0"}
ICON_SETS = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "firefox": "@iconify-json/fxemoji@1.2.2",
    "emojione": "@iconify-json/emojione@1.2.3",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
LEFT_OUT = {"Flags", "Component"}
SIDE = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="assets/build", help="gets a folder for each set, and packages/")
    parser.add_argument("--select", metavar="FOLDER", help="copy 260 images of the set that FOLDER is named after")
    return parser.parse_args()


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """Download the npm package unless it is in the folder already, and open it."""
    path = folder / f"{package.lstrip('@').replace('@', '-').replace('/', '-')}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{package}: could not be fetched with npm ({error})") from None
    return tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes())))  # quick to read in any order


def read(package: tarfile.TarFile, name: str) -> bytes:
    return package.extractfile(f"package/{name}").read()


def draw(svg: str, side: int) -> Image.Image:
    """The vector image over white, as RGB of side x side pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="white")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ground = Image.new("RGBA", (side, side), "white")
    # What is not square leaves room on two sides.
    ground.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground.convert("RGB")


def chosen(keys: tarfile.TarFile, openmoji: tarfile.TarFile) -> list[tuple[dict, dict]]:
    """The metadata row of each emoji that Noto and OpenMoji both draw, and its names; by category and then order."""
    captions = {
        entry["hexcode"]: entry["annotation"].lower().replace("\u2019", "'")
        for entry in json.loads(read(openmoji, "data/openmoji.json"))
    }
    emoji = [entry for entry in json.loads(read(keys, "emoji.json")) if entry["category"] not in LEFT_OUT]
    rows = []
    for entry in sorted(emoji, key=lambda entry: (entry["category"], entry["sort_order"])):
        # OpenMoji drops the variation selector where nothing follows it.
        codes = [name for name in (entry["unified"], entry["unified"].replace("-FE0F", "")) if name in captions]
        if codes and entry["has_img_google"]:
            place = {key: entry[key] for key in ("category", "subcategory")}
            row = {"file_name": entry["image"], "text": captions[codes[0]], **place}
            rows.append((row, {"openmoji": codes[0], "unicode": entry["name"] or ""}))
    return rows


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


def icon_name(style: str, row: dict, unicode_name: str, icons: dict) -> str | None:
    """What the icon set calls this emoji; None where it does not draw it.

    By its code points where the set tells them, else by its caption or its name in Unicode, of which Firefox OS's set
    leaves out the hyphens, and Streamline numbers variants.
    """
    if style in OTHER_NAMES and row["text"] in OTHER_NAMES[style]:
        return OTHER_NAMES[style][row["text"]]
    points = Path(row["file_name"]).stem
    names = [slug(row["text"]), slug(unicode_name)]
    names += [name.replace("-", "") for name in names] if style == "firefox" else [f"{name}-1" for name in names]
    found = [icons["chars"].get(points), icons["chars"].get(points.replace("-fe0f", "")), *names]
    return next((name for name in found if name and (name in icons["icons"] or name in icons["aliases"])), None)


def icon_svg(name: str, icons: dict) -> str:
    while name in icons["aliases"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'


def write_set(folder: Path, side: int, rows: list[dict], svgs: list[str | None]) -> None:
    """Draw each row's image, where there is one, and write metadata.jsonl last: a folder that has it is whole."""
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, svg in zip(tqdm(rows, desc=folder.name), svgs, strict=True):
        if svg is not None:
            draw(svg, side).save(folder / row["file_name"])
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} of {len(rows)} emoji in {folder}")


def select(source: Path, target: Path, count: int = 260) -> None:
    """Copy `count` images of a set, spread over the captions that the base knows except the validation prompts."""
    if not (source / "metadata.jsonl").is_file():
        raise SystemExit(f"{source}: no metadata.jsonl there; run make_data.py without --select first")
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if is_known(row) and row["text"] not in VALIDATION_PROMPTS]
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    for row in chosen:
        shutil.copyfile(source / row["file_name"], target / row["file_name"])
    lines = [json.dumps({key: row[key] for key in ("file_name", "text")}, ensure_ascii=False) + "\n" for row in chosen]
    (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(chosen)} of {len(rows)} images in {target}")


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    if args.select:
        select(output / Path(args.select).resolve().name, Path(args.select))
        return
    keys, openmoji = (fetch(package, output / "packages") for package in PACKAGES.values())
    rows, names = zip(*chosen(keys, openmoji), strict=True)
    sets = {"openmoji": [read(openmoji, f"color/svg/{name['openmoji']}.svg").decode() for name in names]}
    for style, package in ICON_SETS.items():
        tar = fetch(package, output / "packages")
        icons = {"aliases": {}, **json.loads(read(tar, "icons.json")), "chars": json.loads(read(tar, "chars.json"))}
        found = [icon_name(style, row, name["unicode"], icons) for row, name in zip(rows, names, strict=True)]
        sets[style] = [name and icon_svg(name, icons) for name in found]
    for style, svgs in sets.items():
        for folder, side in ((style, SIDE), (f"{style}-{2 * SIDE}", 2 * SIDE)):
            write_set(output / folder, side, rows, svgs)


if __name__ == "__main__":
    main()
