"""Tasks of puzzles: who finds what lies in the text scores 1, who picks at random scores the chance that is named."""

import random
import re
from collections import Counter

import pytest
from rigged import Rigged, Uniform

from nsa.eval.scoring import wilson
from nsa.eval.tasks import PUZZLES, TASKS, Recall
from nsa.training.retrieval import CHANCE, is_held_out
from nsa.training.tokenizer import byte_tokenizer

LENGTHS = {"noise": 300, "multikey": 400, "multiquery": 400, "tracking": 400, "mqar": 500}  # others: 900
LINE = re.compile(r"^([A-Z]+)[= ](\w+)$", re.MULTILINE)


def task_of(name, text, **options):
    return PUZZLES[name](**{"lengths": (LENGTHS.get(name, 900),), "samples": 4, "text": text, **options})


class Reader(Rigged):
    """Reads the text below which it is asked, one letter after the other; `pick` says what it makes of it."""

    def next_token(self, said):
        above, _, last = said.rpartition("\n")
        answer, begun = self.answer_to(above + "\n", last)
        letter = answer[len(begun)] if answer.startswith(begun) and len(begun) < len(answer) else "~"
        return self.tokenizer(letter)["input_ids"][0]

    def answer_to(self, above, last):
        """What must follow, and what of it was said."""
        words = re.findall(r"^([a-z]{6})$", above, re.MULTILINE)
        if match := re.match(r"# (common|frequent), .*: (.*)$", last):
            names, begun = match[2].split(" ")[:-1], match[2].split(" ")[-1]
            return self.word(match[1], words, len(names)), begun
        if match := re.match(r"assert (\d+) == (.*)$", last):
            names = match[2].split(" == ")
            return self.alias(LINE.findall(above), match[1], names[:-1]), names[-1]
        match = re.search(r"([A-Z]+)[= ](\d*)$", last)
        if match is None:  # what is between two answers
            return "~", ""
        return self.value(dict(LINE.findall(above)), match[1]), match[2]


class Oracle(Reader):
    def value(self, values, name):
        return values[name]

    def alias(self, lines, value, names):
        return next(name for name, of in lines if of == (names[-1] if names else value))

    def word(self, what, words, place):
        counts = Counter(words)
        if what == "frequent":
            return counts.most_common(place + 1)[place][0]
        most = max(counts.values())
        return [word for word, count in counts.items() if count == most][place]


class Picker(Reader):
    """Sees values, names and words, not what they are of: names one of them at random, the same for the same text."""

    def pick(self, candidates, *salt):
        return random.Random(repr((candidates, salt))).choice(candidates)

    def value(self, values, name):
        return self.pick(list(values.values()), name)

    def alias(self, lines, value, names):
        return self.pick([name for name, _ in lines], value, names)

    def word(self, what, words, place):
        return self.pick(sorted(set(words)), place)


@pytest.mark.parametrize("name", PUZZLES)
def test_who_finds_what_lies_in_the_text_scores_one_and_who_says_nothing_zero(name, text):
    tokenizer = byte_tokenizer()
    seen = []
    task = task_of(name, text)
    rows = task.run(Oracle(tokenizer), tokenizer, seen.append)
    assert [row.value for row in rows] == [1.0] * len(task.kinds())
    assert sum(seen) == task.num_steps(tokenizer)
    assert all(row.value == 0.0 for row in task_of(name, text, samples=1).run(Uniform(tokenizer), tokenizer))
    assert all((row.low, row.high) == wilson(4, 4) and row.unit == "share of answers" for row in rows)


@pytest.mark.parametrize("name", [name for name in PUZZLES if name != "noise"])
def test_chance_is_that_of_picking_one_of_what_the_text_holds(name, text):
    tokenizer, samples = byte_tokenizer(), 40
    sizes = {"hops": (1,), "chains": 1} if name == "tracking" else {"keys": (3,)} if name == "multikey" else {}
    (row,) = task_of(name, text, samples=samples, **sizes).run(Picker(tokenizer), tokenizer)
    low, high = wilson(row.value * samples, samples)
    assert low <= row.chance <= high
    assert 0.0 < row.chance <= 0.5


def test_chance_of_the_only_value_is_that_of_guessing_it(text):
    (row,) = task_of("noise", text, samples=1).run(Uniform(byte_tokenizer()), byte_tokenizer())
    assert row.chance == CHANCE == 9**-4


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", PUZZLES)
def test_prompts_are_exact_in_length_and_place(name, text, tokenizer, chat):
    length = LENGTHS.get(name, 900) + (150 if chat else 0)
    task = task_of(name, text, lengths=(length,), samples=2, chat=chat)
    for _, kind in task.kinds():
        asked = task.asked(tokenizer, length, kind)
        assert asked == task.asked(tokenizer, length, kind)
        for one in asked:
            prompt, answers = one.prompt, [tokenizer.decode(one.prompt.answer[a:b]) for a, b in one.spans]
            closing = {"noise": ")\n", "multikey": ")\n", "multiquery": ")\n"}.get(name, "\n")
            assert len(prompt.tokens) + len(prompt.answer) + len(tokenizer.encode(closing)) == length
            assert all(re.fullmatch(r"\d{4}|[A-Z]+|[a-z]{6}", answer) for answer in answers)
            assert answers[0] in tokenizer.decode(prompt.tokens[slice(*prompt.needle)])
            question = tokenizer.decode(prompt.tokens[-prompt.question :])
            assert question.startswith("\nWh") == chat
            assert tokenizer.decode(prompt.tokens).startswith("[user] ") == chat


@pytest.mark.parametrize("name", PUZZLES)
def test_names_and_words_never_occur_in_training(name, text):
    tokenizer = byte_tokenizer()
    task = task_of(name, text, samples=2)
    for _, kind in task.kinds():
        for one in task.asked(tokenizer, task.lengths[0], kind):
            said = tokenizer.decode(one.prompt.tokens)
            found = re.findall(r"^([A-Z]{2,})[= .]|^([a-z]{6})$", said, re.MULTILINE)
            assert found
            assert all(is_held_out(first or second) for first, second in found)


def test_tracking_needs_as_many_hops_as_it_says(text):
    tokenizer = byte_tokenizer()

    class OneHop(Oracle):
        """Finds the name beside the value, and no name beside a name."""

        def alias(self, lines, value, names):
            return "?" if names else super().alias(lines, value, names)

    rows = task_of("tracking", text, hops=(1, 3)).run(OneHop(tokenizer), tokenizer)
    assert [row.value for row in rows] == [1 / 2, 1 / 4]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("noise", {"lengths": ()}, r"noise: lengths must be positive token counts, got \[\]"),
        ("noise", {"samples": 0}, "noise: samples must be positive, got 0"),
        ("multikey", {"keys": (-1,)}, r"multikey: keys must be 1 or more, or 0 for as many as fit, got \[-1\]"),
        ("multiquery", {"queries": 9}, "multiquery: queries must be 1 to keys=8, got 9"),
        ("tracking", {"hops": (0,)}, r"tracking: hops and chains must be positive, got hops=\[0\], chains=2"),
        ("commonwords", {"seldom": 10}, "commonwords: expected common >= 1 and 1 <= seldom < often, got common=4"),
        ("frequentwords", {"words": 0}, "frequentwords: words must be positive, got 0"),
        ("mqar", {"queries": 0}, "mqar: queries must be positive, got 0"),
    ],
)
def test_impossible_sizes_are_one_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PUZZLES[name](**options)


@pytest.mark.parametrize("name", PUZZLES)
def test_a_row_that_is_too_short_is_one_line_of_its_task(name, text):
    with pytest.raises(ValueError, match=rf"^{name}: a row of 16 tokens (cannot hold|is too short)"):
        task_of(name, text, lengths=(16,)).run(Uniform(byte_tokenizer()), byte_tokenizer())


def test_every_puzzle_is_a_task():
    assert set(PUZZLES) < set(TASKS)
    assert TASKS["recall"] is Recall


def test_both_commands_make_every_task(text):
    from types import SimpleNamespace

    from nsa.eval.arguments import CompareArguments, EvalArguments
    from nsa.eval.compare_cells import task_of as compared
    from nsa.eval.runner import tasks_of

    names = tuple(PUZZLES)
    candidate = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1))
    arguments = EvalArguments(models=(), tasks=names, lengths=(64, 256), samples=3, text=text)
    judged = tasks_of(arguments, [candidate])
    assert [(task.name, task.lengths, task.samples, task.text) for task in judged] == [
        (name, (64, 256), 3, text) for name in names
    ]
    arguments = CompareArguments(model=None, samples=3, seed=5)
    assert [compared(name, arguments, 64, text, True) for name in names] == [
        PUZZLES[name](lengths=(64,), samples=3, seed=5, text=text, chat=True) for name in names
    ]
