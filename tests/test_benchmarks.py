"""The speed measurements of benchmarks/: what they compare, and that results are stored with their machine."""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from waiting import output_of, wait_until

import reslora

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import experiment_statistics  # noqa: E402
import measured  # noqa: E402
import overhead  # noqa: E402
import paper_report  # noqa: E402
import racing  # noqa: E402
import scale  # noqa: E402
import speed  # noqa: E402
import speed_merge  # noqa: E402
import speed_steps  # noqa: E402
import trainer  # noqa: E402
from watched import WARM_UP, PeakAnonymous, Watched  # noqa: E402

STEPPING = """
import sys, torch
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([parameter])
for _ in range(int(sys.argv[1])):
    parameter.sum().backward()
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def kept(results: Path, name: str) -> dict:
    found = json.loads((results / f"{name}.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["threads"] == torch.get_num_threads()
    return found


def tiny(device: str):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(0, 8, (1, 4), device=device)
    return LlamaForCausalLM(config).to(device), {"input_ids": ids, "labels": ids}, ["q_proj"]


ROWS = {"no adapter", "input(1)", "block(4)", "middle(4)"}


def test_step_ratios_are_kept(results, monkeypatch):
    monkeypatch.setitem(speed_steps.MODELS, "llama", tiny)
    monkeypatch.setattr(sys, "argv", ["speed.py", "steps", "--model", "llama", "--rounds", "3", "--rank", "2"])
    speed.main()
    found = kept(results, "speed/steps-llama-cpu-float32")
    assert (found["rank"], found["rounds"]) == (2, 3) and set(found["shortcuts"]) == ROWS
    for figures in found["shortcuts"].values():
        assert len(figures["ratio_quartiles"]) == 3 and figures["peft_seconds"] > 0
    assert found["shortcuts"]["no adapter"]["memory_ratio"] < 1 < found["shortcuts"]["block(4)"]["memory_ratio"]
    assert [name for name, _ in paper_report.speed_rows(found)] == list(found["shortcuts"])


def test_depth_is_measured_by_blocks_and_pre_num(results, monkeypatch):
    monkeypatch.setattr(speed_steps, "llama", lambda device, **sizes: tiny(device))
    monkeypatch.setattr(speed_steps, "DEPTHS", (3,))
    monkeypatch.setattr(sys, "argv", ["speed.py", "depth", "--rounds", "2", "--rank", "2"])
    speed.main()
    found = kept(results, "speed/depth-cpu-float32")
    reaches = [f"{shortcut}({reach})" for shortcut in ("block", "middle") for reach in (1, 4, -1)]
    assert [row["row"] for row in found["depth"]] == ["no adapter", "input(1)", *reaches]
    assert paper_report.speed_rows(found)[0][0] == "3 blocks, no adapter"


def test_steps_are_taken_turn_about():
    order = []

    def step(name: str, seconds: float):
        return lambda: (order.append(name), seconds)[1]

    times = speed_steps.turn_about({"peft": step("peft", 2.0), "ours": step("ours", 3.0)}, 2)
    assert times == {"peft": [2.0, 2.0], "ours": [3.0, 3.0]}
    assert order == ["peft", "ours", "ours", "peft"]


def test_a_step_without_adapter_ends_where_pefts_would():
    """Gradients are computed down to the first layer that would be adapted, and nothing is trained."""
    base, batch, targets = tiny("cpu")
    frozen = speed_steps.twin(base).requires_grad_(False)
    speed_steps.begin_gradients(frozen, targets)
    loss = speed_steps.Step(frozen, batch, argparse.Namespace(device="cpu", dtype="float32")).loss()
    nodes, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [following for following, _ in node.next_functions]
    leaves = [node.variable.shape for node in nodes if hasattr(node, "variable")]
    assert leaves == [(1, 4, 8)]  # what the first q_proj returned


def test_what_others_do_is_told(monkeypatch):
    monkeypatch.setattr(measured, "_busy_elsewhere", iter([100.0, 103.0, 100.0, 100.0]).__next__)
    monkeypatch.setattr(measured.time, "perf_counter", iter([0.0, 2.0, 0.0, 2.0]).__next__)
    assert measured.Others()() == {"others": 1.5, "quiet": False}
    assert measured.Others()() == {"others": 0.0, "quiet": True}


def test_a_pass_takes_what_there_is_room_for_and_one_that_is_too_large_goes_alone():
    assert speed_merge.passes([(4, 2), (1, 1), (4, 2), (20, 5), (3, 0)], budget=10) == [10, 6, 25]
    assert speed_merge.passes([(4, 2)] * 3, budget=14) == [14]
    assert speed_merge.passes([(4, 2)] * 3, budget=0) == [6, 6, 6]


def test_the_passes_are_those_of_a_merge(monkeypatch):
    monkeypatch.setattr(speed_merge.calibration, "BUDGET", 800)
    base, batch, _ = tiny("cpu")
    inputs = {"input_ids": torch.randint(0, 8, (1, 64))}
    layers = speed_merge.layers_of(lambda: (tiny("meta")[0], ["q_proj", "v_proj", "down_proj"], batch))
    assert Counter((layer.width, layer.out, layer.before) for layer in layers) == {(8, 8, 1): 3, (8, 8, 2): 3}
    assert len({layer.source for layer in layers}) == 4  # q and v read one tensor
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    reslora.connect(model, reslora.ResLoraConfig())
    report = reslora.merge(model, "lstsq", calibration=[inputs])
    sizes = [speed_merge.regression(layer, 64) for layer in {layer.source: layer for layer in layers}.values()]
    assert len(speed_merge.passes(sizes, 800)) == 2 and " 2 passes" in report.notes[0]


def test_costs_of_merging_are_added_up_layer_by_layer():
    layers = [speed_merge.Layer(4, 6, 1, 10, 1), speed_merge.Layer(4, 6, 9, 10, 1), speed_merge.Layer(6, 4, 1, 5, 2)]
    squares = {
        4: {"row": 1.0, "row_of_block": 0.5, "solve": 100.0, "solve_of_block": 10.0, "bytes": 7},
        6: {"row": 2.0, "row_of_block": 0.25, "solve": 200.0, "solve_of_block": 20.0, "bytes": 9},
    }
    one = {"weights": {"seconds": 3.0, "bytes": 11}, "exact": {"seconds": 4.0, "bytes": 0}}
    other = {"weights": {"seconds": 5.0, "bytes": 10}, "exact": {"seconds": 6.0, "bytes": 0}}
    found = speed_merge.add_up(layers, squares, {(4, 6): one, (6, 4): other}, samples=2, rank=3)
    fitted = (20 * 1.0 + 100) + (10 * 2.0 + 200) + 2 * (20 * 0.5 + 10) + (10 * 0.25 + 20)
    assert found["lstsq"]["seconds"] == fitted and found["lstsq"]["passes"] == 1
    # Sums of float32 in panels of one size; solving takes as much again, once.
    assert found["lstsq"]["bytes_in_one_pass"] == 4 * (16 + 36) + 4 * 36
    assert found["lstsq"]["bytes"] == 4 * (16 + 36) + 4 * 36 + 9
    assert found["weights"] == {"seconds": 3 + 3 + 5, "bytes": 11}
    assert found["exact"] == {"seconds": 4 + 4 + 6, "bytes": 4 * 3 * 10 * (2 + 5 + 2)}
    assert found["blocks"] == 3 and found["read"] == {"4": 1, "6": 1}


def test_merging_at_scale_is_kept_and_drawn(results, monkeypatch):
    batch = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    monkeypatch.setattr(speed_merge, "MODELS", {"tiny": lambda: (tiny("meta")[0], ["q_proj", "v_proj"], batch)})
    monkeypatch.setattr(measured.Others, "__call__", lambda self: {"quiet": True})
    args = argparse.Namespace(rank=2, samples=3, device="cpu")
    speed_merge.at_scale(args)
    found = kept(results, "speed/merge-scale")
    assert found["quiet"] and found["samples"] == 3 and found["merging"]["tiny"]["blocks"] == 4
    assert all(found["merging"]["tiny"][method]["bytes"] > 0 for method in ("lstsq", "weights", "exact"))
    rows = paper_report.speed_rows(found)
    methods = ("lstsq", "weights", "exact")
    assert [name for name, _ in rows] == [f"tiny (4 blocks) merged by `{method}`" for method in methods]
    assert "one pass over 3 samples" in rows[0][1] and rows[0][1].endswith(" s")
    monkeypatch.setattr(measured.Others, "__call__", lambda self: {"quiet": False})
    speed_merge.at_scale(args)
    loud = kept(results, "speed/merge-scale")
    assert not loud["quiet"] and not any(figures.endswith(" s") for _, figures in paper_report.speed_rows(loud))


def run(step: float, first: float = 10.0, peak: int = 100, steps: int = 40) -> Watched:
    """Return the record of a watched script: its first step ended at `first`, the others `step` seconds apart."""
    found = Watched.__new__(Watched)
    found.ends = [first + step * i for i in range(steps)]
    found.resident, found.peaks = [peak] * steps, [peak] * steps
    found.peak_at_last_step, found.peak_of_process, found.seconds = peak, 2 * peak, found.ends[-1]
    return found


def test_ratios_beside_diffusers():
    runs = {"theirs": [run(0.5, 10.0, 100)], "ours": [run(0.25, 12.0, 80)]}
    found = trainer.ratios_of(runs)
    assert found["samples per second"] == [pytest.approx(2.0)]
    assert found["peak memory in training"] == found["peak memory of the process"] == [0.8]
    (more,) = found["seconds more before the first step"]
    assert more == pytest.approx((12.0 - 0.25) - (10.0 - 0.5))
    assert found["steps that make up for them"] == [pytest.approx(more / 0.25)]
    assert not trainer.ratios_of({"theirs": runs["ours"], "ours": runs["theirs"]})["steps that make up for them"]


def test_what_sampling_leaves_behind():
    args = argparse.Namespace(steps=60, every=15)
    sampling, without = run(0.5, peak=120 * 2**20, steps=60), run(0.25, peak=100 * 2**20, steps=60)
    sampling.ends[16:] = [end + 5.0 for end in sampling.ends[16:]]  # a sample is drawn after step 15
    sampling.resident[-1] += 3 * 2**20
    found = list(trainer.left_behind(sampling, without, args).values())
    assert found == [pytest.approx(2.0), pytest.approx(1.0), pytest.approx(3.0), pytest.approx(1.2)]


@pytest.mark.exhaustive
def test_steps_of_a_watched_script_are_counted_and_timed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STEPPING)
    (tmp_path / "out").mkdir()
    found = Watched(script, [str(WARM_UP + 4)], tmp_path / "out")
    assert len(found.ends) == WARM_UP + 4 and found.ends == sorted(found.ends)
    durations = found.durations()
    assert len(durations) == 4 and found.step == statistics.median(durations)
    assert found.peak_of_process >= found.resident[-1] > 0
    assert set(found.figures()) >= {"step", "until_first_step", "seconds"}


def test_script_that_fails_ends_the_measurement_with_its_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(SystemExit, match="no such model"):
        Watched(script, [], tmp_path)


def test_the_peak_of_a_processs_own_memory_is_seen():
    """More than what it has at its end, and no less than what it held."""
    held = 2**26
    script = f"import sys; memory = b'1' * {held}; print('held', flush=True); sys.stdin.read(1)"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    watcher = PeakAnonymous(process.pid, seconds=0.001)
    watcher.start()
    assert process.stdout.readline() == b"held\n"
    wait_until(lambda: watcher.peak >= held, "the peak", process, pause=0.001)
    output_of(process, b"x")
    assert held <= watcher.end() < 2 * held


def test_scale_measures_three_runs_of_each_size_and_says_how_quiet_it_was(results, monkeypatch):
    commands = []

    def watched(script: Path, flags: list[str], folder: Path) -> Watched:
        commands.append(flags)
        cache = Path(flags[flags.index("--cache_dir") + 1]) / "encoded"
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "latents.safetensors").write_bytes(bytes(5 * 2**20))
        found = run(0.5, 10.0, 300 * 2**20)
        found.peak_anonymous = 200 * 2**20
        return found

    monkeypatch.setattr(scale, "Watched", watched)
    monkeypatch.setattr(measured.Others, "__call__", lambda self: {"quiet": False})
    monkeypatch.setattr(sys, "argv", ["trainer.py", "scale", "--images", "3", "--captions", "1000"])
    trainer.main()
    found = kept(results, "trainer/scale")
    assert not found["quiet"]
    assert [(row["data"], row["run"]) for row in found["scale"]] == [
        (data, run) for data in ("3 images", "1000 captions") for run in ("first", "second", "uncached")
    ]
    assert ["--no-cache_latents" in flags for flags in commands] == [False, False, True] * 2
    assert len({flags[flags.index("--cache_dir") + 1] for flags in commands}) == 2
    (first, *_) = paper_report.speed_rows(found)
    assert first == [
        "3 images, first run",
        "200 MiB of anonymous memory, 300 MiB of resident memory, 5 MiB of encoded data on disk, "
        "10 s to the first step (on a busy machine)",
    ]


def test_overhead_is_measured_on_a_device_that_computes_nothing(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py", "overhead", "--device_ms", "1", "--batch", "2", "--steps", "3"])
    trainer.main()
    found = kept(results, "trainer/overhead")
    ((name, figures),) = found["overhead"].items()
    assert name == "batch 2, 1 ms a step" and 0 <= figures["idle"] < 1 and figures["host_seconds"] > 0
    (row,) = paper_report.speed_rows(found)
    assert row[0].startswith(name) and row[1].endswith("%")


def test_a_simulated_device_idles_until_it_is_given_a_step(monkeypatch):
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(overhead.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    device = overhead.Device(2.0)
    device.launch()
    loss = overhead.Loss(torch.tensor(0.5), device)
    device.launch()  # while the first is under way
    assert float(loss) == 0.5 and clock.now == 12.0
    clock.now = 15.0  # a second after both are done
    device.launch()
    assert device.idle[1:] == [0.0, 1.0] and device.free == 17.0


def test_settings_are_kept_with_the_figures(results, monkeypatch):
    monkeypatch.setattr(trainer, "memory", lambda args: {"rounds": {"step": [args.steps]}})
    monkeypatch.setattr(sys, "argv", ["trainer.py", "memory", "--steps", "30"])
    trainer.main()
    found = kept(results, "trainer/memory")
    assert found["settings"]["steps"] == 30 and found["rounds"] == {"step": [30]}


def test_loading_is_measured_on_the_trainers_own_cache_and_samples(monkeypatch):
    passes = []
    monkeypatch.setattr(trainer, "consume", lambda args, workers, what, stream: passes.append(list(stream)) or 0.5)
    args = argparse.Namespace(images=8, workers=[0], batch=4, rate=30.0)
    found = trainer.loader(args)
    rates = found["workers"]["0"]
    assert found["scan_seconds"] > 0 and rates.keys() == {
        "encoding, images/s", "not cached, samples/s", "not cached, share waited", "cached, samples/s",
        "cached, share waited",
    }  # fmt: skip
    fresh, cached = passes
    assert len(fresh) == len(cached) == 2
    assert fresh[0].pixels.shape == (4, 3, 512, 512) and cached[0].moments.shape == (4, 2, 4, 64, 64)
    assert cached[0].text["states"].shape == (4, 77, 768)


def test_consumer_waits_for_a_slow_stream_only(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(trainer.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))

    def stream(seconds: float):
        while True:
            clock.now += seconds
            yield object()

    args = argparse.Namespace(rate=10.0, batch=1)
    assert trainer.consume(args, 1, "cached", stream(0.0)) == 0
    assert trainer.consume(args, 1, "cached", stream(0.1)) == pytest.approx(0.5)


def test_a_race_uses_the_steps_until_an_arm_is_stopped_and_chooses_what_is_left():
    """The middle rate is trained to its end, the lower one until half, and the higher one until it is worse."""
    curves = {1.0: {1: 1.5, 2: 1.5, 4: 0.5}, 2.0: {1: 1.4, 2: 1.3, 4: 1.0}, 3.0: {1: 1.41, 2: 0.5, 4: 0.9}}
    assert racing.race(curves) == (
        (4 + 2 + 1) / 12,
        1.0,
    )  # a stopped one would have halved its loss
    assert racing.race({1.0: {2: 1.3, 4: 1.1}, 2.0: {2: 1.3, 4: 1.0}, 3.0: {2: 1.2, 4: 0.8}}) == (1.0, 0.0)
    full = racing.filled({100: 0.5, 200: 0.4}, 0.9)
    assert (
        list(full) == list(range(20, 201, 20)) and full[100] == pytest.approx(0.5) and full[200] == pytest.approx(0.4)
    )
    assert sorted(full.values(), reverse=True) == list(full.values())


def test_the_kept_figures_of_the_race_are_those_of_the_present_rules():
    kept = json.loads((BENCHMARKS / "results" / "experiment" / "racing.json").read_text())
    assert kept["measured"] == json.loads(json.dumps(racing.figures(list(racing.grids()))))
    assert kept["met"]["measured, 5 or more rates"] and not kept["met"]["measured, all"]


def simulated(results, monkeypatch, name: str, **settings) -> dict:
    few = {"SEEDS": (2, 3), "IMAGES": (10,), "VARIANCES": ((1, 0, 0.1),), "FEW_VARIANCES": ((1, 0, 0.1),)}
    for constant, value in (few | {"ESTIMATED": 3} | settings).items():
        monkeypatch.setattr(experiment_statistics, constant, value)
    monkeypatch.setattr(sys, "argv", ["experiment_statistics.py", name, "--experiments", "60"])
    experiment_statistics.main()
    found = kept(results, f"experiment/statistics_{name}")
    assert found["command"] == f"python benchmarks/experiment_statistics.py {name} --experiments 60"
    return found


def test_the_experiments_statistics_are_simulated_beside_other_ways(results, monkeypatch):
    found = simulated(results, monkeypatch, "claims")
    ways = {"ours", "satterthwaite", "t over seeds", "bootstrap"}
    for draw in ("normal", "skewed"):
        for rows in (found[draw][comparisons] for comparisons in ("1", "4")):
            assert [row["seeds"] for row in rows] == [2, 3] and all(set(row["claims"]) == ways for row in rows)
    low, high = found["range_of_claims"]["normal, 1 compared, 3 to 8 seeds"]["bootstrap"]
    assert low == high == found["normal"]["1"][1]["claims"]["bootstrap"] > 0.1  # which knows nothing of few seeds


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["spread", "readings", "choosing"])
def test_each_rule_of_the_statistics_is_simulated_beside_its_absence(results, monkeypatch, name):
    found = simulated(results, monkeypatch, name, LABELS=(2, 3))
    if name == "spread":
        assert found["most_claims"]["one spreads 10 times as much"]["pooled"] > 0.1
        alike = [row["half_width_over_pooled"] for row in found["rows"] if (row["seeds"], row["times"]) == (2, 1)]
        assert all(row["own"] > 2 * row["moderated"] for row in alike)
    elif name == "readings":
        assert found["most_claims"]["ours"] < found["most_claims"]["no correction"]
    else:
        assert all(set(row["claims"]) >= {"all", "ours"} for row in found["rows"])
        assert found["most_claims"]["ours"] < 0.2


@pytest.mark.exhaustive
def test_claims_are_simulated(results, monkeypatch):
    found = simulated(results, monkeypatch, "claim")
    wrong = found["most_wrong_at_the_margin"]
    assert all(rate < 0.1 for rates in wrong.values() for rate in rates.values())  # 60 experiments each
    assert found["right_two_half_widths_away"]["first"][0] > 0.3
    assert all(row["seeds"] <= row["seeds_at_last"] <= row["seeds"] + 20 for row in found["rows"])


@pytest.mark.exhaustive
def test_sizes_are_simulated(results, monkeypatch):
    rows = simulated(results, monkeypatch, "power", LABELS=(2,))["rows"]
    assert [row["seeds"] for row in rows] == [2, 3] and all(row["stated_high_over_low"] > 1 for row in rows)
    rows = simulated(results, monkeypatch, "expected", LABELS=(2,))["rows"]
    assert all(row["expected_over_true"] < 1.01 * row["claimed_over_true"] for row in rows)
