"""Stage 2: the cross-modal projector learns to see a text's states as with its image, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from latent_rl.nn import CrossModalProjector, gaussian_nll
from latent_rl.train.features import AlignedViews, aligned_views, trace_of
from latent_rl.train.freezing import Trainable
from latent_rl.train.stages.base import Batch, Stage, StageOutput

if TYPE_CHECKING:
    from latent_rl.models import LatentActionModel

__all__ = ["ProjectorWarmup", "projector_nll", "require_projector"]


def require_projector(model: LatentActionModel, stage: str) -> CrossModalProjector:
    """Return the model's projector. Raises ValueError if the model was built without one."""
    projector = model.latent.projector
    if projector is None:
        raise ValueError(f"{stage}: the model has no projector (LatentConfig.projector=False)")
    return projector


def projector_nll(projector: CrossModalProjector, views: AlignedViews) -> tuple[Tensor, Tensor]:
    """Return the Gaussian NLL of P (text -> image-text) and of P' (back).

    `(mu-y)^2 exp(-logvar) + logvar`, summed over H, mean over the aligned tokens (0 if there are
    none).
    """
    count = max(1, views.text.shape[0])
    forward = gaussian_nll(projector.to_image_text(views.text), views.image).sum() / count
    backward = gaussian_nll(projector.to_text(views.image), views.text).sum() / count
    return forward, backward


@dataclass(frozen=True)
class ProjectorWarmup(Stage):
    """Gaussian NLL of both directions on the aligned tokens of the two views of paired rows."""

    name: ClassVar[str] = "projector_warmup"
    paired_views: ClassVar[bool] = True

    learning_rate: float = 1e-3

    def trainable(self, model: LatentActionModel) -> list[Trainable]:
        """The projector."""
        return [require_projector(model, self.name)]

    def loss(self, model: LatentActionModel, batch: Batch) -> StageOutput:
        """See the class."""
        projector = require_projector(model, self.name)
        views = aligned_views(model, batch, trace_of(model, batch))
        forward, backward = projector_nll(projector, views)
        if not len(views.text):
            # Text-only rows teach it nothing, and are no zero in a mean over batches.
            return StageOutput(forward + backward, {})
        count = views.text.numel()
        mean = projector(views.text).detach().float()
        metrics = {
            "nll_to_image_text": forward.detach(),
            "nll_to_text": backward.detach(),
            # The gap the projector is there to close, and what is left of it, per element.
            "view_gap": (views.text.float() - views.image.float()).square().sum() / count,
            "projected_gap": (mean - views.image.float()).square().sum() / count,
        }
        return StageOutput(forward + backward, metrics)
