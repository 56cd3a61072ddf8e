"""`latent-rl generate`: an answer, and the latent actions behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from latent_rl.cli.errors import UserError
from latent_rl.cli.loading import (
    load_checkpoint,
    load_processor,
    no_bars_in_logs,
    saved_latent_config,
    torch_device,
)
from latent_rl.cli.run_dir import checkpoint_in
from latent_rl.data import load_image, render_prompts
from latent_rl.decode import Decoder

__all__ = ["Answer", "GenerateRequest", "answer", "run_generate"]


@dataclass(frozen=True)
class GenerateRequest:
    """The options of the command; see its help."""

    model: Path
    prompt: str
    images: tuple[Path, ...] = ()
    system: str | None = None
    backbone: str | None = None
    processor: str | None = None
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    code: int | None = None
    base: bool = False
    max_new_tokens: int = 128
    dtype: str = "auto"
    device: str | None = None
    engine: bool = True


@dataclass(frozen=True)
class Answer:
    """T tokens as text; T codes and log-probabilities (empty for the base model)."""

    text: str
    tokens: tuple[int, ...]
    codes: tuple[int, ...]
    logprobs: tuple[float, ...]


def run_generate(request: GenerateRequest, *, as_json: bool) -> None:
    """Answer and print."""
    found = answer(request)
    if as_json:
        print(json.dumps(found.__dict__))  # noqa: T201
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(found.text, markup=False)
    if found.codes:
        distinct = len(set(found.codes))
        codes = " ".join(map(str, found.codes))
        console.print(f"codes ({len(found.codes)}, {distinct} distinct): {codes}", markup=False)


def answer(request: GenerateRequest) -> Answer:
    """Check everything cheap, load the model, generate.

    Raises:
        UserError, ValueError, OSError: naming what is missing or wrong.
    """
    no_bars_in_logs()
    images = [load_image(path) for path in request.images]
    directory = checkpoint_in(request.model)
    config, record = saved_latent_config(directory)
    if request.code is not None and not 0 <= request.code < config.num_codes:
        raise UserError(f"generate: --code must be in [0, {config.num_codes}), got {request.code}")
    if request.base and request.code is not None:
        raise UserError("generate: --base uses no codes, so --code cannot steer it")
    device = torch_device(request.device)
    model = load_checkpoint(directory, request.backbone, request.dtype).to(device)
    base_name = request.backbone or (record.get("base_model") or {}).get("name")
    candidates: list[str | Path] = (
        [request.processor]
        if request.processor
        else [directory, *([base_name] if base_name else [])]
    )
    processor = load_processor(candidates, "processor")
    inputs = render_prompts(processor, [_row(request, images)])
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return _generate(model, processor, inputs, request)


def _generate(
    model: Any, processor: Any, inputs: dict[str, Any], request: GenerateRequest
) -> Answer:
    model.eval()
    settings = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "seed": request.seed,
        "forced_codes": request.code,
    }
    generate = _by_engine(model) if request.engine else model.generate
    with model.disabled() if request.base else nullcontext():
        out = generate(inputs, **settings)
    keep = out.completion_mask[0]
    tokens = out.completion_ids[0][keep].tolist()
    codes = [] if request.base else out.codes[0][keep].tolist()
    logprobs = [] if request.base else out.logprobs[0][keep].tolist()
    text = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Answer(text, tuple(tokens), tuple(codes), tuple(logprobs))


def _by_engine(model: Any) -> Callable[..., Any]:
    """The decoding engine under the signature of the model's own generate."""
    decoder = Decoder(model)
    return lambda inputs, **settings: decoder.generate(inputs, **settings).generation


def _row(request: GenerateRequest, images: list[Any]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": request.system})
    messages.append({"role": "user", "content": request.prompt})
    return {"prompt": messages, "images": images}
