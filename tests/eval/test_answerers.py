"""Answerers keep the protocol: an answer depends on its row and its seed alone."""

import pytest
import torch

from latent_rl.eval import (
    Answerer,
    FixedAnswers,
    LatentAnswerer,
    Sampling,
    TokenAnswerer,
    answer_seeds,
)
from latent_rl.models import LatentActionModel, LatentConfig
from tests.tiny_models import tiny_image, tiny_vlm

ROWS = [
    {"id": 0, "prompt": "What is in the picture ?", "images": [tiny_image(0)]},
    {"id": 1, "prompt": [{"role": "user", "content": "How many birds are there ? one two"}]},
    {"id": 2, "prompt": "A red house .", "image": tiny_image(2)},
]
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def model_and_processor():
    vlm = tiny_vlm("qwen2_5_vl")
    config = LatentConfig(num_codes=8, inverse_layers=1, policy_layers=1, merge_blocks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentActionModel(vlm.model, config)
        with torch.no_grad():  # an untrained merge says what the base model says
            for parameter in model.latent.merge.parameters():
                parameter.normal_(std=0.2)
            for parameter in model.latent.policy.parameters():
                parameter.mul_(3)
    return model, vlm.processor


@pytest.fixture(params=["latent", "token"])
def answerer(request, model_and_processor) -> Answerer:
    model, processor = model_and_processor
    if request.param == "latent":
        return LatentAnswerer(model, processor, slots=4)
    return TokenAnswerer(model.backbone, processor)


def texts(answers) -> list[list[tuple[int, ...]]]:
    return [[answer.tokens for answer in group] for group in answers]


def test_seeds_do_not_depend_on_what_stands_beside() -> None:
    whole = answer_seeds(3, "test", range(5), 4)
    assert whole.shape == (5, 4)
    assert torch.equal(answer_seeds(3, "test", range(2, 4), 4), whole[2:4])
    assert torch.equal(answer_seeds(3, "test", range(5), 2), whole[:, :2])
    others = [answer_seeds(4, "test", range(5), 4), answer_seeds(3, "ood", range(5), 4)]
    assert len(torch.stack([whole, *others]).unique()) == 60
    assert answer_seeds(0, "test", range(0), 3).shape == (0, 3)


def test_an_answer_depends_on_its_row_and_seed_alone(answerer) -> None:
    seeds = answer_seeds(0, "test", range(3), 3)
    together = answerer.answer(ROWS, seeds, SHORT)
    alone = [answerer.answer([row], seeds[i : i + 1], SHORT)[0] for i, row in enumerate(ROWS)]
    assert texts(together) == texts(alone)
    # Neither collapsed nor blind to the seed: otherwise the test above says nothing.
    assert len({answer for group in texts(together) for answer in group}) > 3


def test_temperature_zero_ignores_the_seeds(answerer) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=6)
    first = answerer.answer(ROWS, answer_seeds(0, "a", range(3), 2), greedy)
    assert texts(first) == texts(answerer.answer(ROWS, answer_seeds(1, "b", range(3), 2), greedy))
    assert all(group[0] == group[1] for group in first)


def test_codes_stand_behind_every_token_of_a_latent_policy(answerer) -> None:
    answers = answerer.answer(ROWS, answer_seeds(0, "test", range(3), 2), SHORT)
    for answer in (answer for group in answers for answer in group):
        assert 0 < len(answer.tokens) <= 6
        assert answer.cost == len(answer.tokens)
        assert answer.finished or len(answer.tokens) == 6
        if answerer.num_codes is None:
            assert answer.codes == ()
        else:
            assert len(answer.codes) == len(answer.tokens)
            assert all(0 <= code < 8 for code in answer.codes)


def test_tokens_follow_the_temperature(model_and_processor) -> None:
    model, processor = model_and_processor
    answerer = TokenAnswerer(model.backbone, processor)
    seeds = answer_seeds(0, "test", range(1), 16)
    cold = Sampling(temperature=1e-4, max_new_tokens=3)
    hot = Sampling(temperature=5.0, max_new_tokens=3)
    greedy = answerer.answer(ROWS[:1], seeds[:, :1], Sampling(0.0, 3))[0][0].tokens
    assert {a.tokens for a in answerer.answer(ROWS[:1], seeds, cold)[0]} == {greedy}
    assert len({a.tokens for a in answerer.answer(ROWS[:1], seeds, hot)[0]}) > 8


def test_the_base_model_uses_no_codes(model_and_processor) -> None:
    model, processor = model_and_processor
    seeds = answer_seeds(0, "test", range(2), 1)
    greedy = Sampling(0.0, 6)
    base = TokenAnswerer(model.backbone, processor).answer(ROWS[:2], seeds, greedy)
    plain = TokenAnswerer(tiny_vlm("qwen2_5_vl").model, processor).answer(ROWS[:2], seeds, greedy)
    assert texts(base) == texts(plain)


def test_fixed_answers_are_taken_in_order() -> None:
    fixed: Answerer = FixedAnswers({0: ["a b", "c"]})
    (answers,) = fixed.answer(ROWS[:1], answer_seeds(0, "test", range(1), 3), SHORT)
    assert [answer.text for answer in answers] == ["a b", "c", "a b"]
    assert [answer.cost for answer in answers] == [2, 1, 2]


@pytest.mark.parametrize(("field", "value"), [("temperature", -0.1), ("max_new_tokens", 0)])
def test_sampling_names_what_is_wrong(field, value) -> None:
    with pytest.raises(ValueError, match=f"{field} must be >="):
        Sampling(**{field: value})
