"""locust's users; see with_locust.py."""

from __future__ import annotations

import random

from locust import HttpUser, constant, task


class User(HttpUser):
    """Asks for sums and fails an answer that is wrong."""

    wait_time = constant(0)

    def sum(self) -> tuple[str, str]:
        """A question and its answer. Pairs of the tens only: the embedded model knows all of them."""
        a, b = random.randint(40, 60), 38
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}"

    @task(3)
    def chat(self) -> None:
        question, answer = self.sum()
        self.ask(question, answer, stream=False)

    @task(3)
    def streamed_chat(self) -> None:
        question, answer = self.sum()
        self.ask(question, answer, stream=True)

    def ask(self, question: str, answer: str, *, stream: bool) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0}
        name = "streamed chat" if stream else "chat"
        where = "/v1/chat/completions"
        with self.client.post(where, json={**body, "stream": stream}, name=name, catch_response=True) as got:
            text = got.text
            if stream and not text.endswith("data: [DONE]\n\n"):
                got.failure(f"cut off: {text[-80:]!r}")
            elif not stream and got.json()["choices"][0]["message"]["content"] != answer:
                got.failure(f"wrong: {text}")

    @task
    def completion(self) -> None:
        body = {"model": "tiny", "prompt": "The capital of", "max_tokens": 20, "n": 2, "temperature": 1}
        self.client.post("/v1/completions", json=body)

    @task
    def generate(self) -> None:
        self.client.post("/generate", json={"inputs": "Funniest joke ever:", "parameters": {"max_new_tokens": 17}})
