"""LLM over two ranks: over the Ray that is there, or a Ray of its own, from the repository without an installation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.processes import is_ray_worker
from engine import LLM, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.made_tokenizers import byte_level

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from engine import LLM, SamplingParams

prompts = ["Hello, my name is", "The ray glides", "the sea", "def f(x):"]
params = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=16, ignore_eos=True)
results, vectors, pids = [], [], []
for ranks in (1, 2):
    llm = LLM(sys.argv[1], tensor_parallel_size=ranks, dtype="float32", device="cpu", num_blocks=64)
    assert ("ray" in sys.modules) == (ranks == 2)
    results.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    vectors.append([output.outputs.embedding for output in llm.embed(prompts, pooling="mean", use_tqdm=False)])
    if ranks == 2:
        pids = [facts.pid for facts in llm.llm_engine.executor.rank_facts]
        import ray
    llm.close()
print(json.dumps({"results": results, "vectors": vectors, "pids": pids, "ray": ray.is_initialized()}))
"""


def test_two_ranks_over_the_callers_ray_give_the_tokens_of_one(ray_job):  # noqa: ARG001
    prompts = ["Hello, my name is", "The capital of France is"]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=12)
    outputs = []
    for ranks in (1, 2):
        with LLM(str(ROOT / "configs/tiny"), tensor_parallel_size=ranks, num_blocks=200) as llm:
            outputs.append([output.outputs for output in llm.generate(prompts, params, use_tqdm=False)])
    assert outputs[1] == outputs[0]
    assert ray.is_initialized(), "it is the caller's to end"


def test_two_ranks_over_their_own_ray_give_the_tokens_of_one_and_leave_nothing_behind(tmp_path):
    tokenizer = byte_level()
    make_checkpoint(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    one, two = told["results"]
    assert [len(tokens) for tokens in one] == [16] * 4
    assert two == one
    for alone, together in zip(*told["vectors"], strict=True):
        assert together == pytest.approx(alone, abs=1e-5)
    assert len(told["pids"]) == 2
    assert [pid for pid in told["pids"] if is_ray_worker(pid)] == []
    assert not told["ray"]
