"""Make the two emoji image sets, Noto and OpenMoji, from npm packages: 64x64 RGB pictures on white, with captions.

    pip install resvg-py                       # draws OpenMoji's vector pictures
    python assets/make/make_data.py            # needs npm; writes assets/build/noto and assets/build/openmoji
    python assets/make/make_data.py --select assets/openmoji   # afterwards: the fine-tuning set, 260 pictures

Both sets hold the same emoji under the same captions, the CLDR short names in lower case; skin tones, flags and
components are left out. Noto Emoji is under the Apache License 2.0, OpenMoji under CC BY-SA 4.0.
"""

import argparse
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import resvg_py
from captions import VALIDATION_PROMPTS, is_known
from PIL import Image
from tqdm import tqdm

PACKAGES = {"keys": "emoji-datasource@16.0.0", "noto": "emoji-datasource-google@16.0.0", "openmoji": "openmoji@17.0.0"}
LEFT_OUT = {"Flags", "Component"}
SIDE = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="assets/build", help="gets the folders noto/, openmoji/ and packages/")
    parser.add_argument("--select", metavar="FOLDER", help="copy the pictures of the fine-tuning set there instead")
    return parser.parse_args()


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """Download the npm package unless it is in the folder already, and open it."""
    path = folder / f"{package.replace('@', '-')}.tgz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"{package}: could not be fetched with npm ({error})") from None
    return tarfile.open(path)


def read(package: tarfile.TarFile, name: str) -> bytes:
    return package.extractfile(f"package/{name}").read()


def on_white(png: bytes) -> Image.Image:
    """The picture over white, as RGB of SIDE x SIDE pixels."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB").resize((SIDE, SIDE), Image.LANCZOS)


def chosen(keys: tarfile.TarFile, openmoji: tarfile.TarFile) -> list[tuple[dict, str]]:
    """The metadata row of each emoji that both sets draw, and its name in OpenMoji; by category and then order."""
    captions = {
        entry["hexcode"]: entry["annotation"].lower().replace("\u2019", "'")
        for entry in json.loads(read(openmoji, "data/openmoji.json"))
    }
    emoji = [entry for entry in json.loads(read(keys, "emoji.json")) if entry["category"] not in LEFT_OUT]
    rows = []
    for entry in sorted(emoji, key=lambda entry: (entry["category"], entry["sort_order"])):
        # OpenMoji drops the variation selector where nothing follows it.
        names = [name for name in (entry["unified"], entry["unified"].replace("-FE0F", "")) if name in captions]
        if names and entry["has_img_google"]:
            place = {key: entry[key] for key in ("category", "subcategory")}
            rows.append(({"file_name": entry["image"], "text": captions[names[0]], **place}, names[0]))
    return rows


def select(openmoji: Path, target: Path, count: int = 260) -> None:
    """Copy `count` pictures, spread over the captions that the base knows but for the validation prompts."""
    if not (openmoji / "metadata.jsonl").is_file():
        raise SystemExit(f"{openmoji}: no metadata.jsonl there; run make_data.py without --select first")
    rows = [json.loads(line) for line in (openmoji / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if is_known(row) and row["text"] not in VALIDATION_PROMPTS]
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    for row in chosen:
        shutil.copyfile(openmoji / row["file_name"], target / row["file_name"])
    lines = [json.dumps({key: row[key] for key in ("file_name", "text")}, ensure_ascii=False) + "\n" for row in chosen]
    (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(chosen)} of {len(rows)} pictures in {target}")


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    if args.select:
        select(output / "openmoji", Path(args.select))
        return
    keys, noto, openmoji = (fetch(package, output / "packages") for package in PACKAGES.values())
    rows = chosen(keys, openmoji)
    for style in ("noto", "openmoji"):
        (output / style).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row, _ in rows]
        (output / style / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    for row, name in tqdm(rows, desc="draw"):
        on_white(read(noto, f"img/google/{SIDE}/{row['file_name']}")).save(output / "noto" / row["file_name"])
        svg = read(openmoji, f"color/svg/{name}.svg").decode()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white")
        on_white(bytes(png)).save(output / "openmoji" / row["file_name"])
    print(f"{len(rows)} emoji in {output / 'noto'} and {output / 'openmoji'}")


if __name__ == "__main__":
    main()
