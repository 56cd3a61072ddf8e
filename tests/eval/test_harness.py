"""The harness, its record and its numbers, on answers that are known."""

import dataclasses
import json
import math

import pytest
from PIL import Image

from latent_rl.eval import (
    Answer,
    EvaluationSettings,
    FixedAnswers,
    evaluate,
    load_evaluation,
    prompt_values,
    save_evaluation,
    summarise,
)
from latent_rl.eval.intervals import Interval
from latent_rl.eval.rows import reward_fingerprint, row_fingerprint, thumbnail
from latent_rl.eval.summary import diversity_interval
from tests.eval.evaluations import (
    LengthEncoder,
    WordAnswerer,
    brief,
    names_colour,
    rows,
    small_evaluation,
)


def fixed(samples, rewards, *, greedy=False, encoder=None, **columns):
    """One evaluation of given texts: {id: [text, ...]}."""
    size = len(next(iter(samples.values())))
    return evaluate(
        FixedAnswers(samples),
        {"test": [{"id": i, "prompt": "say", **columns} for i in samples]},
        rewards,
        settings=EvaluationSettings(samples=size, greedy=greedy),
        encoder=encoder,
    )


def length(*, completions, **columns):
    return [float(len(text)) for text in completions]


def fails_on_b(*, completions, **columns):
    return [RuntimeError("no b") if "b" in text else float(len(text)) for text in completions]


def only_long(*, completions, **columns):
    return [1.0 if len(text) > 1 else None for text in completions]


# numbers


def test_the_reward_is_a_mean_over_prompts_of_means_over_samples() -> None:
    found = summarise(fixed({0: ["a", "aaa"], 1: ["aaaaa", "aaaaa"]}, [length]))["test"]
    assert found.metrics["reward"].mean == (2 + 5) / 2
    assert found.metrics["distinct@2"].mean == (1 + 0.5) / 2
    assert found.metrics["self-BLEU"].mean == pytest.approx((0.1 + 1) / 2)
    assert found.metrics["tokens"].mean == 1
    assert (found.prompts, found.answers, found.dropped) == (2, 4, 0)


def test_weights_and_single_rewards() -> None:
    record = evaluate(
        FixedAnswers({0: ["aa", "a"]}),
        {"test": [{"id": 0, "prompt": "say"}]},
        [length, only_long],
        weights=[2, 10],
        settings=EvaluationSettings(samples=2, greedy=False),
    )
    metrics = summarise(record)["test"].metrics
    assert metrics["reward"].mean == ((2 * 2 + 10) + 2 * 1) / 2
    assert metrics["reward length"].mean == 1.5
    assert metrics["reward only_long"].mean == 1  # where it applies
    assert [(r.name, r.weight) for r in record.rewards] == [("length", 2), ("only_long", 10)]


def test_failed_rewards_are_dropped_and_counted() -> None:
    record = fixed({0: ["a", "bbbb"], 1: ["b", "b"], 2: ["aa", "aa"]}, [fails_on_b])
    found = summarise(record)["test"]
    assert (found.answers, found.dropped, found.failed) == (6, 3, 3)
    assert prompt_values(record, "test")["reward"] == pytest.approx([1, math.nan, 2], nan_ok=True)
    assert found.metrics["reward"].mean == 1.5
    assert record.errors
    assert "no b" in record.errors[0]
    # A failed reward takes the sample out of every reward, not out of diversity.
    both = fixed({0: ["a", "bbbb"]}, [fails_on_b, length])
    assert prompt_values(both, "test")["reward length"] == [1]
    assert prompt_values(both, "test")["distinct@2"] == [1]


def test_when_every_reward_fails_there_is_no_reward() -> None:
    record = fixed({0: ["b", "b"]}, [fails_on_b])
    assert "reward" not in summarise(record)["test"].metrics
    assert summarise(record)["test"].dropped == 2


def test_semantic_diversity_inverts_the_mean_similarity() -> None:
    record = fixed({0: ["", ""], 1: ["", "a"]}, [length], encoder=LengthEncoder())
    metrics = summarise(record)["test"].metrics
    mean = (1 + math.sqrt(0.5)) / 2  # (1, 0) against (1, 1): 45 degrees
    assert metrics["semantic similarity"].mean == pytest.approx(mean)
    assert metrics["semantic diversity"].mean == pytest.approx(1 / mean)
    assert metrics["semantic diversity"].low == pytest.approx(1)
    assert record.encoder == "lengths"


def test_a_similarity_that_reaches_zero_has_an_infinite_upper_end() -> None:
    assert diversity_interval(Interval(0.5, -0.1, 0.8)) == Interval(2.0, 1.25, math.inf)
    assert math.isnan(diversity_interval(Interval(0.5, math.nan, math.nan)).low)


def test_without_an_encoder_nothing_is_called_semantic() -> None:
    metrics = summarise(fixed({0: ["a", "b"]}, [length]))["test"].metrics
    assert not [name for name in metrics if "semantic" in name]


def test_code_usage_is_per_split_and_code_uses_over_all() -> None:
    record = small_evaluation(skill=1.0)
    found = summarise(record)
    # "a <colour> house .": codes 3, colour, 0, 1; test has every colour, ood blue (2) and red (0).
    assert found["test"].usage.counts.sum() == 12 * 4 * 4
    assert found["ood"].usage.counts.tolist() == [72, 48, 24, 48]
    assert sum(use.count for use in record.code_uses) == 2 * 12 * 4 * 4
    (code,) = [use for use in record.code_uses if use.code == 3]
    assert [token.token for token in code.tokens] == ["a"]


def test_greedy_answers_are_their_own_metric() -> None:
    record = small_evaluation(skill=1.0)
    assert summarise(record)["test"].metrics["reward, T=0"].mean == 1.25
    assert "reward, T=0" not in summarise(small_evaluation(greedy=False))["test"].metrics


def test_rewards_see_images_and_columns_that_some_rows_lack(tmp_path) -> None:
    Image.new("RGB", (3, 3), "red").save(tmp_path / "red.png")
    seen = []

    def looks(*, completions, images, hint, log_metric, **columns):
        seen.extend(zip(images, hint, strict=True))
        log_metric("seen", 1.0)
        return [1.0] * len(completions)

    asked = [
        {"id": 0, "prompt": "what?", "images": [str(tmp_path / "red.png")]},
        {"id": 1, "prompt": "who?", "hint": "me"},
    ]
    record = evaluate(
        FixedAnswers({0: ["a"], 1: ["b"]}),
        {"test": asked},
        [looks],
        settings=EvaluationSettings(samples=1, greedy=False),
    )
    assert record.errors == ()
    (first, none), (nothing, hint) = seen
    assert first[0].getpixel((0, 0)) == (255, 0, 0)
    assert (none, nothing, hint) == (None, None, "me")


# independence of how it is run


def test_batches_and_more_samples_change_no_answer() -> None:
    def texts(record):
        return [[s.answer.text for s in p.samples] for p in record.splits["test"].prompts]

    small, large = small_evaluation(batch_prompts=1), small_evaluation(batch_prompts=50)
    assert texts(small) == texts(large)
    assert len({text for group in texts(small) for text in group}) > 2
    assert [group[:4] for group in texts(small_evaluation(samples=8))] == texts(small)
    assert texts(small_evaluation(seed=1)) != texts(small)


def test_progress_and_batches() -> None:
    answerer, seen = WordAnswerer(), []
    evaluate(
        answerer,
        {"test": rows(7)},
        [names_colour],
        settings=EvaluationSettings(samples=2, batch_prompts=3, greedy=False),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert answerer.asked == [3, 3, 1]
    assert seen == [(3, 7), (6, 7), (7, 7)]


# record


def test_a_record_survives_its_file(tmp_path) -> None:
    record = small_evaluation()
    save_evaluation(record, tmp_path / "record.json")
    again = load_evaluation(tmp_path / "record.json")
    assert again == record
    assert (
        summarise(again, resamples=50)["ood"].metrics
        == summarise(record, resamples=50)["ood"].metrics
    )


def test_the_record_names_what_it_measured() -> None:
    record = small_evaluation()
    assert record.created.endswith("+00:00")
    assert set(record.versions) == {"latent_rl", "torch", "transformers", "python"}
    assert record.splits["test"].fingerprint != record.splits["ood"].fingerprint
    assert small_evaluation(0.9).splits["test"].fingerprint == record.splits["test"].fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema="other"), "no evaluation of latent-rl"),
        (lambda v: v.update(schema_version=9), "schema version 9, this version reads 1"),
        (lambda v: v.pop("rewards"), "damaged evaluation: KeyError"),
        (lambda v: v["settings"].update(samples=0), "samples must be >= 1"),
        (lambda v: v["rewards"].pop(), "2 scores for 1 rewards"),
        (lambda v: v.update(unknown=1), "damaged evaluation: TypeError"),
    ],
)
def test_damaged_records_are_one_line(tmp_path, change, message) -> None:
    path = tmp_path / "record.json"
    save_evaluation(small_evaluation(count=2), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        load_evaluation(path)
    assert str(path) in str(raised.value)


def test_files_that_are_no_record(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such evaluation"):
        load_evaluation(tmp_path / "absent.json")
    for text in ("{", "[]", "3"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="no evaluation"):
            load_evaluation(tmp_path / "other.json")


# fingerprints and pictures


def test_a_row_is_known_by_its_content_not_by_its_path(tmp_path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        picture.save(tmp_path / place / "p.png")
    row = {"prompt": "what?", "images": [str(tmp_path / "a" / "p.png")], "colour": "red"}
    assert row_fingerprint(row) == row_fingerprint({**row, "images": [tmp_path / "b" / "p.png"]})
    assert row_fingerprint(row) == row_fingerprint({**row, "images": [picture]})
    others = [
        {**row, "prompt": "who?"},
        {**row, "colour": "blue"},
        {**row, "images": [Image.new("RGB", (4, 4), "blue")]},
        {**row, "images": []},
    ]
    assert len({row_fingerprint(r) for r in [row, *others]}) == 5


def test_a_reward_is_known_by_code_and_settings() -> None:
    assert reward_fingerprint(length, "r", None) == reward_fingerprint(length, "r", None)
    marks = {
        reward_fingerprint(length, "r", None),
        reward_fingerprint(brief, "r", None),
        reward_fingerprint(length, "r", {"key": "secret"}),
        reward_fingerprint(length, "other", None),
    }
    assert len(marks) == 4
    assert not any("secret" in mark for mark in marks)


def test_thumbnails_are_small_whatever_the_image(tmp_path) -> None:
    small = thumbnail(Image.new("RGB", (8, 8), "red"))
    large = thumbnail(Image.effect_noise((2000, 1500), 90))
    assert small.startswith("data:image/png;base64,")
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 40_000


# bad input


class Short:
    name, num_codes, details = "short", None, {}

    def answer(self, rows, seeds, sampling):
        return [[Answer("x")] for _ in rows]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(Short(), {}, [length]), "at least one split"),
        (lambda: evaluate(Short(), {"test": []}, [length]), "split 'test' has no rows"),
        (lambda: evaluate(Short(), {"test": [{"x": 1}]}, [length]), "split 'test', row 0: column"),
        (lambda: evaluate(Short(), {"test": rows(1)}, []), "at least one function"),
        (
            lambda: evaluate(Short(), {"test": rows(1)}, [length], weights=[1, 2]),
            r"weights must have one entry per reward \(1\), got 2",
        ),
        (
            lambda: evaluate(Short(), {"test": rows(2)}, [length]),
            r"short must give 2 lists of 8 answers, got 2 of \[1\]",
        ),
        (
            lambda: evaluate(
                Short(),
                {"test": rows(1)},
                [length],
                settings=EvaluationSettings(samples=1),
                encoder=LengthEncoder(),
            ),
            "needs samples >= 2 a prompt, got 1",
        ),
        (lambda: EvaluationSettings(samples=0), "samples must be >= 1"),
        (lambda: EvaluationSettings(temperature=0.0), "temperature must be > 0"),
        (lambda: EvaluationSettings(max_new_tokens=0), "max_new_tokens must be >= 1"),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_sample_has_rewards_but_no_diversity() -> None:
    record = small_evaluation(samples=1)
    metrics = summarise(record)["test"].metrics
    assert "reward" in metrics
    assert not [m for m in metrics if m.startswith(("distinct", "self"))]
    assert dataclasses.asdict(record)["settings"]["samples"] == 1
