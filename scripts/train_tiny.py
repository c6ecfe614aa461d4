"""Train the embedded model and write it as a Hugging Face folder.

    python -m scripts.train_tiny --out DIR --steps 20000     # or --minutes 5: as many steps as fit
    python -m scripts.train_tiny --out DIR --random          # the tokenizer and random weights, no training

The data and the initial weights follow from --seed; the number of worker processes changes nothing. CUDA's backward
kernels add in no fixed order, so that two runs on a GPU agree in quality, not bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.eval_tiny import wrong_answers
from scripts.tiny_chats import held_out_examples
from scripts.tiny_stream import Batch, BatchStream
from scripts.tiny_tokenizer import BOS, BOS_ID, CHAT_TEMPLATE, END, END_ID, PAD, PAD_ID, VOCAB_SIZE, train_tokenizer

MAX_POSITIONS = 2048
WARM_UP_STEPS = 300
CALIBRATION_STEPS = (150, 400)  # the speed of these decides how many steps fit into --minutes
RESERVE_S = 30.0  # of --minutes, for saving and two evaluations
QUICK_TASKS = ("add", "subtract", "multiply", "reverse_letters", "reverse_words", "sort_words", "count_letters", "json")


def model_config() -> LlamaConfig:
    """About 3.8 million parameters: 7.5 MB in bfloat16. Every width divides by 4, for tensor parallelism."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template, as Transformers loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A model in float32 with the random weights of this seed."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    with torch.no_grad():  # the two matrices that write into the residual stream, once a layer
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix /= math.sqrt(2 * model.config.num_hidden_layers)
    return model


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy in bfloat16, on the same device, for saving and evaluation. The model is not changed."""
    config = copy.deepcopy(model.config)
    copied = LlamaForCausalLM(config).to(dtype=torch.bfloat16, device=model.device)
    copied.load_state_dict(model.state_dict())
    copied.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False
    )
    return copied.eval()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in bfloat16 with its tokenizer; files of an earlier save are replaced."""
    rounded(model).save_pretrained(out)
    chat_tokenizer(Tokenizer.from_str(tokenizer.to_str())).save_pretrained(out)
    path = out / "tokenizer.json"  # of which white space is the larger half
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")


@dataclass
class Schedule:
    """Which share of the training is done, when it counts either steps or minutes."""

    steps: int | None
    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    _calibration_started: float = 0.0

    def before_step(self, n: int) -> None:
        """Set the number of steps once the speed is known; `steps` is None until then."""
        if self.steps is not None or self.minutes is None:
            return
        first, last = CALIBRATION_STEPS
        now = time.monotonic()
        if n == first:
            self._calibration_started = now
        elif n == last:
            step_s = (now - self._calibration_started) / (last - first)
            left_s = self.minutes * 60 - RESERVE_S - (now - self.started)
            self.steps = n + max(0, int(left_s / step_s * 0.97))
            tqdm.write(f"{step_s * 1e3:.1f} ms a step: {self.steps} steps in {self.minutes} minutes")

    def learning_rate(self, n: int, peak: float) -> float:
        """Linear warm-up, then a cosine down to 1 % of the peak."""
        if n < WARM_UP_STEPS:
            return peak * (n + 1) / WARM_UP_STEPS
        if self.steps is None:
            return peak
        progress = min(1.0, (n - WARM_UP_STEPS) / max(1, self.steps - WARM_UP_STEPS))
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def is_over(self, n: int) -> bool:
        """Whether step n need not be made any more: all steps are made or the time is up."""
        late = self.minutes is not None and time.monotonic() - self.started > self.minutes * 60 - RESERVE_S
        return late or (self.steps is not None and n >= self.steps)


def hidden_states(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """What the model's head reads for each token. tokens [rows, row_tokens], causal within a row; returns
    [rows, row_tokens, hidden_size]. The layers are called one by one so that each can be compiled alone."""
    hidden = model.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotation = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotation)
    normed: Tensor = model.model.norm(hidden)
    return normed


def weighted_loss(hidden: Tensor, head: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens, weighted. weights [rows, row_tokens]: each token's weight as a target."""
    logits = F.linear(hidden[:, :-1], head).flatten(0, 1).float()
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    target_weights = weights[:, 1:].flatten()
    return (losses * target_weights).sum() / target_weights.sum()


def make_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=model.device.type == "cuda")


class Trainer:
    """One training run: `run` learns, evaluates now and then, and leaves the best weights in the folder."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.schedule = Schedule(arguments.steps, arguments.minutes)
        self.stream = BatchStream(tokenizer, arguments.seed, arguments.batch_tokens, arguments.workers)
        self.tokenizer = tokenizer
        self.chat_tokenizer = chat_tokenizer(Tokenizer.from_str(tokenizer.to_str()))  # evaluation sets its padding
        self.device = torch.device(arguments.device)
        self.model = new_model(arguments.seed).to(self.device).train()
        self.optimizer = make_optimizer(self.model, arguments.learning_rate)
        self.examples = held_out_examples(seed=2, per_task=arguments.eval_examples)
        self.best = -1.0
        self.loss = weighted_loss
        torch.set_float32_matmul_precision("high")
        if arguments.compile:
            self.loss = torch.compile(weighted_loss, dynamic=False)
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)

    def on_device(self, array: np.ndarray) -> Tensor:
        """The array as a tensor on the device; the copy does not wait for the device."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def step(self, n: int, batch: Batch) -> Tensor:
        """Learn from one batch; returns its loss, on the device."""
        tokens, weights = self.on_device(batch.tokens).long(), self.on_device(batch.weights).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(n, self.arguments.learning_rate)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = hidden_states(self.model, tokens)
            loss = self.loss(hidden, self.model.lm_head.weight, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def evaluate(self, n: int) -> None:
        """Print the accuracy of a few tasks on held-out questions; save the weights when their mean is the best yet."""
        model = rounded(self.model)
        shares = {}
        for task in QUICK_TASKS:
            wrong = wrong_answers(model, self.chat_tokenizer, task, self.examples[task], batch_size=128)
            shares[task] = 1 - len(wrong) / len(self.examples[task])
        mean = sum(shares.values()) / len(shares)
        tqdm.write(f"step {n}: {mean:.3f} " + " ".join(f"{task} {share:.2f}" for task, share in shares.items()))
        if mean >= self.best:
            self.best = mean
            save(self.model, self.tokenizer, self.out)

    def run(self) -> None:
        """Train to the end of the schedule. Raises FloatingPointError when the loss is no longer a number."""
        batches = iter(self.stream)
        bar = tqdm(total=self.schedule.steps, unit="step", mininterval=2.0)
        n, evaluated, waited_s = 0, 0, 0.0
        while not self.schedule.is_over(n):
            self.schedule.before_step(n)
            bar.total = self.schedule.steps
            asked = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked
            loss = self.step(n, batch)
            n += 1
            bar.update()
            if n % 50 == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {n}")
                bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
            if n % self.arguments.eval_every == 0:
                self.evaluate(n)
                evaluated = n
        if evaluated != n:
            self.evaluate(n)
        bar.close()
        self.stream.close()
        took_s = time.monotonic() - self.schedule.started
        print(f"{n} steps of {self.arguments.batch_tokens} tokens in {took_s:.0f} s, {waited_s:.0f} s of it for data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/tiny", help="folder to write")
    parser.add_argument("--tokenizer", help="tokenizer.json to use; without it, a new one is trained")
    parser.add_argument("--random", action="store_true", help="write random weights and stop")
    parser.add_argument("--steps", type=int, help="length of the training")
    parser.add_argument("--minutes", type=float, help="end within this time; without --steps, train as much as fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--eval-every", type=int, default=4000, help="in steps")
    parser.add_argument("--eval-examples", type=int, default=128, help="held-out questions a task")
    parser.add_argument("--compile", action="store_true", help="compile the layers; worth it on a GPU")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(arguments.tokenizer) if arguments.tokenizer else train_tokenizer(arguments.seed)
    if arguments.random:
        save(new_model(arguments.seed), tokenizer, Path(arguments.out))
        return
    if arguments.steps is None and arguments.minutes is None:
        parser.error("give --steps or --minutes")
    Trainer(arguments, tokenizer).run()


if __name__ == "__main__":
    main()
