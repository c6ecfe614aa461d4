"""Small tokenizers made on the spot, one for each way that vocabularies spell text."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from engine.tokenizer import Tokenizer

CORPUS = [
    "Hello, my name is Manta. The ray glides over the sea, and the sea is deep.",
    "你好，世界。 大海很深。 naïve café, Ω ≈ 3.14, 🙂🙃 👩‍👩‍👧 flags 🇳🇴🇯🇵",
    "def f(x):\n    return x + 1\n\n# END of the file </s> STOP",
] * 8
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(vocab_size: int = 400, **arguments: Any) -> PreTrainedTokenizerFast:
    """GPT-2's and Llama 3's way: every byte has a token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False), AddedToken("é≈", special=False)])
    return _wrap(backend, **arguments)


def sentencepiece(vocab_size: int = 400, **arguments: Any) -> PreTrainedTokenizerFast:
    """Llama 2's way: ▁ for a space, one added before the text, and byte tokens for what is not in the vocabulary."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size + 259, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([line[:40] for line in CORPUS if line.isascii()], trainer)
    state = backend.to_str()
    backend = Backend.from_str(_as_plain_tokens(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _wrap(backend, **arguments)


def metaspace(vocab_size: int = 400, **arguments: Any) -> PreTrainedTokenizerFast:
    """T5's way: whole pieces only; how the first one reads depends on its place."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, **arguments)


def _as_plain_tokens(state: str) -> str:
    """Byte tokens are ordinary vocabulary, not specials."""
    raw = json.loads(state)
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(raw)


def _wrap(backend: Backend, *, add_bos: bool = True, chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    if add_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
        )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    hf.chat_template = chat_template
    return hf


def tokenizers() -> dict[str, Tokenizer]:
    makers = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}
    return {name: Tokenizer(make()) for name, make in makers.items()}
