"""Activations in host memory: what is saved, by whom, and what becomes of it where no backward comes, or two do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tierwise
from tests.support.traps import STREAMED, Block, Net, ids_of

OFFLOADED: dict[str, Any] = {"recompute": "none", "offload_activations": "full"}
KEPT: dict[str, Any] = {"recompute": "none", "offload_activations": "none"}


def loss_of(model: Any, step: int, rows: int = 16) -> torch.Tensor:
    """A batch whose tensors are worth a copy."""
    loss: torch.Tensor = model(ids_of(step, rows=rows, seq=32)).square().mean()
    return loss


def away(result: Any) -> dict[str, Any]:
    stats: dict[str, Any] = result.booster.stats()
    assert stats["offloaded_units"] > 0
    assert stats["activation_out_bytes"] > 0
    return stats


def same(kit: Any, build: Callable[[], nn.Module], loss: Any = loss_of, **options: Any) -> Any:
    """Offloaded training equals training with everything kept, to the bit, and leaves nothing behind."""
    kept = kit.fit(build(), loss, **KEPT)
    assert kept.booster.stats()["activation_out_bytes"] == 0
    offloaded = kit.fit(build(), loss, **{**OFFLOADED, **options})
    offloaded.same_as(kept)
    stats = away(offloaded)
    assert stats["activation_in_bytes"] > 0
    assert stats["host_activation_bytes"] == 0
    assert stats["device_activations_bytes"] == 0
    return offloaded


class Views(Block):
    """Saves transposed, expanded, sliced, strided, complex and conjugated views."""

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        wide = self.up(self.norm(x))
        left, right = wide.chunk(2, dim=-1)
        turned = left.transpose(1, 2)
        product = torch.matmul(turned, right)
        spread = right[:, :, :1].expand_as(left) * left
        strided = wide[..., ::2] * left
        turning = torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2))
        circle = torch.view_as_real(turning * turning.conj()).flatten(-2)
        hidden = torch.cat((strided + spread, right @ product), dim=-1) + circle
        return x + scale * self.down(torch.tanh(hidden))


def test_views_of_every_kind(kit: Any) -> None:
    def build() -> Net:
        net = Net()
        net.blocks = nn.ModuleList(Views() for _ in range(4))
        return net

    same(kit, build)


def test_a_storage_saved_twice_is_copied_once(kit: Any) -> None:
    class Square(Block):
        def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            hidden = self.up(x)
            left, right = hidden.chunk(2, dim=-1)
            return x + left * right * hidden.mean(-1, keepdim=True) + hidden.square().mean(-1, keepdim=True)

    def build() -> Net:
        net = Net()
        net.blocks = nn.ModuleList(Square() for _ in range(4))
        return net

    stats = away(same(kit, build))
    # The input of every block, what `up` made of it, and the product of its halves.
    copied = 16 * 32 * (32 + 64 + 32) * 4
    assert stats["activation_out_bytes"] == 6 * 4 * copied
    assert stats["offload_kept_bytes"] == 0


def test_a_storage_that_two_units_save(kit: Any) -> None:
    class Rectified(Block):
        def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            # Its output is saved by it and, as an input, by the next.
            return torch.relu(x + self.down(torch.relu(self.up(x))))

    class Scaled(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            scale = x + 1.0
            for block in self.blocks:
                x = block(x=x, scale=scale)  # Saved by all of them.
            return self.head(x.mean(1))

    def build(kind: type[Net], block: type[Block]) -> Net:
        net = kind()
        net.blocks = nn.ModuleList(block() for _ in range(4))
        return net

    for result in (same(kit, lambda: build(Net, Rectified)), same(kit, lambda: build(Scaled, Block))):
        assert result.booster.stats()["offload_kept_bytes"] == 0, "one copy has room"
    # What several units save counts as kept: it is alive in all of them.
    traced = result.booster._runtime.trace.units
    assert any(unit.offload_bytes < unit.offload_host_bytes for unit in traced)


def test_what_changed_between_two_saves_is_copied_again(kit: Any) -> None:
    class Counting(Block):
        def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            weights = torch.full(x.shape, 0.5, dtype=x.dtype)
            left = x.detach() * weights  # Saves nothing: no gradient.
            with torch.no_grad():
                first = torch.empty(2, *x.shape, dtype=x.dtype)
                first[0] = weights
            x = x * first[0]
            with torch.no_grad():
                first.view(2, -1).data[1] = 0.25  # Another part of what was saved, without a new version.
            return x * first[1] + left + self.down(torch.nn.functional.gelu(self.up(x)))

    def build() -> Net:
        net = Net()
        net.blocks = nn.ModuleList(Counting() for _ in range(3))
        return net

    same(kit, build)


class Fading(Net):
    """What one block saved is changed in place for the next."""

    clone = False

    def between(self) -> None:
        """A test may wait here."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        scale = torch.ones_like(x)
        for block in self.blocks:
            x = block(x=x, scale=scale.clone() if self.clone else scale)
            self.between()
            scale.mul_(0.5)
        return self.head(x.mean(1))


@pytest.mark.parametrize("options", [KEPT, {**OFFLOADED, "d2h_bytes_per_second": 1e6}], ids=["kept", "leaving"])
def test_a_saved_tensor_that_changed_in_place_is_an_error(kit: Any, options: dict[str, Any]) -> None:
    # torch says so too, but not where saved tensors pass through hooks.
    booster, model, optimizer = kit.boosted(Fading(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape \(16, 32, 32\) is at version \d"):
        booster.backward(loss_of(model, 0), optimizer)


def test_a_tensor_that_changed_once_it_had_left_is_another_tensor(kit: Any) -> None:
    original = Fading()
    original.clone = True
    kept = kit.fit(original, loss_of, **KEPT)
    changing = Fading()
    booster, model, optimizer = kit.boosted(changing, precision="fp32", micro_batch_size=None, seq_len=None, **OFFLOADED)

    def wait() -> None:
        booster.flush()
        booster.stats()

    changing.between = wait  # type: ignore[method-assign]
    changing.clone = True
    loss_of(model, 0)  # Plans with room for all copies.
    changing.clone = False
    losses = []
    for step in range(6):
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    result = kit.Result(losses, dict(model.state_dict()), [], booster, model, optimizer)
    result.same_as(kept)
    away(result)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks(kit: Any) -> None:
    def build() -> Net:
        net = Net()
        for block in net.blocks:
            block.compile(backend="aot_eager")
        return net

    torch._dynamo.reset()
    same(kit, build)


def test_tied_weights_and_streamed_ones(kit: Any) -> None:
    options = {"precision": "bf16", "steps": 4, "micro_batch_size": 8, "seq_len": 32}
    data = kit.batches(4, rows=8, seq=32)

    def run(**more: Any) -> Any:
        booster, model, optimizer = kit.boosted(kit.llama(tied=True), **{k: v for k, v in options.items() if k != "steps"}, **more)
        losses = kit.steps(booster, model, optimizer, data)
        return kit.Result(losses, dict(model.state_dict()), [], booster, model, optimizer)

    kept = run(**KEPT)
    for more in ({}, STREAMED):
        offloaded = run(**OFFLOADED, **more)
        offloaded.same_as(kept)
        away(offloaded)


def test_frozen_weights_stay_where_they_are(kit: Any) -> None:
    def build() -> Net:
        net = Net(width=64)  # Weights of 32 KiB.
        net.blocks.requires_grad_(False)
        return net

    result = same(kit, build)
    assert result.booster.stats()["offload_kept_bytes"] == 0
    traced = sum(unit.offload_host_bytes for unit in result.booster._runtime.trace.units if unit.offload_bytes)
    assert result.booster.stats()["activation_out_bytes"] <= 6 * traced


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_inside_checkpoints(kit: Any, reentrant: bool) -> None:
    class Half(Net):
        """Every other block is checkpointed: what those save again is not packed."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                x = checkpoint(lambda x, b=block: b(x=x), x, use_reentrant=reentrant) if index % 2 else block(x=x)
            return self.head(x.mean(1))

    same(kit, Half)


def test_a_module_called_twice_and_two_forwards_of_one_backward(kit: Any) -> None:
    def two(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step) + loss_of(model, step + 100)

    same(kit, lambda: Net(mode="twice"))
    result = same(kit, Net, loss=two)
    # The plan has room for one forward.
    assert result.booster.stats()["offload_kept_bytes"] > 0


def test_a_batch_of_other_shapes_stays_on_the_device(kit: Any) -> None:
    def growing(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step, rows=16 if step < 2 else 40)

    result = same(kit, Net, loss=growing)
    stats = result.booster.stats()
    assert stats["offload_kept_bytes"] > 0
    assert stats["host_activation_peak_bytes"] <= result.booster._runtime.planned.plan["host"]["activations"]
    same(kit, Net, loss=lambda model, step: loss_of(model, step, rows=16 if step < 2 else 5))


def test_a_graph_that_is_kept_for_a_second_backward(kit: Any) -> None:
    def run(**options: Any) -> tuple[Any, Any]:
        booster, model, optimizer = kit.boosted(
            Net(), precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=2, **options
        )
        for step in range(2):
            loss = loss_of(model, step)
            booster.backward(loss, optimizer, retain_graph=True)
            between = booster.stats()
            booster.backward(loss, optimizer)
            optimizer.step()
        return booster, (between, dict(model.state_dict()))

    _, (_, kept) = run(**KEPT)
    booster, (between, offloaded) = run(**OFFLOADED)
    assert all(torch.equal(value, offloaded[name]) for name, value in kept.items())
    # After the first backward everything is in host memory alone.
    assert between["host_activation_bytes"] > 0
    plan = booster._runtime.planned.plan
    assert between["device_activations_bytes"] < plan["offload_window_bytes"]
    assert booster.stats()["host_activation_bytes"] == 0
    assert booster.stats()["activation_in_bytes"] >= 1.9 * booster.stats()["activation_out_bytes"] - plan["offload_window_bytes"] * 4


def test_a_backward_that_never_comes(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **OFFLOADED)
    loss = loss_of(model, 0)
    assert booster.stats()["host_activation_bytes"] > 0
    del loss
    booster.flush()
    stats = booster.stats()
    assert stats["host_activation_bytes"] == stats["device_activations_bytes"] == 0
    # Their place is there for the next.
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
    assert booster.stats()["offload_kept_bytes"] == 0


def test_exceptions_in_forward_and_backward(kit: Any) -> None:
    kept = kit.fit(Net(), loss_of, **KEPT)
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **OFFLOADED)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("wanted by the test")

    losses = []
    for step in range(6):
        model.blocks[2].fail = True
        with pytest.raises(ArithmeticError):
            loss_of(model, step)
        model.blocks[2].fail = False
        failing = model.blocks[1].register_forward_hook(lambda module, args, output: Fails.apply(output))
        with pytest.raises(ArithmeticError):
            booster.backward(loss_of(model, step), optimizer)
        failing.remove()
        booster.flush()
        assert booster.stats()["host_activation_bytes"] == 0
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    assert losses == kept.losses
    assert booster.stats()["offload_kept_bytes"] == 0


def test_evaluation_in_between(kit: Any) -> None:
    def evaluating(model: Any, step: int) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            before = loss_of(model, step)
        after = loss_of(model, step)  # Evaluation with gradients, which nobody asks for.
        assert before == after
        del after
        model.train()
        return loss_of(model, step)

    same(kit, Net, loss=evaluating)


def test_a_backward_on_another_thread_and_two_models_side_by_side(kit: Any) -> None:
    kept = kit.fit(Net(), loss_of, **KEPT)
    results: list[Any] = [None, None]
    models = [Net(), Net()]  # Not in the threads: they share torch's random state.

    def run(index: int) -> None:
        booster, model, optimizer = kit.boosted(models[index], precision="fp32", micro_batch_size=None, seq_len=None, **OFFLOADED)
        losses = []
        for step in range(6):
            loss = loss_of(model, step)
            losses.append(loss.item())
            thread = threading.Thread(target=booster.backward, args=(loss, optimizer))
            thread.start()
            thread.join()
            optimizer.step()
        results[index] = kit.Result(losses, dict(model.state_dict()), [], booster, model, optimizer)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        result.same_as(kept)
        away(result)


# Where it fails in a forward, the hooks that run all the same say so too.
@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True``")
@pytest.mark.parametrize("queue", ["d2h", "h2d"])
def test_a_failing_link_is_an_error_not_a_wrong_value(kit: Any, queue: str) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **OFFLOADED)
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
    booster.flush()
    booster._runtime.target.core.fail_next(queue, "wanted by the test")

    def step() -> None:
        booster.backward(loss_of(model, 1), optimizer)
        booster.flush()

    with pytest.raises(tierwise.TierwiseError, match="wanted by the test"):
        step()
