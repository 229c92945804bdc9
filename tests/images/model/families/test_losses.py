"""Each family's loss equals diffusers' formulas, written out by hand around the stock pipeline."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from pipelines import EDITS, FAMILIES, image_folder

from reslora.images.data.batch import Batch, collate
from reslora.images.data.folders import load_folders
from reslora.images.data.samples import TrainingSamples
from reslora.images.data.training_data import load_training_data
from reslora.images.denoising import DenoisingLoss
from reslora.images.model.families import load_family
from reslora.images.model.families.base import Conditions, Family
from reslora.images.run import load_and_check, resolve_context
from reslora.images.settings import parse_args
from reslora.runtime.signals import StopRequest

CAPTIONS = ["red disc", "blue box"]
MIXED = ["red", "red blue disc box"]
SIZES = torch.tensor([[40, 32, 4, 0, 32, 32], [32, 48, 0, 3, 32, 32]])


class Setting:
    """A tiny pipeline of a family, the trainer's loss, and a batch of random moments."""

    def __init__(self, name: str, folder: Path, *flags: str, **parts) -> None:
        FAMILIES[name](folder / "model", **parts)
        image_folder(folder / "images")
        places = ["--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "images")]
        flags = parse_args([*places, "--output_dir", str(folder / "out"), "--resolution", "32", "--rank", "2", *flags])
        accelerator = Accelerator(cpu=True)
        context = resolve_context(flags, accelerator, StopRequest())
        self.context, model, self.family, self.options = context, context.model, context.model.family, context.options
        _, self.objective = load_and_check(context)
        lacking = {part: None for part, kind in model.index.items() if kind == [None, None]}
        self.stock = DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32, **lacking)
        self.stock.set_progress_bar_config(disable=True)
        self.denoiser = getattr(self.stock, self.family.denoiser)
        with torch.no_grad():  # zero-initialised parts would hide what flows through them
            draws = torch.Generator().manual_seed(5)
            for parameter in self.denoiser.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
        # As the trainer has it: without the denoiser.
        pipeline = model.load_pipeline(torch.float32, accelerator.device, encoders=True)
        self.loss = DenoisingLoss(context, self.objective, pipeline, self.denoiser.config)

    def batch(self, captions: list[str] = CAPTIONS, width: int = 32) -> Batch:
        draws = torch.Generator().manual_seed(7)
        shape = (2, *self.family.latent_shape(self.stock, 32, width))
        timesteps = torch.stack([self.objective.draw(draws) for _ in range(2)])
        names = ("noise", "posterior_noise")
        batch = {name: torch.randn(shape, generator=draws) for name in names}
        moments = torch.rand(2, 2, *shape[1:], generator=draws)
        return Batch(**batch, timesteps=timesteps, moments=moments, sizes=SIZES, caption=captions, weight=torch.ones(2))

    def latents(self, batch: Batch) -> torch.Tensor:
        config = self.stock.vae.config
        mean, std = batch.moments.unbind(1)
        drawn = mean + std * batch.posterior_noise
        shift = config.shift_factor if self.family.objective == "flow" else 0.0
        return (drawn - shift) * config.scaling_factor


@pytest.fixture
def setting(tmp_path):
    return lambda name, *flags, **parts: Setting(name, tmp_path, *flags, **parts)


def mean_square(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.stack([(p - t).pow(2).mean() for p, t in zip(prediction, target, strict=True)])


def ddpm_parts(one: Setting, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents and both targets, from the betas of the scheduler's configuration."""
    config = one.stock.scheduler.config
    power = {"scaled_linear": 2, "linear": 1}[config.beta_schedule]
    ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** power
    kept = torch.cumprod(1 - betas, 0)[batch.timesteps].view(2, 1, 1, 1).float()
    x, e = one.latents(batch), batch.noise
    return kept.sqrt() * x + (1 - kept).sqrt() * e, e, kept.sqrt() * e - (1 - kept).sqrt() * x


def flow_parts(one: Setting, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    s = (batch.timesteps / 1000).view(2, 1, 1, 1)
    x, e = one.latents(batch), batch.noise
    return (1 - s) * x + s * e, e - x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_stable_diffusion(setting, kind):
    one = setting("stable_diffusion", "--prediction_type", kind)
    batch = one.batch()
    noisy, epsilon, v = ddpm_parts(one, batch)
    states = one.stock.encode_prompt(CAPTIONS, "cpu", 1, False)[0]
    prediction = one.denoiser(noisy, batch.timesteps, states).sample
    expected = mean_square(prediction, epsilon if kind == "epsilon" else v)
    torch.testing.assert_close(one.loss(one.denoiser, batch), expected)


@torch.no_grad()
def test_sdxl_is_told_sizes_and_pooled_states(setting):
    one = setting("sdxl")
    batch = one.batch()
    noisy, epsilon, v = ddpm_parts(one, batch)
    states, _, pooled, _ = one.stock.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    told = {"text_embeds": pooled, "time_ids": SIZES.float()}
    prediction = one.denoiser(noisy, batch.timesteps, states, added_cond_kwargs=told).sample
    target = v if one.stock.scheduler.config.prediction_type == "v_prediction" else epsilon
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(prediction, target))


@pytest.mark.parametrize("captions", [CAPTIONS, MIXED], ids=["equal", "mixed"])
@torch.no_grad()
def test_z_image_counts_the_other_way_and_points_the_other_way(setting, captions):
    one = setting("z_image")
    batch = one.batch(captions)
    noisy, velocity = flow_parts(one, batch)
    states, _ = one.stock.encode_prompt(list(captions), "cpu", do_classifier_free_guidance=False)
    assert captions is CAPTIONS or states[0].shape != states[1].shape
    noisy = [image.unsqueeze(1) for image in noisy]
    output = one.denoiser(noisy, (1000 - batch.timesteps) / 1000, states, return_dict=False)[0]
    prediction = -torch.stack([image.squeeze(1) for image in output])
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(prediction, velocity))


@pytest.mark.parametrize(("captions", "width"), [(CAPTIONS, 32), (MIXED, 48)], ids=["equal", "mixed"])
@torch.no_grad()
def test_lumina_2_reads_captions_of_their_own_length_as_its_pipeline_does_padded_ones(setting, captions, width):
    one = setting("lumina2")
    batch = one.batch(captions, width)
    noisy, velocity = flow_parts(one, batch)
    states, mask, empty, its_mask = one.stock.encode_prompt(captions, device="cpu")
    kept = one.family.encode_captions(one.stock, [*captions, ""], 256)["states"]
    assert [len(own) for own in kept] == [*mask.sum(dim=1), its_mask[0].sum()] and max(map(len, kept)) < 64
    torch.testing.assert_close(kept[2], empty[0, : len(kept[2])])  # without the system prompt
    output = one.denoiser(noisy, 1 - batch.timesteps / 1000, states, mask).sample
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(-output, velocity))


@torch.no_grad()
def test_lumina_2s_pipeline_goes_from_noise_to_the_image_by_what_is_trained(setting, monkeypatch):
    """In one step, if the denoiser's output is the one whose loss is zero; and the loss tells it the same time."""
    one = setting("lumina2")
    image, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    output, told = image - noise, []

    def answer(hidden_states, timestep, **inputs):
        told.append(timestep)
        return (output,)

    monkeypatch.setattr(one.stock.transformer, "forward", answer)
    given = {"height": 32, "width": 32, "latents": noise, "guidance_scale": 1.0, "output_type": "latent"}
    drawn = one.stock("red disc", num_inference_steps=1, **given).images
    torch.testing.assert_close(drawn, image)
    conditions = Conditions(one.family.encode_captions(one.stock, ["red disc"], 64), SIZES[:1])
    inputs = one.family.denoiser_inputs(one.denoiser.config, noise, torch.tensor([1000.0]), conditions)
    assert inputs["timestep"].equal(told[0])
    torch.testing.assert_close(one.family.prediction((output,), noise), one.objective.target(image, noise, None))


@pytest.mark.exhaustive
@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_flux_packs_and_is_told_the_guidance_if_it_listens(setting, guided):
    """With an image that is not square: otherwise exchanged rows and columns would go unnoticed."""
    words = ("--guidance_scale_train", "2.5") if guided else ()
    one = setting("flux", *words, transformer={"guidance_embeds": guided})
    batch = one.batch(width=48)
    noisy, velocity = flow_parts(one, batch)
    states, pooled, text_ids = one.stock.encode_prompt(CAPTIONS, None, device="cpu", max_sequence_length=512)
    height, width = noisy.shape[2:]
    places = [(0, row, column) for row in range(height // 2) for column in range(width // 2)]
    output = one.denoiser(
        patches(noisy), states, pooled, batch.timesteps / 1000, torch.tensor(places).float(), text_ids,
        guidance=torch.tensor([2.5, 2.5]) if guided else None,
    ).sample  # fmt: skip
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(output, patches(velocity)))


@pytest.mark.parametrize("with_t5", [True, False])
@torch.no_grad()
def test_sd3(setting, with_t5):
    one = setting("sd3", with_t5=with_t5)
    batch = one.batch()
    noisy, velocity = flow_parts(one, batch)
    states, _, pooled, _ = one.stock.encode_prompt(
        CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=77
    )
    prediction = one.denoiser(noisy, states, pooled, batch.timesteps).sample
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(prediction, velocity))


@pytest.mark.parametrize(("captions", "width"), [(CAPTIONS, 32), (MIXED, 48)], ids=["equal", "mixed"])
@torch.no_grad()
def test_chroma_reads_a_caption_and_one_token_of_padding_as_if_it_were_alone(setting, captions, width):
    """T5 sees no padding, and the denoiser one token of it; a single caption needs no mask."""
    one = setting("chroma")
    batch = one.batch(captions, width)
    noisy, velocity = flow_parts(one, batch)
    places = [(0, row, column) for row in range(noisy.shape[2] // 2) for column in range(width // 8)]
    expected = []
    for number, caption in enumerate(captions):
        tokens = one.stock.tokenizer([caption], padding="max_length", max_length=16, return_tensors="pt")
        states = one.stock.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        states = states[:, : tokens.attention_mask.sum() + 1]
        output = one.denoiser(
            patches(noisy[number : number + 1]), states, batch.timesteps[number : number + 1] / 1000,
            torch.tensor(places).float(), torch.zeros(states.shape[1], 3),
        ).sample  # fmt: skip
        expected.append(mean_square(output, patches(velocity[number : number + 1])))
    torch.testing.assert_close(one.loss(one.denoiser, batch), torch.cat(expected))


@torch.no_grad()
def test_chromas_states_are_those_that_its_pipelines_mask_keeps(setting):
    """Of the padded tokens, all but the first are masked; a caption of maximum length has no padding."""
    one = setting("chroma")
    states, _, mask, *_ = one.stock.encode_prompt(MIXED, do_classifier_free_guidance=False, max_sequence_length=512)
    kept = one.family.encode_captions(one.stock, MIXED, 512)["states"]
    assert states.shape[1] == 512 and [len(own) for own in kept] == mask.sum(dim=1).tolist() == [3 + 1, 6 + 1]
    denoiser, noisy = one.denoiser.double(), one.batch().noise.double()
    mask = torch.cat([mask.bool(), torch.ones(2, 16, dtype=torch.bool)], dim=1)
    conditions = Conditions({"states": [own.double() for own in kept]}, SIZES)
    inputs = one.family.denoiser_inputs(denoiser.config, noisy, torch.tensor([3, 800]), conditions)
    own = denoiser(**inputs, return_dict=False)[0]
    longer = {"encoder_hidden_states": states.double(), "attention_mask": mask, "txt_ids": torch.zeros(512, 3)}
    torch.testing.assert_close(denoiser(**inputs | longer, return_dict=False)[0], own, rtol=1e-10, atol=1e-10)
    assert len(one.family.encode_captions(one.stock, ["red " * 20], 12)["states"][0]) == 12


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["flux2_klein", "flux2"])
@torch.no_grad()
def test_flux2_trains_on_patches_that_the_autoencoder_normalises(setting, family):
    """FLUX.2 dev gets the guidance as an input."""
    words = ("--guidance_scale_train", "2.5") if family == "flux2" else ()
    one = setting(family, *words)
    batch = one.batch(width=48)
    bn, s = one.stock.vae.bn, (batch.timesteps / 1000).view(2, 1, 1, 1)
    mean, std = batch.moments.unbind(1)
    x, e = mean + std * batch.posterior_noise, batch.noise
    x = (x - bn.running_mean[:, None, None]) / (
        bn.running_var[:, None, None] + one.stock.vae.config.batch_norm_eps
    ).sqrt()
    states, text_ids = one.stock.encode_prompt(CAPTIONS, "cpu", max_sequence_length=512)
    height, width = x.shape[2:]
    places = torch.tensor([(0, row, column, 0) for row in range(height) for column in range(width)])
    flat = ((1 - s) * x + s * e).flatten(2).transpose(1, 2)
    told = torch.tensor([2.5, 2.5]) if words else None
    output = one.denoiser(flat, states, batch.timesteps / 1000, places.expand(2, -1, -1), text_ids, told).sample
    expected = mean_square(output, (e - x).flatten(2).transpose(1, 2))
    torch.testing.assert_close(one.loss(one.denoiser, batch), expected)


@torch.no_grad()
def test_flux2_kleins_moments_are_those_of_the_autoencoder_in_patches(setting):
    one = setting("flux2_klein")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior = one.stock.vae.encode(pixels).latent_dist
    moments = one.family.encode_images(one.stock.vae, pixels)
    assert tuple(moments.shape[2:]) == one.family.latent_shape(one.stock, 32, 32)
    for moment, whole in zip(moments[0], (posterior.mean[0], posterior.std[0]), strict=True):
        for row in (0, 1):
            for column in (0, 1):
                torch.testing.assert_close(moment[row * 2 + column :: 4], whole[:, row::2, column::2])


def patches(values: torch.Tensor) -> torch.Tensor:
    """Return tokens of two by two latents: channels first, then rows and columns within a patch."""
    return values.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def qwen_parts(one: Setting, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed noisy latents and velocity; each channel has its own mean and deviation."""
    config, s = one.stock.vae.config, (batch.timesteps / 1000).view(2, 1, 1, 1)
    mean, std = batch.moments.unbind(1)
    own = [torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std)]
    x, e = (mean + std * batch.posterior_noise - own[0]) / own[1], batch.noise
    return patches((1 - s) * x + s * e), patches(e - x)


@pytest.mark.parametrize(("captions", "width"), [(CAPTIONS, 32), (MIXED, 48)], ids=["equal", "mixed"])
@torch.no_grad()
def test_qwen_images_captions_are_read_as_if_each_were_alone(setting, captions, width):
    """Without the template's first 34 tokens, and without a mask, because a single caption has no padding."""
    one = setting("qwen_image")
    batch = one.batch(captions, width)
    noisy, velocity = qwen_parts(one, batch)
    expected = []
    for number, caption in enumerate(captions):
        tokens = one.stock.tokenizer(one.stock.prompt_template_encode.format(caption), return_tensors="pt").input_ids
        states = one.stock.text_encoder(tokens, output_hidden_states=True).hidden_states[-1][:, 34:]
        output = one.denoiser(
            noisy[number : number + 1], states, None, batch.timesteps[number : number + 1] / 1000,
            img_shapes=[(1, 4, width // 8)],
        ).sample  # fmt: skip
        expected.append(mean_square(output, velocity[number : number + 1]))
    torch.testing.assert_close(one.loss(one.denoiser, batch), torch.cat(expected))


@pytest.mark.parametrize(("captions", "width"), [(CAPTIONS, 32), (MIXED, 48)], ids=["equal", "mixed"])
@torch.no_grad()
def test_krea_2_reads_captions_of_their_own_length_as_its_pipeline_does_the_longest(setting, captions, width):
    """Three layers per token; its pipeline pads every caption to 512 tokens, before the end of the template."""
    one = setting("krea2")
    batch = one.batch(captions, width)
    noisy, velocity = qwen_parts(one, batch)
    states, mask = one.stock.encode_prompt(captions, max_sequence_length=512)
    kept = one.family.encode_captions(one.stock, captions, 512)["states"]
    assert states.shape[1:3] == (mask.shape[1], 3) and mask.shape[1] >= 512
    assert [len(own) for own in kept] == mask.sum(dim=1).tolist() and max(map(len, kept)) < 64
    places = [(0, 0, 0)] * mask.shape[1] + [(0, row, column) for row in range(4) for column in range(width // 8)]
    output = one.denoiser(noisy, states, batch.timesteps / 1000, torch.tensor(places), mask).sample
    torch.testing.assert_close(one.loss(one.denoiser, batch), mean_square(output, velocity))


@torch.no_grad()
def test_the_moments_of_qwen_images_autoencoder_are_those_of_the_only_frame(setting):
    one = setting("qwen_image")
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior = one.stock.vae.encode(pixels[:, :, None]).latent_dist
    moments = one.family.encode_images(one.stock.vae, pixels)
    assert tuple(moments.shape[2:]) == one.family.latent_shape(one.stock, 32, 48) == (4, 8, 12)
    torch.testing.assert_close(moments[:, 0], posterior.mean[:, :, 0])
    torch.testing.assert_close(moments[:, 1], posterior.std[:, :, 0])


@pytest.mark.parametrize("name", ["qwen_image", "krea2", "lumina2"])
@torch.no_grad()
def test_padding_beside_a_longer_caption_changes_no_loss(setting, name):
    """In float64, where this is nearly exact: the mask excludes the padding from every product."""
    one = setting(name)
    denoiser, batch = one.denoiser.double(), one.batch(MIXED)
    states = [own.double() for own in one.family.encode_captions(one.stock, MIXED, 64)["states"]]
    assert len(states[0]) < len(states[1])

    def output(kept: list[int]) -> torch.Tensor:
        conditions = Conditions({"states": [states[number] for number in kept]}, SIZES[kept])
        noisy = batch.noise[kept].double()
        inputs = one.family.denoiser_inputs(denoiser.config, noisy, batch.timesteps[kept], conditions)
        return one.family.prediction(denoiser(**inputs, return_dict=False), noisy)

    torch.testing.assert_close(output([0, 1]), torch.cat([output([0]), output([1])]), rtol=1e-10, atol=1e-10)


def test_a_family_that_encodes_no_captions_says_so():
    with pytest.raises(NotImplementedError):
        Family().encode_captions(None, CAPTIONS, None)


def test_every_row_of_the_registry_has_a_module_and_a_builder():
    from reslora.images.model.families import FAMILIES as ROWS

    for pipeline_class, module in ROWS.items():
        family = load_family(pipeline_class)
        assert family.pipeline.__name__ == pipeline_class and family.name == module
        assert module in (EDITS if family.edits else FAMILIES)


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_places_have_no_gradient_and_others_that_of_the_whole_loss(setting, family):
    """The mask is in pixels, with a white upper left quarter; families pack latents in different ways."""
    one = setting(family, "--masked_loss", "--loss_type", "huber")
    batch, outputs = one.batch(), []

    def denoiser(**inputs) -> tuple:
        """Return the same prediction each time, as a leaf tensor."""
        with torch.no_grad():
            output = one.denoiser(**inputs)[0]
        outputs.append([part.detach().requires_grad_() for part in output])
        return (outputs[-1] if isinstance(output, list) else torch.stack(outputs[-1]),)

    whole = one.loss(denoiser, batch)
    batch.mask = torch.zeros(2, 1, 32, 32)
    batch.mask[..., :16, :16] = 1
    masked = one.loss(denoiser, batch)
    (whole.sum() + masked.sum()).backward()
    grids = []
    for leaves in outputs:  # unpacking moves numbers, and some turn their signs
        gradient = [leaf.grad for leaf in leaves]
        packed = gradient if family == "z_image" else torch.stack(gradient)
        grids.append(one.family.prediction((packed,), torch.empty_like(batch.noise)))
    of_whole, of_masked = grids
    height, width = (side // 2 for side in of_whole.shape[2:])
    assert (of_whole != 0).all()
    assert of_masked[..., :height, :width].equal(of_whole[..., :height, :width])
    assert (of_masked[..., height:, :] == 0).all()
    assert (of_masked[..., width:] == 0).all()


@pytest.mark.parametrize(("more", "share"), [((), 4), (("--masked_loss_normalised",), 1)])
@torch.no_grad()
def test_the_validation_loss_is_the_squared_error_within_masks(setting, more, share):
    words = ("--masked_loss", "--loss_type", "smooth_l1", "--prediction_type", "epsilon", *more)
    one = setting("stable_diffusion", *words)
    batch = one.batch()
    batch.mask = torch.zeros(2, 1, 32, 32)
    batch.mask[..., :16, :16] = 1
    noisy, epsilon, _ = ddpm_parts(one, batch)
    prediction = one.denoiser(noisy, batch.timesteps, one.stock.encode_prompt(CAPTIONS, "cpu", 1, False)[0]).sample
    expected = mean_square(prediction[..., :4, :4], epsilon[..., :4, :4]) / share
    torch.testing.assert_close(one.loss(one.denoiser, batch, weighted=False), expected)


@pytest.mark.exhaustive
@torch.no_grad()
def test_flux_shift_is_by_as_many_tokens_as_the_denoiser_reads(setting, monkeypatch):
    """The latents of klein are patches already, one token each."""
    one, told, read = setting("flux2_klein", "--timestep_sampling", "flux_shift"), [], []
    training_data = load_training_data(
        load_folders(one.options.model, one.options.data, one.options.training, one.options.output),
        one.loss.pipeline,
        one.objective,
        one.context,
    )
    draw = type(one.objective).draw
    monkeypatch.setattr(
        type(one.objective), "draw", lambda self, draws, tokens: told.append(tokens) or draw(self, draws, tokens)
    )
    sample = TrainingSamples(training_data)[training_data.plan(1).forward(0)[0]]
    hook = lambda module, args, inputs: read.append(inputs["hidden_states"].shape[1])  # noqa: E731
    one.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    one.loss(one.denoiser, collate([sample]))
    assert told == read and read[0] > 1
