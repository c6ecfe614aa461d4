"""Measure a chat model of the embedded kind on its tasks: `python -m scripts.eval_tiny [--model configs/tiny]`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scripts.tiny_chats import held_out_examples
from scripts.tiny_tasks import Example

MAX_NEW_TOKENS = {"count": 240}  # by task; others get the default
DEFAULT_NEW_TOKENS = 96
BY_HEART = ("times_table", "divide", "unknown", "facts", "small_talk", "emoji")


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    system: str | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, each in a conversation of its own, in the order given."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        system_message = [{"role": "system", "content": system}] if system is not None else []
        inputs = tokenizer.apply_chat_template(
            [[*system_message, {"role": "user", "content": prompts[i]}] for i in chosen],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


def wrong_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
) -> list[tuple[Example, str]]:
    """The examples of a task that the model answers wrongly, each with its answer."""
    max_new_tokens = MAX_NEW_TOKENS.get(task, DEFAULT_NEW_TOKENS)
    prompts = [example.prompt for example in examples]
    answers = answer_all(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    pairs = zip(examples, answers, strict=True)
    return [(example, answer) for example, answer in pairs if not example.is_right(answer)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="configs/tiny", help="folder of the model")
    parser.add_argument("--per-task", type=int, default=500, help="questions a task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers a task")
    arguments = parser.parse_args()

    # With several CPU threads the order of float additions, and so a near tie, may differ between machines.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    examples = held_out_examples(arguments.seed, arguments.per_task)
    tasks = [task for task in examples if not arguments.tasks or task in arguments.tasks]
    print("| task | questions | right | held out |\n| --- | --- | --- | --- |")
    start = time.monotonic()
    for task in tqdm(tasks, desc="tasks"):
        wrong = wrong_answers(model, tokenizer, task, examples[task])
        right = 1 - len(wrong) / len(examples[task])
        held_out = "no, learnt by heart" if task in BY_HEART else "yes"
        tqdm.write(f"| {task} | {len(examples[task])} | {right:.1%} | {held_out} |")
        for example, answer in wrong[: arguments.show_wrong]:
            tqdm.write(f"    {example.prompt!r}: {answer!r} instead of {example.answer!r}")
    print(f"{time.monotonic() - start:.0f} s, {arguments.dtype}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
