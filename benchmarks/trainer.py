"""Prints what train_sd.py costs: beside diffusers' own script, when it loads many pictures, and after it has sampled.

    python benchmarks/trainer.py diffusers      # the bundled pipeline, 64 x 64 pixels, batch 16
    python benchmarks/trainer.py diffusers --model sd15 --mixed_precision bf16
                                                # SD 1.5's size with random weights, 512 x 512, batch 4: needs a GPU
    python benchmarks/trainer.py loader         # 10,000 pictures through the trainer's two loading paths, no model
    python benchmarks/trainer.py memory         # step time and memory before, between and after validation samples

`diffusers` runs `train_sd.py --method lora` and diffusers' train_text_to_image_lora.py turn about, each as a process of
its own on the same model, pictures, batch, resolution, rank and number of steps, and with its own defaults otherwise. A
ratio is the median over the rounds, with the lowest and the highest. Steps are timed from one optimizer step to the
next, without the first ones; what comes before them (imports, loading, for train_sd.py encoding once) is printed apart,
and so is the time of the whole process, which for train_sd.py holds merging, exporting and reading back as well.

The sd15 form was never run where this was written: there was no GPU.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import itertools
import json
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_sd.py"
EXAMPLE = "examples/text_to_image/train_text_to_image_lora.py"
WARM_UP = 5  # steps that are not timed
MEBI = 2**20


def main() -> None:
    args = build_parser().parse_args()
    if args.what != "probe":
        import torch

        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        print(f"torch {torch.__version__}, {where}")
    {"diffusers": diffusers, "loader": loader, "memory": memory, "probe": probe}[args.what](args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="{diffusers,loader,memory}")
    add = commands.add_parser(
        "diffusers", help="samples per second and peak memory beside diffusers' script"
    ).add_argument
    add("--script", type=Path, help=f"diffusers' {EXAMPLE}; default: downloaded for the installed version")
    add("--model", choices=("bundled", "sd15"), default="bundled")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=40)
    add("--batch", type=int, help="default: 16, or 4 with sd15")
    add("--rank", type=int, default=16)
    add = commands.add_parser("loader", help="pictures per second and worker").add_argument
    add("--pictures", type=int, default=10_000)
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--rate", type=float, default=30, help="samples per second that a GPU takes, for the consumer")
    add("--batch", type=int, default=4)
    add = commands.add_parser("memory", help="what validation samples leave behind").add_argument
    add("--steps", type=int, default=60)
    add("--every", type=int, default=15, help="steps between samples")
    add("--rounds", type=int, default=3)
    add = commands.add_parser("probe").add_argument  # how the other commands run a script
    add("record", type=Path)
    add("script")
    add("flags", nargs=argparse.REMAINDER)
    return parser


# -- a script, watched -----------------------------------------------------------------------------------------------


def probe(args: argparse.Namespace) -> None:
    """Runs a training script in this process and notes time and memory after each optimizer step."""
    began, marks = time.perf_counter(), []

    def note(*_) -> None:
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        marks.append((time.perf_counter() - began, torch.cuda.memory_allocated() if cuda else resident(), peak))

    after_import("torch.optim.optimizer", lambda module: module.register_optimizer_step_post_hook(note))
    sys.argv = [args.script, *args.flags]
    sys.path[0] = str(Path(args.script).resolve().parent)
    try:
        runpy.run_path(args.script, run_name="__main__")
    finally:
        args.record.write_text(json.dumps(marks))


def after_import(name: str, action: Callable) -> None:
    """Calls `action` with a module when the script has imported it: a script may have things to set before."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, wanted, path, target=None):
            if wanted != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), action(module))
            return spec

    sys.meta_path.insert(0, Finder())


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system doesn't tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Watched:
    """What `probe` saw of a script: when each step ended, and the memory then."""

    def __init__(self, script: Path, flags: list[str], folder: Path):
        record, log = folder / "marks.json", folder / "log.txt"
        command = [sys.executable, str(Path(__file__).resolve()), "probe", str(record), str(script), *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            _, status, usage = os.wait4(process.pid, 0)
        self.seconds = time.perf_counter() - began
        if status:
            process.returncode = os.waitstatus_to_exitcode(status)
            sys.exit(f"{script} failed:\n{log.read_text()[-2000:]}")
        process.returncode = 0  # waited for already
        marks = json.loads(record.read_text())
        self.ends, self.resident, self.peaks = (list(column) for column in zip(*marks, strict=True))
        self.peak_at_last_step = self.peaks[-1]
        self.peak_of_process = usage.ru_maxrss * 1024

    def durations(self, skip: tuple[int, ...] = ()) -> list[float]:
        """Seconds of each step after the warm-up; steps that follow one in `skip` are left out."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return [b - a for step, (a, b) in enumerate(pairs, 1) if step >= WARM_UP and step not in skip]

    @property
    def step(self) -> float:
        return statistics.median(self.durations())

    @property
    def until_first_step(self) -> float:
        return self.ends[0] - self.step


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# -- beside diffusers ------------------------------------------------------------------------------------------------


def diffusers(args: argparse.Namespace) -> None:
    batch = args.batch or (4 if args.model == "sd15" else 16)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script = args.script or downloaded(folder)
        model, data, resolution = MODELS[args.model](folder)
        pictures = len((data / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--seed", "0"]
        flags += ["--resolution", str(resolution), "--train_batch_size", str(batch), "--rank", str(args.rank)]
        flags += ["--max_train_steps", str(args.steps), "--mixed_precision", args.mixed_precision]
        flags += ["--max_train_samples", str(pictures // batch * batch)]  # diffusers' last batch is a smaller one else
        runs: dict[str, list[Watched]] = {"theirs": [], "ours": []}
        for number in range(args.rounds):
            order = list(runs) if number % 2 else list(reversed(runs))
            for name in order:
                output = folder / f"{name}-{number}"
                own = ["--method", "lora"] if name == "ours" else []
                output.mkdir()
                runs[name].append(
                    Watched(TRAINER if name == "ours" else script, [*flags, *own, "--output_dir", str(output)], output)
                )
                shutil.rmtree(output)
            report_round(number, runs, batch)
        report_ratios(runs)


def report_round(number: int, runs: dict[str, list[Watched]], batch: int) -> None:
    for name, title in (("theirs", "diffusers"), ("ours", "train_sd")):
        run = runs[name][-1]
        print(
            f"round {number + 1}  {title:<10} {batch / run.step:7.2f} samples/s ({run.step * 1e3:.0f} ms a step)"
            f"   first step after {run.until_first_step:.1f} s   whole process {run.seconds:.1f} s"
            f"   peak {run.peak_at_last_step / MEBI:.0f} MiB in training, {run.peak_of_process / MEBI:.0f} MiB RSS",
            flush=True,
        )


def report_ratios(runs: dict[str, list[Watched]]) -> None:
    pairs = list(zip(runs["theirs"], runs["ours"], strict=True))
    print("train_sd.py over diffusers' script: median (lowest-highest)")
    print(f"  samples per second     {spread([theirs.step / ours.step for theirs, ours in pairs])}")
    print(f"  peak memory, training  {spread([o.peak_at_last_step / t.peak_at_last_step for t, o in pairs])}")
    print(f"  peak RSS, whole run    {spread([o.peak_of_process / t.peak_of_process for t, o in pairs])}")
    once = [(ours.until_first_step - theirs.until_first_step, theirs.step - ours.step) for theirs, ours in pairs]
    print(f"  more before the first step, s  {spread([more for more, _ in once], 1)}")
    even = [more / saved for more, saved in once if saved > 0]
    print(f"  made up for after steps        {spread(even, 0) if even else 'never'}")


def downloaded(folder: Path) -> Path:
    """diffusers' example at the installed version, from its repository."""
    from importlib.metadata import version

    address = f"https://raw.githubusercontent.com/huggingface/diffusers/v{version('diffusers')}/{EXAMPLE}"
    print(f"downloading {address}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, TimeoutError) as error:
        sys.exit(f"{address} cannot be had ({error}); give a copy with --script")
    path = folder / Path(EXAMPLE).name
    path.write_bytes(content)
    return path


def bundled(folder: Path) -> tuple[Path, Path, int]:
    """The bundled pipeline as if it were anyone's: train_sd.py's defaults for its own are not for comparing."""
    shutil.copytree(ROOT / "assets" / "pipeline", folder / "model")
    return folder / "model", ROOT / "assets" / "openmoji", 64


def sd15(folder: Path) -> tuple[Path, Path, int]:
    """Stable Diffusion 1.5's shapes with random weights, and 64 pictures of 512 x 512."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "assets" / "pipeline" / "tokenizer", model_max_length=77),
        unet=unet.cpu(),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    return folder / "model", photographs(folder / "pictures", 64), 512


MODELS = {"bundled": bundled, "sd15": sd15}


# -- loading ---------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int, different: int = 64) -> Path:
    """`count` JPEG files of 512 x 512 with as much detail as a photograph, `different` of them unlike each other."""
    import numpy as np
    import PIL.Image

    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number in range(count):
            path = folder / f"{number:05d}.jpg"
            if number < different:
                coarse = PIL.Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((512, 512), PIL.Image.Resampling.BICUBIC), dtype=np.int16)
                pixels = (pixels + random.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(path, quality=90)
            else:
                shutil.copyfile(folder / f"{number % different:05d}.jpg", path)
            metadata.write(json.dumps({"file_name": path.name, "text": f"photograph {number}"}) + "\n")
    return folder


def loader(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import train_sd

    torch.set_num_threads(1)  # as in the worker processes
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder) / "pictures", args.pictures)
        flags = ["--pretrained_model_name_or_path", "someone/model", "--train_data_dir", str(data), "--random_flip"]
        flags += ["--resolution", "512", "--train_batch_size", str(args.batch), "--max_train_steps", "1000000"]
        flags = train_sd.parse_args([*flags, "--output_dir", str(Path(folder) / "run")])
        began = time.perf_counter()
        pictures = train_sd.find_pictures(flags)
        print(f"finding {args.pictures} pictures and checking their headers: {time.perf_counter() - began:.1f} s")
        count = args.pictures // args.batch
        for workers in args.workers:
            flags.dataloader_num_workers = workers
            report_loading("encoding pass, 2 variants each", encoding_pass(flags, pictures), args.pictures, workers)
            for cached in (False, True):
                what = "steps, cached" if cached else "steps, not cached"
                report_loading(what, steps(flags, pictures, cached, count), args.pictures, workers)
                consume(args, workers, cached, steps(flags, pictures, cached, count))


def report_loading(what: str, stream: Iterator, pictures: int, workers: int) -> None:
    next(stream)  # the workers start
    began, count = time.perf_counter(), 1
    for _ in stream:
        count += 1
    seconds = time.perf_counter() - began
    rate = pictures * (count - 1) / count / seconds
    print(f"{workers} workers  {what:<32} {rate:8.1f} pictures/s, {rate / workers:.1f} per worker", flush=True)


def encoding_pass(flags: argparse.Namespace, pictures) -> Iterator:
    """The pictures as `encode_pictures` gets them."""
    from torch.utils.data import DataLoader

    import train_sd

    pixels = train_sd.VariantPixels(pictures, flags)
    return iter(DataLoader(pixels, batch_size=None, num_workers=flags.dataloader_num_workers))


def steps(flags: argparse.Namespace, pictures, cached: bool, count: int) -> Iterator:
    """`count` batches as training gets them; with `cached`, from latents of which there is one in truth."""
    import torch

    import train_sd

    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    run = train_sd.Run(flags, accelerator, stop=None, pictures=pictures, train=list(range(len(pictures.sources))))
    run.pipeline = SimpleNamespace(vae=vae, vae_scale_factor=8)
    run.noise_scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    run.embeddings = dict.fromkeys((texts[0] for texts in pictures.captions), torch.zeros(77, 768))
    moments = torch.zeros(1, 1, 2, 4, 64, 64).expand(len(pictures.sources), pictures.variants, -1, -1, -1, -1)
    pictures.moments = moments if cached else None
    flags.max_train_steps = count
    return iter(train_sd.training_batches(run, 0))


def consume(args: argparse.Namespace, workers: int, cached: bool, stream: Iterator, seconds: float = 20) -> None:
    """Takes batches no faster than a GPU would, and tells what share of the time it waited for them."""
    next(stream)
    began, waited, batches = time.perf_counter(), 0.0, 0
    for _ in range(int(seconds * args.rate / args.batch)):
        asked = time.perf_counter()
        if next(stream, None) is None:
            break
        waited += time.perf_counter() - asked
        batches += 1
        time.sleep(args.batch / args.rate)
    share, rate = waited / (time.perf_counter() - began), batches * args.batch / (time.perf_counter() - began)
    what = f"consumer of {args.rate:g} samples/s, {'cached' if cached else 'not cached'}"
    print(f"{workers} workers  {what:<45} gets {rate:.1f}, waits {share:.1%} of the time", flush=True)


# -- sampling --------------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> None:
    """The same run with and without validation samples, turn about."""
    sampled = tuple(range(0, args.steps + 1, args.every))
    ratios, before_after, growth, peaks = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, data, resolution = bundled(folder)
        flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--method", "lora"]
        flags += ["--resolution", str(resolution), "--max_train_steps", str(args.steps)]
        prompts = ["--validation_prompt", "cat face", "sailboat", "--validation_steps", str(args.every)]
        for number in range(args.rounds):
            runs = {}
            for name in ("without", "with") if number % 2 else ("with", "without"):
                output = folder / f"{name}-{number}"
                output.mkdir()
                own = prompts if name == "with" else []
                runs[name] = Watched(TRAINER, [*flags, *own, "--output_dir", str(output)], output)
                shutil.rmtree(output)
            with_, without = runs["with"], runs["without"]
            ratios.append(statistics.median(with_.durations(sampled)) / statistics.median(without.durations(sampled)))
            first, last = with_.ends[: args.every], with_.ends[-args.every + 1 :]
            before_after.append(median_step(last) / median_step(first[WARM_UP:]))
            growth.append((with_.resident[-1] - with_.resident[args.every]) / MEBI)
            peaks.append(with_.peak_at_last_step / without.peak_at_last_step)
    times = len(sampled) - 1
    print(f"{times} times sampled in {args.steps} steps, beside the same run without: median (lowest-highest)")
    print(f"  step time, with over without                     {spread(ratios, 3)}")
    print(f"  step time, after the last over before the second  {spread(before_after, 3)}")
    print(f"  memory in use, after the last less after the second, MiB  {spread(growth, 1)}")
    print(f"  peak memory in training, with over without        {spread(peaks, 3)}")


def median_step(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


if __name__ == "__main__":
    main()
