"""Reports: content, escaping, size, and nothing fetched."""

import dataclasses
import importlib.util
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from latent_rl.eval import Answer, EvaluationSettings, compare, evaluate
from latent_rl.eval.intervals import Interval
from latent_rl.eval.record import CodeEffect
from latent_rl.eval.report import read_histories, write_comparison, write_run_report
from latent_rl.eval.report.figures import thinned
from latent_rl.eval.report.history import Curve, curves
from latent_rl.eval.report.pages import verdict
from latent_rl.eval.world_model import WorldModelReport
from tests.eval.evaluations import small_evaluation

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;'
VOID = {"meta", "img", "br", "link", "input", "path", "use"}


class Page(HTMLParser):
    """Tags, visible text, attributes; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    def named(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def history():
    return [
        {"step": i, "loss": 1 / i, "reward": i / 40, "rewards/<b>/mean": i / 2, "epoch": i / 9}
        for i in range(1, 41)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory, history) -> Page:
    record = dataclasses.replace(
        small_evaluation(skill=0.7),
        world_model={"test": WorldModelReport(1.25, 0.5, 2.5, 1.0, 99)},
        code_effects=(CodeEffect(3, ("zebra",), (0.5,)),),
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    histories = {"06-rl": history}
    write_run_report(path, title="A run", evaluations={"latent": record}, histories=histories)
    return Page(path.read_text(encoding="utf-8"))


def fetched(page: Page) -> list[str]:
    """Everything a browser would load from elsewhere."""
    names = ("src", "href", "xlink:href", "data", "action", "srcset", "poster")
    values = [a[n] for _, a in page.tags for n in names if a.get(n)]
    return [v for v in values if not v.startswith(("data:", "#"))]


# content


def test_a_report_has_its_numbers(page) -> None:
    reward = re.search(r"reward (\d\.\d{3}) \[(\d\.\d{3}), (\d\.\d{3})\]", page.words)
    assert reward
    mean, low, high = map(float, reward.groups())
    assert low < mean < high
    for text in (
        "A run",
        "in distribution (test)",
        "out of distribution (ood)",
        "reward, T=0",
        "distinct@4",
        "self-BLEU",
        "code perplexity, of 4",
        "answers dropped (a reward failed) 0 (0)",
        "under random codes 2.500",
        "zebra",
        "question 3 ?",
        "3 more samples",
        "fewer than 20 prompts",
        "names_colour (weight 1)",
    ):
        assert text in page.words, text


def test_plots_are_inline_and_follow_the_pages_colours(page) -> None:
    figures = [a for a in page.named("figure") if a.get("role") == "img"]
    assert [bool(a["aria-label"]) for a in figures] == [True, True]
    assert "06-rl: reward, rewards/<b>/mean, loss" in figures[1]["aria-label"]
    assert len(page.named("svg")) == 2
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    used = [a["xlink:href"][1:] for a in page.named("use")]
    assert used
    assert set(used) <= set(ids)
    assert all("viewbox" in a and "width" not in a and "height" not in a for a in page.named("svg"))
    styles = " ".join(a.get("style") or "" for _, a in page.tags)
    assert "currentColor" in styles
    assert "#010203" not in styles
    assert "#000000" not in styles


def test_a_report_is_accessible(page) -> None:
    assert page.named("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("alt") for a in page.named("img"))
    assert all(a.get("scope") in ("row", "col") for a in page.named("th"))
    assert len(page.named("caption")) >= 3


def test_nothing_is_fetched_and_nothing_runs(page) -> None:
    assert fetched(page) == []
    assert page.named("script") == []
    policy = next(a for a in page.named("meta") if a.get("http-equiv"))["content"]
    assert "default-src 'none'" in policy


# hostile text


class HostileAnswerer:
    name, num_codes = HOSTILE, 2
    details = {HOSTILE: HOSTILE}  # noqa: RUF012

    def answer(self, rows, seeds, sampling):
        return [[Answer(HOSTILE, (0, 1), (0, 1)) for _ in group] for group in seeds]


def hostile_reward(*, completions, **columns):
    return [RuntimeError(HOSTILE), *([1.0] * (len(completions) - 1))]


hostile_reward.__name__ = HOSTILE


def test_hostile_text_stays_text(tmp_path) -> None:
    asked = [{"prompt": HOSTILE, "images": [Image.new("RGB", (4, 4))]}]
    record = evaluate(
        HostileAnswerer(),
        {HOSTILE: asked},
        [hostile_reward, lambda *, completions, **columns: [0.0] * len(completions)],
        settings=EvaluationSettings(samples=3),
        decode=lambda ids: HOSTILE,
    )
    history = [{"step": i, HOSTILE: float(i), "$\\frac{x$": float(i)} for i in range(3)]
    first, second = tmp_path / "run.html", tmp_path / "compare.html"
    write_run_report(
        first,
        title=HOSTILE,
        evaluations={HOSTILE: record, "b": record},
        histories={HOSTILE: history},
    )
    found = compare([record, record], names=[HOSTILE, HOSTILE])
    write_comparison(second, title=HOSTILE, found=found, evaluations=[record, record])
    for path in (first, second):
        raw = path.read_text(encoding="utf-8")
        page = Page(raw)
        assert page.named("script") == []
        assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
        assert fetched(page) == []
        assert 'alert("x")' in page.words
        assert "<script" not in raw.lower()


# size


def test_long_texts_are_folded_and_cut_and_the_page_stays_small(tmp_path) -> None:
    class Talker:
        name, num_codes, details = "talker", 64, {}

        def answer(self, rows, seeds, sampling):
            ids = tuple(range(64)) * 8
            return [[Answer("w" * 100_000, ids, ids) for _ in group] for group in seeds]

    noise = Image.effect_noise((600, 600), 90)
    asked = [{"prompt": f"what {i}?", "images": [noise] * 2} for i in range(30)]
    record = evaluate(
        Talker(),
        {"test": asked},
        [lambda *, completions, **columns: [1.0] * len(completions)],
        settings=EvaluationSettings(samples=2, greedy=False, shown=4),
        decode=lambda ids: "x" * len(ids),
    )
    history = [{"step": i, **{f"m{k}": i * k for k in range(30)}} for i in range(1500)]
    path = tmp_path / "report.html"
    write_run_report(path, title="big", evaluations={"a": record}, histories={"rl": history})
    page = Page(path.read_text(encoding="utf-8"))
    assert "cut after 20000 of 100000 characters" in page.words
    assert len(page.named("article")) == 4
    assert "18 more logged numbers" in page.words
    # 4 prompts x (2 x 20 kB of text and a head, 2 thumbnails), and 12 curves of 400 points.
    assert path.stat().st_size < 1_500_000


# training logs


def test_logs_of_a_recipes_steps_are_read_in_order(tmp_path) -> None:
    for name in ("02-joint", "01-inverse_warmup", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.json").write_text(json.dumps([{"loss": 1.0, "step": 1}]))
    assert list(read_histories(tmp_path)) == ["01-inverse_warmup", "02-joint"]
    assert list(read_histories(tmp_path / "02-joint")) == ["02-joint"]


def test_a_trainers_last_checkpoint_is_read(tmp_path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"loss": float(step), "step": step}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (entries,) = read_histories(tmp_path).values()
    assert entries[0]["loss"] == 10


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_damaged_logs_are_named(tmp_path, text) -> None:
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(ValueError, match=r"log\.json: damaged log"):
        read_histories(tmp_path)


def test_curves_leave_out_what_says_nothing() -> None:
    entries = [
        {"step": 1, "grad_norm": 1.0, "loss": 1, "epoch": 0.1, "note": "x", "once": 1.0},
        {"step": 2, "grad_norm": 2.0, "loss": float("nan"), "epoch": 0.2, "flag": True},
        {"step": 3, "loss": 3, "reward": 0.5, "train_runtime": 3.0},
        {"step": 4, "reward": 0.6, "train_runtime": 3.0},
    ]
    found, left_out = curves(entries)
    assert [(c.name, c.steps, c.values) for c in found] == [
        ("reward", (3, 4), (0.5, 0.6)),
        ("loss", (1, 3), (1, 3)),
        ("grad_norm", (1, 2), (1, 2)),
    ]
    assert left_out == 0


def test_long_curves_are_thinned_to_means() -> None:
    curve = Curve("loss", tuple(range(1000)), tuple(2.0 * i for i in range(1000)))
    steps, values = thinned(curve)
    assert len(steps) == len(values) == 334
    assert (steps[0], values[0], steps[-1]) == (1, 2, 999)
    short = Curve("loss", (1, 2), (3, 4))
    assert thinned(short) == ([1, 2], [3, 4])


# comparison page


def test_a_comparison_marks_differences_that_stand(tmp_path) -> None:
    records = [small_evaluation(0.1), small_evaluation(0.9, seed=3)]
    found = compare(records)
    write_comparison(tmp_path / "c.html", title="Two", found=found, evaluations=records)
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert [a for a in page.named("span") if a.get("class") == "better"]
    assert "skill 0.9: seed is 3, skill 0.1 has 0" in page.words
    assert fetched(page) == []


@pytest.mark.parametrize(
    ("metric", "difference", "expected"),
    [
        ("reward", Interval(0.2, 0.1, 0.3), "better"),
        ("reward", Interval(-0.2, -0.3, -0.1), "worse"),
        ("reward", Interval(0.2, -0.1, 0.3), ""),
        ("self-BLEU", Interval(0.2, 0.1, 0.3), "worse"),
        ("semantic similarity", Interval(-0.2, -0.3, -0.1), "better"),
        ("tokens", Interval(2, 1, 3), ""),
        ("reward", Interval(2, float("nan"), float("nan")), ""),
    ],
)
def test_verdicts(metric, difference, expected) -> None:
    assert verdict(metric, difference) == expected


def test_a_report_needs_something_and_matplotlib(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="evaluations or training logs"):
        write_run_report(tmp_path / "r.html", title="x", evaluations={}, histories={})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'latent-rl\[eval\]'"):
        write_run_report(tmp_path / "r.html", title="x", evaluations={}, histories={"a": []})
    assert list(tmp_path.iterdir()) == []
