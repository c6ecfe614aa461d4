"""An endless, seeded stream of packed training batches, made by worker processes while the model learns."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from scripts.tiny_chats import make_conversation, make_document
from scripts.tiny_tokenizer import ASSISTANT_ID, BOS_ID, END_ID, SYSTEM_ID, USER_ID

ROW_TOKENS, LONG_ROW_TOKENS = 512, 2048
LONG_EVERY = 8  # one batch in so many is of long rows, with the same number of tokens
LONGEST_COUNT = 400  # numbers in one answer of a long row
DOCUMENT_SHARE = 0.04

# Loss weights in tenths: what the assistant says, plain text, and the rest of a conversation.
ANSWER_WEIGHT, DOCUMENT_WEIGHT, PROMPT_WEIGHT = 10, 3, 1


class Batch(NamedTuple):
    """tokens [rows, row_tokens] int16; weights likewise, uint8: each token's loss weight as a target, in tenths."""

    tokens: np.ndarray
    weights: np.ndarray


class RowPacker:
    """Turns conversations and documents into rows of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._role_ids = {"system": SYSTEM_ID, "user": USER_ID, "assistant": ASSISTANT_ID}
        assert all(tokenizer.token_to_id(f"<|{role}|>") == i for role, i in self._role_ids.items())

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def documents(self, rng: Random, num_tokens: int, longest_count: int) -> Iterator[tuple[list[int], list[int]]]:
        """At least num_tokens tokens of whole documents, each as ids and loss weights."""
        while num_tokens > 0:
            chats = [
                [("document", make_document(rng))]
                if rng.random() < DOCUMENT_SHARE
                else [(message.role, message.content) for message in make_conversation(rng, longest_count)]
                for _ in range(64)
            ]
            contents = iter(self.texts_to_ids([content for chat in chats for _, content in chat]))
            for chat in chats:
                ids, weights = [BOS_ID], [0]
                for role, _ in chat:
                    content = next(contents)
                    if role == "document":
                        ids += content
                        weights += [DOCUMENT_WEIGHT] * len(content)
                    else:
                        weight = ANSWER_WEIGHT if role == "assistant" else PROMPT_WEIGHT
                        ids += [self._role_ids[role], *content]
                        weights += [PROMPT_WEIGHT] + [weight] * len(content)
                    ids.append(END_ID)
                    weights.append(weights[-1])
                num_tokens -= len(ids)
                yield ids, weights

    def batch(self, rng: Random, rows: int, row_tokens: int, longest_count: int = 40) -> Batch:
        """Rows of documents one after another. Each row starts with a document; its last one is cut at the border."""
        tokens = np.zeros((rows, row_tokens), dtype=np.int16)
        weights = np.zeros((rows, row_tokens), dtype=np.uint8)
        row, column = 0, 0
        while row < rows:
            for ids, document_weights in self.documents(rng, (rows - row) * row_tokens, longest_count):
                room = row_tokens - column
                tokens[row, column : column + len(ids)] = ids[:room]
                weights[row, column : column + len(ids)] = document_weights[:room]
                column += len(ids)
                if column >= row_tokens:
                    row, column = row + 1, 0
                    if row == rows:
                        break
        return Batch(tokens, weights)


def nth_batch(packer: RowPacker, seed: int, n: int, batch_tokens: int) -> Batch:
    """Batch n of the stream of this seed; it depends on nothing else."""
    rng = Random(f"batch {seed} {n}")
    if n % LONG_EVERY == LONG_EVERY - 1 and batch_tokens >= LONG_ROW_TOKENS:
        return packer.batch(rng, batch_tokens // LONG_ROW_TOKENS, LONG_ROW_TOKENS, LONGEST_COUNT)
    return packer.batch(rng, batch_tokens // ROW_TOKENS, ROW_TOKENS)


def _work(
    queue: multiprocessing.Queue[Batch], tokenizer_json: str, seed: int, first: int, step: int, size: int
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packer = RowPacker(Tokenizer.from_str(tokenizer_json))
    n = first
    while True:
        queue.put(nth_batch(packer, seed, n, size))
        n += step


class BatchStream:
    """Batches 0, 1, 2, ... of a seed, made ahead by worker processes; the same whatever their number.

    Start it before CUDA is used when the workers are forked, which starts them fastest. `close` ends them.
    """

    def __init__(
        self, tokenizer: Tokenizer, seed: int, batch_tokens: int, num_workers: int, start_method: str = "fork"
    ) -> None:
        context: Any = multiprocessing.get_context(start_method)
        self._queues: list[multiprocessing.Queue[Batch]] = [context.Queue(maxsize=8) for _ in range(num_workers)]
        self._workers = [
            context.Process(
                target=_work, args=(queue, tokenizer.to_str(), seed, i, num_workers, batch_tokens), daemon=True
            )
            for i, queue in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for queue in self._queues:
                yield queue.get()

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.terminate()
            worker.join()
