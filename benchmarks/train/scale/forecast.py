"""What the measurements will hold and take at least, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.train.scale.decode import DecodePlanned
from benchmarks.train.scale.floors import parameters, step_bytes, step_flops
from benchmarks.train.scale.iteration import IterationCase
from benchmarks.train.scale.sizes import ScaleSizes, build_model
from benchmarks.train.scale.stages import StagesPlanned
from latent_rl.decode import Decoder
from latent_rl.models import LatentActionModel

META = torch.device("meta")


def on_meta(sizes: ScaleSizes) -> LatentActionModel:
    """The model in bfloat16, without memory behind it."""
    return build_model(sizes, META, torch.bfloat16)


def decode_lines(
    model: LatentActionModel, planned: DecodePlanned, copy_gb_per_s: float
) -> Iterator[tuple[str, ...]]:
    """Rows, context, prompts, GiB held, ms of the floor, ms of the products at 1000 TFLOP/s."""
    for case in planned.cases():
        plan = Decoder(model, slots=case.rows).plan(
            requests=case.rows,
            prompt_tokens=case.context,
            new_tokens=planned.steps + 2,
            num_generations=case.group,
        )
        said = [planned.steps // 2] * case.rows
        bytes_ = step_bytes(model, [case.context] * case.prompts, said, group=case.group)
        yield (
            str(case.rows),
            str(case.context),
            str(case.prompts),
            f"{plan.total_bytes / 2**30:.1f}",
            f"{bytes_.weights / 1e9:.2f}",
            f"{bytes_.kv / 1e9:.2f}",
            f"{bytes_.floor_ms(copy_gb_per_s):.2f}",
            f"{step_flops(model, case.rows) / 1e12:.2f}",
        )


def update_pflop(model: LatentActionModel, case: IterationCase) -> dict[str, float]:
    """10^15 operations of products with weights: 2 forward, 6 forward and backward per weight and
    position; attention is left out."""
    latent, decoder = model.latent, model.decoder
    head = model.latent_config.num_codes
    words = decoder.get_input_embeddings().weight.numel()
    trunk = parameters(decoder) - words
    policy = parameters(latent.policy) - head
    said = case.rows * (case.steps - 1)
    packed = case.prompts * case.prompt_tokens + said
    padded = case.rows * (case.prompt_tokens + case.steps - 1)
    # The reference runs forward beside forward and backward of the policy.
    return {
        "latent, packed": 8 * policy * packed / 1e15,
        "latent, the paper's form": (8 * policy + 2 * trunk) * padded / 1e15,
        "token level": 8 * (trunk * padded + words * case.rows * case.steps) / 1e15,
    }


def tell(
    sizes: ScaleSizes,
    console: Console,
    *,
    decode: DecodePlanned,
    case: IterationCase,
    stages: StagesPlanned,
    copy_gb_per_s: float,
    gemm_tflop_per_s: float,
) -> None:
    """Print parameters, memory and floors at ceilings that are assumed, not measured."""
    model = on_meta(sizes)
    backbone = parameters(model.backbone)
    console.print(
        f"{sizes.name}: {backbone} parameters; "
        + ", ".join(f"{n} {parameters(m)}" for n, m in model.latent.named_children()),
        markup=False,
        soft_wrap=True,
    )
    table = Table(title=f"a decoding step at {copy_gb_per_s:.0f} GB/s (assumed)")
    for name in ("rows", "context", "prompts", "GiB held", "weights GB", "KV GB", "floor ms",
                 "TFLOP"):  # fmt: skip
        table.add_column(name)
    for line in decode_lines(model, decode, copy_gb_per_s):
        table.add_row(*line)
    console.print(table)
    for name, pflop in update_pflop(model, case).items():
        console.print(
            f"update, {name}: {pflop:.2f} PFLOP, {1e3 * pflop / gemm_tflop_per_s:.2f} s at "
            f"{gemm_tflop_per_s:.0f} TFLOP/s (assumed)",
            markup=False,
        )
    tokens = stages.rows * stages.length
    trunk = parameters(model.decoder) - model.decoder.get_input_embeddings().weight.numel()
    logits = tokens * sizes.vocabulary * 4 / 2**30
    console.print(
        f"stages: {tokens} positions, trunk forward {2 * trunk * tokens / 1e12:.0f} TFLOP; "
        f"float32 logits of all of them (the paper's form) {logits:.1f} GiB",
        markup=False,
    )
