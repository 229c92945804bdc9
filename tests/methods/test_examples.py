"""T-LoRA, the example of a method that depends on the timestep, and its controls: their formulas by hand."""

import pytest
import torch
from core_models import tiny_llama, tiny_unet, unet_inputs

from reslora.methods.adapters import attach
from reslora.methods.registry import AdapterSettings, adapter_config

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


# Rank 4, at least 2: r(t) = floor(2 (1 - t / 1000)) + 2, so 4 at t = 0, 3 at 1 to 500, 2 above. Alpha is 8, scale 2.
@pytest.mark.parametrize(
    ("method", "ranks", "scales"),
    [
        ("tlora", (4, 3, 2), (2, 2, 2)),
        ("faded", (4, 4, 4), (2, 2 * 3 / 4, 2 * 2 / 4)),
        ("rescaled", (4, 3, 2), (8 / 4, 8 / 3, 8 / 2)),
    ],
)
def test_ranks_and_scales_follow_the_timestep_of_each_sample(method, ranks, scales):
    base = tiny_unet()
    settings = AdapterSettings(r=4, alpha=8, dropout=0.0, targets=["to_q"], total_steps=1)
    model = attach(base, adapter_config(f"examples.tlora.{method}", settings, base))
    layer = model.get_submodule(LAYER)
    update = layer.update["default"]
    torch.nn.init.normal_(update.up)
    calls = []
    layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    base_layer = layer.get_base_layer()
    inputs = unet_inputs(batch=3)
    inputs["timestep"] = torch.tensor([0, 500, 501])
    model(**inputs)
    [(x, found)] = calls
    for sample, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        change = scale * update.up[:, :rank].double() @ update.down[:rank].double()
        expected = base_layer(x[sample]) + x[sample] @ change.T
        torch.testing.assert_close(found[sample], expected, rtol=1e-5, atol=1e-5)
    model(inputs["sample"], 500, inputs["encoder_hidden_states"])  # as pipelines call it: one timestep for all
    torch.testing.assert_close(update.delta(), 2 * update.up @ update.down)
    x, found = calls[-1]
    change = scales[1] * update.up[:, : ranks[1]].double() @ update.down[: ranks[1]].double()
    torch.testing.assert_close(found, base_layer(x) + x @ change.T, rtol=1e-5, atol=1e-5)


def test_a_model_without_timesteps_is_refused():
    settings = AdapterSettings(r=4, alpha=8, dropout=0.0, targets=["q_proj"], total_steps=1)
    with pytest.raises(ValueError, match=r"--method examples\.tlora:tlora: T-LoRA of this example is for U-Nets"):
        adapter_config("examples.tlora.tlora", settings, tiny_llama())
