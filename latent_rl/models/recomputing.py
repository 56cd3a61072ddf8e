"""Activation checkpointing, under every name that transformers' Trainer has called it by."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from latent_rl.models.modules import LatentModules

__all__ = ["Recomputing"]


class Recomputing(nn.Module):
    """A model whose towers, and whose backbone where it trains, can recompute their activations."""

    supports_gradient_checkpointing = True

    backbone: nn.Module
    latent: LatentModules

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute activations in the towers, and in the backbone when some of it is trained.

        Args and meaning as in transformers. ``every_n_layers`` and ``offload`` other than the
        defaults raise a TypeError under releases of it that do not know them.
        """
        options: dict[str, Any] = {"every_n_layers": every_n_layers} if every_n_layers != 1 else {}
        options |= {"offload": offload} if offload else {}
        for module in self._checkpointable():
            if hasattr(module, "activation_checkpointing_enable"):
                module.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
            else:
                module.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Undo :meth:`activation_checkpointing_enable`."""
        for module in (self.latent.inverse.tower, self.latent.policy.tower, self.backbone):
            new = getattr(module, "activation_checkpointing_disable", None)
            (new or cast(Any, module).gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether any module recomputes its activations."""
        # Read at every micro-batch: getattr of what a module lacks takes twice as long.
        return any(vars(module).get("gradient_checkpointing", False) for module in self.modules())

    # The names of transformers before 5.23, which its Trainer calls there.

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """See :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """See :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """See :attr:`is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def _checkpointable(self) -> list[Any]:
        modules: list[Any] = [self.latent.inverse.tower, self.latent.policy.tower]
        if any(p.requires_grad for p in self.backbone.parameters()):
            modules.append(self.backbone)
        return modules
