"""Writes the quickstart's preference pairs: an instruction, the answer that follows it, the answer
that does not.

    python configs/sample/make_pairs.py [OUT_DIR]

Every scenario is asked twice, with opposite instructions and the same two answers swapped. So each
answer is chosen once and rejected once, and answers alone say nothing: only a model that reads the
instruction can tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

# Counted per family. Every scenario makes two pairs.
TRAIN_SCENARIOS = 56
EVAL_SCENARIOS = 16

FRAMES = (
    "Please {task}, {cue}.",
    "{cue}, {task}.",
    "{task}, {cue}.",
    "Can you {task}, {cue}?",
    "I would like you to {task}. Do it {cue}.",
)
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")

Pair = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Scenario:
    """One task, and its answer on either side of the family's instruction."""

    task: str
    answers: tuple[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of instruction: the wordings of its two opposite sides, and the scenarios it is
    asked about.
    """

    cues: tuple[tuple[str, ...], tuple[str, ...]]
    scenarios: list[Scenario]


def letter_case() -> Family:
    capital = ("in capital letters", "in upper case", "with big letters only")
    small = ("in small letters", "in lower case", "with little letters only")
    animals = words(
        "the cat, the old dog, a grey horse, the little bird, my rabbit, a brown bear, the duck, "
        "our hen"
    )
    actions = words(
        "sleeps in the sun, waits at the door, drinks from the river, hides behind the tree, "
        "runs to the farm, looks at the moon, sits on the wall, eats the green apple, walks over "
        "the bridge"
    )
    scenarios = []
    for animal, action in product(animals, actions):
        answers = f"{animal} {action}.".upper(), f"{animal} {action}."
        scenarios.append(Scenario(f"write that {animal} {action}", answers))
    return Family((capital, small), scenarios)


def numbers() -> Family:
    in_digits = ("with the numbers in digits", "using figures", "with numerals")
    in_words = ("with the numbers in words", "using number words", "with every number spelled out")
    spelled = words("two, three, four, five, six, seven, eight, nine, ten")
    digits = {word: str(value) for value, word in enumerate(spelled, start=2)}
    scenes = cycle(
        (
            "the farm has {} horses and {} hens",
            "the school has {} doors and {} clocks",
            "the harbour has {} boats and {} lamps",
            "the hotel has {} beds and {} chairs",
            "the garden has {} trees and {} flowers",
        )
    )
    scenarios = []
    for (first, second), scene in zip(product(spelled, spelled), scenes, strict=False):
        # The task writes one number in each form, so copying it follows neither instruction.
        task = "tell me that " + scene.format(first, digits[second])
        answers = (
            sentence(scene.format(digits[first], digits[second])),
            sentence(scene.format(first, second)),
        )
        scenarios.append(Scenario(task, answers))
    return Family((in_digits, in_words), scenarios)


def tense() -> Family:
    past = ("in the past tense", "as news from yesterday", "as something already done")
    future = ("in the future tense", "as a plan for tomorrow", "as something still to come")
    actions = words(
        "paint the gate, clean the kitchen, visit the museum, cook the soup, repair the clock, "
        "water the garden, open the shop, call the doctor, mend the car"
    )
    scenarios = []
    for person, action in product(PEOPLE, actions):
        verb, thing = action.split(" ", maxsplit=1)
        answers = f"Yesterday {person} {verb}ed {thing}.", f"Tomorrow {person} will {verb} {thing}."
        scenarios.append(Scenario(f"say that {person} {verb}s {thing}", answers))
    return Family((past, future), scenarios)


def language() -> Family:
    french = ("in French", "for a friend in Paris", "as a French teacher would")
    english = ("in English", "for a friend in London", "as an English teacher would")
    things = {
        "the cat": "le chat",
        "the key": "la clé",
        "the book": "le livre",
        "the letter": "la lettre",
        "the hat": "le chapeau",
        "the lamp": "la lampe",
        "the bread": "le pain",
        "the bottle": "la bouteille",
    }
    places = {
        "in the kitchen": "dans la cuisine",
        "on the table": "sur la table",
        "under the bed": "sous le lit",
        "behind the door": "derrière la porte",
        "in the garden": "dans le jardin",
        "near the window": "près de la fenêtre",
        "in the car": "dans la voiture",
        "on the chair": "sur la chaise",
        "in front of the house": "devant la maison",
    }
    scenarios = []
    for thing, place in product(things, places):
        answers = sentence(f"{things[thing]} est {places[place]}"), sentence(f"{thing} is {place}")
        scenarios.append(Scenario(f"say that {thing} is {place}", answers))
    return Family((french, english), scenarios)


def invitation() -> Family:
    accept = ("with a yes", "by accepting", "as someone who is free that day")
    decline = ("with a no", "by declining", "as someone who is busy that day")
    events = words("picnic, concert, dinner, wedding, party, match, film, lesson, boat trip")
    scenarios = []
    for host, event in product(PEOPLE, events):
        answers = (
            f"Yes, {host}, I will gladly come to the {event}.",
            f"No, {host}, I am sorry to miss the {event}.",
        )
        scenarios.append(Scenario(f"answer {host}, who invites you to the {event}", answers))
    return Family((accept, decline), scenarios)


def review() -> Family:
    praise = ("with praise", "as a happy guest", "with five stars")
    complaint = ("with a complaint", "as an angry guest", "with one star")
    dishes = words("soup, bread, fish, salad, cake, coffee, rice, pie, tea")
    places = words("cafe, hotel, market, harbour, station, museum, theatre, school")
    scenarios = []
    for dish, place in product(dishes, places):
        meal = f"The {dish} at the {place} was"
        answers = f"{meal} fresh and lovely.", f"{meal} stale and awful."
        scenarios.append(Scenario(f"review the {dish} at the {place}", answers))
    return Family((praise, complaint), scenarios)


def words(listed: str) -> list[str]:
    return listed.split(", ")


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(text: str) -> str:
    return capitalized(text) + "."


def digest(text: str) -> int:
    """A key to shuffle by that is the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pairs_of(family: Family, scenario: Scenario) -> Iterator[Pair]:
    """The scenario's two pairs: one for either side of the instruction, with the answers
    swapped.
    """
    for side, cues in enumerate(family.cues):
        draw = digest(f"{scenario.task} {side}")
        cue, frame = cues[draw % len(cues)], FRAMES[draw // len(cues) % len(FRAMES)]
        yield {
            "prompt": [
                {"role": "user", "content": capitalized(frame.format(task=scenario.task, cue=cue))}
            ],
            "chosen": [{"role": "assistant", "content": scenario.answers[side]}],
            "rejected": [{"role": "assistant", "content": scenario.answers[1 - side]}],
        }


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    shuffled = sorted(pairs, key=lambda pair: digest(pair["prompt"][0]["content"]))
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in shuffled]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(out_dir: Path) -> None:
    train: list[Pair] = []
    held_out: list[Pair] = []
    for family in (letter_case(), numbers(), tense(), language(), invitation(), review()):
        # Whole scenarios are held out, so that no answer of eval is ever seen in training.
        shuffled = sorted(family.scenarios, key=lambda scenario: digest(scenario.task))
        for index, scenario in enumerate(shuffled[: EVAL_SCENARIOS + TRAIN_SCENARIOS]):
            (held_out if index < EVAL_SCENARIOS else train).extend(pairs_of(family, scenario))
    out_dir.mkdir(parents=True, exist_ok=True)
    write_pairs(out_dir / "train.jsonl", train)
    write_pairs(out_dir / "eval.jsonl", held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
