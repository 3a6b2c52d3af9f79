"""Text of a small model's own, to calibrate and measure it on: what a model writes is what it was trained for.

    python benchmarks/stories.py --model ../shared/models/stories260k --out .

Writes stories.calibration.txt and stories.evaluation.txt, 220 and 60 stories sampled as the model has their chances.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 20


def main() -> None:
    """Sample both texts, each with a seed of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two texts")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    start = torch.full((BATCH, 1), tokenizer.bos_token_id)
    for name, count, seed in (("calibration", 220, 0), ("evaluation", 60, 1)):
        torch.manual_seed(seed)
        stories: list[str] = []
        for _ in range(count // BATCH):
            written = model.generate(
                start, do_sample=True, temperature=1.0, top_k=0, min_new_tokens=100, max_new_tokens=300,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            stories += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        (args.out / f"stories.{name}.txt").write_text("\n\n".join(stories))


if __name__ == "__main__":
    main()
