"""Small evaluations without a model."""

import hashlib

import torch

from latent_rl.eval import Answer, EvaluationSettings, evaluate

WORDS = ("red", "green", "blue", "a", "house", ".")


def rows(count: int, colours=("red", "green", "blue")) -> list[dict]:
    return [
        {
            "id": i,
            "prompt": [{"role": "user", "content": f"question {i} ?"}],
            "colour": colours[i % len(colours)],
        }
        for i in range(count)
    ]


class WordAnswerer:
    """Says words drawn from its seeds alone; the more of `skill`, the oftener the right colour."""

    num_codes = 4

    def __init__(self, name: str = "words", skill: float = 0.5, **details) -> None:
        self.name, self.skill, self.details = name, skill, details
        self.asked: list[int] = []

    def answer(self, rows, seeds, sampling):
        self.asked.append(len(rows))
        return [
            [self._say(row, int(seed), sampling) for seed in group]
            for row, group in zip(rows, seeds, strict=True)
        ]

    def _say(self, row, seed, sampling):
        key = f"{row['prompt']}/{seed if sampling.temperature else 'greedy'}"
        noise = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
        right = WORDS.index(row["colour"])
        said = right if noise < self.skill else (right + 1) % 3
        tokens = (3, said, 4, 5)[: sampling.max_new_tokens]
        text = " ".join(WORDS[t] for t in tokens)
        return Answer(text, tokens, tuple(t % 4 for t in tokens), finished=len(tokens) == 4)


def names_colour(*, completions, colour, **columns):
    return [float(c in said[0]["content"]) for said, c in zip(completions, colour, strict=True)]


def brief(*, completions, **columns):
    return [1 / len(said[0]["content"].split()) for said in completions]


def decode(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def small_evaluation(skill: float = 0.5, *, rewards=(names_colour, brief), count=12, **changes):
    """Two splits of `count` prompts; `changes` are settings or "name"."""
    name = changes.pop("name", f"skill {skill}")
    return evaluate(
        WordAnswerer(name, skill),
        {"test": rows(count), "ood": rows(count, ("blue", "red"))},
        rewards,
        settings=EvaluationSettings(**{"samples": 4, "batch_prompts": 5, **changes}),
        decode=decode,
    )


class LengthEncoder:
    name = "lengths"

    def encode(self, texts):
        return torch.tensor([[1.0, float(len(text))] for text in texts])
