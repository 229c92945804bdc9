"""Tables and plots of the results of `paper.py run`, between the marks of RESULTS.md and benchmarks/reports/."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator

import knobs_report
import matplotlib
import matplotlib.pyplot as plt
import why_plots
from matplotlib.figure import Figure
from measured import RESULTS, ROOT
from why import AGAIN, KEPT
from why import EXPERIMENTS as OF_WHY
from why_report import NOT_RUN, Kept, again_table, alpha_table, counted, records, summary_table, why_tables

from reslora.config import MERGES as FOR_LINKS
from reslora.formatting import pluralize
from reslora.io import read_object

matplotlib.use("Agg")
REPORTS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "benchmarks" / "reports").glob("*.md"))]
COLORS = {
    "lora": "#8a8f98",
    "lora_x2": "#1971c2",
    "lora_x4": "#0b2e59",
    "is": "#e8590c",
    "bs(4)": "#2f9e44",
    "ms(4)": "#9c36b5",
}
MERGES = (*FOR_LINKS, "exact")
PAPER_COST = {"is": 1.07, "bs(4)": 1.79, "ms(4)": 1.36}


def write(experiments: dict) -> None:
    """Fill every marked part of each report, `<!-- name -->` to `<!-- /name -->`, also where results are missing."""
    for report in REPORTS:
        text = report.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- ([a-z0-9_-]+) -->", text):
            content, pattern = part(name, experiments), rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
            content = content.replace("](", f"]({'../' * (len(report.relative_to(ROOT).parts) - 1)}")
            text = re.sub(pattern, lambda m, content=content: f"{m[1]}\n{content}\n{m[2]}", text, flags=re.DOTALL)
        report.write_text(text, encoding="utf-8")
    print(f"RESULTS.md, its reports and the plots in {RESULTS.relative_to(ROOT)} are up to date")


def part(name: str, experiments: dict) -> str:
    """Return the content between the marks of that name."""
    found = records()
    special = {
        "cost": cost_table, "speed": speed_tables, "not-run": lambda: not_run(experiments),
        "merging": merging_table, "merging-plot": merging_plot, "why": lambda: why_tables(found),
        "counted": counted, "summary": summary_table, "alpha": alpha_table,
        "again": again_table,
        "knobs-plot": knobs_plot,
        "knobs-first": lambda: f"{knobs_plot()}\n\n{knobs_report.summary(knobs_report.all_found())}",
        "knobs": lambda: knobs_report.sentences(knobs_report.all_found()),
        "knobs-table": lambda: knobs_report.table(knobs_report.all_found()), "knobs-planned": knobs_report.planned,
        "forest": lambda: plot_of(found, "every comparison with LoRA", why_plots.forest, "why-forest.png"),
        "rates": lambda: plot_of(found, "loss by learning rate and method", why_plots.rates, "why-rates.png"),
    }  # fmt: skip
    return special[name]() if name in special else section(name, experiments)


def results_of(name: str, variants: Iterable[str]) -> dict[str, list[dict]]:
    """Return the final trainings of each variant at its chosen learning rate, by seed, also if seeds are missing."""
    found: dict[str, list[dict]] = {}
    for path in sorted((RESULTS / name).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "variant" in result:
            found.setdefault(result["variant"], []).append(result)
    chosen = {}
    for variant in variants:
        rates = {result["rate"] for result in found.get(variant, [])}
        # On the pipeline the trainings of the search are here too: the chosen learning rate has the most seeds.
        count = {rate: sum(result["rate"] == rate for result in found[variant]) for rate in rates}
        if count:
            rate = max(count, key=count.get)
            chosen[variant] = sorted((r for r in found[variant] if r["rate"] == rate), key=lambda r: r["seed"])
    return chosen


def section(name: str, experiments: dict) -> str:
    """Return the tables and plots of one experiment."""
    experiment = experiments[name]
    results = results_of(name, experiment.variants)
    if not results:
        return NOT_RUN
    seeds = {len(found) for found in results.values()}
    numbers = ", ".join(map(str, sorted(seeds)))
    parts = [f"Seeds per method: {numbers}. Values with ± are mean and standard deviation over the seeds."]
    if any(found for found in results.values()):
        parts += [convergence(name, results), rates(name, experiment), merges(results), calibration(results)]
    return "\n\n".join(part for part in parts if part)


# -- numbers -----------------------------------------------------------------------------------------------------------


def spread(values: list[float], form: str = "{:.4f}") -> str:
    """Format mean and standard deviation, or a single value."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def curve(result: dict, figure: str = "loss", split: str = "validation") -> list[tuple[int, float]]:
    """Return a figure of the log by step."""
    return [(row["step"], row[figure]) for row in result["log"] if row["split"] == split and figure in row]


def steps_to(result: dict, level: float) -> float | None:
    """Return the first step at which the validation loss reaches `level`, interpolated between rows; None if never."""
    points = curve(result)
    for (before, high), (after, low) in zip([points[0], *points], points, strict=False):
        if low <= level:
            return after if high <= low else before + (after - before) * (high - level) / (high - low)
    return None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows)]
    return "\n".join(lines)


# -- convergence (Figure 1, Table 9) -----------------------------------------------------------------------------------


def convergence(name: str, results: dict[str, list[dict]]) -> str:
    """Return a table of final validation losses and of the steps until LoRA's final loss, and a plot."""
    finals = {result["seed"]: curve(result)[-1][1] for result in results.get("lora", [])}
    total = curve(next(iter(results.values()))[0])[-1][0]
    other = next((key for key in ("accuracy", "f1", "matthews", "pearson") if key in last_row(results)), None)
    rows = []
    for variant, found in results.items():
        reached = [steps_to(result, finals[result["seed"]]) for result in found if result["seed"] in finals]
        # A run that never reaches it counts with all its steps: the mean is then a lower bound.
        never = sum(step is None for step in reached)
        steps = spread([total if step is None else step for step in reached], "{:.0f}") if reached else "—"
        cells = [variant, f"{found[0]['rate']:g}", spread([curve(result)[-1][1] for result in found])]
        gaps = [curve(result)[-1][1] - finals[result["seed"]] for result in found if result["seed"] in finals]
        cells.append(spread(gaps, "{:+.4f}").replace("± +", "± ") if gaps and variant != "lora" else "—")
        if other:
            cells.append(spread([curve(result, other)[-1][1] for result in found], "{:.3f}"))
        rows.append([*cells, steps + (f" (not reached by {never} of {len(reached)} runs)" if never else "")])
    head = [
        "method",
        "learning rate",
        "validation loss",
        "paired difference to LoRA",
        *([f"validation {other}"] if other else []),
    ]
    plot = plot_curves(name, results)
    head.append(f"steps to LoRA's final loss (of {total})")
    return f"{table(head, rows)}\n\n![validation loss by step]({plot})"


def rates(name: str, experiment) -> str:
    """Return tables by learning rate for seed 0, if the trainings of the search are final ones too.

    The tables show the validation loss, and the steps to LoRA's final loss at the same learning rate and at its chosen
    one.
    """
    if len(experiment.rates) < 2 or experiment.script != "train_sd.py":
        return ""
    grid = {variant: [at_rate(name, variant, rate) for rate in experiment.rates] for variant in experiment.variants}
    parts = [rate_table("validation loss", experiment, grid, lambda result, _: f"{curve(result)[-1][1]:.4f}")]
    if all(grid.get("lora", [None])):
        ends = [curve(result)[-1][1] for result in grid["lora"]]
        chosen = experiment.rates.index(results_of(name, ["lora"])["lora"][0]["rate"])
        title = f"steps to {ends[chosen]:.4f}, LoRA's final loss at its chosen learning rate"
        same = "steps to LoRA's final loss at the same learning rate"
        parts.append(rate_table(same, experiment, grid, steps_in_words, ends))
        parts.append(rate_table(title, experiment, grid, steps_in_words, [ends[chosen]] * len(ends)))
    return "\n\n".join(parts)


def at_rate(name: str, variant: str, rate: float) -> dict | None:
    """Return the result of seed 0 at a learning rate, if it has run."""
    path = RESULTS / name / f"{variant.replace(' ', '-')}-lr{rate:g}-seed0.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rate_table(title: str, experiment, grid: dict, cell_of: Callable, levels: Iterable[float | None] = ()) -> str:
    """Return a table with methods as rows and learning rates as columns; `levels` are passed to `cell_of`."""
    levels = list(levels) or [None] * len(experiment.rates)
    rows = [
        [variant, *(cell_of(r, level) if r else "—" for r, level in zip(results, levels, strict=True))]
        for variant, results in grid.items()
    ]
    return table([f"seed 0: {title}", *(f"learning rate {rate:g}" for rate in experiment.rates)], rows)


def steps_in_words(result: dict, level: float) -> str:
    """Return the steps to `level` as text."""
    steps = steps_to(result, level)
    return "never" if steps is None else f"{steps:.0f}"


def last_row(results: dict[str, list[dict]]) -> dict:
    """Return the last validation row of the first result."""
    rows = next(iter(results.values()))[0]["log"]
    return [row for row in rows if row["split"] == "validation"][-1]


def plot_curves(name: str, results: dict[str, list[dict]]) -> str:
    """Plot the mean validation loss by step, with the range of the seeds as a band."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant, found in results.items():
        runs = [curve(result) for result in found]
        steps = [step for step, _ in runs[0]]
        losses = [[loss for _, loss in run] for run in runs]
        color = COLORS.get(variant)
        line = axis.plot(steps, [statistics.mean(at) for at in zip(*losses, strict=True)], label=variant, color=color)
        lows, highs = ([f(at) for at in zip(*losses, strict=True)] for f in (min, max))
        axis.fill_between(steps, lows, highs, color=line[0].get_color(), alpha=0.15, linewidth=0)
    axis.set(title=name, xlabel="step", ylabel="validation loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    return saved(figure, f"{name}.png")


def saved(figure, name: str) -> str:
    """Save a plot, and return its path in the repository."""
    figure.savefig(RESULTS / name, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return f"benchmarks/results/{name}"


# -- merging (Tables 3, 6 and 7) ---------------------------------------------------------------------------------------

LEAST_RISE = 0.01  # of the unmerged model's loss


def merges(results: dict[str, list[dict]]) -> str:
    """Return tables of results unmerged and merged by every method, on the test split."""
    wired = {variant: found for variant, found in results.items() if len(found[0].get("table", {})) > 1}
    single = {variant: found for variant, found in results.items() if variant not in wired}
    if not wired:
        return ""
    columns = [m for m in MERGES if any(m in found[0]["table"] for found in wired.values())]
    judged = [m for m in columns if m in ("input", "weights", "lstsq")]
    parts = []
    for figure in [key for key in next(iter(wired.values()))[0]["table"]["unmerged"] if key not in ("block_error",)]:
        rows = []
        for variant, found in {**single, **wired}.items():
            cells = [cell(found, row, figure) for row in ("unmerged", *columns)]
            rows.append([variant, *cells])
        parts.append(table([f"final {figure}", "unmerged", *columns], rows))
        shares = [[variant, *(kept(found, figure, merge) for merge in judged)] for variant, found in wired.items()]
        shares = [row for row in shares if set(row[1:]) != {"—"}]
        parts.append(table([f"{figure}: share of the improvement retained", *judged], shares))
    return "\n\n".join(parts)


def cell(found: list[dict], row: str, figure: str) -> str:
    """Return one cell of the table of merges: mean and standard deviation over the seeds."""
    values = [result["table"][row][figure] for result in found if row in result.get("table", {})]
    return spread(values) if values else "—"


def kept(found: list[dict], figure: str, merge: str) -> str:
    """Return the fraction of the loss from dropping the shortcuts (`none`) that `merge` avoids, over the seeds."""
    shares = []
    for result in found:
        rows = result["table"]
        if merge in rows and rows["none"][figure] != rows["unmerged"][figure]:
            lost = rows["none"][figure] - rows["unmerged"][figure]
            shares.append((rows["none"][figure] - rows[merge][figure]) / lost)
    return spread([100 * share for share in shares], "{:.1f}") + "%" if shares else "—"


def retained(found: list[dict]) -> list[str]:
    """Return the fraction of the test loss that each merge retains, as cells of a table.

    The cells are empty if dropping the shortcuts raises the loss by less than LEAST_RISE, because fractions of so small
    a rise say nothing about the merges.
    """
    none, unmerged = (sum(result["table"][row]["loss"] for result in found) for row in ("none", "unmerged"))
    if none < (1 + LEAST_RISE) * unmerged:
        return ["—"] * 3
    return [kept(found, "loss", merge) for merge in ("input", "weights", "lstsq")]


def merged_runs() -> Iterator[tuple[str, str, list[dict]]]:
    """Yield each task, its shortcut (`is` or `ms(4)`), and the runs that were merged by every method."""
    for task in ("svamp", "sst2", "pipeline"):
        for variant, found in results_of(task, ("is", "ms(4)")).items():
            yield task, variant, found
    for name, experiment in OF_WHY.items():
        runs = read_object(AGAIN / f"{name}.json").get("runs", [])
        for label in sorted({run["label"] for run in runs if "lstsq" in run["table"]}):
            found = [run for run in runs if run["label"] == label]
            yield experiment.shows.partition(",")[0], "is" if "input" in label else "ms(4)", found


def merging_table() -> str:
    """Return a table of the fraction that each merge retains, for all tasks."""
    rows = [[task, variant, str(len(found)), *retained(found)] for task, variant, found in merged_runs()]
    return table(["task", "shortcut", "seeds", "`input`", "`weights`", "`lstsq`"], rows) if rows else NOT_RUN


def merging_plot() -> str:
    """Return a plot of the table of merges: a row for each task and shortcut, a point for each merge."""
    cells = {f"{task}, {variant}": retained(found) for task, variant, found in merged_runs()}
    measured = {label: row for label, row in cells.items() if "—" not in row}
    rows = [(label, [float(cell.split()[0].rstrip("%")) for cell in row]) for label, row in measured.items()]
    if not rows:
        return NOT_RUN
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2))
    low, high = -50, 150
    places = range(len(rows), 0, -1)
    for number, (merge, color, marker) in enumerate(
        (("input", "#868e96", "s"), ("weights", "#e8590c", "D"), ("lstsq", "#1971c2", "o"))
    ):
        values = [min(max(values[number], low), high) for _, values in rows]
        axes.scatter(values, places, color=color, marker=marker, label=f"--merge {merge}", zorder=3)
    axes.axvline(100, color="#1f2933", linewidth=1)
    axes.axvline(0, color="#1f2933", linewidth=1, linestyle=":")
    axes.set_yticks(list(places), [label for label, _ in rows])
    axes.set_xlim(low - 5, high + 5)
    axes.set_xlabel("how much of the loss from dropping the shortcuts the merge avoids, in percent")
    axes.grid(axis="y", color="#e9ecef")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.tight_layout()
    return f"![what each merge retains]({saved(figure, 'merging.png')})"


def calibration(results: dict[str, list[dict]]) -> str:
    """Return a table of test losses after `lstsq` merges by number and task of the calibration examples."""
    studied = {variant: [r for r in found if "calibration" in r] for variant, found in results.items()}
    studied = {variant: found for variant, found in studied.items() if found}
    if not studied:
        return ""
    names = list(next(iter(studied.values()))[0]["calibration"])
    rows = [[v, *(spread([r["calibration"][n] for r in found]) for n in names)] for v, found in studied.items()]
    return table(["test loss after `lstsq` with", *map(examples_in_words, names)], rows)


def examples_in_words(name: str) -> str:
    """Return "128 examples" for the name "128", and "128 examples of gsm8k" for "128 of gsm8k"."""
    number, *task = name.split(" ", 1)
    return " ".join([number, "examples", *task])


# -- cost (Table 8), and what has run ----------------------------------------------------------------------------------


def cost_table() -> str:
    """Return the table of step times and peak memory."""
    path = RESULTS / "cost" / "llm.json"
    if not path.is_file():
        return NOT_RUN
    measured = json.loads(path.read_text(encoding="utf-8"))
    peft = measured.pop("peft")
    rows = []
    for variant, figures in measured.items():
        paper = f"{PAPER_COST[variant]:.2f}" if variant in PAPER_COST else "—"
        ratios = [
            [ours[key] / theirs[key] for ours, theirs in zip(figures, peft, strict=True)]
            for key in ("seconds", "peak_mib")
        ]
        rows.append([variant, *(spread(values, "{:.2f}") for values in ratios), paper])
    return table(["method", "step time / stock PEFT LoRA", "peak memory / stock PEFT LoRA", "paper's time"], rows)


def speed_tables() -> str:
    """Return tables of the results of speed.py and trainer.py, each with its machine."""
    parts = []
    for path in [*sorted((RESULTS / "speed").glob("*.json")), *(RESULTS / "trainer").glob("scale.json")]:
        found = json.loads(path.read_text(encoding="utf-8"))
        machine = found["machine"]
        threads = pluralize(machine["threads"], "thread")
        where = f"{machine['gpu'] or machine['cpu']}, {threads}, torch {machine['torch']}"
        if "shortcuts" in found or "depth" in found:
            where += f"; r = {found['rank']}, {found['rounds']} pairs of steps"
        parts.append(table([f"`{path.parent.name}/{path.stem}`, {where}", ""], speed_rows(found)))
    return "\n\n".join(parts) or NOT_RUN


def speed_rows(found: dict) -> list[list[str]]:
    """Return the rows of one measurement: step times over PEFT's, seconds, or memory."""
    if "shortcuts" in found:
        return [[name, step_figures(figures, found)] for name, figures in found["shortcuts"].items()]
    if "depth" in found:
        return [[f"{row['blocks']} blocks, {row['row']}", step_figures(row, found)] for row in found["depth"]]
    if "seconds" in found:
        return [[name, f"{seconds:.2f} s"] for name, seconds in found["seconds"].items()]
    if "scale" in found:
        note = "" if found["quiet"] else " (on a busy machine)"
        return [[f"{row['data']}, {row['run']} run", scale_figures(row) + note] for row in found["scale"]]
    return [
        [f"{model} ({figures['blocks']} blocks) merged by `{method}`", merge_figures(figures[method], found)]
        for model, figures in found["merging"].items()
        for method in ("lstsq", "weights", "exact")
    ]


def step_figures(figures: dict, found: dict) -> str:
    """Format a step's time and memory relative to stock PEFT's."""
    low, middle, high = figures["ratio_quartiles"]
    what = "peak memory" if found["device"] == "cuda" else "memory for the backward pass"
    step = f"{middle:.3f} ({low:.3f}-{high:.3f}) of stock PEFT's time"
    memory = f"{figures['memory_ratio']:.2f} of its {what}"
    return f"{step}, {memory}" + ("" if found["quiet"] else " (on a busy machine)")


def scale_figures(row: dict) -> str:
    """Format the memory until the last step, the size on disk, and the time to the first step."""
    own, resident, encoded = (f"{row[key] / 2**20:.0f} MiB" for key in ("anonymous", "resident", "encoded"))
    memory = f"{own} of anonymous memory, {resident} of resident memory"
    return f"{memory}, {encoded} of encoded data on disk, {row['until_first_step']:.0f} s to the first step"


def merge_figures(figures: dict, found: dict) -> str:
    """Format the memory of a merge in addition to the model, its passes and, from a quiet machine, its time."""
    said = [f"{figures['bytes'] / 2**20:.0f} MiB"]
    if "passes" in figures:
        whole = f"{figures['bytes_in_one_pass'] / 2**30:.1f} GiB"
        several = f"{figures['passes']} passes over {found['samples']} samples (one pass would take {whole})"
        said.append(several if figures["passes"] > 1 else f"one pass over {found['samples']} samples")
    seconds = f"{figures['seconds']:.0f} s" if figures["seconds"] >= 1 else "less than 1 s"
    return ", ".join([*said, *([seconds] if found["quiet"] else [])])


def not_run(experiments: dict) -> str:
    """Return a sentence that lists the experiments without a result."""
    of_paper = [name for name in experiments if not list((RESULTS / name).glob("*.json"))]
    of_why = [name for name in OF_WHY if not (KEPT / f"{name}.json").is_file()]
    scripts = {"paper.py": of_paper, "why.py": of_why}
    named = [f"of `{script}`: {', '.join(f'`{name}`' for name in names)}" for script, names in scripts.items() if names]
    return f"These experiments have not run; {'; '.join(named)}."


def plot_of(found: list[Kept], shows: str, plot: Callable[[list[Kept]], Figure], name: str) -> str:
    """Return a plot of experiments of `why.py` as a Markdown image."""
    return f"![{shows}]({saved(plot(found), name)})" if found else NOT_RUN


def knobs_plot() -> str:
    """Return the figure of `knobs.py` as a Markdown image."""
    found = knobs_report.all_found()
    return f"![which settings matter when one trains a LoRA]({saved(knobs_report.figure(found), 'knobs.png')})"
