"""The tasks of the embedded model: makers of questions with their right answers, and the held-out split.

An example belongs to the held-out split by a hash of what it asks (never of how it is phrased): about a tenth of
all number pairs, word combinations and words. `make(..., held_out=False)` can therefore never yield a question that
`make(..., held_out=True)` can yield. Facts and small talk are learnt by heart and have no held-out part.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from scripts import tiny_facts as facts

HELD_OUT_SHARE = 10  # one in so many


class Example(NamedTuple):
    """One question and its answer.

    `key` names what is asked, and None means that the example is learnt by heart. `value` is the bare answer, for
    the tasks that can also answer briefly or in JSON. An answer is right when it equals `answer`, or, where `keys`
    is set, when it is a JSON object with exactly these keys in this order.
    """

    task: str
    prompt: str
    answer: str
    key: str | None
    value: int | str | None = None
    keys: tuple[str, ...] | None = None

    def is_right(self, answer: str) -> bool:
        """Whether a model's answer counts as right; white space at its ends is ignored."""
        if self.keys is None:
            return answer.strip() == self.answer
        try:
            found = json.loads(answer)
        except ValueError:
            return False
        return isinstance(found, dict) and tuple(found) == self.keys


def is_held_out(key: str) -> bool:
    """Whether the example or word of this key is kept out of training."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _words_taught_elsewhere() -> set[str]:
    """Words that other tables use; they cannot be held out as never seen."""
    texts = [*facts.COLORS, *facts.ANIMALS, *facts.FRUITS, *facts.EMOJI, *facts.OTHER_FIELDS, *facts.SENTENCES]
    texts += [*facts.UNKNOWN, *facts.UNKNOWN_PHRASES, facts.UNKNOWN_ANSWER]
    for questions, sentence, value in facts.FACTS:
        texts += [*questions, sentence, value]
    for questions, answer in facts.SMALL_TALK:
        texts += [*questions, answer]
    return {word.strip(".,!?").lower() for text in texts for word in text.split()}


_TAUGHT_ELSEWHERE = _words_taught_elsewhere()
HELD_OUT_WORDS = tuple(word for word in facts.WORDS if is_held_out(word) and word not in _TAUGHT_ELSEWHERE)
TRAINING_WORDS = tuple(word for word in facts.WORDS if word not in HELD_OUT_WORDS)

_ONSETS = facts.words_of(
    "b c d f g h j k l m n p r s t v w y z bl br cl cr dr fl fr gl gr pl pr sh sl sn sp st str th tr tw qu"
)
_VOWELS = (*"aeiouaeio", "ai", "ea", "ee", "oa", "oo", "ou")
_CODAS = ("", "", "", *facts.words_of("b d g k l m n p r s t x ck ll nd ng nk nt rd rk rm rn rt sh sk ss st"))


def made_up_word(rng: Random) -> str:
    """A pronounceable word of 3 to 9 letters that most likely does not exist."""
    while True:
        syllables = rng.choice((1, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if 3 <= len(word) <= 9:
            return word


def spliced_word(rng: Random) -> str:
    """The start of one training word and the end of another: it brings more pieces of spelling into training."""
    while True:
        first, second = rng.choice(TRAINING_WORDS), rng.choice(TRAINING_WORDS)
        word = first[: rng.randint(1, len(first))] + second[rng.randrange(len(second)) :]
        if 3 <= len(word) <= 10:
            return word


def random_letters(rng: Random) -> str:
    """Three to ten letters, most often unpronounceable."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10)))


def pick_word(rng: Random, held_out: bool) -> str:
    """A word of the wanted split: mostly from the table, else one that hardly exists.

    Those of the held-out split are of the table or pronounceable.
    """
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(HELD_OUT_WORDS if held_out else TRAINING_WORDS)
    maker = made_up_word if held_out or kind < 0.7 else spliced_word if kind < 0.95 else random_letters
    while True:
        word = maker(rng)
        if word not in _TAUGHT_ELSEWHERE and is_held_out(word) == held_out:
            return word


def pick_words(rng: Random, held_out: bool, low: int = 3, high: int = 6) -> list[str]:
    """Between low and high different words, in random order.

    Of the held-out split one list in two is of words never trained on; the other is of known words, whose
    combination was never trained on.
    """
    unseen = held_out and rng.random() < 0.5
    wanted = rng.randint(low, high)
    words: list[str] = []
    while len(words) < wanted:
        word = pick_word(rng, unseen)
        if word not in words:
            words.append(word)
    return words


def listed(words: Sequence[str], rng: Random) -> str:
    """The words with commas between, now and then with an "and" before the last, or with spaces only."""
    kind = rng.random()
    if kind < 0.2:
        return ", ".join(words[:-1]) + " and " + words[-1]
    return ", ".join(words) if kind < 0.92 else " ".join(words)


# --- arithmetic -------------------------------------------------------------------------------------------------------

_SUM_PHRASES = {
    "+": ("How much is {a} plus {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"),
    "-": ("How much is {a} minus {b}?", "Subtract {b} from {a}.", "What is {a} minus {b}?"),
    "*": ("How much is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} times {b}?", "What is {a} x {b}?"),
    "/": ("How much is {a} divided by {b}?", "Divide {a} by {b}.", "What is {a} divided by {b}?"),
}
_SUM_PHRASES_WITH_SIGN = (
    "What is {a} {op} {b}?",
    "What is {a} {op} {b}?",
    "{a} {op} {b}",
    "{a} {op} {b} =",
    "Calculate {a} {op} {b}.",
    "{a}{op}{b}",
    "What is {a}{op}{b}?",
)


def _ask_sum(rng: Random, a: int, op: str, b: int) -> str:
    phrases = _SUM_PHRASES[op] if rng.random() < 0.4 else _SUM_PHRASES_WITH_SIGN
    return rng.choice(phrases).format(a=a, op=op, b=b)


def make_add(rng: Random, _held_out: bool) -> Example:
    a, b = rng.randrange(100), rng.randrange(100)
    key = f"add {min(a, b)} {max(a, b)}"
    return Example("add", _ask_sum(rng, a, "+", b), f"{a} + {b} = {a + b}", key, a + b)


def make_add_large(rng: Random, _held_out: bool) -> Example:
    """Sums of up to four digits, at least one number beyond two: what the last step of `make_multiply` needs."""
    a, b = rng.randrange(100, rng.choice((1000, 10000))), rng.randrange(rng.choice((100, 1000, 10000)))
    if rng.random() < 0.5:
        a, b = b, a
    key = f"add {min(a, b)} {max(a, b)}"
    return Example("add_large", _ask_sum(rng, a, "+", b), f"{a} + {b} = {a + b}", key, a + b)


def make_subtract_large(rng: Random, _held_out: bool) -> Example:
    """Differences of numbers of up to four digits, the larger one beyond two; the result is not negative."""
    a = rng.randrange(100, rng.choice((1000, 10000)))
    b = rng.randrange(min(a + 1, rng.choice((100, 1000, 10000))))
    return Example("subtract_large", _ask_sum(rng, a, "-", b), f"{a} - {b} = {a - b}", f"subtract {b} {a}", a - b)


def make_subtract(rng: Random, _held_out: bool) -> Example:
    a, b = rng.randrange(100), rng.randrange(100)
    key = f"subtract {min(a, b)} {max(a, b)}"
    return Example("subtract", _ask_sum(rng, a, "-", b), f"{a} - {b} = {a - b}", key, a - b)


def make_times_table(rng: Random, _held_out: bool) -> Example:
    """A one-digit number times one of at most two digits: learnt by heart, as a step of `make_multiply`."""
    a, b = rng.randrange(100), rng.randrange(10)
    if rng.random() < 0.5:
        a, b = b, a
    return Example("times_table", _ask_sum(rng, a, "*", b), f"{a} * {b} = {a * b}", None, a * b)


def make_divide(rng: Random, _held_out: bool) -> Example:
    """The times table the other way round, learnt by heart; divisions come out even."""
    a, b = rng.randrange(100), rng.randrange(1, 10)
    return Example("divide", _ask_sum(rng, a * b, "/", b), f"{a * b} / {b} = {a}", None, a)


def make_multiply(rng: Random, _held_out: bool) -> Example:
    """Two two-digit numbers; the answer shows the steps that lead to it."""
    a, b = rng.randrange(10, 100), rng.randrange(10, 100)
    tens, ones = b - b % 10, b % 10
    steps = f" = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones}" if ones else ""
    key = f"multiply {min(a, b)} {max(a, b)}"
    return Example("multiply", _ask_sum(rng, a, "*", b), f"{a} * {b}{steps} = {a * b}", key)


# --- words ------------------------------------------------------------------------------------------------------------

_REVERSE_LETTERS = (
    'Reverse the word "{w}".',
    'Spell "{w}" backwards.',
    'Reverse "{w}"',
    "Reverse the word {w}.",
    "Write the word {w} backwards.",
    "Spell {w} backwards.",
    "Reverse {w}",
)
_REVERSE_WORDS = (
    "Reverse the order of these words: {l}",
    "Reverse this list: {l}",
    "Reverse the words {l}.",
    "Write these words in reverse order: {l}",
)
_SORT_WORDS = (
    "Sort these words: {l}",
    "Sort alphabetically: {l}",
    "Put these words in alphabetical order: {l}",
    "Sort the words {l}.",
    "Sort this list: {l}",
    "Sort: {l}",
)


def make_reverse_letters(rng: Random, held_out: bool) -> Example:
    word = pick_word(rng, held_out)
    key = word
    if not held_out and rng.random() < 0.1:
        word = word.capitalize()
    return Example("reverse_letters", rng.choice(_REVERSE_LETTERS).format(w=word), word[::-1], key)


def make_reverse_words(rng: Random, held_out: bool) -> Example:
    words = pick_words(rng, held_out)
    prompt = rng.choice(_REVERSE_WORDS).format(l=listed(words, rng))
    return Example("reverse_words", prompt, ", ".join(reversed(words)), "reverse " + " ".join(words))


def make_sort_words(rng: Random, held_out: bool) -> Example:
    words = pick_words(rng, held_out)
    prompt = rng.choice(_SORT_WORDS).format(l=listed(words, rng))
    return Example("sort_words", prompt, ", ".join(sorted(words)), "sort " + " ".join(sorted(words)))


def make_sort_numbers(rng: Random, _held_out: bool) -> Example:
    numbers = sorted(rng.sample(range(100), rng.randint(3, 6)))
    key = "sort " + " ".join(map(str, numbers))
    answer = ", ".join(map(str, numbers))
    rng.shuffle(numbers)
    phrase = rng.choice(("Sort these numbers: {l}", "Sort the numbers {l}."))
    prompt = phrase.format(l=listed([str(number) for number in numbers], rng))
    return Example("sort_numbers", prompt, answer, key)


# --- counting ---------------------------------------------------------------------------------------------------------


def make_count(rng: Random, _held_out: bool, longest: int = 40) -> Example:
    """Count up or down, by ones or by a larger step, over at most `longest` numbers."""
    step = rng.choice((1, 1, 1, 1, 1, -1, -1, 2, 5, 10))
    length = rng.randint(2, longest) if longest <= 40 else rng.randint(40, longest)
    low = rng.choice((0, 1, 1, 1, rng.randrange(100), rng.randrange(1000 - longest * 10))) if longest <= 40 else 1
    numbers = range(low, low + length * abs(step), abs(step))
    if step < 0:
        numbers = numbers[::-1]
    start, end = numbers[0], numbers[-1]
    if step == 1:
        phrases: tuple[str, ...] = ("Count from {s} to {e}.", "Count from {s} to {e}", "Count up from {s} to {e}.")
        if start == 1:
            phrases += ("Count to {e}.",)
    elif step == -1:
        phrases = ("Count down from {s} to {e}.", "Count from {s} down to {e}.", "Count backwards from {s} to {e}.")
    else:
        phrases = ("Count from {s} to {e} in steps of {t}.", "Count from {s} to {e} by {t}.")
    prompt = rng.choice(phrases).format(s=start, e=end, t=step)
    return Example("count", prompt, ", ".join(map(str, numbers)), f"count {start} {end} {step}")


def make_count_letters(rng: Random, held_out: bool) -> Example:
    word = pick_word(rng, held_out)
    if rng.random() < 0.5:
        n = len(word)
        prompt = rng.choice(
            (
                'How many letters are in the word "{w}"?',
                'How many letters does "{w}" have?',
                "How many letters are in {w}?",
            )
        )
        return Example("count_letters", prompt.format(w=word), f'The word "{word}" has {n} letters.', word, n)
    letter = rng.choice(word)
    n = word.count(letter)
    prompt = rng.choice(('How often does the letter {c} occur in "{w}"?', 'How many times is the letter {c} in "{w}"?'))
    answer = f'The letter {letter} occurs {n} time{"s" * (n != 1)} in "{word}".'
    return Example("count_letters", prompt.format(c=letter, w=word), answer, word, n)


def make_count_items(rng: Random, held_out: bool) -> Example:
    words = pick_words(rng, held_out, 2, 8)
    prompt = rng.choice(("How many words are in this list: {l}?", "Count these words: {l}"))
    answer = f"The list has {len(words)} words."
    return Example("count_words", prompt.format(l=listed(words, rng)), answer, "items " + " ".join(words), len(words))


def make_draw(rng: Random, _held_out: bool) -> Example:
    name, n = rng.choice([*facts.EMOJI]), rng.randint(1, 12)
    prompt = rng.choice(("Draw {n} {w} emoji.", "Show me {n} {w} emoji.")).format(n=n, w=name)
    return Example("emoji", prompt, facts.EMOJI[name] * n, None)


# --- by heart ---------------------------------------------------------------------------------------------------------


def make_fact(rng: Random, _held_out: bool) -> Example:
    if rng.random() < 0.4:
        country, city = rng.choice([*facts.CAPITALS.items()])
        phrases = ("What is the capital of {c}?", "Name the capital of {c}.", "Which city is the capital of {c}?")
        prompt = rng.choice(phrases).format(c=country)
        return Example("facts", prompt, f"The capital of {country} is {city}.", None, city)
    questions, sentence, value = rng.choice(facts.FACTS)
    return Example("facts", rng.choice(questions), sentence, None, int(value) if value.isdigit() else value)


def make_unknown(rng: Random, _held_out: bool) -> Example:
    """A question out of reach, perhaps in another script, and the admission that it is."""
    kind = rng.random()
    if kind < 0.15:
        first = rng.choice((0x0400, 0x0370, 0x4E00, 0x3040, 0x0600, 0x1F300, 0x00C0))
        prompt = "".join(chr(first + rng.randrange(64)) for _ in range(rng.randint(2, 12)))
    elif kind < 0.3:
        prompt = rng.choice(facts.UNKNOWN)
    else:
        phrase = rng.choice(facts.UNKNOWN_PHRASES)
        prompt = phrase.format(w=pick_word(rng, False), n=rng.choice(facts.NAMES), c=rng.choice(facts.CITIES))
    return Example("unknown", prompt, facts.UNKNOWN_ANSWER, None)


def make_repeat(rng: Random, held_out: bool) -> Example:
    words = pick_words(rng, held_out, 1, 8)
    text = rng.choice((" ", ", ")).join(words)
    phrase = rng.choice(("Repeat after me: {t}", "Repeat: {t}", 'Say "{t}"', "Repeat these words: {t}"))
    return Example("repeat", phrase.format(t=text), text, "repeat " + " ".join(words))


def make_small_talk(rng: Random, _held_out: bool) -> Example:
    questions, answer = rng.choice(facts.SMALL_TALK)
    return Example("small_talk", rng.choice(questions), answer, None)


# Tasks whose prompts may be written carelessly: no name, list or quotation in them depends on capitals.
_CARELESS = {"add", "subtract", "add_large", "subtract_large", "multiply", "divide", "times_table"}
_CARELESS |= {"facts", "small_talk", "unknown", "count", "emoji"}


def carelessly(example: Example, rng: Random) -> Example:
    """The example as a hurried person would type it: small letters, or no full stop at the end."""
    prompt, kind = example.prompt, rng.random()
    if kind < 0.5 and example.task in _CARELESS:
        prompt = prompt.lower()
    elif kind < 0.6:
        prompt = prompt[0].lower() + prompt[1:]
    if rng.random() < 0.5 and prompt[-1] in ".?!":
        prompt = prompt[:-1]
    return example._replace(prompt=prompt)


Maker = Callable[[Random, bool], Example]


def make(maker: Maker, rng: Random, *, held_out: bool) -> Example:
    """An example of the wanted split; of what is learnt by heart, any example."""
    while True:
        example = maker(rng, held_out)
        if example.key is None or is_held_out(example.key) == held_out:
            return example
