"""Draw the three shortcuts of ResLoRA and what each becomes by a merge, as assets/shortcuts.svg.

    python assets/make/shortcuts.py

One row for each shortcut: three neighboring blocks while training, then block n after the merge. The drawing is SVG
text without a library, so that it is sharp at every size and small in the repository.
"""

import re
from html import escape
from pathlib import Path

WIDTH, ROW, TOP, BLOCK = 1310, 254, 64, 260
"""Pixels: width of the drawing, height of a row, height of the heading, and width of a block."""
FIRST, MERGED = 215, 1145
"""Pixels: the horizontal position of the first block, and the middle of the column on the right."""
INK, FROZEN, LORA, SHORTCUT = "#1f2933", "#d9dee3", "#cfe3f7", "#d1480f"
RANK, FIT = "as one LoRA of rank (m + 1) r", "C x_n is fitted to {}"
ROWS = {
    # title, what it adds, the LoRA after the merge, whether that is exact, why
    "input": ("Input-shortcut", "adds the neighbor's x", "s B_n (A_n + C) x_n", "approximate", FIT.format("A_n x_n-1")),
    "block": ("Block-shortcut", "adds the neighbors' B A", "s (B_n A_n + B_n-1 A_n-1 + …) x_n", "exact", RANK),
    "middle": (
        "Middle-shortcut",
        "adds the neighbors' A x",
        "s B_n (A_n + C) x_n",
        "approximate",
        FIT.format("A_n-1 x_n-1 + …"),
    ),
}
NAMES = ("_n-2", "_n-1", "_n")


def main() -> None:
    """Write the drawing."""
    height = TOP + ROW * len(ROWS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, '
        f'sans-serif" font-size="17" fill="{INK}">',
        "<title>The three shortcuts of ResLoRA while training, and after a merge</title>",
        f'<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker><marker id="shortcut" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{SHORTCUT}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(560, 28, "While training: neighboring blocks of a chain", weight="bold"),
        text(MERGED, 28, "After the merge: block n", weight="bold"),
    ]
    for number, shortcut in enumerate(ROWS):
        parts += row(shortcut, TOP + number * ROW)
    out = Path(__file__).parents[1] / "shortcuts.svg"
    out.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
    print(f"wrote {out}")


def row(shortcut: str, top: int) -> list[str]:
    """Return the parts of one row, whose upper edge is at `top`."""
    title, what, left, exactness, why = ROWS[shortcut]
    parts = [
        f'<line x1="0" y1="{top - 20}" x2="{WIDTH}" y2="{top - 20}" stroke="#c3cad1"/>',
        text(14, top + 8, title, anchor="start", weight="bold"),
        text(14, top + 30, what, anchor="start", fill=SHORTCUT),
    ]
    places = [FIRST + BLOCK * number for number in range(len(NAMES))]
    for number in (1, 2):  # under the boxes, which hide the crossings
        parts.append(shortcut_line(shortcut, places[number], top, level=number))
    for number, (x, name) in enumerate(zip(places, NAMES, strict=True)):
        if shortcut == "block" and number:
            parts += further_term(x, top, NAMES[number - 1])
        parts += block(
            x, top, name, adds=shortcut == "middle" and number > 0, inside=shortcut == "input" and number > 0
        )
    parts += [
        text(MERGED, top + 66, "W_n x_n", size=19),
        text(MERGED, top + 98, f"+ {left}", size=19),
        text(MERGED, top + 142, exactness, weight="bold"),
        text(MERGED, top + 168, why, size=16),
        line([(MERGED - 152, top - 10), (MERGED - 152, top + ROW - 32)], "#c3cad1", end=False),
    ]
    return parts


def block(x: int, top: int, name: str, adds: bool, inside: bool) -> list[str]:
    """Return a block with its input below and its output above.

    `adds`: a sum between A and B (middle). `inside`: a sum below A (input).
    """
    wide = x + 20  # the frozen weight, and the LoRA path 90 to the right
    lora = wide + 90
    parts = [
        text(wide, top + 204, f"x{name}", size=18),
        line([(wide, top + 184), (wide, top + 142)]),
        box(wide - 32, top + 76, 64, 66, FROZEN, f"W{name}"),
        line([(wide, top + 76), (wide, top + 45)]),
        plus(wide, top + 36),
        line([(wide, top + 27), (wide, top + 6)]),
        line([(wide, top + 172), (lora, top + 172), (lora, top + 168 if inside else top + 142)], end=not inside),
        box(lora - 27, top + 116, 54, 26, LORA, f"A{name}"),
        line([(lora, top + 116), (lora, top + 86)]),
        box(lora - 27, top + 60, 54, 26, LORA, f"B{name}"),
        line([(lora, top + 60), (lora, top + 36), (wide + 9, top + 36)]),
    ]
    if adds:
        parts.append(plus(lora, top + 101))
    if inside:
        parts += [plus(lora, top + 159), line([(lora, top + 150), (lora, top + 142)])]
    return parts


def shortcut_line(shortcut: str, x: int, top: int, level: int) -> str:
    """Return the line from the previous block to the block at `x`; `level` keeps the lines of inputs apart."""
    lora, before = x + 110, x + 20 - BLOCK
    if shortcut == "input":  # below the boxes, into the sum below A
        low = top + 206 + 8 * level
        path = [(before, top + 211), (before, low), (lora + 44, low), (lora + 44, top + 159), (lora + 9, top + 159)]
        return line(path, SHORTCUT)
    if shortcut == "middle":  # from A x (without the sum), to the sum between A and B
        turn, low = lora - 34, top + 113
        return line([(before + 90, low), (turn, low), (turn, top + 101), (lora - 9, top + 101)], SHORTCUT)
    return line([(before + 90, top + 101), (lora + 36, top + 101)], SHORTCUT, dashed=True)


def further_term(x: int, top: int, name: str) -> list[str]:
    """Return B A of the previous block `name` once more, which the block at `x` multiplies by its own input."""
    lora = x + 110
    pair = lora + 80
    return [
        box(pair - 44, top + 82, 88, 38, "white", f"B{name} A{name}", SHORTCUT),
        line([(lora, top + 172), (pair, top + 172), (pair, top + 120)], SHORTCUT),
        line([(pair, top + 82), (pair, top + 36), (lora, top + 36)], SHORTCUT),
    ]


def text(x: int, y: int, content: str, anchor: str = "middle", size: int = 17, weight: str = "normal", fill=INK) -> str:
    """Return a line of text, in which `_n-1` is an index; `y` is its baseline."""
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    lowered = r'<tspan dy="5" font-size="70%">\1</tspan><tspan dy="-5">&#8203;</tspan>'
    content = re.sub("_(n-[12]|n)", lowered, escape(content)).replace("n-", "n&#8722;").replace("alpha", "&#945;")
    return f'<text x="{x}" y="{y}" {style}>{content}</text>'


def box(x: int, y: int, width: int, height: int, fill: str, content: str, stroke: str = INK) -> str:
    """Return a rectangle with text in its middle."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{stroke}"/>'
    return shape + text(x + width // 2, y + height // 2 + 6, content, size=16)


def plus(x: int, y: int) -> str:
    """Return a sum."""
    circle = f'<circle cx="{x}" cy="{y}" r="9" fill="white" stroke="{INK}"/>'
    return circle + f'<path d="M{x - 5} {y}h10M{x} {y - 5}v10" stroke="{INK}"/>'


def line(points: list[tuple[int, int]], color: str = INK, end: bool = True, dashed: bool = False) -> str:
    """Return a line through `points`, with an arrow at its end."""
    marker = f' marker-end="url(#{"end" if color == INK else "shortcut"})"' if end else ""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    width = 1.5 if color == INK else 2.2
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{marker}{dashes}/>'


if __name__ == "__main__":
    main()
