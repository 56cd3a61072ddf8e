"""What an RL trainer is given, completed where TRL completes it, checked before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_rl.data import check_processor, prompt_of, render_prompts
from latent_rl.models import LatentActionModel
from latent_rl.models.checkpoint import BACKBONE_DIR
from latent_rl.train.completions import PromptRenderer

__all__ = [
    "check_evaluation_rows",
    "check_rows",
    "model_of",
    "output_dir_of",
    "processor_of",
    "refuse_trl_arguments",
    "renderer_of",
]

NOT_HERE: Mapping[str, str] = {
    "quantization_config": "load the backbone quantised and hand over LatentActionModel(backbone)",
    "peft_config": "RL trains the policy's tower alone; adapters of the backbone are TaskSFT's",
    "tools": "completions are answers, without calls of tools",
    "rollout_func": "rollouts keep the states that updates need; prompt_renderer and "
    "generation_kwargs are what can be changed",
    "environment_factory": "there are no environments; a reward function may hold a state",
}
"""Arguments of TRL's trainer that this one has no use for."""

_TEACH = (
    "wrap a base model, LatentActionModel(AutoModelForImageTextToText.from_pretrained(...)), and "
    "teach it its codes first (InverseWarmup, BehaviourCloning)"
)


def refuse_trl_arguments(**given: object) -> None:
    """Refuse arguments of TRL's trainer in `NOT_HERE`.

    Raises:
        ValueError: naming the argument and the reason.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"LatentGRPOTrainer: {name} is not supported ({NOT_HERE[name]}), "
                f"got {type(value).__name__}"
            )


def model_of(
    model: LatentActionModel | str | Path, options: Mapping[str, Any] | None
) -> LatentActionModel:
    """The model itself, or the one saved in a directory, its backbone loaded with `options`.

    Raises:
        TypeError: for anything else.
        ValueError: for a directory without a latent-action model, and for options beside a model
            that is loaded already.
    """
    if isinstance(model, LatentActionModel):
        if options:
            raise ValueError(
                "LatentGRPOTrainer: model_init_kwargs are for a model given as a directory, "
                "got a model that is loaded already"
            )
        return model
    if not isinstance(model, (str, Path)):
        raise TypeError(
            "LatentGRPOTrainer: model must be a LatentActionModel or the directory of a saved one, "
            f"got {type(model).__name__}; {_TEACH}"
        )
    try:
        return LatentActionModel.from_pretrained(model, backbone_options=options)
    except FileNotFoundError as error:
        raise ValueError(
            f"LatentGRPOTrainer: {model} is no directory of a latent-action model ({error}); "
            f"{_TEACH}"
        ) from error


def processor_of(
    given: Any | None, source: LatentActionModel | str | Path, model: LatentActionModel
) -> Any:
    """The processor given, else the one saved beside the model, else its base model's.

    Raises:
        ValueError: where none is found.
    """
    if given is not None:
        return given
    from transformers import AutoProcessor

    base = Path(str(getattr(model.config, "_name_or_path", "")))
    names = [] if isinstance(source, LatentActionModel) else [str(source)]
    if base.name:
        # A backbone saved within a checkpoint has the processor beside it.
        names += [str(base.parent), str(base)] if base.name == BACKBONE_DIR else [str(base)]
    reasons = []
    for name in names:
        try:
            found = AutoProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
            check_processor(found)
        except (OSError, ValueError, TypeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            return found
    tried = "; ".join(reasons) or "the model names no base model"
    raise ValueError(
        f"LatentGRPOTrainer: processing_class is None and no processor was found ({tried})"
    )


def check_rows(dataset: Any, name: str, *, read_prompt: bool = True) -> None:
    """Check that a data set can be sampled, and that its first row is an RL row.

    read_prompt: whether the prompt has to be one that `latent_rl.data` reads.

    Raises:
        TypeError: for data without a length, for splits, and for rows that are no mappings.
        ValueError: for no data, and for a first row whose prompt cannot be read.
    """
    if dataset is None:
        raise ValueError(f"LatentGRPOTrainer: {name} is required, got None")
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"LatentGRPOTrainer: {name} must be one data set, got the splits "
            f"{', '.join(map(str, dataset))}; choose one"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"LatentGRPOTrainer: {name} must have a length and rows by number, "
            f"got {type(dataset).__name__}; of a stream take a part: list(stream.take(10_000))"
        )
    if not len(dataset):
        raise ValueError(f"LatentGRPOTrainer: {name} has no rows")
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise TypeError(
            f"LatentGRPOTrainer: rows of {name} must be mappings with a prompt, "
            f"got {type(first).__name__}"
        )
    if "prompt" not in first:
        raise ValueError(
            f"LatentGRPOTrainer: {name} needs a column 'prompt' (chat messages or text), "
            f"its columns are {', '.join(sorted(map(str, first)))}"
        )
    if read_prompt:
        prompt_of(first, f"{name}, row 0")


def check_evaluation_rows(dataset: Any, *, read_prompt: bool = True) -> None:
    """As `check_rows`, for one evaluation set, several by name, or none."""
    if isinstance(dataset, Mapping):
        for split, rows in dataset.items():
            check_rows(rows, f"eval_dataset[{split!r}]", read_prompt=read_prompt)
    elif dataset is not None:
        check_rows(dataset, "eval_dataset", read_prompt=read_prompt)


def output_dir_of(source: LatentActionModel | str | Path, model: LatentActionModel) -> str:
    """The directory of a run without settings, named after its model as TRL does."""
    name = getattr(model.config, "_name_or_path", "") if source is model else source
    return f"{Path(str(name)).name or 'model'}-LatentGRPO"


def renderer_of(
    given: PromptRenderer | None, processing_class: Any, template_options: Mapping[str, Any] | None
) -> PromptRenderer:
    """The renderer given, else `latent_rl.data.render_prompts` under the template's options.

    Raises:
        TypeError, ValueError: for a processor that the default cannot use.
        ValueError: for a renderer beside options, which it would not see.
    """
    if given is None:
        check_processor(processing_class)
        return functools.partial(render_prompts, template_options=template_options)
    if template_options:
        raise ValueError(
            "LatentGRPOTrainer: chat_template_kwargs are for the default prompt_renderer, got both"
        )
    return given
