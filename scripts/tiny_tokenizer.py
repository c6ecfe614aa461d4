"""The embedded model's tokenizer: byte-level BPE over the made-up text, digits and leading letters apart.

A lower-case word right after a space is merged into word pieces, as usual. A lower-case word that follows nothing, a
quote or a bracket is left as single letters: that is what lets a small model spell, reverse and compare what it is
given. Digits always stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.tiny_chats import make_conversation, make_document

PAD, BOS, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
_UNUSED = tuple(f"<|unused_{i}|>" for i in range(10))
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, *_UNUSED)
PAD_ID, BOS_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(6)
VOCAB_SIZE = 2048

# In this order: a capitalized word, a lower-case word after a space, one letter, one digit, punctuation, white space.
_PIECES = (
    r" ?\p{Lu}[\p{L}\p{M}]*"
    r"| [\p{L}\p{M}]+"
    r"|[\p{L}\p{M}]"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)

# Roles become tokens; the content stands between its role and <|end|> unchanged. A list of content parts is joined.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'developer', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('a message role must be system, developer, user, assistant or tool, not ' ~ message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ ({'developer': 'system', 'tool': 'user'}[message.role] or message.role) ~ '|>' -}}"
    "{%- if message.content is string -%}"
    "{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content or [] -%}{{- part.text -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def training_text(seed: int, num_documents: int) -> Iterator[str]:
    """Message contents and plain documents of the training split.

    Emoji are left out on purpose: they stay several tokens each, so that half a character is an everyday sight for the
    detokenizer.
    """
    rng = Random(f"tokenizer {seed}")
    for _ in range(num_documents):
        if rng.random() < 0.1:
            yield make_document(rng)
        for message in make_conversation(rng):
            if message.content.isascii():
                yield message.content


def train_tokenizer(seed: int, num_documents: int = 60_000) -> Tokenizer:
    """Train the tokenizer; the same seed gives the same tokenizer. Every byte is in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(seed, num_documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the made-up text gave {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    return tokenizer
