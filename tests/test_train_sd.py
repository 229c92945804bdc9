"""train_sd.py, run as users run it, on a tiny Stable Diffusion with random weights."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import train_sd

SCRIPT = Path(train_sd.__file__)
WORDS = ["<start>", "<end>", "<unk>", "red", "blue", "disc", "box"]


def tiny_pipeline(folder: Path) -> Path:
    """Stable Diffusion's parts at the smallest size that still has chains: 32x32 pictures, 8x8 latents."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special),
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int = 6, caption=lambda i: ["red disc", "blue box"][i % 2]) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        PIL.Image.fromarray(random.integers(0, 255, (32, 32 + 8 * (i % 3), 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny-sd")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def base_flags(model, data) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "32"),
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--train_batch_size", "2", "--rank", "4"),
        *("--validation_prompt", "red disc", "blue box", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--num_inference_steps", "2", "--learning_rate", "1e-2", "--random_flip", "--validation_split", "0.3"),
        *("--merge_calibration_samples", "4", "--report_to", "none"),
    ]


@pytest.fixture(scope="module")
def run(base_flags, tmp_path_factory) -> Path:
    """One uninterrupted run of LoRA and ResLoRA that the tests below look at."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert train_sd.main([*base_flags, "--method", "lora", "reslora", "--output_dir", str(output)]) == 0
    return output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default output folders are relative: a run that was left in the checkout must not meet the tests."""
    monkeypatch.chdir(tmp_path)


def refused(capsys, *flags: str, quiet: bool = True) -> str:
    """The line with which the script refuses these flags; with `quiet`, the only one on stderr."""
    try:
        status = train_sd.main(list(map(str, flags)))
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.splitlines()
    assert lines[-1].startswith("train_sd.py: error: ") and (len(lines) == 1 or not quiet), captured.err
    return lines[-1]


def digests(folder: Path, pattern: str) -> dict[str, str]:
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob(pattern)}
    assert found
    return found


def final_weights(output: Path, method: str = "reslora", step: int = 4) -> dict[str, torch.Tensor]:
    name = "reslora_model.safetensors" if method == "reslora" else "adapter.safetensors"
    return load_file(output / method / f"checkpoint-{step}" / name)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True, msg=name)


# -- what a run writes -----------------------------------------------------------------------------------------------


def test_run_writes_the_documented_files(run):
    for name in ("config.json", "comparison.png", "loss.png"):
        assert (run / name).is_file()
    for method in ("lora", "reslora"):
        names = ["log.jsonl", "pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_config.json"]
        names += ["peft/adapter_model.safetensors", "unet/config.json", "checkpoint-2", "checkpoint-4"]
        names += [f"samples/step-{step:06d}/{prompt}-0.png" for step in (0, 2, 4) for prompt in (0, 1)]
        for name in names:
            assert (run / method / name).exists(), name
    for name in ("chains.json", "merge.json", "calibration.safetensors"):
        assert (run / "reslora" / name).is_file()
    assert not (run / "pytorch_lora_weights.safetensors").exists()  # that is for runs of one method
    assert not list(run.rglob("*.tmp"))


def test_log_has_training_and_validation_rows(run):
    rows = [json.loads(line) for line in (run / "reslora" / "log.jsonl").read_text().splitlines()]
    assert all(set(row) == {"step", "split", "loss", "lr", "seconds"} for row in rows)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [0, 2, 4]


def test_config_holds_every_resolved_flag(run):
    config = json.loads((run / "config.json").read_text())
    assert config["lora_alpha"] == 8 and config["method"] == ["lora", "reslora"] and config["max_train_steps"] == 4
    assert set(config) == {a.dest for a in train_sd.build_parser()._actions} - {"help", "config", "hub_token"}


@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_exports_load_in_stock_libraries_and_agree(run, model, method):
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)),
    }
    outputs = {}
    with torch.no_grad():
        for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            pipeline = StableDiffusionPipeline.from_pretrained(model)
            outputs["base"] = pipeline.unet(**inputs).sample
            pipeline.load_lora_weights(run / method, weight_name=name)
            outputs[name] = pipeline.unet(**inputs).sample
        base = UNet2DConditionModel.from_pretrained(model / "unet")
        outputs["peft"] = PeftModel.from_pretrained(base, run / method / "peft")(**inputs).sample
        outputs["unet"] = UNet2DConditionModel.from_pretrained(run / method / "unet")(**inputs).sample
    reference, base = outputs.pop("unet"), outputs.pop("base")
    assert (reference - base).abs().max() > 1e-2
    for output in outputs.values():
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


def test_one_method_leaves_its_weights_where_diffusers_script_does(base_flags, tmp_path):
    flags = [*base_flags, "--max_train_steps", "1", "--method", "lora_x2", "--output_dir", str(tmp_path / "out")]
    assert train_sd.main(flags) == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out" / "lora_x2" / name).read_bytes()


def test_other_adapters_train_and_export(base_flags, tmp_path):
    flags = [*base_flags, "--method", "adalora", "loha", "lokr", "--output_dir", str(tmp_path / "out")]
    assert train_sd.main(flags) == 0
    for method in ("adalora", "loha", "lokr"):
        record = json.loads((tmp_path / "out" / method / "exports.json").read_text())
        assert {"peft", "unet"} <= set(record["difference_of_255"])
        assert max(record["difference_of_255"].values()) <= 2


# -- the same samples for every method, seed and process -------------------------------------------------------------


def test_methods_share_initial_weights(model, base_flags):
    args, states = train_sd.parse_args(base_flags), []
    for method in ("lora", "lora_x2", "reslora"):
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        train_sd.add_adapter(unet, method, args, total_steps=4)
        states.append(train_sd.adapter_state(unet))
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_methods_share_the_samples(run):
    """B is zero at first, so that the first training loss is the base model's on the same noise: equal to the bit."""
    first = {}
    for method in ("lora", "reslora"):
        rows = [json.loads(line) for line in (run / method / "log.jsonl").read_text().splitlines()]
        first[method] = [row["loss"] for row in rows if row["step"] <= 1]
    assert first["lora"] == first["reslora"]
    assert digests(run / "lora", "samples/step-000000/*") == digests(run / "reslora", "samples/step-000000/*")
    assert digests(run / "lora", "samples/step-000004/*") != digests(run / "reslora", "samples/step-000004/*")


def test_same_seed_gives_the_same_bytes(run, base_flags, tmp_path):
    output = tmp_path / "again"
    assert train_sd.main([*base_flags, "--method", "reslora", "--output_dir", str(output)]) == 0
    for pattern in ("checkpoint-4/*.safetensors", "unet/*", "samples/**/*.png", "merge.json", "chains.json", "peft/*"):
        assert digests(output / "reslora", pattern) == digests(run / "reslora", pattern)
    for name in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        assert_same(load_file(output / "reslora" / name), load_file(run / "reslora" / name))
    other = tmp_path / "other"
    assert train_sd.main([*base_flags, "--method", "reslora", "--output_dir", str(other), "--seed", "1"]) == 0
    assert digests(other / "reslora", "kohya.safetensors") != digests(run / "reslora", "kohya.safetensors")


def test_accumulation_is_a_larger_batch(run, base_flags, tmp_path):
    flags = [*base_flags, "--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--method", "lora"]
    assert train_sd.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    for name, value in final_weights(tmp_path / "out", "lora").items():
        torch.testing.assert_close(value, final_weights(run, "lora")[name], rtol=1e-3, atol=1e-5)


def test_two_processes_end_where_one_with_the_whole_batch_ends(run, base_flags, tmp_path):
    flags = [*base_flags, "--train_batch_size", "1", "--method", "reslora", "--output_dir", str(tmp_path / "out")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *flags], env=environment, check=True, capture_output=True, timeout=240)
    for name, value in final_weights(tmp_path / "out").items():
        if name != "reslora.norms":  # recorded by the first process, of its half of the batch
            torch.testing.assert_close(value, final_weights(run)[name], rtol=1e-3, atol=1e-5)


def test_compiled_steps_are_the_same_steps(run, base_flags, tmp_path, monkeypatch):
    """The whole graph is captured as for any backend, but run without code generation, which would take minutes."""
    captured, compile_ = [], torch.compile

    def capture(graph, inputs):
        captured.append(any("conv2d" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=capture, fullgraph=True))
    flags = [*base_flags, "--compile", "--method", "reslora", "--output_dir", str(tmp_path / "out")]
    assert train_sd.main(flags) == 0
    assert sum(captured) == 1  # the U-Net, once; the rest puts the norms of a forward away
    ours, eager = (load_file(f / "reslora" / "pytorch_lora_weights.safetensors") for f in (tmp_path / "out", run))
    assert all(torch.allclose(ours[name], eager[name], rtol=1e-3, atol=1e-5) for name in eager)


@pytest.mark.parametrize("cached", [True, False])
def test_half_precision_and_uncached_encoders_train(base_flags, tmp_path, cached):
    uncached = ["--no-cache_latents", "--no-cache_text_embeddings", "--dataloader_num_workers", "1"]
    flags = [*base_flags, *([] if cached else uncached)]
    flags += ["--snr_gamma", "5", "--noise_offset", "0.1", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    flags += ["--method", "reslora", "--output_dir", str(tmp_path / "out")]
    # A process of its own: accelerate keeps the precision it was first started with.
    subprocess.run([sys.executable, str(SCRIPT), *flags], check=True, capture_output=True)
    assert all(value.dtype == torch.float32 for value in final_weights(tmp_path / "out").values())


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "reslora", "adalora"])
def test_resumed_run_equals_an_uninterrupted_one(base_flags, tmp_path, method):
    flags = [
        *base_flags,
        "--method",
        method,
        "--lora_dropout",
        "0.2",
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "1",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_sd.main([*flags, "--output_dir", str(whole)]) == 0
    # A run killed after its second step: nothing but the checkpoint of that step is there.
    parts.joinpath(method).mkdir(parents=True)
    (whole / method / "checkpoint-2").rename(parts / method / "checkpoint-2")
    (parts / method / "log.jsonl").write_text((whole / method / "log.jsonl").read_text())
    assert train_sd.main([*flags, "--output_dir", str(parts), "--resume_from_checkpoint", "latest"]) == 0
    assert digests(whole / method, "checkpoint-4/*.safetensors") == digests(
        parts / method, "checkpoint-4/*.safetensors"
    )
    one, other = (torch.load(f / method / "checkpoint-4" / "trainer.pt", weights_only=True) for f in (whole, parts))
    assert one["lr_scheduler"] == other["lr_scheduler"]
    for index, state in one["optimizer"]["state"].items():
        assert_same(state, other["optimizer"]["state"][index])
    losses = [
        [(r["step"], r["split"], r["loss"]) for r in train_sd.read_log(f / method / "log.jsonl")]
        for f in (whole, parts)
    ]
    assert losses[0] == losses[1]


def test_latest_skips_a_damaged_checkpoint_and_stray_folders(run, base_flags, tmp_path, capsys):
    output = tmp_path / "out"
    flags = [*base_flags, "--method", "reslora", "--output_dir", str(output)]
    assert train_sd.main(flags) == 0
    (output / "reslora" / "exports.json").unlink()
    (output / "reslora" / "checkpoint-best").mkdir()
    (output / "reslora" / "checkpoint-9").mkdir()  # unfinished
    weights = output / "reslora" / "checkpoint-4" / "reslora_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    assert train_sd.main([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert "checkpoint-4 is damaged" in capsys.readouterr().out
    assert_same(final_weights(output), final_weights(run))


def test_only_the_newest_checkpoints_are_kept(base_flags, tmp_path):
    flags = [*base_flags, "--method", "lora", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    assert train_sd.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out" / "lora").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(run, base_flags, tmp_path):
    flags = [*base_flags, "--method", "reslora", "--output_dir", str(tmp_path / "out"), "--checkpointing_steps", "1"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("reslora/checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (128 + signal.SIGTERM, 0)  # 0 where it was done before the signal came
    assert not (tmp_path / "out" / ".lock").exists()
    assert train_sd.main([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert_same(final_weights(tmp_path / "out"), final_weights(run))


def test_sigterm_to_the_whole_group_saves_too(base_flags, tmp_path):
    """As systemd and Slurm send it: the loader's processes leave the answer to the trainer."""
    flags = [*base_flags, "--method", "lora", "--output_dir", str(tmp_path / "out"), "--max_train_steps", "400"]
    flags += ["--dataloader_num_workers", "2", "--validation_steps", "400", "--checkpointing_steps", "400"]
    command = [sys.executable, str(SCRIPT), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "out" / "lora" / "log.jsonl"
    while not (log.is_file() and "train" in log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    assert len(list((tmp_path / "out" / "lora").glob("checkpoint-*"))) == 1


def test_a_stop_while_samples_are_drawn_saves_and_the_samples_follow(run, base_flags, tmp_path, monkeypatch):
    """Asked to stop in the samples of step 2: they are cut short, the step is saved, and drawn when the run goes on."""
    output, draw = tmp_path / "out", train_sd.sample
    flags = [*base_flags, "--method", "reslora", "--output_dir", str(output), "--checkpointing_steps", "100"]

    def interrupted(run_, unet, *more):
        if (output / "reslora" / "samples" / "step-000000").is_dir():
            run_.stop.signal = signal.SIGTERM
        return draw(run_, unet, *more)

    with monkeypatch.context() as patch:
        patch.setattr(train_sd, "sample", interrupted)
        assert train_sd.main(flags) == 128 + signal.SIGTERM
    method = output / "reslora"
    assert {path.name for path in method.glob("checkpoint-*")} == {"checkpoint-2"}
    assert not (method / "samples" / "step-000002").exists()
    assert train_sd.main([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert_same(final_weights(output), final_weights(run))
    rows = [
        [(row["step"], row["split"]) for row in train_sd.read_log(o / "reslora" / "log.jsonl")] for o in (output, run)
    ]
    assert rows[0] == rows[1]
    names = [sorted(p.name for p in (o / "reslora" / "samples").iterdir()) for o in (output, run)]
    assert names[0] == names[1]


def test_finished_run_does_nothing(run, base_flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train_sd.main([*base_flags, "--method", "lora", "reslora", "--output_dir", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_unfinished_run_is_not_overwritten(run, base_flags, capsys, tmp_path):
    checkpoint = tmp_path / "lora" / "checkpoint-2"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(run / "lora" / "checkpoint-2")
    assert "--resume_from_checkpoint latest" in refused(
        capsys, *base_flags, "--method", "lora", "--output_dir", tmp_path
    )


@pytest.mark.parametrize(
    "flags", [("--rank", "8"), ("--shortcut", "middle"), ("--seed", "3"), ("--train_batch_size", "3")]
)
def test_resume_refuses_other_settings(run, base_flags, capsys, flags):
    line = refused(capsys, *base_flags, *flags, "--output_dir", run, "--method", "reslora", "--max_train_steps", "6",
                   "--resume_from_checkpoint", "latest")  # fmt: skip
    assert flags[0] in line or "batch size" in line


def test_resume_refuses_other_pictures(run, base_flags, data, capsys, tmp_path):
    flags = [
        *base_flags,
        "--method",
        "lora",
        "--output_dir",
        str(tmp_path / "out"),
        "--resume_from_checkpoint",
        "latest",
    ]
    folder = pictures(tmp_path / "p", caption=lambda i: "red box")
    flags[flags.index("--train_data_dir") + 1] = str(folder)
    checkpoint = tmp_path / "out" / "lora" / "checkpoint-2"
    shutil.copytree(run / "lora" / "checkpoint-2", checkpoint)
    record = json.loads((checkpoint / "trainer.json").read_text())
    record["settings"]["train_data_dir"] = str(folder)  # the same folder, with other captions in it
    (checkpoint / "trainer.json").write_text(json.dumps(record))
    assert "was trained on 6 pictures" in refused(capsys, *flags, quiet=False)


def test_missing_named_checkpoint_is_an_error(base_flags, capsys, tmp_path):
    assert "checkpoint-7" in refused(
        capsys, *base_flags, "--output_dir", tmp_path, "--resume_from_checkpoint", "checkpoint-7"
    )


def test_lock_refuses_a_second_run_and_a_stale_one_is_taken_over(base_flags, capsys, tmp_path):
    code = "import sys, train_sd; c = train_sd.locked(train_sd.Path(sys.argv[1])); c.__enter__(); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", str(tmp_path)]
    with subprocess.Popen(command, cwd=SCRIPT.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert (tmp_path / ".lock").read_text() == str(other.pid)
        with pytest.raises(train_sd.InvalidArgument, match=f"process {other.pid} is training in it"):
            train_sd.locked(tmp_path).__enter__()
        (tmp_path / "lora" / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "lora" / "checkpoint-2" / "trainer.json").write_text("{}")
        for resume in ([], ["--resume_from_checkpoint", "latest"]):
            line = refused(capsys, *base_flags, "--method", "lora", "--output_dir", tmp_path, *resume)
            assert f"process {other.pid} is training in it" in line
        other.kill()
    (tmp_path / ".lock").write_text(str(os.getppid()))  # an id that was used again
    with train_sd.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / ".lock").exists()


def test_not_a_number_stops_the_run(base_flags, tmp_path, capsys):
    flags = [*base_flags, "--method", "lora", "--learning_rate", "1e30", "--checkpointing_steps", "1"]
    assert train_sd.main([*flags, "--output_dir", str(tmp_path / "out"), "--max_grad_norm", "1e30"]) == 1
    assert "lower --learning_rate" in capsys.readouterr().err
    for checkpoint in (tmp_path / "out" / "lora").glob("checkpoint-*"):
        assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "adapter.safetensors").values())


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--rank", "0"),
        ("--rank", "four"),
        ("--learning_rate", "nan"),
        ("--lora_alpha", "inf"),
        ("--lora_dropout", "1"),
        ("--pre_num", "-2"),
        ("--checkpoints_total_limit", "0"),
        ("--method", "dora"),
        ("--shortcut", "sideways"),
        ("--resolution", "30"),
        ("--target_modules", "to_nothing"),
        ("--pretrained_model_name_or_path", "/no/such/folder"),
        ("--train_data_dir", "/no/such/folder"),
        ("--caption_column", "caption"),
        ("--output_dir", "/proc/run"),
        ("--resume_from_checkpoint", "checkpoint-1"),
        ("--report_to", "comet_ml"),
        ("--config", "/no/such/file.toml"),
        ("--no_such_flag", "1"),
        ("--resolution", "12"),
        ("--num_inference_steps", "2000"),
        ("--learning_rate", "1e-08", "--lr_scheduler", "polynomial"),
        ("--max_train_steps", "2", "--method", "adalora"),
        ("--target_modules", "conv1", "--method", "adalora"),
    ],
)
def test_bad_flags_are_refused_in_one_line(base_flags, capsys, tmp_path, flags):
    output = [] if flags[0] == "--output_dir" else ["--output_dir", tmp_path / "out"]
    line = refused(capsys, *base_flags, "--method", "reslora", *output, *flags)
    assert flags[0] in line and flags[1] in line
    assert not list(tmp_path.glob("out/*"))


def test_a_refused_run_leaves_the_users_files(base_flags, capsys, tmp_path):
    """Leftovers of a killed run go; what merely looks alike stays, as does a folder that was there."""
    theirs = [tmp_path / "out" / ".mine.tmp", tmp_path / "out" / "notes" / ".draft.1.tmp"]
    own = [tmp_path / "out" / ".config.json.123.tmp", tmp_path / "out" / "lora" / ".peft.123.old.tmp"]
    for path in (*theirs, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        refused(capsys, *base_flags, "--target_modules", "to_nothing", "--output_dir", tmp_path / name)
    assert all(path.is_file() for path in theirs) and not any(path.exists() for path in own)
    assert (tmp_path / "empty").is_dir()


def damage_missing(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").unlink()


def damage_cut_off(unet: Path) -> None:
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def damage_other_shape(unet: Path) -> None:
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 24]}))


@pytest.mark.parametrize("damage", [damage_missing, damage_cut_off, damage_other_shape])
def test_damaged_unet_is_refused_before_anything_is_encoded(base_flags, model, capsys, tmp_path, damage):
    broken = shutil.copytree(model, tmp_path / "model")
    damage(broken / "unet")
    flags = ["--pretrained_model_name_or_path", broken, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *base_flags, *flags)
    assert "--pretrained_model_name_or_path" in line and "unet" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index, vae", [("[]", None), (None, "[]"), ("{", None)])
def test_damaged_model_configs_are_refused(base_flags, model, capsys, tmp_path, index, vae):
    broken = shutil.copytree(model, tmp_path / "model")
    if index:
        (broken / "model_index.json").write_text(index)
    if vae:
        (broken / "vae" / "config.json").write_text(vae)
    assert "model_index.json" in refused(capsys, *base_flags, "--pretrained_model_name_or_path", broken)


def test_hub_that_cannot_be_reached_is_said_at_once(capsys, data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False, raising=False)
    flags = ("--pretrained_model_name_or_path", "nobody/nothing", "--train_data_dir", data, "--report_to", "none")
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "nobody/nothing" in line and "http://127.0.0.1:9 cannot be reached" in line
    assert not (tmp_path / "out").exists()


def test_model_without_data_is_refused(model, capsys):
    assert "--train_data_dir" in refused(capsys, "--pretrained_model_name_or_path", model)


def test_sdxl_is_refused(capsys, tmp_path, data):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    line = refused(capsys, "--pretrained_model_name_or_path", tmp_path, "--train_data_dir", data)
    assert "SDXL is supported by the reslora library only" in line


def test_script_itself_exits_with_2_and_answers_help_without_heavy_imports():
    heavy = "import sys, train_sd; train_sd.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=SCRIPT.parent, check=False).returncode == 0
    done = subprocess.run([sys.executable, str(SCRIPT), "--rank", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--rank" in done.stderr


def test_every_flag_of_diffusers_script_is_there():
    names = {
        "pretrained_model_name_or_path", "revision", "variant", "dataset_name", "dataset_config_name",
        "train_data_dir", "image_column", "caption_column", "validation_prompt", "num_validation_images",
        "validation_epochs", "max_train_samples", "output_dir", "cache_dir", "seed", "resolution",
        "center_crop", "random_flip", "train_batch_size", "num_train_epochs", "max_train_steps",
        "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "scale_lr", "lr_scheduler",
        "lr_warmup_steps", "snr_gamma", "use_8bit_adam", "allow_tf32", "dataloader_num_workers", "adam_beta1",
        "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "push_to_hub", "hub_token",
        "prediction_type", "hub_model_id", "logging_dir", "mixed_precision", "report_to", "local_rank",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
        "enable_xformers_memory_efficient_attention", "noise_offset", "rank", "image_interpolation_mode",
    }  # fmt: skip
    assert len(names) == 51
    assert names <= {action.dest for action in train_sd.build_parser()._actions}


def test_config_file_gives_flags_and_the_command_line_wins(run, data, model, tmp_path):
    toml = tmp_path / "run.toml"
    lines = [f'train_data_dir = "{data}"', f'pretrained_model_name_or_path = "{model}"', "rank = 7", "resolution = 32"]
    lines += ['method = ["lora", "loha"]', "random_flip = true", "cache_latents = false"]
    toml.write_text("\n".join(lines))
    args = train_sd.parse_args(["--config", str(toml), "--rank", "3"])
    assert (args.rank, args.lora_alpha, args.method, args.random_flip, args.cache_latents) == (
        3,
        6,
        ["lora", "loha"],
        True,
        False,
    )
    more = ["--num_train_epochs", "5", "--validation_epochs", "3", "--rank", "5", "--no-random_flip"]
    args = train_sd.parse_args(["--config", str(run / "config.json"), *more])
    assert (args.max_train_steps, args.num_train_epochs, args.lora_alpha, args.random_flip) == (None, 5, 10, False)
    assert args.validation_epochs == 3 and args.validation_steps is None
    again = vars(train_sd.parse_args(["--config", str(run / "config.json")]))
    config = json.loads((run / "config.json").read_text())
    assert config == {name: again[name] for name in config}


def test_a_config_that_is_no_table_is_refused(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    assert "--config" in refused(capsys, "--config", tmp_path / "list.json")


def test_an_alpha_of_the_config_stays_when_the_rank_is_given(tmp_path, data):
    toml = tmp_path / "run.toml"
    toml.write_text(f"\ufefflora_alpha = 64\ntrain_data_dir = '{data}'\n", encoding="utf-8")
    assert train_sd.parse_args(["--config", str(toml), "--rank", "4"]).lora_alpha == 64


def test_prompts_that_begin_with_a_dash_come_back(tmp_path, data):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"validation_prompt": ["-foo", "--seed=7"], "train_data_dir": str(data)}))
    args = train_sd.parse_args(["--config", str(file)])
    assert args.validation_prompt == ["-foo", "--seed=7"] and args.seed == 0


@pytest.mark.parametrize("content", ["rank = [4]", "[rank]\nvalue = 4", "rank = 4 5"])
def test_malformed_config_values_are_refused(tmp_path, capsys, content):
    (tmp_path / "run.toml").write_text(content)
    assert "--config" in refused(capsys, "--config", tmp_path / "run.toml")


def test_upload_is_tried_again_by_the_same_command(run, base_flags, monkeypatch, capsys):
    """The hub is a stand-in: what is uploaded, under what card, and what a failure leaves."""
    import huggingface_hub

    flags, uploaded = [*base_flags, "--method", "lora", "reslora", "--output_dir", str(run), "--push_to_hub"], []
    made = type("Made", (), {"repo_id": "me/run"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: made)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", missing_card)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: 1 / 0)
    assert train_sd.main(flags) == 1
    assert "me/run could not be uploaded" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **more: uploaded.append(more))
    assert train_sd.main(flags) == 0
    card = (run / "README.md").read_text()
    (run / "README.md").unlink()
    assert "comparison.png" in card and "base_model" not in card and str(run.parent) not in card
    assert uploaded[0]["repo_id"] == "me/run" and "*/checkpoint-*" in uploaded[0]["ignore_patterns"]


def missing_card(*_, **__):
    from huggingface_hub.errors import EntryNotFoundError

    raise EntryNotFoundError("none yet")


# -- pictures and captions -------------------------------------------------------------------------------------------


def gather(folder: Path, *flags: str) -> train_sd.Pictures:
    return train_sd.find_pictures(train_sd.parse_args(["--train_data_dir", str(folder), *flags]))


def test_a_stray_text_does_not_hide_metadata_csv(tmp_path):
    folder = pictures(tmp_path / "p", 3)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,red disc\n1.png,blue box\n")
    (folder / "2.txt").write_text("stray")
    assert gather(folder).captions == [["red disc"], ["blue box"]]


def test_captions_from_windows_editors(tmp_path, capsys):
    folder = pictures(tmp_path / "p", 4)
    (folder / "metadata.jsonl").unlink()
    encodings = ["utf-8-sig", "utf-16", "latin-1", "utf-8"]
    for number, encoding in enumerate(encodings):
        (folder / f"{number}.txt").write_text("café", encoding=encoding)
    found = gather(folder)
    assert found.captions == [["café"]] * 3
    assert len(found.left_out) == 1 and "2.png" in found.left_out[0] and "not UTF-8" in found.left_out[0]


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a\\u0000.png", "text": "x"}',
        '{"file_name": "\\ud800.png", "text": "x"}',
        '{"file_name": "loop.png", "text": "x"}',
        "[" * 100_000,
    ],
)
def test_rows_that_name_no_file_are_refused(tmp_path, capsys, row):
    folder = pictures(tmp_path / "p")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "metadata.jsonl").write_text(row)
    flags = ("--train_data_dir", folder, "--output_dir", tmp_path / "out")
    assert str(folder) in refused(capsys, *flags)


def test_half_a_character_in_a_caption_is_replaced(tmp_path):
    folder = pictures(tmp_path / "p", 2)
    rows = [json.dumps({"file_name": f"{n}.png", "text": "cat \ud83d"}) for n in range(2)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert gather(folder).captions == [["cat ?"]] * 2


def test_a_runs_own_samples_are_no_pictures(tmp_path):
    folder = pictures(tmp_path / "p", 2)
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("red disc")
    (folder / "1.txt").write_text("red disc")
    (folder / "out").mkdir()
    shutil.copy(folder / "0.png", folder / "out" / "comparison.png")
    (folder / "loop").symlink_to(folder / "loop")
    found = gather(folder, "--output_dir", str(folder / "out"))
    assert len(found.sources) == 2 and not found.left_out


def test_captions_beside_the_pictures(tmp_path):
    pictures(tmp_path / "p")
    (tmp_path / "p" / "metadata.jsonl").unlink()
    (tmp_path / "p" / "0.txt").write_text("red disc\n")
    (tmp_path / "p" / "2.txt").write_text("صورة 🎈 " + "long " * 2000)
    found = gather(tmp_path / "p")
    assert [path.name for path in found.sources] == ["0.png", "2.png"]
    assert found.captions[0] == ["red disc"] and found.captions[1][0].startswith("صورة 🎈")
    assert len(found.left_out) == 4


def test_pictures_that_cannot_be_used_are_named_and_left_out(tmp_path, capsys):
    folder = pictures(tmp_path / "p", caption=lambda i: [None, "a\0b", "", ["x", "y"], "gone", "text"][i])
    (folder / "4.png").unlink()
    (folder / "5.png").write_text("not a picture")
    found = gather(folder)
    assert found.captions == [["ab"], [""], ["x", "y"]]
    assert [line.split("/")[-1] for line in found.left_out] == [
        "0.png: no caption", "4.png: no such file", "5.png: not a picture"
    ]  # fmt: skip
    assert "0.png" in refused(capsys, "--train_data_dir", folder, "--strict", "--output_dir", tmp_path / "out")


def test_metadata_that_is_not_utf_8_is_refused(tmp_path, capsys):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "\u00e9"}'.encode("latin-1"))
    assert "not UTF-8" in refused(capsys, "--train_data_dir", tmp_path)


@pytest.mark.parametrize("content", ["", '{"file_name": "../0.png", "text": "x"}', '{"file_name": "0.png"}', "{"])
def test_bad_metadata_is_refused(tmp_path, capsys, content):
    pictures(tmp_path / "p")
    (tmp_path / "p" / "metadata.jsonl").write_text(content)
    assert "--" in refused(capsys, "--train_data_dir", tmp_path / "p", "--output_dir", tmp_path / "out")


def test_other_layouts_are_read_by_datasets(tmp_path):
    folder = pictures(tmp_path / "p", count=2)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,label,text\n0.png,1,red disc\n1.png,2,blue box\n")
    found = gather(folder, "--cache_dir", str(tmp_path / "cache"))
    assert found.captions == [["red disc"], ["blue box"]]
    assert train_sd.open_picture(found.sources[0]).size == (32, 32)


def test_folder_without_captions_is_refused(tmp_path, capsys):
    (tmp_path / "p" / "cats").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "p" / "cats" / "0.png")
    assert "1 pictures without captions" in refused(capsys, "--train_data_dir", tmp_path / "p")
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(capsys, "--train_data_dir", tmp_path / "empty")


def solid(mode: str, colour, **save) -> np.ndarray:
    """What a picture of one colour, written in `mode`, is read as."""
    import io

    file = io.BytesIO()
    PIL.Image.new(mode, (8, 4), colour).save(file, **({"format": "PNG"} | save))
    return np.asarray(train_sd.open_picture(file.getvalue()))


def test_every_kind_of_picture_is_read_right():
    assert (solid("RGBA", (255, 0, 0, 0)) == 255).all()  # transparent red is white
    assert (solid("RGBA", (255, 0, 0, 255)) == (255, 0, 0)).all()
    assert (solid("LA", (0, 0)) == 255).all()
    assert (solid("L", 100) == 100).all()
    assert (solid("L", 100, transparency=100) == 255).all()
    assert (solid("I;16", 100 * 257) == 100).all()
    assert (solid("1", 1) == 255).all()
    assert np.abs(solid("CMYK", (0, 255, 255, 0), format="JPEG").astype(int) - (255, 0, 0)).max() <= 4
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert solid("RGB", (1, 2, 3), exif=exif).shape == (8, 4, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 64)])
def test_extreme_shapes_are_cropped_in_little_memory(size):
    args = train_sd.parse_args(["--resolution", "64"])
    pixels = train_sd.crop_and_scale(PIL.Image.new("RGB", size, "white"), (0.5, 1.0), True, args)
    assert pixels.shape == (3, 64, 64) and (pixels == 1).all()


def test_prompts_in_other_scripts_find_a_font_if_one_is_installed():
    from matplotlib import font_manager

    plain = train_sd.font_for("red disc", 20)
    greek = train_sd.font_for("κόκκινος", 20)
    has_greek = any(
        {ord(c) for c in "κόκινς"} <= font_manager.get_font(path).get_charmap().keys()
        for path in font_manager.findSystemFonts(fontext="ttf")
    )
    assert plain.getlength("red disc") > 0
    assert (greek.path != plain.path) == has_greek


def test_fewer_pictures_than_a_batch(model, tmp_path):
    folder = pictures(tmp_path / "p", count=1)
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder), "--resolution", "32"]
    flags += ["--max_train_steps", "1", "--method", "lora", "--num_inference_steps", "2", "--report_to", "none"]
    assert train_sd.main([*flags, "--train_batch_size", "4", "--output_dir", str(tmp_path / "out")]) == 0


# -- what a run was asked for ------------------------------------------------------------------------------------------


def test_steps_and_epochs_are_told_apart(run, base_flags, capsys):
    """A run that `--max_train_steps` ended is not the run of so many epochs, and not one of fewer steps."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", str(run)]
    assert train_sd.finished_methods(train_sd.parse_args(flags)) == ["lora", "reslora"]
    at = flags.index("--max_train_steps")
    assert train_sd.finished_methods(train_sd.parse_args([*flags[:at], *flags[at + 2 :]])) == []
    line = refused(capsys, *flags, "--max_train_steps", 2)
    assert "--max_train_steps 2" in line and "4" in line


def test_a_damaged_newest_checkpoint_does_not_hide_other_settings(run, base_flags, capsys, tmp_path):
    output = shutil.copytree(run, tmp_path / "out")
    (output / "lora" / "exports.json").unlink()
    (output / "lora" / "checkpoint-4" / "trainer.json").write_text("[]")
    flags = [*base_flags, "--method", "lora", "--output_dir", output, "--resume_from_checkpoint", "latest"]
    assert "--learning_rate" in refused(capsys, *flags, "--learning_rate", "0.5")


def test_other_pictures_under_the_same_names_are_noticed(run, base_flags, data, capsys, tmp_path):
    output, folder = shutil.copytree(run, tmp_path / "out"), shutil.copytree(data, tmp_path / "pictures")
    for path in output.glob("lora/checkpoint-*/trainer.json"):
        record = json.loads(path.read_text())
        record["settings"]["train_data_dir"] = str(folder.resolve())
        path.write_text(json.dumps(record))
    PIL.Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    (output / "lora" / "exports.json").unlink()
    flags = [*base_flags, "--method", "lora", "--output_dir", output, "--resume_from_checkpoint", "latest"]
    line = refused(capsys, *flags, "--train_data_dir", folder, quiet=False)
    assert str(folder) in line and "bring them back" in line
