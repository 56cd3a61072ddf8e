from transformers import AutoModelForImageTextToText, AutoProcessor

from latent_rl.data import load_chat
from latent_rl.models import LatentActionModel, LatentConfig
from latent_rl.rewards import completion_text
from latent_rl.train import (
    BehaviourCloning,
    InverseWarmup,
    LatentGRPOConfig,
    LatentGRPOTrainer,
    StageArguments,
    StageTrainer,
)

name = "Qwen/Qwen2.5-VL-3B-Instruct"
processor = AutoProcessor.from_pretrained(name)
model = LatentActionModel(AutoModelForImageTextToText.from_pretrained(name), LatentConfig())
rows, prompts = load_chat("conversations.jsonl"), load_chat("prompts.jsonl")

for stage in (InverseWarmup(), BehaviourCloning()):
    args = StageArguments(output_dir=f"runs/{stage.name}", num_train_epochs=1, report_to="none")
    StageTrainer(model, stage, args, rows, processing_class=processor).train()


def names_the_colour(*, completions, colour, **columns):
    return [float(c in completion_text(said)) for said, c in zip(completions, colour, strict=True)]


args = LatentGRPOConfig(output_dir="runs/rl", max_completion_length=64, num_train_epochs=1)
LatentGRPOTrainer(model, names_the_colour, args, prompts, processing_class=processor).train()
model.save_pretrained("runs/final")
