"""The state of one forward pass: threads, nested calls, separate parts, and recomputations during other passes."""

import threading
from functools import partial

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    RANK,
    STACK_INPUTS,
    Oracle,
    Stack,
    assert_equal,
    assert_one_line,
    find_layer,
    gradients,
    gradients_of,
    lora_stack,
    loss_of,
    randomize,
    run,
    stack_chain,
)
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from waiting import LIMIT, join, start_thread

import reslora
from reslora import ResLoraConfig
from reslora.model import connection_of

STATEFUL = [("input", 1, "repeat"), ("input", 1, "none"), ("middle", 2, "repeat")]
stateful = pytest.mark.parametrize("shortcut, pre_num, head", STATEFUL)
models = pytest.mark.parametrize("name", ["llama", "unet"])


def pair(arch, shortcut, pre_num, head, window=0):
    """Return a connected model, and the oracle with the same weights."""
    model = arch.lora()
    oracle = Oracle(model, arch.blocks, shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    return model, oracle.model


def connected(arch, config: ResLoraConfig):
    model = arch.lora()
    reslora.connect(model, config)
    return model


def in_thread(work) -> None:
    """Run `work` on another thread to its end, and raise its exception."""
    raised = []

    def guarded():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    join(start_thread(guarded))
    for error in raised:
        raise error


def nested(work) -> None:
    """Run `work` at once, on this thread."""
    work()


def at(model, layer: str, work) -> torch.utils.hooks.RemovableHandle:
    """Call `work` once, during a forward pass, before the named layer."""
    waiting = [work]

    def hook(module, args):
        while waiting:
            waiting.pop()()

    return find_layer(model, layer).register_forward_pre_hook(hook)


MIDDLE = {"llama": "model.layers.2.self_attn.q_proj", "unet": "mid_block.attentions.0.transformer_blocks.1.attn1.to_v"}


# --- a forward in the middle of another -------------------------------------------------------------------------------


@models
@stateful
def test_a_forward_in_the_middle_of_another_leaves_both_right(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    expected, of_inner = gradients_of(oracle, arch.inputs()), run(oracle, arch.inputs(seed=7)).detach()
    inner = []

    def interrupt():
        with torch.no_grad():
            inner.append(run(model, arch.inputs(seed=7)))

    for number, where in enumerate((in_thread, nested)):
        at(model, MIDDLE[name], partial(where, interrupt))
        assert_equal(gradients_of(model, arch.inputs()), expected)
        assert_equal(inner[number], of_inner)


@pytest.mark.exhaustive
@stateful
def test_threads_that_take_turns_block_by_block(llama, shortcut, pre_num, head):
    """Every thread waits for the others before each layer, so all forward passes are always at the same layer."""
    model, oracle = pair(llama, shortcut, pre_num, head)
    together = threading.Barrier(3)

    def meet(module, args):
        together.wait(LIMIT)

    for n in range(4):
        find_layer(model, f"model.layers.{n}").register_forward_pre_hook(meet)
    found = {}

    def work(seed):
        try:
            with torch.no_grad():
                found[seed] = [run(model, llama.inputs(seed=seed + n)) for n in (0, 10)]
        except BaseException:
            together.abort()
            raise

    join(*[start_thread(work, seed) for seed in range(3)])
    assert set(found) == {0, 1, 2}
    for seed, outputs in found.items():
        for n, output in zip((0, 10), outputs, strict=True):
            assert_equal(output, run(oracle, llama.inputs(seed=seed + n)).detach())


@stateful
def test_a_nested_forward_that_fails_leaves_the_outer_one_right(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)

    def fail():
        handle = find_layer(model, "model.layers.1.mlp").register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, llama.inputs(seed=5))
        handle.remove()

    at(model, MIDDLE["llama"], fail)
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@pytest.mark.exhaustive
def test_a_nested_forward_is_recorded_apart(llama):
    """Each forward pass writes its own column, the inner one first."""
    model = connected(llama, ResLoraConfig("input", window=2))
    at(model, MIDDLE["llama"], lambda: loss_of(model, llama.inputs(seed=7)))
    loss_of(model, llama.inputs())
    plain = connected(llama, ResLoraConfig("input", window=2))
    for seed in (7, 0):
        loss_of(plain, llama.inputs(seed=seed))
    found, expected = (connection_of(m.get_base_model()).wires.norms for m in (model, plain))
    assert found.count == expected.count == 2
    assert torch.equal(found.values, expected.values)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@stateful
def test_nothing_is_left_of_a_forward_that_ctrl_c_ended(llama, shortcut, pre_num, head):
    """Forward hooks do not run after a `KeyboardInterrupt`: the next forward pass removes the leftover state."""
    model, oracle = pair(llama, shortcut, pre_num, head)

    def interrupt():
        raise KeyboardInterrupt

    at(model, MIDDLE["llama"], interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, llama.inputs(seed=5))
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))
    assert connection_of(model.get_base_model()).wires.threads.slot.state is None
    with pytest.raises(RuntimeError) as error:
        find_layer(model, "model.layers.1.self_attn.q_proj")(torch.zeros(1, 2, 32, dtype=torch.float64))
    assert_one_line(error, "outside a forward")


# --- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@models
@stateful
def test_a_backward_in_the_middle_of_a_forward_leaves_both_right(name, shortcut, pre_num, head):
    """The segments of an earlier forward pass are recomputed during another one, on this thread or on another."""
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    for seed, batch in ((7, 3), (0, 2)):
        loss_of(oracle, arch.inputs(seed=seed, batch=batch)).backward()
    for where in (in_thread, nested):
        model.zero_grad(set_to_none=True)
        earlier = loss_of(model, arch.inputs(seed=7, batch=3))
        at(model, MIDDLE[name], partial(where, earlier.backward))
        loss_of(model, arch.inputs()).backward()
        assert_equal(gradients(model), gradients(oracle))


@pytest.mark.exhaustive
@models
@stateful
def test_a_forward_in_the_middle_of_a_recomputation_leaves_both_right(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    loss = loss_of(model, arch.inputs())
    inner = []

    def interrupt():
        with torch.no_grad():
            inner.append(run(model, arch.inputs(seed=7)))

    at(model, MIDDLE[name], interrupt)
    loss.backward()
    assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))
    assert_equal(inner[0], run(oracle, arch.inputs(seed=7)).detach())


class Refining(Stack):
    """A model that computes a gradient through its checkpointed first layers during its forward pass."""

    contexts = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x = x.detach().requires_grad_()
        for n, layer in enumerate(self.layers):
            kwargs = {"context_fn": self.contexts} if self.contexts else {}
            x = x + (checkpoint(layer, x, use_reentrant=False, **kwargs) if self.contexts else layer(x))
            if n == 1 and torch.is_grad_enabled():
                x = x + torch.autograd.grad(x.square().sum(), start, retain_graph=True)[0].detach()
        return x


@stateful
def test_a_gradient_taken_inside_the_forward(shortcut, pre_num, head):
    """The forward pass continues with its own state after the recomputation inside it."""
    model = lora_stack(Refining())
    oracle = Oracle(model, [stack_chain()], shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)
    base = model.get_base_model()
    base.contexts = connection_of(base).wires.contexts
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(oracle, STACK_INPUTS))


class Mixed(Stack):
    """A model whose first layer is checkpointed with our context, the others without."""

    contexts = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n, layer in enumerate(self.layers):
            kwargs = {"context_fn": self.contexts} if n == 0 else {}
            x = x + (checkpoint(layer, x, use_reentrant=False, **kwargs) if self.contexts else layer(x))
        return x


@stateful
def test_a_segment_without_our_context_is_refused_after_one_that_has_it(shortcut, pre_num, head):
    model = lora_stack(Mixed())
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)
    base = model.get_base_model()
    base.contexts = connection_of(base).wires.contexts
    with pytest.raises(RuntimeError) as error:
        run(model, STACK_INPUTS)
    assert_one_line(error, "layers.1.proj", "reslora.enable_gradient_checkpointing")


# --- parts that run alone ---------------------------------------------------------------------------------------------


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def tiny_bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0,
        eos_token_id=None, bos_token_id=None, pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).double()


ENCODER_DECODERS = {
    "t5": (
        tiny_t5,
        ["q", "v"],
        ["encoder.block.{}.layer.0.SelfAttention.", "decoder.block.{}.layer.0.SelfAttention.",
         "decoder.block.{}.layer.1.EncDecAttention."],
    ),
    "bart": (
        tiny_bart,
        ["q_proj", "v_proj"],
        ["model.encoder.layers.{}.self_attn.", "model.decoder.layers.{}.self_attn.",
         "model.decoder.layers.{}.encoder_attn."],
    ),
}  # fmt: skip


def encoder_decoder(name, shortcut, pre_num, head):
    """A connected T5 or BART, its oracle, and token ids."""
    build, targets, patterns = ENCODER_DECODERS[name]
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=targets, task_type="SEQ_2_SEQ_LM")
    model = randomize(get_peft_model(build(), config)).train()
    chains = [[pattern.format(n) + target for n in range(3)] for pattern in patterns for target in targets]
    oracle = Oracle(model, chains, shortcut, pre_num, head).model
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    plan = reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=example)
    assert [[block.name for block in chain] for chain in plan] != [] and plan.links == 2 * len(chains)
    return model, oracle, example


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODER_DECODERS)
@stateful
def test_generation_of_an_unmerged_encoder_decoder(name, shortcut, pre_num, head):
    model, oracle, example = encoder_decoder(name, shortcut, pre_num, head)
    options = {"max_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    ids = {"input_ids": example["input_ids"], "attention_mask": torch.ones_like(example["input_ids"])}
    for use_cache in (True, False):
        found, expected = (c.eval().generate(**ids, **options, use_cache=use_cache) for c in (model, oracle))
        assert torch.equal(found.sequences, expected.sequences)
        assert_equal(found.encoder_hidden_states[-1], expected.encoder_hidden_states[-1])
        assert_equal(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODER_DECODERS)
@stateful
def test_gradients_of_an_encoder_alone_and_of_the_whole(name, shortcut, pre_num, head):
    model, oracle, example = encoder_decoder(name, shortcut, pre_num, head)

    def gradients_of_both(candidate) -> dict:
        candidate.zero_grad(set_to_none=True)
        encoder = candidate.get_base_model().get_encoder()
        hidden = encoder(input_ids=example["input_ids"]).last_hidden_state
        whole = candidate(**example).logits
        (hidden.square().sum() + whole.square().sum()).backward()
        return gradients(candidate)

    expected = gradients_of_both(oracle)
    assert_equal(gradients_of_both(model), expected)
    reslora.enable_gradient_checkpointing(model)
    assert_equal(gradients_of_both(model), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_part_inside_a_forward_is_recorded_with_the_whole(name):
    """One column per forward pass, with the norms of encoder and decoder; a separate part leaves the others out."""
    model, _, example = encoder_decoder(name, "middle", 1, "repeat")
    norms = connection_of(model.get_base_model()).wires.norms
    model(**example)
    assert norms.count == 1 and bool(norms.values[:, 0].isfinite().all())
    model.get_base_model().get_encoder()(input_ids=example["input_ids"])
    encoder = torch.tensor(["encoder." in name for name in norms.names])
    assert norms.count == 2 and torch.equal(norms.values[:, 1].isfinite(), encoder)


@pytest.mark.exhaustive
@stateful
def test_a_part_that_cuts_a_chain_in_two_does_not_run_alone(llama, shortcut, pre_num, head):
    model, _ = pair(llama, shortcut, pre_num, head)
    layer = model.get_base_model().model.layers[2]
    hidden = torch.zeros(1, 2, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError) as error:
        layer(hidden, position_embeddings=(torch.ones(1, 2, 8).double(), torch.zeros(1, 2, 8).double()))
    assert_one_line(error, "model.layers.2", "outside a forward")


@pytest.mark.exhaustive
def test_block_needs_no_state(llama):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, "block", 2).model
    reslora.connect(model, ResLoraConfig("block", 2))
    x = torch.randn(1, 2, 32, dtype=torch.float64)
    alone, expected = (find_layer(candidate, "model.layers.3.self_attn.q_proj")(x) for candidate in (model, oracle))
    assert_equal(alone, expected)
