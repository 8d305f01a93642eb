"""Draws words, says values, and writes the rows of the task and of the primer.

What is drawn from is in nano/words/. Each writer is a random generator: its seed decides its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any, Final

from ruamel.yaml import YAML

Turn = tuple[str, str]  # what the user says, what the assistant answers
Row = dict[str, list[dict[str, str]]]
Pools = dict[str, Sequence[Any]]  # kind of value -> the values that one split may use

SPLITS: Final = ("train", "valid", "test")
INVENTED_SHARE: Final = 0.75  # of a training row's copied values: a list would be learnt by heart
COPYING_FIRST: Final = 0.15  # of the primer only repeats: the rest is learnt once copying works
MAX_CHARACTERS: Final = 500  # of a conversation of the primer: short ones make quick steps


def load(name: str) -> SimpleNamespace:
    """Returns a YAML file of this folder, its keys as attributes. In YAML 1.2 `no` is a word."""
    content = YAML(typ="safe", pure=True).load(Path(__file__).parent / f"{name}.yaml")
    return SimpleNamespace(**content)


TASK, VALUES, ENGLISH, PRIMER = (
    load(f"words/{name}") for name in ("task", "values", "english", "primer")
)
SLOT: Final = re.compile(r"{(\w+)}")
CALL_NAME: Final = re.compile("|".join(TASK.calls) + '|"call":')

SHARED: Final[Pools] = {  # keywords, the same in every split: they are known, not copied
    "day": VALUES.days,
    "room": VALUES.rooms,
    "currency": sorted(VALUES.currencies),
    "people": range(2, 25),
}
EVERY_TIME: Final = [f"{hour:02d}:{minute:02d}" for hour in range(24) for minute in range(60)]


def time_split(time: str) -> str:
    """Returns the split that may use a clock time.

    Train has every hour and every minute, but not every pair. Chance would keep an hour's only
    spoken forms ("eight pm", "half past eight") from it.
    """
    diagonal = (int(time[:2]) + int(time[3:]) // 5) % 12
    return {0: "valid", 1: "test", 2: "test"}.get(diagonal, "train")


# The clock times of each split. The primer has all but the held-out ones; train's most often.
TIMES: Final = {s: [t for t in EVERY_TIME[::5] if time_split(t) == s] for s in SPLITS}
PRIMER_TIMES: Final = [
    *(time for time in EVERY_TIME if time not in TIMES["valid"] + TIMES["test"]),
    *TIMES["train"] * 4,
]


def to_json(value: Any) -> str:
    """Returns the one serialisation that rows and answers have."""
    return json.dumps(value, ensure_ascii=False)


def make_row(turns: Iterable[Turn]) -> Row:
    """Returns a conversation as one row of a data file."""
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"messages": messages}


def space_words(text: str) -> str:
    """Returns the words of a text in lower case, with blanks around them."""
    return " ".join(("", *re.findall(r"\w+", text.lower()), ""))


def find_spaced(sought: Iterable[str], text: str) -> list[str]:
    """Returns those of the spaced texts that stand in `text`, word by word, whatever the case."""
    words = space_words(text)
    return [spaced for spaced in sought if spaced in words]


def number_word(n: int) -> str:
    """Returns the English for 0 to 99."""
    if n < 20:
        return VALUES.ones[n]
    return VALUES.tens[n // 10 - 2] + (f" {VALUES.ones[n % 10]}" if n % 10 else "")


class Writer(Random):
    """Draws words and says values: what the task and the primer have in common."""

    def chance(self, share: float) -> bool:
        """Returns True in that share of cases."""
        return self.random() < share

    def say(self, kind: str, value: Any, on: bool = False) -> str:
        """Says a value in one of the ways of its kind; `on`: `on friday`, not `friday`."""
        if kind in ("number", "people"):
            return number_word(value) if self.chance(0.5) else str(value)
        if kind == "time":
            return self.say_time(value)
        if kind == "minutes":
            return self.say_minutes(value)
        if kind == "money":
            return self.say_money(**value)
        if kind == "day" and value not in ("today", "tomorrow"):
            name = self.choice((value, value.capitalize()))
            return self.choice(("on ", "on ", "this ")) + name if on else name
        return str(value)

    def say_time(self, time: str) -> str:
        """Says a 24-hour time: `19:30`, `7:30 pm`, `half past seven pm`."""
        hour, minute = time.split(":")
        h12, half = (int(hour) + 11) % 12 + 1, "am" if int(hour) < 12 else "pm"
        way = self.choice(VALUES.clock["always"] + VALUES.clock.get(minute, []))
        return way.format(time=time, hour=h12, name=number_word(h12), minute=minute, half=half)

    def say_minutes(self, minutes: int) -> str:
        """Says `45 minutes`, `half an hour` or `two hours`."""
        if minutes == 30 and self.chance(0.5):
            return "half an hour"
        if minutes == 60:
            return self.choice(("an hour", "one hour", "1 hour"))
        if minutes % 60 == 0:
            return f"{self.say('number', minutes // 60)} hours"
        return f"{self.say('number', minutes)} minutes"

    def say_money(self, amount: float, currency: str) -> str:
        """Says `20 euros`, `€20`, `twenty dollars` or `12.50 GBP`."""
        forms = VALUES.currencies[currency]
        if isinstance(amount, int) and amount < 100 and self.chance(0.25):
            return forms[0].format(number_word(amount))
        digits = str(amount) if isinstance(amount, int) else f"{amount:.2f}"
        return self.choice((forms[0], *forms)).format(digits)

    def invent_word(self) -> str:
        """Returns a pronounceable word that likely nobody has seen; now and then random letters."""
        if self.chance(0.12):
            return "".join(self.choice(ascii_lowercase) for _ in range(self.randint(2, 8)))
        word = ""
        for _ in range(self.choice((1, 1, 1, 2, 2, 2, 3))):
            word += self.choice(ENGLISH.onsets) if self.chance(0.9) else ""
            word += self.choice(ENGLISH.vowels)
            word += self.choice(ENGLISH.codas) if self.chance(0.45) else ""
        return word

    def draw(self, words: Sequence[str], share: float) -> str:
        """Returns one of the words in that share of cases, else a made-up word."""
        return self.choice(words) if self.chance(share) else self.invent_word()

    def draw_english(self) -> str:
        """Returns an English word; rarely one that could as well join two parts of a sentence."""
        nouns, others = ENGLISH.nouns, (ENGLISH.adjectives, ENGLISH.verbs, ENGLISH.links)
        word = self.choice(self.choice((nouns, nouns, *others)))
        return word if word not in PRIMER.markers or self.chance(0.2) else self.choice(nouns)

    def draw_word(self) -> str:
        """Returns a made-up word or an English one."""
        return self.invent_word() if self.chance(0.5) else self.draw_english()

    def draw_words(self, low: int, high: int) -> str:
        """Returns words; at times two are alike, since copying has to keep its place."""
        words = [self.draw_word() for _ in range(self.randint(low, high))]
        if len(words) > 1 and self.chance(0.25):
            i, j = self.sample(range(len(words)), 2)
            same = self.chance(0.3)
            words[j] = words[i] if same else words[i][: self.randint(1, 3)] + self.invent_word()
        return " ".join(words)

    def draw_name(self) -> str:
        """Returns one or two capitalised made-up words; at times both begin alike."""
        first, second = self.invent_word(), self.invent_word()
        if self.chance(0.25):
            second = first[: self.randint(1, 2)] + second
        names = (first.capitalize(), second.capitalize())
        return " ".join(names[: self.choice((1, 1, 1, 2))])

    def draw_noun(self) -> str:
        """Returns a noun, often with an adjective."""
        noun = self.draw(ENGLISH.nouns, 0.6)
        return f"{self.draw(ENGLISH.adjectives, 0.7)} {noun}" if self.chance(0.6) else noun

    def draw_action(self) -> str:
        """Returns what one can do: a verb and its object."""
        verb = self.draw(ENGLISH.verbs, 0.6)
        article = self.choice(("the", "my", "a", "some", "your"))
        return f"{verb} {article} {self.choice((self.draw_noun, self.draw_word))()}"

    def draw_clause(self) -> str:
        """Returns a short statement."""
        pronoun = self.choice(ENGLISH.pronouns)
        things = [f"the {self.draw_word()}", f"my {self.draw_word()}", f"our {self.draw_noun()}"]
        thing = self.choice((*things, self.draw_word()))
        subject = self.choice((pronoun, pronoun, thing, thing, self.draw_name()))
        state = self.choice(ENGLISH.states)
        act = self.choice(ENGLISH.verbs) + self.choice(("", "s", "ed"))
        verb = self.choice((state, state, act, self.invent_word()))
        return f"{subject} {verb} {self.draw_words(1, 4)}"


class TaskWriter(Writer):
    """Writes requests and their calls."""

    def invent_value(self, kind: str) -> str:
        """Returns a made-up value; often one of its words begins or ends like an English one.

        `package` does so, too: no part of a word must decide how the rest of it is copied.
        """

        def fill(slot: re.Match[str]) -> str:
            pool = getattr(ENGLISH, f"{slot[1].lower()}s", None)
            word = self.draw(pool, 0.8) if pool else self.invent_word()
            return word.capitalize() if slot[1].istitle() else word

        if kind in VALUES.patterns:
            words = SLOT.sub(fill, self.choice(VALUES.patterns[kind])).split()
        else:
            words = {"task": self.draw_action, "text": self.draw_clause}[kind]().split()
        if self.chance(0.4):
            at = self.randrange(len(words))
            pool = (*ENGLISH.nouns, *ENGLISH.verbs, *ENGLISH.adjectives)
            one, other = self.choice(pool), self.choice(pool)
            whole = self.chance(0.4)
            new = one + self.invent_word() if whole else one[:4] + other[-self.randint(2, 4) :]
            words[at] = new.capitalize() if words[at][0].isupper() else new
        return " ".join(words)

    def fill_phrasing(self, name: str, phrasing: str, pools: Pools, invented_share: float) -> Turn:
        """Returns a request with values from `pools`, some of them made up, and its JSON call."""
        spoken: dict[str, str] = {}
        values: dict[str, Any] = {"call": name}
        for field, kind in TASK.calls[name]["fields"].items():
            invents = invented_share and kind in VALUES.copied and self.chance(invented_share)
            value = self.invent_value(kind) if invents else self.choice(pools[kind])
            values[field] = value
            spoken[kind] = self.say(kind, value)
            if kind == "day":
                spoken["on_day"] = self.say("day", value, on=True)
            if kind == "currency":
                spoken["money"] = self.say_money(values["amount"], value)
        return phrasing.format(**spoken), to_json(values)

    def write_task(
        self, split: str, pools: Pools, count: int, names: Sequence[str], held_out: Sequence[str]
    ) -> list[Row]:
        """Returns different rows of a split, spread evenly over the calls and their phrasings."""
        rows: dict[str, Row] = {}
        turn = 0
        calls = [name for name in TASK.calls if name in names]
        invented_share = INVENTED_SHARE if split == "train" else 0
        while len(rows) < count:
            name, nth = calls[turn % len(calls)], turn // len(calls)
            phrasings = TASK.calls[name][split]
            phrasing = phrasings[nth % len(phrasings)]
            request, answer = self.fill_phrasing(name, phrasing, pools, invented_share)
            ends_free = phrasing.endswith(("{task}", "{text}"))
            closer = "" if ends_free else self.choice(TASK.closers[split])
            request = self.choice(TASK.openers[split]) + request + closer
            if split != "train" or not find_spaced(held_out, request):
                rows.setdefault(request, make_row([(request, answer)]))
                turn += 1
        ordered = list(rows.values())
        self.shuffle(ordered)
        return ordered


class PrimerWriter(Writer):
    """Writes conversations of general skills."""

    def draw_place(self) -> str:
        """Returns the name of a restaurant or hotel."""
        first = self.choice(("The ", "", "", ""))
        first += self.choice((self.invent_word, self.draw_english))().capitalize()
        second = self.choice((self.draw_name(), self.choice(ENGLISH.nouns).capitalize()))
        return first + self.choice(("", "", "'s", f" {second}", f" {second}", f" and {second}"))

    def draw_money(self) -> dict[str, Any]:
        """Returns an amount of money; one in three ends in a half."""
        amounts = (self.randint(1, 99), self.randint(1, 999), self.randint(1, 99) + 0.5)
        return {"amount": self.choice(amounts), "currency": self.choice(SHARED["currency"])}

    def draw_value(self, kind: str, on: bool = False) -> tuple[str, Any]:
        """Returns a value as it is said, and as it stands in JSON."""
        nouns, hours = ENGLISH.nouns, (30, 60, 120, 180, 240, 300, 360)
        draw: dict[str, Callable[[], Any]] = {
            "time": lambda: self.choice(PRIMER_TIMES),
            "day": lambda: self.choice(VALUES.days),
            "number": lambda: self.choice((self.randint(1, 25), self.randint(1, 99))),
            "minutes": lambda: self.choice((self.randint(2, 99), self.choice(hours))),
            "money": self.draw_money,
            "name": lambda: self.draw_name() if self.chance(0.8) else f"my {self.choice(nouns)}",
            "town": self.draw_name,
            "place": self.draw_place,
            "room": lambda: self.choice((*VALUES.rooms, *PRIMER.more_rooms, self.invent_word())),
            "thing": lambda: self.choice(("the ", "a ", "my ", "", "", "")) + self.draw_noun(),
            "title": lambda: self.draw_words(1, 4),
            "job": self.draw_action,
            "words": lambda: self.draw_clause() if self.chance(0.7) else self.draw_words(2, 7),
        }
        value = draw[kind]()
        return self.say(kind, value, on), value

    def write_sentence(self) -> str:
        """Returns a statement with none to three adjuncts around it; their slots are open."""
        group = self.choice(PRIMER.statements)
        statement = self.choice(group["texts"])
        roles = [role for role in group["admits"] if role not in SLOT.findall(statement)]
        front: list[str] = []
        back = [statement]
        for role in self.sample(roles, min(len(roles), self.choice((0, 1, 1, 2, 2, 3)))):
            adjunct = self.choice(PRIMER.adjuncts[role])
            leads = statement.endswith("{words}") or self.chance(0.25)
            (front if leads else back).append(adjunct)
        end = self.choice((" ", " ", " ", ", ")).join(back)
        return " ".join(front) + (self.choice((" ", ", ")) if front else "") + end

    def fill_sentence(self, sentence: str) -> tuple[str, dict[str, Any]]:
        """Returns a sentence with its slots filled, and what it says; money has two keys."""
        spoken: dict[str, str] = {}
        values: dict[str, Any] = {}
        slots = {slot.removeprefix("on_"): slot for slot in SLOT.findall(sentence)}
        for key in filter(slots.get, PRIMER.roles):
            spoken[slots[key]], value = self.draw_value(PRIMER.roles[key], on=slots[key] != key)
            values |= value if isinstance(value, dict) else {key: value}
        return sentence.format(**spoken), values

    def ask(self, kind: str, **parts: str) -> str:
        """Returns a request of a kind about these parts."""
        return self.choice(PRIMER.requests[kind]).format(**parts)

    def repeat(self) -> list[Turn]:
        """Asks for the same words."""
        text = self.draw_words(1, 10)
        return [(self.ask("repeat", t=text), text)]

    def repeat_often(self) -> list[Turn]:
        """Asks for the same words, several times."""
        text, n = self.draw_words(1, 3), self.randint(2, 4)
        return [(f"say {self.say('number', n)} times: {text}", ", ".join([text] * n))]

    def find_part(self) -> list[Turn]:
        """Asks what comes before, after or between markers: where does a part begin and end?"""
        left, middle, right = (self.draw_words(1, 4) for _ in range(3))
        marked = self.chance(0.8)
        m, n = self.sample(PRIMER.markers, 2) if marked else [self.invent_word() for _ in range(2)]
        if m == n or {m, n} & {*f"{left} {middle} {right}".split()}:
            return self.find_part()
        answers = {"after": f"{middle} {n} {right}", "before": left, "between": middle}
        kind = self.choice(("after", "before", "between", "between"))
        return [(self.ask(kind, m=m, n=n, t=f"{left} {m} {middle} {n} {right}"), answers[kind])]

    def pick_words(self) -> list[Turn]:
        """Asks for the first or last word, for the others, for the next, or for a JSON list."""
        words = self.draw_words(3, 7).split()
        i = self.randrange(len(words) - 1)
        if len(set(words)) != len(words):
            return self.pick_words()
        answers = {
            "first word": words[0],
            "last word": words[-1],
            f"the word after {words[i]}": words[i + 1],
            "all but the first word": " ".join(words[1:]),
            "all but the last word": " ".join(words[:-1]),
            "as a JSON list": to_json(words),
        }
        request, answer = self.choice([*answers.items()])
        return [(f"{request}: {' '.join(words)}", answer)]

    def convert(self) -> list[Turn]:
        """Asks for the plain form of a clock time, number, duration, amount of money or day."""
        kind = self.choice(("time", *PRIMER.conversions))
        spoken, value = self.draw_value(kind, on=True)
        request = self.choice(PRIMER.conversions[kind]).format(t=spoken)
        return [(request, value if isinstance(value, str) else to_json(value))]

    def ask_questions(self) -> list[Turn]:
        """Asks one to three questions about a sentence."""
        text, values = self.fill_sentence(self.write_sentence())
        keys = self.sample(sorted(values), min(len(values), self.randint(1, 3)))
        turns = [(self.ask("question", k=key), str(values[key])) for key in keys]
        return [(f"{text}\n{turns[0][0]}", turns[0][1]), *turns[1:]]

    def extract(self) -> list[Turn]:
        """Asks for all or named values of a sentence as JSON; at times again with other values."""
        turns = []
        sentence = self.write_sentence()
        for _ in range(self.choice((1, 1, 1, 2))):
            text, values = self.fill_sentence(sentence)
            if self.chance(0.5):
                turns.append((self.ask("everything", t=text), to_json(values)))
            else:
                keys = self.sample(sorted(values), self.randint(1, len(values)))
                named = " and ".join(filter(None, (", ".join(keys[:-1]), keys[-1])))
                answer = to_json({key: values[key] for key in keys})
                turns.append((self.ask("extract", k=named, t=text), answer))
        return turns

    def read_pairs(self) -> list[Turn]:
        """Asks for pairs of key and value as JSON."""
        kinds = [self.choice(PRIMER.pairs["kinds"]) for _ in range(self.randint(2, 4))]
        nouns = ENGLISH.nouns
        keys = [self.invent_word() if self.chance(0.5) else self.choice(nouns) for _ in kinds]
        spoken, values = zip(*map(self.draw_value, kinds), strict=True)
        inner, outer = self.choice(PRIMER.pairs["signs"])
        pairs = outer.join(map(inner.join, zip(keys, spoken, strict=True)))
        return [(f"as JSON: {pairs}", to_json(dict(zip(keys, values, strict=True))))]

    def finish(self) -> list[Turn]:
        """Asks for the rest of a sentence."""
        whole = self.chance(0.5)
        text = self.draw_clause() if whole else self.fill_sentence(self.write_sentence())[0]
        words = text.split()
        cut = self.randint(1, len(words) - 1) if len(words) > 1 else 1
        return [(f"{text}\nfinish: {' '.join(words[:cut])}", " ".join(words[cut:]) or ".")]

    def write_primer(self, count: int, held_out: Sequence[str]) -> Iterator[Row]:
        """Yields conversations of one or two skills, none with a call or a held-out text."""
        weights = {
            self.extract: 12,
            self.convert: 6,
            self.find_part: 3,
            self.ask_questions: 2,
            self.repeat: 3,
            self.pick_words: 1,
            self.read_pairs: 1,
            self.finish: 1,
            self.repeat_often: 1,
        }
        made, num_copying = 0, round(COPYING_FIRST * count)
        while made < count:
            skills = self.choices([*weights], [*weights.values()], k=self.choice((1, 1, 1, 2)))
            skills = skills if made >= num_copying else [self.repeat]
            turns = [turn for skill in skills for turn in skill()]
            texts = [text for turn in turns for text in turn]
            if sum(map(len, texts)) > MAX_CHARACTERS:
                continue
            if not any(CALL_NAME.search(text) or find_spaced(held_out, text) for text in texts):
                made += 1
                yield make_row(turns)
