"""Installs the chunked loss on Hugging Face causal LMs without copying their forward.

When labels are passed in training mode the output embedding returns its input, and the model's `loss_function` gets that instead of logits
and calls a small module that reads the embedding's weight.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tierwise.gemini.tracing import FusedLossMismatchError
from tierwise.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy

_log = logging.getLogger("tierwise")


class LinearCrossEntropyLoss(nn.Module):
    """The loss of a causal LM from hidden states; a unit of its own, because it reads the output embedding's weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.__dict__["_head"] = head  # Not a child: the model owns it.

    def forward(self, hidden: Tensor, labels: Tensor, num_items: Tensor | float | None, ignore_index: int) -> Tensor:
        """hidden: (tokens, hidden_size), labels: (tokens,); see `linear_cross_entropy`."""
        return linear_cross_entropy(hidden, self.__dict__["_head"].weight, labels, num_items, ignore_index)


class FusedLoss:
    """The fused loss of one model."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        self.model = model
        self.head = head
        self.module = LinearCrossEntropyLoss(head)
        self.enabled = True
        self._active = False
        self._hidden: Tensor | None = None
        self._signature = inspect.signature(model.forward)
        self._original: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]
        head_forward = head.forward

        def forward(hidden: Tensor) -> Tensor:
            if not self._active:
                return head_forward(hidden)
            self._hidden = hidden
            return hidden

        head.forward = forward  # type: ignore[method-assign, assignment]
        model.loss_function = self._loss  # type: ignore[assignment]

    @property
    def weight(self) -> nn.Parameter:
        """The output embedding's weight."""
        weight = self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @staticmethod
    def install(model: nn.Module) -> FusedLoss | None:
        """Installs the fused loss where it is known to be right: a `ForCausalLM` loss called through `self.loss_function` on what a
        bias-free nn.Linear output embedding returns. Otherwise leaves the model alone and returns None."""
        if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
            return None
        if getattr(model, "loss_type", None) != "ForCausalLM":
            return None
        code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
        if code is None or "loss_function" not in code.co_names or "labels" not in inspect.signature(model.forward).parameters:
            return None
        head = model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear or getattr(head, "bias", None) is not None or "forward" in head.__dict__:
            return None
        return FusedLoss(model, head)

    def refuse(self) -> None:
        """This model changes logits on their way to the loss: computes them whole from now on."""
        self.enabled = False
        _log.warning("%s changes its logits before the loss: the fused loss is off for it", type(self.model).__name__)

    @contextlib.contextmanager
    def active(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Iterator[None]:
        """Within this context the model's forward, called with these arguments, uses the fused loss if it computes a loss."""
        labels = kwargs.get("labels")
        if labels is None and args:
            labels = self._signature.bind_partial(*args).arguments.get("labels")
        self._active = self.enabled and training and labels is not None
        try:
            yield
        finally:
            self._active = False
            self._hidden = None

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self._active:
            loss: Tensor = self._original(
                logits, labels, vocab_size, num_items_in_batch, ignore_index=ignore_index, shift_labels=shift_labels, **kwargs
            )
            return loss
        if logits is not self._hidden:
            raise FusedLossMismatchError(
                f"{type(self.model).__name__} changes its logits between the output embedding and the loss; "
                "use GeminiPlugin(fused_loss=False)"
            )
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden = logits.reshape(-1, logits.shape[-1])
        targets = shift_labels.reshape(-1).to(hidden.device)
        result: Tensor = self.module(hidden, targets, num_items_in_batch, ignore_index)
        return result

    def without_logits(self, output: Any) -> Any:
        """`output` with None where its logits would be: they were never computed."""
        hidden = self._hidden
        if not self._active or hidden is None:
            return output
        if isinstance(output, tuple):
            return tuple(None if item is hidden else item for item in output)
        if isinstance(output, Mapping) and output.get("logits") is hidden:
            return type(output)(**{key: value for key, value in output.items() if key != "logits"})
        return output
