"""Hooks of mkdocs: the documents outside docs/ become pages, and links to other files of the repository lead there."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/OWNER/reslora-sd/blob/main"
PAGES = {
    "RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
    "benchmarks/reports/comparisons.md": "results-comparisons.md",
    "benchmarks/reports/repetition.md": "results-repetition.md", "benchmarks/reports/speed.md": "results-speed.md",
    "benchmarks/reports/amendments.md": "results-amendments.md",
    "assets/README.md": "bundled.md", "assets/accelerate/README.md": "accelerate.md",
}  # fmt: skip
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)([^)\s]*\))")


def on_files(files, config):
    """Add the documents in PAGES, and the images that any page shows."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in [*files.documentation_pages()]:
        for link, target, _ in LINK.findall(page.content_string):
            path = resolved(page.src_uri, target)
            if link.startswith("!") and path and not files.get_file_from_path(f"images/{path}"):
                files.append(File.generated(config, f"images/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point each link to a page, to an image, or to the file in the repository."""

    def pointed(match):
        """Return a link with its new target."""
        path = resolved(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        if match[1].startswith("!"):
            return f"{match[1]}images/{path}{match[3]}"
        page_of = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return f"{match[1]}{page_of or f'{REPOSITORY}/{path}'}{match[3]}"

    return LINK.sub(pointed, markdown)


def resolved(page, target):
    """Return the file that a link leads to, from the repository's root; None of an address or a mail."""
    if ":" in target:
        return None
    source = {page: source for source, page in PAGES.items()}.get(page, f"docs/{page}")
    path = (ROOT / PurePosixPath(source).parent / target).resolve()
    return path.relative_to(ROOT).as_posix()
