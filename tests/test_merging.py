"""Every cell of the merge table against its formula, computed by hand, through `reslora.merge`."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    RANK,
    STACK_INPUTS,
    Oracle,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    base_weight,
    delta,
    find_layer,
    fix_dropout,
    lora_stack,
    loss_of,
    randomize,
    run,
    stack_chain,
    tiny_llama,
)
from peft import LoraConfig, PeftModel
from suites import quick
from torch import nn

import reslora
from reslora import ResLoraConfig, merging

RIDGE = 1e-2
PLANS = [
    ("input", 1, "repeat"),
    ("input", 1, "none"),
    ("middle", 1, "repeat"),
    ("middle", 2, "repeat"),
    ("middle", -1, "none"),
]
ONE_PLAN_EACH = [PLANS[0], PLANS[3]]
"""One plan of each shortcut that merges approximately: for what `pytest` tries with all plans on another model."""
plans = pytest.mark.parametrize("shortcut, pre_num, head", ONE_PLAN_EACH)
architectures = pytest.mark.parametrize(
    "name, shortcut, pre_num, head",
    quick(
        [(name, *plan) for name in ("llama", "gpt2", "unet") for plan in PLANS],
        *[("llama", *plan) for plan in PLANS],
        *[(name, *plan) for name in ("gpt2", "unet") for plan in ONE_PLAN_EACH],
    ),
)


class Case:
    """A connected model, the oracle of its unmerged forward pass, and the original weights of the blocks."""

    def __init__(self, arch, shortcut, pre_num=1, head="repeat", window=100, dropout=0.0, **lora):
        self.arch, self.shortcut, self.pre_num, self.head = arch, shortcut, pre_num, head
        self.model = arch.lora(lora_dropout=dropout, **lora)
        self.oracle = Oracle(self.model, arch.blocks, shortcut, pre_num, head)
        reslora.connect(self.model, ResLoraConfig(shortcut, pre_num, head, window))

    def train(self, steps: int) -> "Case":
        for seed in range(steps):
            inputs = self.arch.inputs(seed=seed, batch=1 + seed)
            loss_of(self.model, inputs).backward()
            loss_of(self.oracle.model, inputs).backward()
        return self

    def batches(self, count: int = 2) -> list[dict]:
        return [self.arch.inputs(seed=50 + n, batch=4, length=11) for n in range(count)]

    def calibrate(self, batches) -> list[dict]:
        """Run the calibration batches through the oracle only; return them for `merge`."""
        self.oracle.inputs.clear()
        self.oracle.outputs.clear()
        with torch.no_grad():
            for batch in batches:
                run(self.oracle.model.eval(), batch)
        return batches

    def layers(self, chain) -> list[nn.Module]:
        return [find_layer(self.oracle.model, name) for name in chain]

    def A(self, chain) -> list[torch.Tensor]:
        return [layer.lora_A["default"].weight.detach() for layer in self.layers(chain)]

    def B(self, chain) -> list[torch.Tensor]:
        return [layer.lora_B["default"].weight.detach() for layer in self.layers(chain)]

    def s(self, chain) -> list[float]:
        return [layer.scaling["default"] for layer in self.layers(chain)]

    def m(self, n: int) -> int:
        return n if self.pre_num == -1 else min(self.pre_num, n)

    def tokens(self, name: str) -> torch.Tensor:
        """Return every calibration token that entered a layer, (tokens, in)."""
        return torch.cat([x.flatten(0, -2) for x in self.oracle.inputs[name]])

    def norms(self, chain, window: int) -> list[float]:
        """Return f_n of Eqs. 8 and 12: the mean over the window of the Frobenius norm, one per forward pass."""
        result = []
        for name, A in zip(chain, self.A(chain), strict=True):
            entered = [x if self.shortcut == "input" else x @ A.T for x in self.oracle.inputs[name][-window:]]
            result.append(sum(float(x.norm()) for x in entered) / len(entered))
        return result

    def head_alpha(self) -> float:
        return 1.0 if self.head == "repeat" else 0.0

    def assert_merged_to(self, expected, tolerance: float = 1e-9) -> None:
        """Assert the merged weights: `expected(chain)` gives s B* A* of every block of the chain."""
        for chain in self.arch.blocks:
            actual = [delta(find_layer(self.model, name)) for name in chain]
            assert_equal(actual, expected(chain), rtol=tolerance, atol=tolerance)

    def assert_errors(self, report) -> None:
        """Assert the reported errors: those of every block on its unmerged inputs, for one calibration batch."""
        for tail in (tail for chain in self.arch.blocks for tail in chain):
            (block,) = [block for block in report.blocks if block.name.endswith(tail)]
            unmerged = self.oracle.outputs[tail][0].flatten(0, -2)
            merged = self.tokens(tail) @ delta(find_layer(self.model, tail)).T
            assert block.error == pytest.approx(float((merged - unmerged).norm() / unmerged.norm()), rel=1e-3, abs=1e-6)


def merged_by_input(case: Case, window: int):
    """Return the merge by Eqs. 7, 9 and 12."""

    def expected(chain):
        A, B, s, f = case.A(chain), case.B(chain), case.s(chain), case.norms(chain, window)
        result = []
        for n in range(len(chain)):
            if case.shortcut == "input":
                alpha = f[n - 1] / f[n] if n else case.head_alpha()
            else:
                alpha = sum(f[n - k] / f[n] for k in range(1, case.m(n) + 1))
            result.append(s[n] * (1 + alpha) * B[n] @ A[n])
        return result

    return expected


def weights_alphas(case: Case, chain) -> tuple[list, list[torch.Tensor]]:
    """Return the alphas and s B* A* of every block by Eqs. 10, 11 and 13, front to back over the merged weights."""
    A, B, s = case.A(chain), case.B(chain), case.s(chain)
    W = [base_weight(layer) for layer in case.layers(chain)]
    f, alphas, result = [], [], []
    for n in range(len(chain)):
        if case.shortcut == "input":
            alpha = case.head_alpha() if n == 0 else 1.0 if n == 1 else f[n - 2] / f[n - 1]
            merged = s[n] * (1 + alpha) * B[n] @ A[n]
        else:
            alpha = [f[n - k - 1] / f[n - 1] if n - k - 1 >= 0 else 1.0 for k in range(1, case.m(n) + 1)]
            others = sum(a * A[n - k] for k, a in enumerate(alpha, start=1))
            merged = s[n] * B[n] @ (A[n] + others)
        f.append(float((W[n] + merged).norm()))
        alphas.append(alpha)
        result.append(merged)
    return alphas, result


def merged_by_lstsq(case: Case):
    """Return the merge with C = argmin E|target - C x|^2 + ridge |C - C0|^2, by the normal equations."""

    def expected(chain):
        A, B, s, X = case.A(chain), case.B(chain), case.s(chain), [case.tokens(name) for name in chain]
        result = []
        for n in range(len(chain)):
            if case.shortcut == "input" and n == 0:
                C = case.head_alpha() * A[0]
            elif case.shortcut == "input":
                C = ridge_regression(X[n], X[n - 1] @ A[n].T, A[n])
            elif case.m(n) == 0:
                C = torch.zeros_like(A[n])
            else:
                past = range(1, case.m(n) + 1)
                C = ridge_regression(X[n], sum(X[n - k] @ A[n - k].T for k in past), sum(A[n - k] for k in past))
            result.append(s[n] * B[n] @ (A[n] + C))
        return result

    return expected


def ridge_regression(x: torch.Tensor, target: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Solve it as ordinary least squares: the ridge adds `width` observations whose target is the prior."""
    tokens, width = x.shape
    ridge = RIDGE * float(x.square().sum(0).mean()) / tokens
    root = math.sqrt(ridge * tokens) * torch.eye(width, dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, root]), torch.cat([target, root @ prior.T])).solution.T


# --- none -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut, pre_num, head", [*PLANS, ("block", 2, "repeat"), ("none", 1, "repeat")])
def test_none_keeps_every_a_and_b(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    report = reslora.merge(case.model, method="none")
    assert report.method == "none"
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    assert torch.equal(run(case.model, llama.inputs()), run(llama.lora(), llama.inputs()))


# --- input ------------------------------------------------------------------------------------------------------------


@architectures
def test_input_uses_the_norms_recorded_in_training(name, shortcut, pre_num, head):
    case = Case(ARCHITECTURES[name], shortcut, pre_num, head).train(3)
    report = reslora.merge(case.model, method="input")
    assert report.method == "input"
    case.assert_merged_to(merged_by_input(case, window=3), tolerance=1e-6)


@pytest.mark.exhaustive
@plans
def test_input_uses_the_last_norms_of_a_window_shorter_than_training(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head, window=2).train(5)
    reslora.merge(case.model, method="input")
    case.assert_merged_to(merged_by_input(case, window=2), tolerance=1e-6)


@pytest.mark.exhaustive
@plans
def test_norms_are_taken_before_dropout(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head, dropout=0.4)
    fix_dropout(case.model)
    fix_dropout(case.oracle.model)
    case.train(2)
    reslora.merge(case.model, method="input")
    case.assert_merged_to(merged_by_input(case, window=2), tolerance=1e-6)


@pytest.mark.exhaustive
@plans
def test_calibration_replaces_what_training_recorded(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head).train(3)
    reslora.merge(case.model, method="input", calibration=case.calibrate(case.batches(3)))
    case.assert_merged_to(merged_by_input(case, window=3), tolerance=1e-6)


@pytest.mark.parametrize("method", ["input", "weights", "lstsq"])
def test_input_merges_one_block_whatever_pre_num_says(llama, method):
    cases = [Case(llama, "input", number) for number in (1, -1)]
    for case in cases:
        reslora.merge(case.model, method=method, calibration=case.batches(2))
    for layer, expected in zip(*(adapter_layers(case.model).values() for case in cases), strict=True):
        assert torch.equal(delta(layer), delta(expected))


@pytest.mark.exhaustive
@plans
def test_only_training_with_gradients_is_recorded(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head).train(2)
    with torch.no_grad():
        run(case.model, llama.inputs(seed=30, length=12))
    run(case.model.eval(), llama.inputs(seed=31, length=12))
    with case.model.disable_adapter():
        run(case.model.train(), llama.inputs(seed=32, length=12))
    reslora.merge(case.model, method="input")
    case.assert_merged_to(merged_by_input(case, window=2), tolerance=1e-6)


@pytest.mark.exhaustive
@plans
def test_a_recomputation_records_nothing(llama, shortcut, pre_num, head):
    """With a window of two, recording twice per step would drop the first of two steps."""
    case = Case(llama, shortcut, pre_num, head, window=2)
    reslora.enable_gradient_checkpointing(case.model)
    case.train(2)
    reslora.merge(case.model, method="input")
    case.assert_merged_to(merged_by_input(case, window=2), tolerance=1e-6)


def test_the_report_of_input_has_the_alphas(llama):
    case = Case(llama, "input").train(2)
    report = reslora.merge(case.model, method="input")
    blocks = {block.name: block for block in report.blocks}
    for chain in llama.blocks:
        f = case.norms(chain, 2)
        for n, tail in enumerate(chain):
            (block,) = [b for name, b in blocks.items() if name.endswith(tail)]
            assert block.alpha == pytest.approx(f[n - 1] / f[n] if n else 1.0, rel=1e-6)


def test_input_without_norms_is_an_error(llama):
    case = Case(llama, "input", window=0)
    case.train(1)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method="input")
    assert_one_line(error, "calibration")


# --- weights ----------------------------------------------------------------------------------------------------------


@architectures
def test_weights_walks_the_chain_with_merged_weights(name, shortcut, pre_num, head):
    case = Case(ARCHITECTURES[name], shortcut, pre_num, head)
    report = reslora.merge(case.model, method="weights")
    assert report.method == "weights"
    case.assert_merged_to(lambda chain: weights_alphas(case, chain)[1], tolerance=1e-5)


@pytest.mark.exhaustive
@plans
def test_weights_uses_every_blocks_own_scale(llama, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head, alpha_pattern={"layers.1.self_attn.q_proj": 30}, use_rslora=True)
    reslora.merge(case.model, method="weights")
    case.assert_merged_to(lambda chain: weights_alphas(case, chain)[1], tolerance=1e-5)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_half_precision_bases_are_measured_in_fp32(llama, shortcut):
    torch.manual_seed(0)
    model = llama.lora(base=tiny_llama().half())
    exact = copy.deepcopy(model).double()
    for candidate in (model, exact):
        reslora.connect(candidate, ResLoraConfig(shortcut))
        reslora.merge(candidate, method="weights")
    for name, layer in adapter_layers(model).items():
        assert layer.base_layer.weight.dtype == torch.float16
        assert_equal(delta(layer).double(), delta(find_layer(exact, name)), rtol=1e-5, atol=1e-6)


# --- lstsq ------------------------------------------------------------------------------------------------------------


@architectures
def test_lstsq_solves_the_ridge_regression(name, shortcut, pre_num, head):
    case = Case(ARCHITECTURES[name], shortcut, pre_num, head)
    report = reslora.merge(case.model, method="lstsq", calibration=case.calibrate(case.batches()))
    assert report.method == "lstsq"
    case.assert_merged_to(merged_by_lstsq(case), tolerance=1e-5)


@plans
def test_lstsq_weighs_every_token_alike(llama, shortcut, pre_num, head):
    """Batches have different sizes: the expectation is over tokens, not over batches."""
    case = Case(llama, shortcut, pre_num, head)
    batches = [llama.inputs(seed=1, batch=1, length=3), llama.inputs(seed=2, batch=6, length=9)]
    reslora.merge(case.model, method="lstsq", calibration=case.calibrate(batches))
    case.assert_merged_to(merged_by_lstsq(case), tolerance=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut, pre_num", [("input", 1), ("middle", -1)])
def test_equal_inputs_merge_exactly_under_lstsq(unet, shortcut, pre_num):
    """All k and v of cross-attention read the same text states."""
    case = Case(unet, shortcut, pre_num)
    reslora.merge(case.model, method="lstsq", calibration=case.batches())
    for role in ("attn2.to_k", "attn2.to_v"):
        for chain in unet.chains[role]:
            A, B, s = case.A(chain), case.B(chain), case.s(chain)
            for n, name in enumerate(chain):
                whole = 2 * A[n] if shortcut == "input" else sum(A[n - k] for k in range(case.m(n) + 1))
                assert_equal(delta(find_layer(case.model, name)), s[n] * B[n] @ whole, rtol=1e-6, atol=1e-6)


class Scaled(Stack):
    """Two blocks, whose inputs are of size 1e-3 and 1e2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](1e5 * self.layers[0](1e-3 * x))


def test_lstsq_keeps_a_block_as_it_is_where_that_loses_less():
    """The ridge, a fraction of x^T x, leaves a hundredth of `A_1 x_2`, which is far larger than `A_1 x_1` itself."""
    model = lora_stack(Scaled(layers=2, width=16), r=3)
    before = copy.deepcopy(model)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reslora.connect(model, ResLoraConfig("middle", 1), example_inputs={"x": x})
    report = reslora.merge(model, "lstsq", calibration=[{"x": x}])
    first, second = report.blocks
    layers = [find_layer(before, name) for name in stack_chain(2)]
    for layer, name in zip(layers, stack_chain(2), strict=True):
        assert_equal(delta(find_layer(model, name)), delta(layer), rtol=0, atol=0)
    a_1, a_2 = (layer.lora_A["default"].weight.detach() for layer in layers)
    b = layers[1].lora_B["default"].weight.detach()
    x_1, x_2 = 1e-3 * x, 1e5 * before.get_base_model().layers[0](1e-3 * x).detach()
    handed, own = x_1 @ a_1.T @ b.T, x_2 @ a_2.T @ b.T
    assert second.error == pytest.approx(float(handed.norm() / (own + handed).norm()), rel=1e-6)
    fitted = x_2 @ ridge_regression(x_2, x_1 @ a_1.T, a_1).T @ b.T
    worse = float((fitted - handed).norm() / (own + handed).norm())
    assert worse > 10 * second.error and (first.alpha, second.alpha) == (0.0, 0.0)
    words = f"layers.1.proj: merged by 'none', whose error is {second.error:.2g}; that of 'lstsq' is {worse:.2g}"
    assert report.method == "lstsq" and report.notes == (words,)


def test_lstsq_without_calibration_is_an_error(llama):
    for calibration in (None, [], iter(())):
        case = Case(llama, "input").train(1)
        with pytest.raises((ValueError, RuntimeError)) as error:
            reslora.merge(case.model, method="lstsq", calibration=calibration)
        assert_one_line(error, "calibration")


# --- block ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, pre_num",
    quick(
        itertools.product(["auto", "input", "weights", "lstsq"], [1, 2, -1, 100]),
        *[("auto", pre_num) for pre_num in (1, 2, -1, 100)],
        *[(method, 2) for method in ("input", "weights", "lstsq")],
    ),
)
def test_block_is_exact_whatever_the_method(llama, method, pre_num):
    case = Case(llama, "block", pre_num).train(1)
    calibration = case.batches() if method == "lstsq" else None
    report = reslora.merge(case.model, method=method, calibration=calibration)
    inputs = llama.inputs(seed=9)
    assert_equal(run(case.model, inputs), run(case.oracle.model, inputs))
    for chain in llama.blocks:
        for n, tail in enumerate(chain):
            (block,) = [block for block in report.blocks if block.name.endswith(tail)]
            layer = find_layer(case.model, tail)
            assert block.rank == layer.r["default"] == layer.lora_A["default"].weight.shape[0]
            assert block.rank == (case.m(n) + 1) * RANK


@pytest.mark.exhaustive
def test_block_is_exact_on_every_architecture(arch):
    case = Case(arch, "block", 2)
    reslora.merge(case.model)
    inputs = arch.inputs(seed=9)
    assert_equal(run(case.model, inputs), run(case.oracle.model, inputs))
    assert_equal(run(case.model.eval(), inputs), run(case.oracle.model.eval(), inputs))


def test_block_stacks_the_neighbours_matrices_current_block_first(llama):
    case = Case(llama, "block", 2)
    reslora.merge(case.model)
    for chain in llama.blocks:
        A, B = case.A(chain), case.B(chain)
        for n, name in enumerate(chain):
            layer, past = find_layer(case.model, name), range(case.m(n) + 1)
            assert torch.equal(layer.lora_A["default"].weight, torch.cat([A[n - k] for k in past]))
            assert torch.equal(layer.lora_B["default"].weight, torch.cat([B[n - k] for k in past], dim=1))


BLOCK_LORA = [
    {"alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
    {"rank_pattern": {"layers.2.self_attn.q_proj": 7, "down_proj": 2}},
    {
        "use_rslora": True,
        "rank_pattern": {".*q_proj": 2, "v_proj": 4},
        "alpha_pattern": {"layers.[34].self_attn.v_proj": 16},
    },
]


def expected_chains(model, arch) -> list[list[str]]:
    """Return the architecture's chains, cut where the rank changes."""
    result = []
    for chain in arch.blocks:
        ranks = [find_layer(model, name).r["default"] for name in chain]
        cuts = [0, *[n for n in range(1, len(chain)) if ranks[n] != ranks[n - 1]], len(chain)]
        result += [chain[a:b] for a, b in itertools.pairwise(cuts)]
    return result


@pytest.mark.exhaustive
@pytest.mark.parametrize("lora", BLOCK_LORA)
@pytest.mark.parametrize("max_rank", [None, 4])
def test_a_merged_block_model_is_saved_and_loaded_by_stock_peft(llama, tmp_path, lora, max_rank):
    model = llama.lora(**lora)
    oracle = Oracle(model, expected_chains(model, llama), "block", 2)
    reslora.connect(model, ResLoraConfig("block", 2))
    reslora.merge(model, max_rank=max_rank)
    merged = run(model.eval(), llama.inputs())
    if max_rank is None:
        assert_equal(merged, run(oracle.model.eval(), llama.inputs()))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_equal(run(loaded.eval(), llama.inputs()), merged)


def test_the_first_layers_pattern_does_not_catch_the_tenth(tmp_path):
    """`layers.1` is a prefix of `layers.10`: patterns are anchored and escaped."""
    arch = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    model = arch.lora(base=tiny_llama(12), target_modules=["q_proj"])
    reslora.connect(model, ResLoraConfig("block", -1))
    reslora.merge(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_llama(12), tmp_path)
    assert_equal(run(loaded.eval(), arch.inputs()), run(model.eval(), arch.inputs()))


@pytest.mark.parametrize("max_rank", [1, 4])
def test_max_rank_is_the_best_approximation_of_that_rank(llama, max_rank):
    """The loss is reported, except for blocks that had that rank or less."""
    case, notes = Case(llama, "block", 2, alpha_pattern={"layers.1.self_attn.q_proj": 11}), set()
    report = reslora.merge(case.model, max_rank=max_rank)
    for chain in llama.blocks:
        A, B, s = case.A(chain), case.B(chain), case.s(chain)
        for n, name in enumerate(chain):
            layer = find_layer(case.model, name)
            whole = s[n] * sum(B[n - k] @ A[n - k] for k in range(case.m(n) + 1))
            U, S, Vh = torch.linalg.svd(whole)
            best = U[:, :max_rank] * S[:max_rank] @ Vh[:max_rank]
            rank = (case.m(n) + 1) * RANK
            assert layer.r["default"] == min(max_rank, rank)
            assert_equal(delta(layer), best, rtol=1e-6, atol=1e-6)
            if rank > max_rank:
                loss = S[max_rank:].norm() / S.norm()
                notes.add(f"{name}: rank {rank} truncated to {max_rank} loses {loss:.3%} of the norm")
    assert set(report.notes) == notes


def test_max_rank_is_for_block_only(llama):
    case = Case(llama, "input").train(1)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method="weights", max_rank=2)
    assert_one_line(error, "max_rank", "input")


@pytest.mark.exhaustive
@pytest.mark.parametrize("max_rank", [0, 1.5])
def test_a_bad_max_rank_is_named(llama, max_rank):
    case = Case(llama, "block", 2)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, max_rank=max_rank)
    assert_one_line(error, "max_rank", str(max_rank))


# --- zero norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 2])
def test_a_zero_input_norm_merges_with_alpha_one_and_is_named(zero):
    """So does the block after the one whose inputs are all zero."""
    model, names = lora_stack(), stack_chain()
    model.get_submodule(f"base_model.model.layers.{zero}").register_forward_pre_hook(lambda module, args: args[0] * 0)
    plain = copy.deepcopy(model)
    reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
    report = reslora.merge(model, method="input", calibration=[STACK_INPUTS])
    for name in names[zero : zero + 2]:
        assert_equal(delta(find_layer(model, name)), 2 * delta(find_layer(plain, name)))
    assert report.notes == (f"{names[zero]}: zero norm, alpha* = 1",)


def test_a_zero_weight_norm_merges_with_alpha_one_and_is_named():
    number = 1
    model = lora_stack()
    zero = find_layer(model, stack_chain()[number])
    with torch.no_grad():
        zero.base_layer.weight.zero_()
        zero.lora_B["default"].weight.zero_()
    plain = copy.deepcopy(model)
    reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
    report = reslora.merge(model, method="weights")
    name = stack_chain()[number + 1]  # its f*_{n-1} is zero
    assert_equal(delta(find_layer(model, name)), 2 * delta(find_layer(plain, name)))
    assert report.notes == (f"{stack_chain()[number]}: zero norm, alpha* = 1",)


# --- auto -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", quick(["input", "middle"], "input"))
@pytest.mark.parametrize(
    "steps, window, calibrated, chosen",
    [
        (0, 100, True, "lstsq"),
        (2, 100, True, "lstsq"),
        (2, 100, False, "input"),
        (2, 0, False, "weights"),
        (0, 100, False, "weights"),
    ],
)
def test_auto_takes_the_best_method_there_is_data_for(llama, shortcut, steps, window, calibrated, chosen):
    cases = [Case(llama, shortcut, window=window).train(steps) for _ in range(2)]
    calibration = cases[0].batches() if calibrated else None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        automatic = reslora.merge(cases[0].model, calibration=calibration)
        reslora.merge(cases[1].model, method=chosen, calibration=calibration)  # who names it knows
    assert automatic.method == chosen
    line = f"merging by {chosen!r} because calibration= is missing; the more accurate 'lstsq' needs it"
    assert [str(each.message) for each in warned] == ([] if calibrated else [line])
    assert all(each.filename == __file__ for each in warned)
    for chain in llama.blocks:
        for name in chain:
            assert torch.equal(delta(find_layer(cases[0].model, name)), delta(find_layer(cases[1].model, name)))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_is_an_iterator_read_once(llama):
    case = Case(llama, "input")
    read = []

    def batches():
        for n, batch in enumerate(case.batches(3)):
            read.append(n)
            yield batch

    reslora.merge(case.model, method="lstsq", calibration=batches())
    assert read == [0, 1, 2]


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_calibration_runs_in_eval_mode_without_gradients(llama, shortcut):
    case = Case(llama, shortcut, dropout=0.5)
    seen = []
    layer = find_layer(case.model, "model.layers.2.self_attn.q_proj")
    layer.register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.is_grad_enabled(), out.requires_grad))
    )
    reslora.merge(case.model, calibration=case.batches(2))
    assert seen == [(False, False, False)] * 2
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert torch.is_grad_enabled()


def test_every_modules_mode_is_restored(llama):
    case = Case(llama, "input")
    case.model.train(True)
    find_layer(case.model, "model.layers.2.self_attn").train(False)
    modes = {name: module.training for name, module in case.model.named_modules()}
    reslora.merge(case.model, calibration=case.batches())
    assert {name: module.training for name, module in case.model.named_modules()} == modes


@pytest.mark.exhaustive
def test_calibration_leaves_no_hooks(llama):
    plain = llama.lora()
    case = Case(llama, "input")
    reslora.merge(case.model, calibration=case.batches())
    for ours, theirs in zip(case.model.modules(), plain.modules(), strict=True):
        assert len(ours._forward_hooks) == len(theirs._forward_hooks)
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shortcut, method",
    [("input", "lstsq"), ("middle", "input"), ("block", "auto")],
)
def test_the_report_has_one_entry_per_block(llama, shortcut, method):
    case = Case(llama, shortcut, 2)
    report = reslora.merge(case.model, method=method, calibration=case.batches())
    tails = [tail for chain in llama.blocks for tail in chain]
    assert len(report.blocks) == len(tails)
    for tail in tails:
        (block,) = [block for block in report.blocks if block.name.endswith(tail)]
        assert tail.endswith(block.role)
        assert block.rank == find_layer(case.model, tail).r["default"]
        assert block.error >= 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["none", "input", "weights", "lstsq"])
@plans
def test_the_error_is_that_of_every_block_on_its_unmerged_inputs(llama, method, shortcut, pre_num, head):
    case = Case(llama, shortcut, pre_num, head, alpha_pattern={"layers.1.self_attn.q_proj": 9})
    report = reslora.merge(case.model, method=method, calibration=case.calibrate(case.batches(1)))
    case.assert_errors(report)


@pytest.mark.exhaustive
def test_the_error_of_a_truncated_block_is_what_truncation_loses(llama):
    case = Case(llama, "block", 2)
    report = reslora.merge(case.model, calibration=case.calibrate(case.batches(1)), max_rank=3)
    case.assert_errors(report)


def test_the_error_of_a_small_output_is_the_root_of_the_ratio():
    one, moments = torch.ones(1, 1), merging.Moments(torch.ones(1, 1))
    moments.own_own, moments.own_handed = 0.02 * one, 0.01 * one
    moments.handed_handed, moments.gap_gap = 0.05 * one, 0.01 * one
    block = merging.Factors("layer", one, one, 1.0, lambda: one, moments=moments)
    assert merging.relative_error(block, merging.Merged(one, one)) == pytest.approx((0.01 / 0.09) ** 0.5)


# --- what a merged model is -------------------------------------------------------------------------------------------

METHODS = [
    ("input", "input"),
    ("input", "weights"),
    ("input", "lstsq"),
    ("middle", "input"),
    ("middle", "weights"),
    ("middle", "lstsq"),
    ("block", "auto"),
]
methods = pytest.mark.parametrize("shortcut, method", METHODS)


@methods
def test_a_merged_model_is_plain_lora(llama, shortcut, method):
    """Its forward pass is W x + s B A x with its weights, and PEFT's own merge gives the same."""
    case = Case(llama, shortcut, 2)
    reslora.merge(case.model, method=method, calibration=case.batches())
    assert all(not layer.lora_variant for layer in adapter_layers(case.model).values())
    plain = Oracle(case.model, llama.blocks, "none").model
    inputs = llama.inputs()
    merged = run(case.model.eval(), inputs)
    assert_equal(merged, run(plain.eval(), inputs))
    assert_equal(run(case.model.merge_and_unload(), inputs), merged)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@methods
def test_dtype_device_and_requires_grad_are_kept(llama, shortcut, method, dtype):
    model = llama.lora().float()
    for layer in adapter_layers(model).values():
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    reslora.merge(model, method=method, calibration=[llama.inputs()])
    for layer in adapter_layers(model).values():
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            assert isinstance(parameter, nn.Parameter)
            assert (parameter.dtype, parameter.device.type) == (dtype, "cpu")
            assert parameter.requires_grad is True


@pytest.mark.exhaustive
@methods
def test_the_base_weights_are_not_touched(llama, shortcut, method):
    case = Case(llama, shortcut, 2)
    before = {name: p.clone() for name, p in case.model.named_parameters() if "lora_" not in name}
    reslora.merge(case.model, method=method, calibration=case.batches())
    after = dict(case.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.exhaustive
@methods
def test_other_adapters_are_not_touched(llama, shortcut, method):
    case = Case(llama, shortcut, 2)
    case.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomize(case.model, seed=9, adapter="other")
    before = {name: p.clone() for name, p in case.model.named_parameters() if ".other." in name}
    reslora.merge(case.model, method=method, calibration=case.batches())
    after = dict(case.model.named_parameters())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut, pre_num", [("none", 1), ("input", 0)])
@pytest.mark.parametrize("method", ["auto", "input"])
def test_a_plan_without_wires_merges_to_itself(llama, shortcut, pre_num, method):
    case = Case(llama, shortcut, pre_num)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    reslora.merge(case.model, method=method, calibration=case.batches())
    after = case.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("method", ["input", "weights", "lstsq"])
@pytest.mark.parametrize("head, factor", [("repeat", 2), ("none", 1)])
def test_heads_merge_exactly(llama, method, head, factor):
    case = Case(llama, "input", 1, head)
    reslora.merge(case.model, method=method, calibration=case.batches())
    for chain in llama.blocks:
        before = delta(find_layer(case.oracle.model, chain[0]))
        assert_equal(delta(find_layer(case.model, chain[0])), factor * before, rtol=1e-6, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(case: Case, before) -> None:
    """Assert that the weights are unchanged and the model is still connected."""
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["merge_bi", None])
def test_an_unknown_method_is_answered_with_the_known_ones(llama, method):
    case = Case(llama, "input")
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method=method)
    assert_one_line(error, str(method), "auto", "none", "input", "weights", "lstsq")


@pytest.mark.exhaustive
def test_merging_twice_is_an_error(llama):
    case = Case(llama, "input")
    reslora.merge(case.model, method="weights")
    before = snapshot(case.model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method="weights")
    assert_one_line(error)
    assert_untouched(case, before)


def test_merging_a_model_that_was_never_connected_is_an_error(llama):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(llama.lora())
    assert_one_line(error, "connect")


def test_merging_an_adapter_that_is_not_the_connected_one_is_an_error(llama):
    case = Case(llama, "input")
    case.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, adapter_name="other")
    assert_one_line(error, "other")


@pytest.mark.exhaustive
def test_merging_while_pefts_own_merge_is_active_is_an_error(llama):
    case = Case(llama, "input")
    find_layer(case.model, "model.layers.1.self_attn.q_proj").merged_adapters.append("default")
    before = snapshot(case.model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method="weights")
    assert_one_line(error, "unmerge")
    assert_untouched(case, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut, method", [*METHODS, ("block", "lstsq")], ids=lambda value: value)
def test_an_adapter_that_is_not_finite_is_named_and_nothing_is_touched(llama, shortcut, method):
    case = Case(llama, shortcut).train(1 if method == "input" else 0)
    broken = "model.layers.2.self_attn.q_proj"
    with torch.no_grad():
        find_layer(case.model, broken).lora_A["default"].weight[0, 0] = float("nan")
    before = snapshot(case.model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method=method, calibration=case.batches(1) if method == "lstsq" else None)
    assert_one_line(error, broken)
    assert_untouched(case, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "shortcut, method, value",
    [("input", "lstsq", float("nan")), ("input", "input", float("inf"))],
)
def test_calibration_that_is_not_finite_is_an_error_and_nothing_is_touched(unet, shortcut, method, value):
    case = Case(unet, shortcut)
    batches = case.batches(2)
    batches[1]["sample"][0, 0, 0, 0] = value
    before = snapshot(case.model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method=method, calibration=batches)
    assert_one_line(error, "calibration")
    assert_untouched(case, before)
    assert_equal(run(case.model, unet.inputs()), run(case.oracle.model, unet.inputs()))
    good = case.batches(2)
    reslora.merge(case.model, method="lstsq", calibration=case.calibrate(good))
    case.assert_merged_to(merged_by_lstsq(case), tolerance=1e-5)


@pytest.mark.exhaustive
def test_batches_that_are_no_dicts_are_an_error(llama):
    case = Case(llama, "input")
    before = snapshot(case.model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.merge(case.model, method="lstsq", calibration=8)
    assert_one_line(error, "calibration")
    assert_untouched(case, before)


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_a_forward_that_overflowed_does_not_count():
    model, other = lora_stack(), lora_stack()
    for wired in (model, other):
        reslora.connect(wired, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
        run(wired, STACK_INPUTS)
    overflowing = STACK_INPUTS["x"].clone()
    overflowing[0, 0, 0] = torch.inf
    run(model, {"x": overflowing})
    assert reslora.merge(model, "input").to_dict() == reslora.merge(other, "input").to_dict()


def test_norms_that_all_overflowed_are_an_error_and_auto_takes_the_weights():
    model = lora_stack()
    reslora.connect(model, ResLoraConfig(), example_inputs=STACK_INPUTS)
    run(model, {"x": torch.full_like(STACK_INPUTS["x"], torch.nan)})
    with pytest.raises(ValueError) as error:
        reslora.merge(model, "input")
    assert_one_line(error, "calibration")
    assert reslora.merge(model).method == "weights"


def test_under_autocast_the_model_goes_on_with_the_merged_weights():
    """Autocast caches casts of parameters until its context ends, even if the parameters are overwritten."""
    model = lora_stack().float().eval()
    inputs = {"x": STACK_INPUTS["x"].float()}
    reslora.connect(model, ResLoraConfig("middle", 2), example_inputs=inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reslora.merge(model, calibration=[inputs])
        inside = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, run(model, inputs))
