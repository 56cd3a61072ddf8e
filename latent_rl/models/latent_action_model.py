"""A latent-action model over any Hugging Face image-text model, by composition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from latent_rl.models import backbone as bb
from latent_rl.models import checkpoint, generation
from latent_rl.models.config import LatentConfig
from latent_rl.models.hooks import CaptureHidden, DecoderHook, ReplaceHidden
from latent_rl.models.modules import LatentModules
from latent_rl.models.recomputing import Recomputing
from latent_rl.models.trace import Trace
from latent_rl.nn import Quantized


class InverseOutput(NamedTuple):
    """Features of the inverse model.

    Attributes:
        head: [B, L, F]; position t explains token t+1.
        valid: bool [B, L]; True where positions t and t+1 are both real.
    """

    head: Tensor
    valid: Tensor


class LatentActionModel(Recomputing):
    """``backbone`` (frozen unless told otherwise) plus ``latent``, the trainable modules.

    The backbone stays the very object given; one forward hook on its decoder lets
    :meth:`generate` and :meth:`forward` put codes between its trunk and its vocabulary head.
    Outside those calls, and under :meth:`disabled`, it computes exactly what it always did.
    """

    main_input_name = "input_ids"

    def __init__(self, backbone: nn.Module, config: LatentConfig | None = None) -> None:
        """Wrap a model.

        Args:
            backbone: an ``AutoModelForImageTextToText`` model (or a PEFT model around one). Its
                parameters are frozen here; a stage may unfreeze some.
            config: sizes of the latent modules.

        Raises:
            TypeError: for something that is no image-text model.
            ValueError: for an architecture that is known not to work.
        """
        super().__init__()
        bb.check_backbone(backbone)
        self.backbone = backbone.requires_grad_(False)
        self.latent_config = config or LatentConfig()
        decoder = cast(Any, backbone).get_decoder()
        self.latent = LatentModules(decoder, self.latent_config)
        self._hook = DecoderHook(decoder)
        self._head = bb.VocabularyHead(backbone)
        self._active = True
        self.train(False)

    # What transformers.Trainer and accelerate look at.

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def generation_config(self) -> Any:
        """The backbone's generation configuration."""
        return self.backbone.generation_config

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return cast(torch.device, self.backbone.device)

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype; logits are float32 whatever it is."""
        return cast(torch.dtype, self.backbone.dtype)

    @property
    def decoder(self) -> Any:
        """The backbone's text stack."""
        return cast(Any, self.backbone).get_decoder()

    def train(self, mode: bool = True) -> Self:
        """Train mode for the latent modules; a wholly frozen backbone stays in eval mode.

        Its dropout would otherwise make e_t differ between rollout and update.
        """
        super().train(mode)
        if mode and not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    # The trunk.

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        grad: bool = False,
        past_key_values: Cache | None = None,
    ) -> Trace:
        """Run the trunk once, without the vocabulary head.

        Args:
            inputs: what the processor made: ``input_ids`` [B, L], ``attention_mask``, image
                inputs and token types.
            grad: keep the graph, for stages that train backbone layers; otherwise no_grad.
            past_key_values: an empty cache to fill, or None.

        Returns:
            The trace; its states never carry a code.

        Raises:
            ValueError: for inputs that the architecture would misread, see
                :func:`latent_rl.models.backbone.check_inputs`.
        """
        bb.check_inputs(self.backbone, inputs)
        capture = CaptureHidden()
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()), self._hook.use(capture):
            bb.trunk(self.backbone)(
                **inputs, past_key_values=past_key_values, use_cache=past_key_values is not None
            )
        if capture.hidden is None:
            raise RuntimeError("LatentActionModel.encode: the decoder did not run")
        keep_mask = bb.prompt_mask(inputs)
        return Trace(capture.hidden, capture.kwargs, keep_mask, self.text_only(inputs["input_ids"]))

    def text_only(self, input_ids: Tensor) -> Tensor:
        """bool [B]: True for rows without an image, video or audio placeholder."""
        ids = bb.feature_token_ids(self.config)
        placeholders = torch.tensor(ids, device=input_ids.device, dtype=input_ids.dtype)
        return ~torch.isin(input_ids, placeholders).any(-1)

    def state(self, trace: Trace) -> Tensor:
        """[B, L, H]: what inverse model, policy and merge read.

        The trace's states; where there is a projector, rows without an image are replaced by
        ``mu_P(e)``, in training and at inference alike.
        """
        return self.project(trace.hidden, trace.text_only)

    def project(self, hidden: Tensor, text_only: Tensor) -> Tensor:
        """``mu_P(hidden)`` in the rows where ``text_only`` [B] is True; hidden is [B, L, H]."""
        projector = self.latent.projector
        if projector is None:
            return hidden
        projected = projector(hidden)
        return torch.where(text_only[:, None, None], projected, hidden.to(projected.dtype))

    # The latent path.

    def inverse(self, state: Tensor, trace: Trace) -> InverseOutput:
        """Features of the code that explains each next token; state [B, L, H]."""
        head = self.latent.inverse(state, trace.tower_kwargs)
        keep = trace.keep_mask
        after = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
        return InverseOutput(head, keep & after)

    def quantize(
        self, head: Tensor, mask: Tensor | None = None, *, seed: int | Tensor = 0
    ) -> Quantized:
        """Quantise the rows where ``mask`` is True; in training the codebook learns from them.

        Args:
            head: [..., F].
            mask: bool [...]; None: every row.
            seed: of the Gumbel noise: int, or int64 scalar, or one per selected row.

        Returns:
            codes [...] (-1 outside the mask), vectors [..., D] and entropy [...] (0 outside),
            and the loss and shares of the selected rows alone.
        """
        lead = head.shape[:-1]
        if mask is None:
            mask = torch.ones(lead, dtype=torch.bool, device=head.device)
        out = self.latent.quantizer(head[mask], seed)
        codes = torch.full(lead, -1, dtype=torch.int64, device=head.device)
        codes[mask] = out.codes
        vectors = out.vectors.new_zeros(*lead, out.vectors.shape[-1])
        entropy = out.entropy.new_zeros(lead)
        return cast(Quantized, out)._replace(
            codes=codes,
            vectors=vectors.masked_scatter(mask[..., None], out.vectors),
            entropy=entropy.masked_scatter(mask, out.entropy),
        )

    def inverse_codes(self, head: Tensor) -> Tensor:
        """The most likely code, no noise: [..., F] -> int64 [...]."""
        return self.latent.quantizer.codes(head)

    def code_scores(self, head: Tensor) -> Tensor:
        """Normalised log-scores of all codes: [..., F] -> float32 [..., K]."""
        return self.latent.quantizer.scores(head)

    def policy_logits(self, state: Tensor, trace: Trace) -> Tensor:
        """Float32 logits [B, L, K] of the code at each position; state [B, L, H]."""
        logits: Tensor = self.latent.policy(state, trace.tower_kwargs)
        return logits

    @torch.no_grad()
    def merge_tables(self) -> list[Tensor]:
        """Per merge block what depends on the code alone, [2, K, I].

        It holds for the weights as they are now; with it :meth:`merge` has no gradient.
        """
        return self.latent.merge.tables(self.latent.quantizer.codebook.weight)

    def merge(
        self,
        state: Tensor,
        codes: Tensor,
        code_vectors: Tensor | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """States under codes, row by row.

        Args:
            state: [..., H].
            codes: int64 [...]; a position with -1 has no action and keeps its state.
            code_vectors: [..., D] from :meth:`quantize`, for a gradient to the inverse model.
            tables: from :meth:`merge_tables`, for many calls under the same weights.

        Returns:
            [..., H] in the latent modules' dtype.
        """
        acts = codes >= 0
        codebook = self.latent.quantizer.codebook.weight
        if torch.is_grad_enabled() and not codebook.requires_grad:
            # A moving-average update may change it in place before the backward pass.
            codebook = codebook.clone()
        merged: Tensor = self.latent.merge(
            state, codes.clamp_min(0), codebook, code_vectors, tables
        )
        return torch.where(acts[..., None], merged, state.to(merged.dtype))

    def lm_logits(self, merged: Tensor) -> Tensor:
        """Float32 [..., V]: what the backbone computes from a state, capping and scaling too."""
        return self._head(merged)

    def lm_scores(self, merged: Tensor) -> Tensor:
        """[..., V], the values of :meth:`lm_logits` in whichever dtype holds them exactly.

        For who only ranks or draws tokens: no float32 copy of a vocabulary. The caller owns it.
        """
        return self._head.scores(merged)

    def forward(self, inputs: Mapping[str, Tensor], codes: Tensor | None = None) -> Any:
        """The backbone's output for whole sequences under codes.

        Args:
            inputs: as for :meth:`encode`.
            codes: int64 [B, L]; -1 keeps a position's state. None: the policy's most likely
                codes, or nothing at all under :meth:`disabled`.

        Returns:
            What the backbone returns; ``.logits`` are under the codes.
        """
        bb.check_inputs(self.backbone, inputs)
        text_only = self.text_only(inputs["input_ids"])

        def under_codes(hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
            state = self.project(hidden, text_only)
            chosen = codes
            if chosen is None:
                chosen = self.latent.policy(state, kwargs).argmax(-1)
            return self.merge(state, chosen)

        interceptor = ReplaceHidden(under_codes) if self._active else None
        with self._hook.use(interceptor):
            return self.backbone(**inputs, use_cache=False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit: :meth:`forward` and :meth:`generate` use no codes."""
        previous, self._active = self._active, False
        try:
            yield
        finally:
            self._active = previous

    def generate(
        self,
        inputs: Mapping[str, Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Tensor = 0,
        do_sample_tokens: bool = False,
        forced_codes: int | Tensor | None = None,
        return_hidden: bool = False,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> generation.LatentGeneration:
        """Act and speak: sample a code per token, take the most likely token under it.

        Args:
            inputs: left-padded prompts, as for :meth:`encode`; ``input_ids`` [B, P].
            max_new_tokens: T at most.
            temperature: of the codes; 0 takes the most likely.
            top_k: codes to keep, 0 for all.
            top_p: mass of codes to keep.
            min_p: least probability of a code, relative to the most likely.
            seed: int (expanded to one per row), or int64 [B]: then a row's codes depend on
                nothing but its own seed and prompt.
            do_sample_tokens: sample tokens at temperature 1 as well, from the same seeds.
            forced_codes: steer: one code for every step, or int64 [B, >= T]; -1 lets the policy
                choose.
            return_hidden: keep the states for replay, see ``LatentGeneration.trace``.
            generation_kwargs: passed to the backbone's ``generate`` (``min_new_tokens``,
                ``cache_implementation``, ``eos_token_id``, ...). One sequence per prompt.

        Raises:
            ValueError: for right padding, bad codes, beams or several sequences per prompt.
        """
        request = generation.Request(
            max_new_tokens=max_new_tokens,
            chooser=generation.make_chooser(
                self.latent_config.num_codes,
                generation.CodeSampling(temperature, top_k, top_p, min_p),
                forced_codes,
                max_new_tokens,
                inputs["input_ids"],
            ),
            seeds=generation.expand_seeds(seed, inputs["input_ids"]),
            do_sample_tokens=do_sample_tokens,
            return_hidden=return_hidden,
            generation_kwargs=dict(generation_kwargs or {}),
        )
        return generation.generate(self, inputs, request)

    @property
    def is_active(self) -> bool:
        """False under :meth:`disabled`."""
        return self._active

    # Checkpoints.

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        include_backbone: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the latent modules atomically, see :func:`latent_rl.models.checkpoint.save`.

        Args:
            directory: made when missing; other files in it are left alone.
            include_backbone: write the backbone beside them (for stages that tuned it).
            state_dict: a gathered full state (FSDP); default: this model's own.
        """
        checkpoint.save(self, directory, include_backbone=include_backbone, state_dict=state_dict)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backbone: nn.Module | None = None,
        *,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> LatentActionModel:
        """Load a checkpoint; without ``backbone`` the one it names or contains is loaded.

        Args:
            directory: what :meth:`save_pretrained` wrote.
            backbone: the base model, loaded already.
            backbone_options: for loading it (``dtype``, ``device_map``, ``attn_implementation``);
                the dtype is the saved one's by default.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: when the files are corrupt or do not fit; nothing is half-loaded.
        """
        return checkpoint.load(cls, directory, backbone, backbone_options)
