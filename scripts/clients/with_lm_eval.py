"""lm-eval's harness: log-likelihoods of answers to sums, and sums answered, over /v1/completions with token ids."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

DISTRIBUTION = "lm_eval"
NUM_SUMS = 100
RAN = f"local-completions with token ids, {NUM_SUMS} sums: multiple choice of 4 by log-likelihood, and generate_until"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "<|bos|><|user|>What is {{{{a}}}} + {{{{b}}}}?<|end|><|assistant|>"
target_delimiter: ""
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list:
  - metric: acc
"""
ANSWERS = """\
output_type: generate_until
doc_to_target: "{{choices[right]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 32
  temperature: 0
metric_list:
  - metric: exact_match
"""


def check(url: str) -> str:
    """Raises when a task is not run, or less than 95 % are right."""
    with tempfile.TemporaryDirectory() as folder:
        scores = _evaluate(url, Path(folder))
    choices, answers = scores["sum_choices"]["acc,none"], scores["sum_answers"]["exact_match,none"]
    assert choices >= 0.95, scores
    assert answers >= 0.95, scores
    return f"acc {choices:.2f}, exact_match {answers:.2f}"


def _evaluate(url: str, folder: Path) -> dict[str, dict[str, float]]:
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _sums()))
    for name, kind in (("sum_choices", CHOICES), ("sum_answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    at = f"base_url={url}/v1/completions,model=tiny,tokenizer=configs/tiny,num_concurrent=8,tokenized_requests=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", at]
    command += ["--tasks", "sum_choices,sum_answers", "--include_path", str(folder), "--output_path", f"{folder}/out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder), "OPENAI_API_KEY": "none"}
    subprocess.run(command, check=True, env={**os.environ, **offline})
    found = next((folder / "out").rglob("results*.json"))
    results: dict[str, dict[str, float]] = json.loads(found.read_text())["results"]
    return results


def _sums() -> list[dict[str, object]]:
    draw = random.Random(5)
    rows: list[dict[str, object]] = []
    for _ in range(NUM_SUMS):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        totals = [a + b, *draw.sample([a + b + d for d in (-10, -2, -1, 1, 2, 10)], 3)]
        draw.shuffle(totals)
        choices = [f"{a} + {b} = {total}" for total in totals]
        rows.append({"a": a, "b": b, "choices": choices, "right": totals.index(a + b)})
    return rows
