"""The judge against an endpoint on this machine that answers well, badly, or not at all."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latent_rl.rewards import RewardStop, score_all
from latent_rl.rewards.judge import (
    MMROLE,
    PCOGALIGN,
    Dimension,
    JudgeError,
    JudgeSettings,
    PairwiseJudge,
    PointwiseJudge,
    Rubric,
)
from latent_rl.rewards.judge import cache as judge_cache
from latent_rl.rewards.judge.cache import JudgementCache
from tests.rewards.fake_endpoint import KEY, Asked, Reply, by_length, chat, endpoint, good, scored

WIT = Rubric("wit", "1", "The assistant is witty.", (Dimension("wit", "Is it witty?"),), 1, 10)


class Waits:
    """Instead of sleeping: notes how long it would have taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def settings(url: str, **changes: Any) -> JudgeSettings:
    return JudgeSettings(**{"model": "judge-1", "base_url": url, "timeout": 5.0, **changes})


def point(url: str, waits: Waits | None = None, **changes: Any) -> PointwiseJudge:
    return PointwiseJudge(settings(url, **changes), WIT, sleep=waits or Waits(), jitter=lambda: 1.0)


def score(judge: Any, texts: list[str], **columns: Any) -> list[Any]:
    count = len(texts)
    awaitable = judge(
        prompts=["Say something."] * count,
        completions=texts,
        completion_ids=[[]] * count,
        **columns,
    )
    return asyncio.run(awaitable)


def kinds(values: list[Any]) -> list[Any]:
    return [value.kind if isinstance(value, JudgeError) else value for value in values]


# Values.


def test_pointwise_is_the_mean_share_of_the_scale() -> None:
    rubric = Rubric("two", "1", "", (Dimension("a", "?"), Dimension("b", "?")), 1, 5)

    def behave(asked: Asked, number: int) -> Reply:
        scores = {"response": {"a": 5, "b": 2}}
        return Reply(chat(json.dumps({"token": asked.token, "scores": scores})))

    with endpoint(behave) as server:
        judge = PointwiseJudge(settings(server.url), rubric)
        assert score(judge, ["hello"]) == [(1.0 + 0.25) / 2]


def test_a_pair_is_asked_in_both_orders_and_averaged() -> None:
    """A judge that gives two points more to whatever stands first."""

    def biased(asked: Asked, number: int) -> Reply:
        return Reply(
            chat(scored(asked, lambda label, t: len(t) + (2 if label == "response_1" else 0)))
        )

    with endpoint(biased) as server:
        judge = PairwiseJudge(settings(server.url), WIT)
        metrics: dict[str, float] = {}
        values = score(judge, ["abcd"], reference=["ab"], log_metric=metrics.__setitem__)
        # 4 against 2 on a scale of 9 steps; the two points cancel out.
        assert values == [pytest.approx(2 / 9)]
        pairs = {(a.text("response_1"), a.text("response_2")) for a in server.asked}
        assert pairs == {("abcd", "ab"), ("ab", "abcd")}
        # In one order 6 against 2, in the other 4 against 4.
        assert metrics["judge/position_gap"] == pytest.approx(4 / 9)
        assert metrics["judge/wit"] == pytest.approx(2 / 9)
        assert metrics["judge/requests"] == 2
        assert metrics["judge/tokens"] == 240
        assert metrics["judge/seconds"] > 0


def test_a_pair_fails_when_one_order_does() -> None:
    def once(asked: Asked, number: int) -> Reply:
        return good(asked, number) if number else Reply(chat("no idea"))

    with endpoint(once) as server:
        judge = PairwiseJudge(settings(server.url, max_concurrency=1), WIT)
        assert kinds(score(judge, ["abcd"], reference=["ab"])) == ["malformed"]
        assert len(server.asked) == 2


def test_rows_without_a_reference_are_not_applicable() -> None:
    with endpoint() as server:
        judge = PairwiseJudge(settings(server.url), WIT)
        assert score(judge, ["abcd", "ab"], reference=[None, ""]) == [None, None]
        assert server.asked == []


@pytest.mark.parametrize(("rubric", "count", "high"), [(MMROLE, 8, 10), (PCOGALIGN, 5, 5)])
def test_the_benchmarks_rubrics_are_asked_whole(rubric: Rubric, count: int, high: int) -> None:
    columns = {
        "character": ["Ada"],
        "profile": [{"personality": "dry", "catchphrase": ""}],
        "role_set": [{"Home": "mother"}],
        "location": ["Home"],
        "eval_help": ["calm"],
        "answer": ["not for the judge"],
    }
    with endpoint() as server:
        judge = PairwiseJudge(
            settings(server.url), rubric.only([d.name for d in rubric.dimensions])
        )
        score(judge, ["abc"], reference=["ab"], **columns)
        asked = server.asked[0]
        assert len(asked.dimensions) == count
        assert f"from 1 (poor) to {high} (excellent)" in asked.system
        for name in rubric.columns:
            assert asked.text(name)
        assert "not for the judge" not in asked.user
    with pytest.raises(ValueError, match="no dimension charm; known are"):
        rubric.only(["charm"])


def test_images_are_shown_small_and_few() -> None:
    image = Image.effect_noise((900, 700), 80).convert("RGB")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    with endpoint() as server:
        judge = point(server.url, max_images=2, max_image_pixels=10_000, max_image_bytes=2_500)
        calls = {"prompts": [prompt], "completions": ["abc"], "completion_ids": [[]]}
        asyncio.run(judge(**calls, images=[[image, image, image]]))
        asyncio.run(judge(**calls, image=[image]))
        asyncio.run(judge(**calls, images=[[]]))
        assert [len(asked.images) for asked in server.asked] == [2, 1, 0]
        url = server.asked[0].images[0]
        assert url.startswith("data:image/jpeg;base64,")
        assert len(url) < 2_500 * 4 / 3 + 50
        assert "user: [image]What?" in server.asked[0].text("conversation")
        # An image that cannot be read is that row's failure.
        assert isinstance(asyncio.run(judge(**calls, image=["missing.png"]))[0], FileNotFoundError)


# Failures.


@pytest.mark.parametrize(
    ("reply", "kind", "requests"),
    [
        (Reply("<html>busy</html>"), "malformed", 2),
        (Reply({"choices": []}), "malformed", 2),
        (Reply({"choices": [{"message": {"content": None}}]}), "malformed", 2),
        (Reply("[" * 20_000), "malformed", 2),
        (Reply(b"\xff\xfe\x00"), "malformed", 2),
        # A well-formed answer without scores: the same question would get the same answer.
        (Reply(chat("I would say nine.")), "malformed", 1),
        (Reply("x" * 40_000), "too_large", 1),
        (Reply({"error": "nope"}, 400), "client_error", 1),
        (Reply("", 307, {"Location": "http://127.0.0.1:1/"}), "client_error", 1),
        (Reply({"error": "key?"}, 401), "unauthorized", 1),
        (Reply("oops", 500), "server_error", 2),
        (Reply("wait", 429), "rate_limited", 2),
        (Reply(closes=True), "connection", 2),
        (Reply(silent=0.3), "timeout", 2),
        (Reply(chat("x" * 100), trickles=0.02), "timeout", 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_way_to_fail_has_its_kind_and_no_value(reply: Reply, kind: str, requests: int) -> None:
    timeout = 0.15 if kind == "timeout" else 5.0
    with endpoint(lambda asked, number: reply) as server:
        judge = point(server.url, max_retries=1, timeout=timeout, max_response_bytes=30_000)
        value = score(judge, ["hello"])[0]
        assert kinds([value]) == [kind]
        assert len(str(value)) < 400
        assert len(server.asked) == requests


@pytest.mark.parametrize(
    "first",
    [Reply("oops", 500), Reply("", 503), Reply("slow", 429), Reply(closes=True), Reply("<html>")],
)
def test_what_passes_is_retried(first: Reply) -> None:
    waits = Waits()
    with endpoint(lambda a, n: good(a, n) if n > 1 else first) as server:
        assert score(point(server.url, waits, backoff=0.5), ["hello"]) == [4 / 9]
        assert waits.seconds == [0.5, 1.0]
        assert len(server.asked) == 3
        assert server.asked[0].token == server.asked[2].token


def test_waits_grow_up_to_a_bound_and_keep_to_retry_after() -> None:
    waits = Waits()
    headers = [{}, {"Retry-After": "7"}, {"Retry-After": "0.1"}, {"Retry-After": "soon"}, {}]
    with endpoint(lambda a, n: Reply("", 429, headers[n])) as server:
        judge = point(server.url, waits, max_retries=4, backoff=1.0, max_backoff=3.0)
        assert kinds(score(judge, ["hello"])) == ["rate_limited"]
    assert waits.seconds == [1.0, 7.0, 3.0, 3.0]


def test_a_date_in_retry_after_is_a_wait() -> None:
    waits = Waits()
    header = {"Retry-After": "Thu, 01 Jan 2026 00:00:30 GMT"}
    with endpoint(lambda a, n: good(a, n) if n else Reply("", 503, header)) as server:
        judge = point(server.url, waits)
        judge.client.now = lambda: 1767225600.0  # the same day, at midnight
        assert score(judge, ["hello"]) == [4 / 9]
    assert waits.seconds == [30.0]


def test_a_wait_longer_than_the_batch_has_is_given_up_at_once() -> None:
    waits = Waits()
    with endpoint(lambda a, n: Reply("", 429, {"Retry-After": "86400"})) as server:
        assert kinds(score(point(server.url, waits), ["hello"])) == ["rate_limited"]
        assert len(server.asked) == 1
    assert waits.seconds == []


def test_random_waits_spread_and_leave_the_runs_seeds_alone() -> None:
    import random

    waits = Waits()
    with endpoint(lambda a, n: Reply("", 500)) as server:
        judge = PointwiseJudge(settings(server.url, max_retries=3), WIT, sleep=waits)
        state = random.getstate()
        score(judge, ["hello"])
        assert random.getstate() == state
    assert len(set(waits.seconds)) == 3
    assert all(0 <= wait <= limit for wait, limit in zip(waits.seconds, (1, 2, 4), strict=True))


def test_one_bad_answer_costs_one_sample() -> None:
    def behave(asked: Asked, number: int) -> Reply:
        return Reply("", 400) if asked.text("response") == "b" * 4 else good(asked, number)

    with endpoint(behave) as server:
        table = score_all(
            [point(server.url)],
            prompts=["?"] * 3,
            completions=["a" * 2, "b" * 4, "c" * 6],
            completion_ids=[[]] * 3,
            columns={},
        )
    assert table.names == ("judge",)
    assert table.keep_mask == (True, False, True)
    assert table.rewards[2] == pytest.approx(5 / 9)
    assert [(f.reward, f.kind) for f in table.failures] == [("judge", "client_error")]


def test_the_whole_batch_has_a_time_limit() -> None:
    def behave(asked: Asked, number: int) -> Reply:
        slow = asked.text("response") == "slow"
        return Reply(silent=0.5) if slow else good(asked, number)

    with endpoint(behave) as server:
        judge = point(server.url, total_timeout=0.2)
        values = score(judge, ["slow", "fast!"])
    assert kinds(values) == ["timeout", 4 / 9]
    assert "total_timeout=0.2" in str(values[0])


# Limits.


def test_no_more_requests_at_once_than_allowed() -> None:
    limit, running, most = 3, 0, 0
    full = threading.Condition()

    def behave(asked: Asked, number: int) -> Reply:
        nonlocal running, most
        with full:
            running += 1
            most = max(most, running)
            full.notify_all()
            # Nobody leaves before the limit is reached, so that it is reached.
            full.wait_for(lambda: most >= limit, timeout=1.0)
        time.sleep(0.02)  # time for one more to come, were there one
        with full:
            running -= 1
        return good(asked, number)

    with endpoint(behave) as server:
        score(point(server.url, max_concurrency=limit), [f"answer {i}" for i in range(12)])
        assert len(server.asked) == 12
    assert most == limit


def test_a_spent_budget_stops_the_run() -> None:
    with endpoint() as server:
        judge = point(server.url, max_requests=5, max_concurrency=2)
        texts = [f"answer {i}" for i in range(9)]
        with pytest.raises(RewardStop, match="budget is spent: 5 of max_requests=5 used"):
            score(judge, texts)
        assert len(server.asked) <= 5
        assert judge.budget.requests == 5
        with pytest.raises(RewardStop, match="max_requests"):
            score_all(
                [judge],
                prompts=["?"],
                completions=["more"],
                completion_ids=[[]],
                columns={},
            )


def test_a_spent_budget_may_drop_samples_instead() -> None:
    with endpoint() as server:
        judge = point(server.url, max_requests=3, stop_on_budget=False, max_concurrency=1)
        values = kinds(score(judge, [f"answer {i}" for i in range(5)]))
        assert values.count("budget") == 2
        assert len(server.asked) == 3


def test_tokens_and_money_are_counted() -> None:
    prices = {"price_per_million_input_tokens": 10.0, "price_per_million_output_tokens": 50.0}
    with endpoint() as server:
        tokens = point(server.url, max_total_tokens=240, max_concurrency=1)
        with pytest.raises(RewardStop, match="240 of max_total_tokens=240"):
            score(tokens, ["a", "bb", "ccc"])
        # 100 tokens in and 20 out: 0.002 a request.
        money = point(server.url, max_cost=0.005, max_concurrency=1, **prices)
        with pytest.raises(RewardStop, match=r"0\.006 of max_cost=0\.005"):
            score(money, ["a", "bb", "ccc", "dddd"])
        resumed = point(server.url, max_cost=0.005, **prices)
        resumed.load_state_dict(money.state_dict())
        assert resumed.budget.cost == pytest.approx(0.006)
    with (
        endpoint(lambda a, n: Reply(chat(scored(a, by_length), usage=None))) as server,
        pytest.raises(RewardStop, match="need a server that reports usage"),
    ):
        score(point(server.url, max_total_tokens=1000), ["a"])


# Cache.


def test_what_was_judged_is_not_asked_again(tmp_path: Path) -> None:
    with endpoint() as server:
        metrics: dict[str, float] = {}
        first = point(server.url, cache_dir=tmp_path)
        values = score(first, ["aa", "bbbb", "aa"])
        assert values == [1 / 9, 3 / 9, 1 / 9]
        assert len(server.asked) == 2  # equal questions of one batch are one
        again = point(server.url, cache_dir=tmp_path)
        assert score(again, ["bbbb", "aa"], log_metric=metrics.__setitem__) == [3 / 9, 1 / 9]
        assert len(server.asked) == 2
        assert metrics["judge/cache_hits"] == 2
        assert metrics["judge/requests"] == 0
        assert again.budget.requests == 0


def test_any_difference_in_the_question_is_another_one(tmp_path: Path) -> None:
    changed = Rubric("wit", "2", WIT.task, WIT.dimensions, 1, 10)
    with endpoint() as server:

        def ask(rubric: Rubric = WIT, text: str = "aa", ask: str = "?", **changes: Any) -> None:
            judge = PointwiseJudge(settings(server.url, cache_dir=tmp_path, **changes), rubric)
            call = {"prompts": [ask], "completions": [text], "completion_ids": [[]]}
            asyncio.run(judge(**call))

        ask()
        ask(changed)
        ask(model="judge-2")
        ask(temperature=0.5)
        ask(ask="??")
        ask(text="aa ")
        ask(max_chars=1)
        assert len(server.asked) == 7
        ask()
        ask(max_concurrency=2, max_retries=0, timeout=4.0)  # how it is asked changes no answer
        assert len(server.asked) == 7


def test_failures_are_not_cached(tmp_path: Path) -> None:
    with endpoint(lambda a, n: good(a, n) if n else Reply(chat("?"))) as server:
        judge = point(server.url, cache_dir=tmp_path)
        assert kinds(score(judge, ["aa"])) == ["malformed"]
        assert score(judge, ["aa"]) == [1 / 9]


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Two other processes write and read the same keys at the same time as this one."""
    # The file alone: importing the package would take seconds.
    script = (
        "import runpy, sys; from pathlib import Path\n"
        f"JudgementCache = runpy.run_path({judge_cache.__file__!r})['JudgementCache']\n"
        "cache = JudgementCache(Path(sys.argv[1]), 10**6)\n"
        "for i in range(200):\n"
        "    key = f'{i % 20:064x}'\n"
        "    cache.put(key, {'n': i % 20, 'fill': 'x' * 200})\n"
        "    for j in range(20):\n"
        "        value = cache.get(f'{j:064x}')\n"
        "        assert value is None or value == {'n': j, 'fill': 'x' * 200}, value\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for other in others:
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors.decode()
    cache = JudgementCache(tmp_path, 10**6)
    assert cache.get(f"{7:064x}") == {"n": 7, "fill": "x" * 200}
    assert not list(tmp_path.glob("*/*.tmp"))


def test_the_cache_is_bounded_and_drops_what_was_unused_longest(tmp_path: Path) -> None:
    cache = JudgementCache(tmp_path, 10**6)
    keys = [f"{i:064x}" for i in range(10)]
    for age, key in enumerate(keys):
        cache.put(key, "x" * 100)
        os.utime(next(tmp_path.glob(f"*/{key}.json")), (age, age))
    assert cache.get(keys[0]) is not None  # used now: stays
    one = next(tmp_path.glob("*/*")).stat().st_size
    small = JudgementCache(tmp_path, 5 * one)
    assert [key for key in keys if small.get(key) is not None] == [keys[0], *keys[7:]]
    for key in keys:
        small.put(f"f{key[1:]}", "x" * 100)  # shrinks by itself, without being opened anew
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 5.5 * one


def test_a_damaged_file_counts_as_absent(tmp_path: Path, caplog: Any) -> None:
    cache = JudgementCache(tmp_path, 10_000)
    cache.put("ab" * 32, 1)
    (tmp_path / "ab" / f"{'ab' * 32}.json").write_text('{"format": 1, "key"')
    assert cache.get("ab" * 32) is None
    assert "is damaged" in caplog.text
    cache.put("ab" * 32, 2)
    assert cache.get("ab" * 32) == 2


# The key.


def test_the_key_is_sent_and_stays_nowhere(
    tmp_path: Path, monkeypatch: Any, caplog: Any, capsys: Any
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def echoes(asked: Asked, number: int) -> Reply:
        """Servers repeat the key, also across the border where a message is cut."""
        at = asked.text("response")
        if at == "well":
            return good(asked, number)
        status = {"denied": 401, "bad": 400, "broken": 500, "html": 200}[at]
        return Reply("x" * 190 + f"invalid key {KEY}" if at == "bad" else f"{KEY} {KEY}", status)

    with endpoint(echoes) as server:
        judge = point(server.url, api_key_env="JUDGE_KEY", cache_dir=tmp_path, max_retries=1)
        table = score_all(
            [judge],
            prompts=["?"] * 5,
            completions=["well", "denied", "bad", "broken", "html"],
            completion_ids=[[]] * 5,
            columns={},
        )
        assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    assert table.keep_mask == (True, False, False, False, False)
    seen = [
        caplog.text,
        *capsys.readouterr(),
        repr(table),
        repr(judge),
        repr(vars(judge)),
        repr(judge.settings),
        repr(judge.client.__dict__),
        repr(copy.copy(judge.settings)),
        json.dumps(judge.state_dict()),
        *(path.read_text() for path in tmp_path.rglob("*.json")),
    ]
    assert "HTTP" in caplog.text  # the client did log
    for start in range(len(KEY) - 8):
        part = KEY[start : start + 8]
        assert not any(part in text for text in seen), part


def test_a_missing_key_and_secrets_in_the_url_are_refused(monkeypatch: Any) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY is not set"):
        settings("http://x/v1", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "a\nb")
    with pytest.raises(ValueError, match="cannot stand in a header"):
        settings("http://x/v1", api_key_env="JUDGE_KEY")
    for url in (f"http://me:{KEY}@x/v1", f"http://x/v1?key={KEY}", f"ftp://{KEY}/v1"):
        with pytest.raises(ValueError, match="base_url") as caught:
            settings(url)
        assert KEY not in str(caught.value)


def test_wrong_settings_are_named() -> None:
    for changes, message in (
        ({"model": ""}, "model must not be empty"),
        ({"max_concurrency": 0}, "max_concurrency must be > 0, got 0"),
        ({"timeout": -1.0}, "timeout must be > 0"),
        ({"max_retries": -1}, "max_retries must be >= 0"),
        ({"max_cost": 1.0}, "max_cost needs price_per_million_input_tokens"),
        ({"extra_body": {"messages": []}}, "extra_body must not set messages"),
    ):
        with pytest.raises(ValueError, match=message):
            settings("http://x/v1", **changes)


def test_the_request_is_what_was_set() -> None:
    with endpoint() as server:
        score(point(server.url, extra_body={"seed": 3}, max_tokens=77, json_mode=False), ["aa"])
        score(point(server.url), ["aa"])
        first, second = (asked.body for asked in server.asked)
        assert server.asked[0].path == "/v1/chat/completions"
        assert server.asked[0].authorization is None
    assert (first["model"], first["seed"], first["max_tokens"]) == ("judge-1", 3, 77)
    assert first["temperature"] == 0
    assert "response_format" not in first
    assert second["response_format"] == {"type": "json_object"}


def test_without_httpx_one_line_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r"pip install 'latent-rl\[judge\]'"):
        point("http://x/v1")
