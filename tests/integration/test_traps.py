"""Traps of hooking into autograd: each of these was wrong, silently or not, in an obvious implementation.

Trap -> test (in this file unless another is named):

Hooks
    a full backward hook fires early for keyword inputs   test_modules_called_with_keywords_only
    ... and for inputs that need no gradient              test_a_full_backward_hook_is_not_needed_for_inputs_without_gradients
    gradients of some outputs come early                  test_blocks_with_auxiliary_outputs
    all gradients are in before a frozen weight is read   test_a_frozen_weight_behind_the_trainable_ones
    post hooks run after an exception                     test_an_exception_in_forward_leaves_no_hooks_behind
    checkpointing of `__call__`: hooks fire again         test_checkpointing_whose_hooks_fire_again
    checkpointing of `forward`: hooks never see it        test_checkpointing_of_forward_which_hooks_never_see
    several forwards and one backward                     test_two_forwards_and_one_backward
    modules called twice                                  test_a_module_called_twice
    encoder and decoder: backward in another order        test_models.py::test_architectures

Checkpoint regions
    a region must fit the slots                           test_the_plan_counts_with_regions
    ... or is an error                                    test_an_unplanned_region_that_does_not_fit_is_an_error_not_a_wrong_gradient
    its chunks stay until the backward of each leaves     test_chunks_of_a_region_keep_their_slots_until_their_own_backward
    reentrant checkpoints                                 test_reentrant_checkpoints_and_shared_weights

Parameters that are elsewhere
    slots move, autograd remembers addresses              test_saved_views_of_moving_slots
    a node that comes late                                test_a_late_node_finds_its_weight_wherever_it_is
    a graph of older parameters                           test_a_graph_older_than_the_parameters_is_an_error
    a stray read is loud; shapes and counts work          test_a_streamed_out_parameter_has_its_shape_and_is_loud
    `state_dict` gathers, full parameters on request      test_state_dict_gathers_and_full_parameters_lends

Gradients and the optimizer
    `zero_grad` without a step                            test_zero_grad_without_a_step_forgets_the_batch
    torch's `clip_grad_norm_` sees no gradients           test_gradients_are_consumed_and_torch_clipping_is_warned_about
    the optimizer's own `clip_grad_norm_`                 test_clipping_by_the_optimizer
    a bare `loss.backward()`                              test_a_bare_backward_names_the_right_call
    shared weights fire twice                             test_reference.py::test_losses_and_norms_agree
    a gradient in two parts                               test_a_gradient_in_two_parts_is_an_error_not_half_a_gradient
    unused parameters do not decay                        test_unused_and_frozen_parameters_stay_as_they_are
    nothing happens between accumulation boundaries       test_accumulation_boundaries
    the loss is divided by the accumulation count         test_reference.py::test_losses_and_norms_agree (its norms)
    a step that is not finite                             test_a_step_with_non_finite_gradients_changes_nothing
    the loss scale is folded into the step                test_placement.py::test_fp16_losses_and_norms_do_not_show_the_scale
    one reduction tree for the norm                       test_placement.py::test_norms_do_not_depend_on_placement
    denormal moments                                      test_denormal_moments_become_zero
    options without meaning here                          test_optimizer.py::test_options_are_refused_by_name

The rest
    buffers that no state dict has                        test_buffers_keep_their_dtype_and_stay_real_when_lazy
    forked workers                                        test_forked_workers_are_harmless
    moving slots recompile nothing                        test_compiled_blocks_recompile_nothing_when_slots_move
    hooks under `torch.compile`                           test_compiled_layers
    CUDA graphs replay addresses                          test_cuda_graphs_are_refused
    an exception leaves saved-tensor hooks active         test_an_exception_in_forward_leaves_no_hooks_behind
    pack returns the tensor: a cycle                      test_saved_tensors_are_freed_without_the_garbage_collector
    evaluation, other sequence lengths                    test_eval_in_the_middle_and_other_sequence_lengths

On CUDA only (tests/gpu): the same plan run twice is equal, and placement changes nothing, under deterministic algorithms.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierwise

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


class Block(nn.Module):
    def __init__(self, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.fail = False

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        if self.fail:
            raise ArithmeticError("wanted by the test")
        return x + scale * self.down(hidden)


class Net(nn.Module):
    """Blocks that take keywords only; `mode` varies how they are called.

    Blocks of unequal size never come back to the slot that they had, so a stale address is not right by chance.
    """

    def __init__(self, blocks: int = 4, width: int = 32, mode: str = "plain", equal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, width)
        inner = [2 * width if equal else width * (1 + index * 3 % 4) for index in range(blocks)]
        self.blocks = nn.ModuleList(Block(width, size) for size in inner)
        self.head = nn.Linear(width, 8)
        self.mode = mode

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.mode == "region":
            for first in range(0, len(self.blocks), 2):
                x = checkpoint(self._pair, first, x, use_reentrant=False)
        else:
            for block in self.blocks:
                x = checkpoint(lambda x, b=block: b(x=x), x, use_reentrant=False) if self.mode == "checkpoint" else block(x=x)
                if self.mode == "twice":
                    x = block(x=x, scale=0.5)
        return self.head(x.mean(1))

    def _pair(self, first: int, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[first : first + 2]:
            x = block(x=x)
        return x


def ids_of(step: int, rows: int = 4, seq: int = 6) -> torch.Tensor:
    return torch.randint(0, 64, (rows, seq), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return model(ids_of(step)).square().mean()


def same(kit: Any, mode: str = "plain", loss: Any = loss_of, **options: Any) -> Any:
    """Streamed training equals plain torch in fp32, and itself on the device to the bit."""
    device = kit.fit(Net(mode=mode), loss)
    streamed = kit.fit(Net(mode=mode), loss, **{**STREAMED, **options})
    streamed.same_as(device)
    assert streamed.losses == pytest.approx(kit.plain_fit(Net(), loss).losses if mode != "twice" else device.losses, rel=1e-5)
    assert streamed.booster.stats()["fetches"] > 0
    return streamed


def enable_checkpointing(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # The name changes in transformers 6.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# ---- hooks ------------------------------------------------------------------------------------------------------------


def test_modules_called_with_keywords_only(kit: Any) -> None:
    same(kit)


def test_a_module_called_twice(kit: Any) -> None:
    assert same(kit, "twice").booster.stats()["off_trace"] == 0


def test_a_full_backward_hook_is_not_needed_for_inputs_without_gradients(kit: Any) -> None:
    # The first block's input needs no gradient: it is left when its parameters are in.
    def loss(model: Any, step: int) -> torch.Tensor:
        return model(ids_of(step)).square().mean()

    def build() -> Net:
        net = Net()
        net.embed.weight.requires_grad_(False)
        return net

    device = kit.fit(build(), loss)
    kit.fit(build(), loss, **STREAMED).same_as(device)


def test_checkpointing_whose_hooks_fire_again(kit: Any) -> None:
    # transformers before 5.2x checkpoints `__call__`: module hooks fire again in the recomputation, early stop skips post hooks.
    same(kit, "checkpoint")


def test_checkpointing_of_forward_which_hooks_never_see(kit: Any) -> None:
    options = {"precision": "fp32"}
    plain = kit.train(kit.llama(), steps=5, **options)

    def own_checkpointing() -> Any:
        return enable_checkpointing(kit.llama())

    kit.train(own_checkpointing(), steps=5, **options).same_as(plain)
    calls = []
    counted = own_checkpointing()
    counted.model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    kit.train(counted, steps=1, recompute="full", **options)
    assert len(calls) == 1 + 1 + 1, "traced, run and recomputed once: not checkpointed twice"
    streamed = kit.train(own_checkpointing(), steps=5, **options, **STREAMED)
    streamed.same_as(plain)
    assert all(streamed.booster._runtime.planned.plan["recompute"][u] for u in range(1, 4)), "the plan has to count with it"


def test_checkpointing_enabled_after_boosting(kit: Any) -> None:
    plain = kit.train(kit.llama(), steps=3, precision="fp32")
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", **STREAMED)
    enable_checkpointing(model)
    losses = []
    for ids in kit.batches(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    assert losses == plain.losses


def test_our_own_recomputation(kit: Any) -> None:
    plain = kit.train(kit.llama(), steps=5, precision="fp32", recompute="none")
    again = kit.train(kit.llama(), steps=5, precision="fp32", recompute="full", **STREAMED)
    again.same_as(plain)
    runtime = again.booster._runtime
    assert all(runtime.planned.plan["recompute"][1:4])
    assert runtime.counter.peak_bytes < plain.booster._runtime.counter.peak_bytes
    # What a recomputation saves counts as well, one layer's worth at a time.
    layer = runtime.saved_bytes(1)
    assert runtime.counter.peak_bytes == pytest.approx(runtime.trace.activation_peak_bytes(runtime.planned.plan["recompute"]), rel=0.1)
    assert runtime.counter.peak_bytes > layer


def test_dropout_is_recomputed_with_its_own_random_state(kit: Any) -> None:
    options = {"precision": "fp32", "steps": 3}
    config = {"attention_dropout": 0.3}
    kit.train(kit.llama(**config), recompute="full", **options).same_as(kit.train(kit.llama(**config), recompute="none", **options))


class Reentrant(Net):
    """Reentrant checkpoints run a backward inside the backward; a weight that is used outside too gets its gradient in two parts."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.front = nn.Linear(32, 64, bias=False)
        if shared:
            self.blocks[2].up.weight = self.front.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.front(self.embed(ids))[..., :32]
        for block in self.blocks:
            x = checkpoint(lambda x, b=block: b(x=x), x, use_reentrant=True)
        return self.head(x.mean(1))


@pytest.mark.parametrize("shared", [False, True])
def test_reentrant_checkpoints_and_shared_weights(kit: Any, shared: bool) -> None:
    reference = kit.plain_fit(Reentrant(shared), loss_of)
    device = kit.fit(Reentrant(shared), loss_of)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(Reentrant(shared), loss_of, **STREAMED).same_as(device)


def test_a_gradient_in_two_parts_is_an_error_not_half_a_gradient(kit: Any) -> None:
    class Twice(Reentrant):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for _ in range(2):
                x = checkpoint(lambda x: self.blocks[0](x=x), x, use_reentrant=True)
            return self.head(x.mean(1))

    booster, model, optimizer = kit.boosted(Twice(False), precision="fp32", micro_batch_size=None, seq_len=None)
    with pytest.raises(tierwise.TierwiseError, match=r"gradient of 'blocks\.0\..*arrived again.*use_reentrant=False"):
        booster.backward(loss_of(model, 0), optimizer)


# ---- checkpoint regions -----------------------------------------------------------------------------------------------


def test_a_region_of_two_blocks(kit: Any) -> None:
    same(kit, "region")


class OneRegion(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self._all, self.embed(ids), use_reentrant=False)
        return self.head(x.mean(1))

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x=x)
        return x


def test_the_plan_counts_with_regions(kit: Any) -> None:
    device = kit.fit(OneRegion(blocks=8), loss_of)
    streamed = kit.fit(OneRegion(blocks=8), loss_of, **STREAMED)
    streamed.same_as(device)
    region = sum(p.numel() * 4 for p in streamed.model.blocks.parameters())
    assert streamed.booster._runtime.planned.plan["stream_slab_bytes"] >= region


def test_an_unplanned_region_that_does_not_fit_is_an_error_not_a_wrong_gradient(kit: Any) -> None:
    class Later(OneRegion):
        region = False

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) if self.region else Net.forward(self, ids)

    booster, model, optimizer = kit.boosted(Later(blocks=8), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
    model.region = True
    with pytest.raises(tierwise.TierwiseError, match=r"no slot .*blocks.*checkpoint smaller regions"):
        booster.backward(loss_of(model, 1), optimizer)
    model.region = False
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()


@contextlib.contextmanager
def pins_at(result: Any, module: nn.Module, chunk: str) -> Iterator[list[int]]:
    """How often backward pins a chunk at the moment when the gradient of a module's output is there."""
    runtime = result.booster._runtime
    index = [c.name for c in runtime.grouping.chunks].index(chunk)
    pins: list[int] = []

    def look(grad: torch.Tensor) -> None:
        pins.append(runtime.residency()[index]["backward_pins"])

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not pins and output.requires_grad and torch._C._current_graph_task_id() == -1:
            output.register_hook(look)

    handle = module.register_forward_hook(watch)
    yield pins
    handle.remove()


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_of_a_region_keep_their_slots_until_their_own_backward(kit: Any, frozen: bool) -> None:
    class Moving(Net):
        """A region of three blocks in front while planning, among the last blocks later: room enough, and others to prefetch into it."""

        start = 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                if index == self.start:
                    x = checkpoint(self._three, x, use_reentrant=False)
                elif not self.start < index < self.start + 3:
                    x = block(x=x)
            return self.head(x.mean(1))

        def _three(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[self.start : self.start + 3]:
                x = block(x=x)
            return x

    def loss(model: Any, step: int) -> torch.Tensor:
        model.start = 6 if step else 0
        return loss_of(model, step)

    def build() -> Moving:
        net = Moving(blocks=10)
        if frozen:  # Gradients that never come do not tell when a unit is over.
            net.blocks[6].requires_grad_(False)
        return net

    reference = kit.fit(build(), loss)
    streamed = kit.fit(build(), loss, **STREAMED)
    streamed.same_as(reference)
    # Whatever is evicted or not: while block 7 runs its backward, block 6, recomputed with it, must be pinned.
    with pins_at(streamed, streamed.model.blocks[7].up, "blocks.6") as pins:
        streamed.booster.backward(loss(streamed.model, 7), streamed.optimizer)
    assert pins == [1]


class Aux(Net):
    """Every block gives something to an auxiliary loss, whose gradient is known before that of the block's main output."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        extra = []
        for block in self.blocks:
            x, aux = block(x=x)
            extra.append(aux)
        return self.head(x.mean(1)) + sum(extra)


class AuxBlock(Block):
    def forward(self, *, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(hidden), hidden.mean()


def test_blocks_with_auxiliary_outputs(kit: Any) -> None:
    def build() -> Aux:
        net = Aux(blocks=0)
        net.blocks = nn.ModuleList(AuxBlock(32, 32 * (1 + index * 3 % 4)) for index in range(6))
        return net

    torch.manual_seed(0)
    initial = build().state_dict()

    def fresh() -> Aux:
        net = build()
        net.load_state_dict(initial)
        return net

    reference = kit.plain_fit(fresh(), loss_of)
    device = kit.fit(fresh(), loss_of)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(fresh(), loss_of, recompute="full").same_as(device)
    kit.fit(fresh(), loss_of, **STREAMED).same_as(device)
    kit.fit(fresh(), loss_of, **STREAMED, recompute="full").same_as(device)


def test_a_frozen_weight_behind_the_trainable_ones(kit: Any) -> None:
    # All gradients of the block are in before its norm, which is read once more to reach the blocks in front.
    def build() -> Net:
        net = Net(blocks=6, equal=False)
        for block in net.blocks:
            block.norm.requires_grad_(False)
        return net

    reference = kit.fit(build(), loss_of)
    streamed = kit.fit(build(), loss_of, **STREAMED, recompute="full")
    streamed.same_as(reference)
    with pins_at(streamed, streamed.model.blocks[3].norm, "blocks.3") as pins:
        streamed.booster.backward(loss_of(streamed.model, 7), streamed.optimizer)
    assert pins == [1]


# ---- streamed-out parameters ------------------------------------------------------------------------------------------


def test_a_streamed_out_parameter_has_its_shape_and_is_loud(kit: Any) -> None:
    result = same(kit)
    for param in result.model.parameters():
        assert param.isnan().all()
        assert param.untyped_storage().nbytes() <= 4
    assert result.model.blocks[0].up.weight.shape == (64, 32)
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in Net().parameters())
    with torch.no_grad():
        stray = torch.nn.functional.linear(torch.ones(1, 32), result.model.blocks[0].up.weight)
    assert stray.isnan().all()


def test_saved_views_of_moving_slots(kit: Any) -> None:
    # Several chunks pass through few slots between a layer's forward and its backward: raw addresses would read another chunk.
    result = kit.fit(Net(blocks=8, equal=False), loss_of, **STREAMED)
    assert result.booster.stats()["evictions"] > 0
    result.same_as(kit.fit(Net(blocks=8, equal=False), loss_of))


def test_a_late_node_finds_its_weight_wherever_it_is(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    loss_of(model, 0)  # Plans.
    outputs: list[torch.Tensor] = []
    handles = [block.down.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in model.blocks]
    loss = loss_of(model, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    node = outputs[2].grad_fn
    while not hasattr(node, "_saved_mat2"):
        node = node.next_functions[0][0]
    # Reading this unpacks it, with no unit entered and its chunk evicted.
    assert torch.equal(node._saved_mat2, weights["blocks.2.down.weight"].t())
    booster.backward(loss, optimizer)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("options", [{}, {"placement_policy": "static", "offload_optim_frac": 1.0}, STREAMED])
@pytest.mark.parametrize("flushed", [True, False])
def test_a_graph_older_than_the_parameters_is_an_error(kit: Any, options: dict[str, Any], flushed: bool) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
    old = loss_of(model, 0)
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()
    if flushed:
        booster.flush()
    with pytest.raises(tierwise.TierwiseError, match="rewritten since its forward"):
        booster.backward(old, optimizer)
    # Nothing was lost: the next batch trains.
    booster.backward(loss_of(model, 2), optimizer)
    optimizer.step()
    expected = kit.fit(Net(), lambda model, step: loss_of(model, step + 1), steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.weights[name]), name


def test_two_losses_of_one_step_may_share_a_graph(kit: Any) -> None:
    # Between them nothing is rewritten: the same graph twice is as good as once with twice the loss, divided by two micro-batches.
    booster, model, optimizer = kit.boosted(
        Net(), precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=2, **STREAMED
    )
    loss = loss_of(model, 0)
    booster.backward(loss, optimizer, retain_graph=True)
    booster.backward(loss, optimizer)
    optimizer.step()
    expected = kit.fit(Net(), loss_of, steps=1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.weights[name], rtol=1e-5, atol=1e-6)


def test_state_dict_gathers_and_full_parameters_lends(kit: Any) -> None:
    booster, model, _ = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    fresh = {name: value.clone() for name, value in Net().state_dict().items()}
    loss_of(model, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name])
    for name, value in model.blocks.state_dict().items():
        assert torch.equal(value, fresh[f"blocks.{name}"])
    reference = Net()
    with tierwise.full_parameters(model):
        inside = loss_of(model, 0)
        assert torch.equal(inside, loss_of(reference, 0))
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                mine.mul_(0.5)
                theirs.mul_(0.5)
    assert model.blocks[1].up.weight.isnan().all()
    assert torch.equal(model.state_dict()["blocks.1.up.weight"], fresh["blocks.1.up.weight"] * 0.5)
    assert any(chunk["slot"] is not None for chunk in booster._runtime.residency())
    assert loss_of(model, 0).item() == loss_of(reference, 0).item(), "a clean copy in a slot has to follow"
    other = {name: value + 1 for name, value in fresh.items()}
    model.load_state_dict(other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


# ---- optimizer and backward -------------------------------------------------------------------------------------------


def test_a_bare_backward_names_the_right_call(kit: Any) -> None:
    for options in ({}, STREAMED):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        with pytest.raises(tierwise.TierwiseError, match=r"booster\.backward"):
            loss_of(model, 0).backward()
        booster.backward(loss_of(model, 0), optimizer)
        optimizer.step()


def test_gradients_are_consumed_and_torch_clipping_is_warned_about(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None)
    booster.backward(loss_of(model, 0), optimizer)
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UserWarning, match="max_norm to GeminiPlugin"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.utils.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)
    assert optimizer.grad_norm > 0


def test_clipping_by_the_optimizer(kit: Any) -> None:
    by_plugin = kit.fit(Net(), loss_of, max_norm=1e-3)
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None)
    for step in range(6):
        booster.backward(loss_of(model, step), optimizer)
        optimizer.clip_grad_norm_(1e-3)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, by_plugin.weights[name])


def test_unused_and_frozen_parameters_stay_as_they_are(kit: Any) -> None:
    class Partly(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x=self.embed(ids))
            return self.head((self.blocks[2](x=x) if self.skip else self.blocks[1](x=x)).mean(1))

        skip = False

    def build() -> Partly:
        net = Partly()
        net.blocks[0].up.weight.requires_grad_(False)
        net.blocks[0].norm.requires_grad_(False)
        return net

    def loss(model: Any, step: int) -> torch.Tensor:
        model.skip = step % 3 == 2
        return model(ids_of(step)).square().mean()

    reference = kit.plain_fit(build(), loss)
    for options in ({}, STREAMED):
        result = kit.fit(build(), loss, **options)
        assert result.losses == pytest.approx(reference.losses, rel=1e-5)
        fresh = build().state_dict()
        for name in ("blocks.3.up.weight", "blocks.0.up.weight", "blocks.0.norm.bias"):
            assert torch.equal(result.weights[name], fresh[name]), name
        steps = {name: result.optimizer.param_steps().get(p) for name, p in result.model.named_parameters()}
        assert steps["blocks.2.up.weight"] == 2
        assert steps["blocks.1.up.weight"] == 4
        assert steps["blocks.3.up.weight"] == 0
        assert steps["blocks.0.up.weight"] is None


def test_two_forwards_and_one_backward(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return model(ids_of(step)).square().mean() + model(ids_of(step + 100)).abs().mean()

    same(kit, loss=loss)


def test_accumulation_boundaries(kit: Any) -> None:
    from tierwise.booster import Booster

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    booster = Booster(kit.plugin(precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=3))
    model, converted, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    assert converted is optimizer
    assert scheduler.optimizer is optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for micro in range(6):
        booster.backward(loss_of(model, micro), optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        changed = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert changed == (micro >= 2), micro
        assert scheduler.get_last_lr() == [0.1 * 0.5 ** ((micro + 1) // 3)]
    assert booster.stats()["steps"] == 2


def test_more_backwards_than_the_plan_accumulates(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=2)
    for step in range(2):
        booster.backward(loss_of(model, step), optimizer)
    with pytest.raises(tierwise.TierwiseError, match="set gradient_accumulation_steps=3"):
        booster.backward(loss_of(model, 2), optimizer)
    optimizer.step()
    booster.backward(loss_of(model, 2), optimizer)
    booster.flush()
    assert booster.stats()["steps"] == 1, "the refused call must not lose the gradients before it"


def test_zero_grad_without_a_step_forgets_the_batch(kit: Any) -> None:
    for options in ({}, STREAMED, {**STREAMED, "clip_mode": "speculate"}):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        booster.backward(loss_of(model, 7), optimizer)
        optimizer.zero_grad()
        losses = []
        for step in range(4):
            loss = loss_of(model, step)
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        assert losses == kit.fit(Net(), loss_of, steps=4).losses


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_non_finite_gradients_changes_nothing(kit: Any, bad: float) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step) * (bad if step == 2 else 1.0)

    for options in ({}, STREAMED, {"placement_policy": "static", "offload_optim_frac": 1.0, "clip_mode": "speculate"}):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, max_norm=1.0, **options)
        for step in range(4):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            booster.backward(loss(model, step), optimizer)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step_skipped == (step == 2)
            equal = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert equal == (step == 2)
        assert set(optimizer.param_steps().values()) == {3}


def test_denormal_moments_become_zero(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step) * (1e-30 if step == 0 else 0.0)

    for options in ({}, STREAMED):
        result = kit.fit(Net(), loss, steps=12, **options)
        result.booster.flush()
        for param in result.model.parameters():
            for value in result.optimizer.read_state(param).values():
                assert ((value == 0) | (value.abs() >= 2.0**-126)).all()


# ---- the rest ---------------------------------------------------------------------------------------------------------


def test_buffers_keep_their_dtype_and_stay_real_when_lazy(kit: Any) -> None:
    eager = kit.llama()
    expected = {name: buffer.clone() for name, buffer in eager.named_buffers()}
    _, model, _ = kit.boosted(eager, precision="bf16", **STREAMED)
    with tierwise.lazy_init():
        lazy = kit.llama()
    assert all(param.is_meta for param in lazy.parameters())
    for boosted in (model, lazy):
        for name, buffer in boosted.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected[name]), name


def _in_child(queue: Any, booster: Any) -> None:
    try:
        booster._runtime.engine.flush()
    except tierwise.TierwiseError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_are_harmless(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", **STREAMED)
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader([ids[0] for ids in kit.batches(4)], batch_size=2, num_workers=1, multiprocessing_context=context)
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, booster))
    child.start()
    message = queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert "process" in message
    booster.flush()


# torch asks every tensor that it guards for its `.grad`, and warns itself about that.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiling
@pytest.mark.parametrize("what", ["block", "linear"])
def test_compiled_blocks_recompile_nothing_when_slots_move(kit: Any, what: str) -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def build(compiled: bool) -> Net:
        net = Net(blocks=6)
        for block in net.blocks if compiled else ():
            (block if what == "block" else block.up).compile(backend=backend)
        return net

    plain = kit.fit(build(False), loss_of)
    torch._dynamo.reset()
    kit.plain_fit(build(True), loss_of, steps=2)
    unboosted, graphs = graphs, 0
    torch._dynamo.reset()
    streamed = kit.fit(build(True), loss_of, steps=2, **STREAMED)
    first = graphs
    assert first == unboosted, "hooks are not part of what is compiled"
    # torch 2.11 does not compile a layer of torch's own by itself.
    assert first > 0 or what == "linear"
    for step in range(2, 6):
        loss = loss_of(streamed.model, step)
        streamed.losses.append(loss.item())
        streamed.booster.backward(loss, streamed.optimizer)
        streamed.optimizer.step()
    assert graphs == first
    assert streamed.losses == plain.losses


@compiling
@pytest.mark.parametrize("how", ["layer.compile()", "torch.compile(layer)", "layer.forward"])
def test_compiled_layers(kit: Any, how: str) -> None:
    torch._dynamo.reset()
    plain = kit.train(kit.llama(), steps=4, precision="fp32")
    model = kit.llama()
    for index, layer in enumerate(model.model.layers):
        if how == "layer.compile()":
            layer.compile(backend="aot_eager")
        elif how == "torch.compile(layer)":
            model.model.layers[index] = torch.compile(layer, backend="aot_eager")
        else:
            layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for options in (STREAMED, {**STREAMED, "recompute": "full"}):
        compiled = kit.train(copy.deepcopy(model) if how != "layer.forward" else model, steps=4, precision="fp32", **options)
        assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
        if how == "layer.forward":
            break


# torch 2.11's inductor uses a deprecated part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}])
@pytest.mark.parametrize("how", ["block.compile()", "torch.compile(block)", "block.forward"])
def test_cuda_graphs_are_refused(kit: Any, how: str, options: dict[str, Any]) -> None:
    def build(options: dict[str, Any]) -> Net:
        net = Net()
        block: Any = net.blocks[1]
        if how == "block.compile()":
            block.compile(**options)
        elif how == "torch.compile(block)":
            net.blocks[1] = torch.compile(block, **options)
        else:
            block.forward = torch.compile(block.forward, **options)
        return net

    with pytest.raises(ValueError, match=r"blocks\.1.* compiled with CUDA graphs"):
        kit.boosted(build(options))
    kit.boosted(build({"mode": "max-autotune-no-cudagraphs"}), micro_batch_size=None, seq_len=None)


def test_an_exception_in_forward_leaves_no_hooks_behind(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    losses = []
    for step in range(4):
        if step % 2:
            model.blocks[2].fail = True
            with pytest.raises(ArithmeticError):
                loss_of(model, step)
            model.blocks[2].fail = False
            assert not booster._runtime.saved.active
            assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            assert all(not c["forward_pins"] for c in booster._runtime.residency())
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    assert losses == kit.fit(Net(), loss_of, steps=4).losses


def test_an_interrupt_in_forward_is_cleaned_up_by_the_next(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt  # Module hooks with always_call do not run for it.

    losses = []
    for step in range(3):
        handle = model.blocks[2].down.register_forward_pre_hook(interrupt)
        if step:
            with pytest.raises(KeyboardInterrupt):
                loss_of(model, step)
        handle.remove()
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
        assert all(not chunk["forward_pins"] for chunk in booster._runtime.residency())
    assert losses == kit.fit(Net(), loss_of, steps=3).losses


def test_an_exception_in_backward_can_be_survived(kit: Any) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("wanted by the test")

    class Net2(Net):
        bad = False

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                x = block(x=x)
                if index == 1 and self.bad:
                    x = Fails.apply(x)
            return self.head(x.mean(1))

    for options in ({}, STREAMED):
        booster, model, optimizer = kit.boosted(Net2(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        losses = []
        for step in range(4):
            model.bad = True
            with pytest.raises(ArithmeticError):
                booster.backward(loss_of(model, step), optimizer)
            model.bad = False
            loss = loss_of(model, step)
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
        assert losses == kit.fit(Net(), loss_of, steps=4).losses
        booster.flush()
        assert booster.stats()["device_gradients_bytes"] == 0


def test_an_exception_in_a_later_micro_batch_says_what_went_with_it(kit: Any) -> None:
    options = {"precision": "fp32", "micro_batch_size": None, "seq_len": None, "gradient_accumulation_steps": 3}
    booster, model, optimizer = kit.boosted(Net(), **options)

    def refuse(grad: torch.Tensor) -> None:
        raise ArithmeticError("wanted by the test")

    for step in range(2):
        booster.backward(loss_of(model, step), optimizer)
    loss = loss_of(model, 2)
    loss.register_hook(refuse)
    with pytest.raises(ArithmeticError) as caught:
        booster.backward(loss, optimizer)
    assert any("micro-batch 3 of 3" in note and "the 2 before it" in note for note in caught.value.__notes__)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()  # There is nothing to step.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for step in range(3):
        booster.backward(loss_of(model, step), optimizer)
    optimizer.step()
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_a_touched_chunk_is_not_mapped_for_longer_than_its_unit(kit: Any) -> None:
    # It keeps its slot until the next operation, and then nobody would say that its parameters point at another chunk's bytes.
    booster, model, _ = kit.boosted(Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    loss_of(model, 0)
    runtime = booster._runtime
    block = model.blocks[2]
    chunk = runtime.grouping.place[block.down.weight][0]

    def touches(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        runtime.engine.touch(chunk, 0)

    handle = block.down.register_forward_hook(touches)
    loss_of(model, 0)
    handle.remove()
    assert chunk not in runtime.saved.mapped
    assert block.down.weight.isnan().all()


def test_saved_tensors_are_freed_without_the_garbage_collector(kit: Any) -> None:
    class SavesItsOutput(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).tanh()  # Where pack returns this very tensor, it keeps itself alive.

    booster, model, _ = kit.boosted(SavesItsOutput(), precision="fp32", micro_batch_size=None, seq_len=None)
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(model, 0)
        assert booster.stats()["activation_bytes"] > 0
        del loss
        assert booster.stats()["activation_bytes"] == 0
    finally:
        gc.enable()


def test_eval_in_the_middle_and_other_sequence_lengths(kit: Any) -> None:
    def run(**options: Any) -> tuple[list[float], Any]:
        booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", max_norm=0.5, **options)
        seen = []
        for step, ids in enumerate(kit.batches(6)):
            ids = ids[:, : 16 - 3 * (step % 3)]
            loss = model(input_ids=ids, labels=ids).loss
            seen.append(loss.item())
            booster.backward(loss, optimizer)
            if step == 3:
                # Before the step is committed: the weights are still the old ones.
                model.eval()
                with torch.no_grad():
                    seen.append(model(input_ids=ids).logits.float().sum().item())
                model.train()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen.append(model(input_ids=ids, labels=ids).loss.item())
                assert model(input_ids=ids, labels=ids).logits is not None
            model.train()
        return seen, booster

    expected, _ = run()
    for options in (STREAMED, {**STREAMED, "clip_mode": "speculate"}):
        seen, booster = run(**options)
        assert seen == expected
        assert booster.stats()["off_trace"] > 0, "eval passes are not in the trace, and are counted"


def test_generate_while_streamed(kit: Any) -> None:
    expected = kit.llama().eval()
    ids = kit.batches(1)[0][:, :4]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = expected.generate(ids, **settings)
    _, model, _ = kit.boosted(kit.llama(), precision="fp32", **STREAMED)
    model.eval()
    assert torch.equal(model.generate(ids, **settings), want)


def test_a_submodule_called_on_its_own_is_packed_too(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        x = model.embed(ids_of(step))
        for block in model.blocks:
            x = block(x=x)
        return model.head(x.mean(1)).square().mean()

    def build(**options: Any) -> list[float]:
        booster, model, optimizer = kit.boosted(
            Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **options
        )
        losses = []
        for step in range(4):
            value = (loss if step else loss_of)(model, step)
            losses.append(value.item())
            booster.backward(value, optimizer)
            optimizer.step()
        booster.backward(loss(model, 9), optimizer)
        value = loss(model, 10)
        assert not booster._runtime.saved.active
        return [*losses, value.item()]

    assert build(**STREAMED) == build()


def test_parameters_on_the_root_and_inside_parents(kit: Any) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.ones(16))
            self.first = nn.Linear(16, 16)
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3)])
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) * self.scale
            for block in self.inner:
                x = x + block(x) * self.scale
            return x * self.scale

    def loss(model: Any, step: int) -> torch.Tensor:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean()

    reference = kit.plain_fit(Parent(), loss)
    device = kit.fit(Parent(), loss)
    streamed = kit.fit(Parent(), loss, **STREAMED)
    streamed.same_as(device)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(Parent(), loss, **STREAMED, recompute="full").same_as(device)
    # A parent stays entered while its children run their backward.
    with pins_at(streamed, streamed.model.inner[1][0], "Parent") as pins:
        streamed.booster.backward(loss(streamed.model, 0), streamed.optimizer)
    assert pins == [1]
