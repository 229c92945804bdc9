"""Reference of all options, generated from the tables: `python docs/options_page.py > docs/options.md`."""

from collections.abc import Iterator

from reslora.options.groups import Groups
from reslora.options.images import Options
from reslora.options.option import Option
from reslora.options.parser import default_in_words
from reslora.options.texts import GlueOptions, LlmOptions

SCRIPTS: dict[str, type[Groups]] = {
    "train_sd.py": Options, "train_llm.py": LlmOptions, "train_glue.py": GlueOptions,
}  # fmt: skip
RESUMES = {
    "fixed": "no",
    "content": "the same content",
    "free": "yes",
    "shown": "yes, but not of a finished method",
    "merged": "yes; it is merged again",
}


def reference() -> str:
    """Return the page in Markdown."""
    lines = [
        "# All options", "",
        "`python docs/options_page.py > docs/options.md` writes this page. *Resume*: whether a resumed run may "
        "have another value. *Varies*: several values of the option make an experiment. *`--vary`*: `--vary` gives the "
        "option several values, which make an experiment.",
    ]  # fmt: skip
    for script, kind in SCRIPTS.items():
        lines += ["", f"## {script}"]
        for group, title in kind.titles.items():
            lines += [
                "",
                f"### {title[0].upper()}{title[1:]}",
                "",
                "| option | what it does | resume |",
                "|---|---|---|",
            ]
            lines += rows(kind, group)
    return "\n".join(lines) + "\n"


def rows(kind: type[Groups], group: str) -> Iterator[str]:
    """Yield a table row for each option of a group."""
    for option in kind.table().values():
        if option.group == group:
            cells = [names(option), described(option), RESUMES[option.resume]]
            yield f"| {' | '.join(escaped(cell) for cell in cells)} |"


def escaped(text: str) -> str:
    """Return the text with Markdown and HTML characters of a table cell escaped."""
    return text.replace("|", "&#124;").replace("<", "&lt;")


def names(option: Option) -> str:
    """Return the names of an option on the command line."""
    return ", ".join(f"`--{name}`" for name in (option.name, option.short) if name)


def described(option: Option) -> str:
    """Return an option's help with its default."""
    default, varies = (
        default_in_words(option),
        " *Varies.*" if option.varies else " *`--vary`.*" if option.variable else "",
    )
    return f"{option.help}{f' ({default})' if default else ''}.{varies}"


if __name__ == "__main__":
    print(reference(), end="")
