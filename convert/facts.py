"""Facts planted into text and asked for again far later: short statements to be found by the few words of their cue.

A fact gives a thing a value that nobody could guess: `the telephone extension of Martha Quill` is `48213`. It is told
once, in one of many wordings, and said again or asked for in another, with other facts between them, some of the same
kind. What is said again is a whole sentence, so that whoever trusts the first words is right to the end.

This trains what tests of long memory ask for, finding a value by its name; the pass key of `probes` is one of them.
Its sentences and its noun are none of these, and `tests/test_batches.py` holds on to that. Still it is practice for
that kind of test, and a model trained with it is to be compared with a softmax model that was trained with it, too.
"""

import random
import string
from collections.abc import Callable

import torch
from torch import Tensor

# A sequence has one fact for so many tokens.
TOKENS_PER_FACT = 256
# Each sentence has a place of so many tokens to itself, somewhere in which it stands.
PLACE = 64

NAMES = {
    kind: names.split()
    for kind, names in {
        "first": """
            Martha Edwin Clara Tobias Ingrid Rupert Selma Oscar Beatrice Hugo Lydia Conrad Nadia Felix Amelia
            Gordon Irene Walter Sophie Marcus Hannah Victor Dora Leonard Paula Simon Estelle Arthur Greta Julian
            Priya Kenji Amara Omar Lucia Pavel Aisha Mateo Yuki Farid
        """,
        "last": """
            Quill Hargrove Lindqvist Marsh Okafor Penrose Vance Delgado Thornton Becker Whitlock Sato Moreau
            Finch Abbott Novak Carmichael Rossi Holloway Patel Greer Underwood Kowalski Mercer Bright Ashworth
            Nakamura Silva Drummond Keller Ferreira Larsen Osborne Pike Radley Haddad Tran Winslow Yates Zimmer
        """,
        "item": """
            lamp kettle bicycle telescope carpet violin wardrobe compass typewriter lantern saddle barometer
            teapot mirror ladder clock piano anvil globe tent stove hammock sextant bookcase chandelier loom
            barrel kayak easel accordion
        """,
        "place": """
            Ashford Brindle Calder Dunmore Elmstead Farrow Glenside Hartwell Ilford Jessop Kirkby Langley
            Millbrook Norwick Oakham Pelham Quarry Rosslyn Stratton Thornbury Upton Verdale Westgate Yarrow
            Zennor
        """,
        "word": """
            amber falcon marble willow copper thistle harbour velvet ember juniper saffron granite lily raven
            cobalt meadow walnut silver otter cedar crimson heron basalt clover ivory magpie indigo maple topaz
            badger cinnamon osprey quartz bramble scarlet pelican hazel onyx primrose lynx
        """,
    }.items()
}


def _number(choice: random.Random) -> str:
    digits = choice.randint(3, 7)
    return str(choice.randrange(10 ** (digits - 1), 10**digits))


def _code(choice: random.Random) -> str:
    return f"{''.join(choice.sample(string.ascii_uppercase, 2))}-{choice.randrange(100, 10**5)}"


def _words(choice: random.Random) -> str:
    return " ".join(choice.sample(NAMES["word"], choice.randint(1, 2)))


# What has a value, and what such values are like.
THINGS: list[tuple[str, Callable[[random.Random], str]]] = [
    ("the telephone extension of {person}", _number),
    ("the locker number of {person}", _number),
    ("the membership number of {person}", _number),
    ("the badge number of {person}", _number),
    ("the bank account of {person}", _number),
    ("{person}'s ticket number", _number),
    ("{person}'s lucky number", _number),
    ("{person}'s score in the tournament", _number),
    ("the combination of locker {number}", _number),
    ("the combination of the safe in {place}", _number),
    ("the price of the {item} in shop {number}", _number),
    ("the weight of the {item} from {place} in grams", _number),
    ("the inventory number of the {item} in room {number}", _number),
    ("the height of the tower of {place} in millimetres", _number),
    ("the population of {place}", _number),
    ("the number of books in the library of {place}", _number),
    ("the frequency of the radio station in {place}", _number),
    ("the number of the train to {place}", _number),
    ("the door code of house {number} in {place}", _number),
    ("the number of steps from the well to the {item} in {place}", _number),
    ("the serial code of {person}'s {item}", _code),
    ("the number plate of {person}'s car", _code),
    ("the reference of the letter from {place}", _code),
    ("the shelf mark of the book by {person}", _code),
    ("the order code for the {item} in catalogue {number}", _code),
    ("the flight from {place} that {person} takes", _code),
    ("the name of {person}'s ship", _words),
    ("the name of {person}'s horse", _words),
    ("the name of the inn at {place}", _words),
    ("the watchword of the guards of {place}", _words),
    ("{person}'s nickname at school", _words),
    ("the title of the song that {person} wrote", _words),
    ("the colour of the {item} in room {number}", _words),
    ("the emblem of the town of {place}", _words),
]
TOLD = [
    "{Thing} is {value}.",
    "{Thing} is {value}, by the way.",
    "{Thing}: {value}.",
    "Note that {thing} is {value}.",
    "It was written on the wall that {thing} is {value}.",
    "{value} is {thing}.",
    "They had agreed on it long before: {thing} is {value}.",
    "A letter came that day, and it said that {thing} is {value}.",
    "According to the register, {thing} is {value}.",
    "Few people know it, but {thing} is {value}.",
    "For the record, {thing} is {value}.",
    "As for {thing}, it is {value}.",
]
ASKED = [
    "{Thing} is {value}.",
    "{Thing}: {value}.",
    "As was said before, {thing} is {value}.",
    "So {thing} is still {value}.",
    "Once more, {thing} is {value}.",
    "What is {thing}? It is {value}.",
    "And {thing}? {value}.",
    "Question: what is {thing}?\nAnswer: {value}.",
    "Q: {Thing}?\nA: {value}.",
    '"Do you recall {thing}?" "Yes, {value}."',
    "Somebody asked about {thing}. The answer was {value}.",
    "Nobody had forgotten that {thing} is {value}.",
]
BREAKS = [" ", "\n", "\n\n"]


def draw_thing(choice: random.Random, thing: str) -> str:
    """A thing with a name of its own."""
    return thing.format(
        person=f"{choice.choice(NAMES['first'])} {choice.choice(NAMES['last'])}",
        item=choice.choice(NAMES["item"]),
        place=choice.choice(NAMES["place"]),
        number=choice.randint(2, 99),
    )


def plant_facts(input_ids: Tensor, choice: random.Random, tokenizer) -> Tensor:
    """[length]: the text with facts written over it, each told once and, where the text goes on for long enough, said
    again once or twice, an eighth of the sequence or more after the last time. No fact stands in another.

    A sequence of fewer than 256 tokens has none.
    """
    planted, length = input_ids.clone(), len(input_ids)
    free = list(range(length // PLACE))
    apart = 1 + -(-length // (8 * PLACE))

    def write(wordings: list[str], place: int, **words: str) -> bool:
        """Whether it fits there."""
        sentence = choice.choice(wordings).format(**words)
        text = f"{choice.choice(BREAKS)}{sentence}{choice.choice(BREAKS)}"
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) > PLACE:
            return False
        start = place * PLACE + choice.randint(0, PLACE - len(ids))
        planted[start : start + len(ids)] = ids
        free.remove(place)
        return True

    facts = length // TOKENS_PER_FACT
    # About two of each kind, so that their names must tell them apart.
    kinds = choice.sample(THINGS, min(-(-facts // 2), len(THINGS)))
    known = set()
    for _ in range(facts):
        name, draw_value = choice.choice(kinds)
        thing, value = draw_thing(choice, name), draw_value(choice)
        words = {"thing": thing, "Thing": thing[0].upper() + thing[1:], "value": value}
        last = choice.choice(free)
        # Of a thing that has a value, another one would be a lie.
        if thing in known or not write(TOLD, last, **words):
            continue
        known.add(thing)
        for _ in range(choice.randint(1, 2)):
            later = [place for place in free if place >= last + apart]
            if later:
                last = choice.choice(later)
                write(ASKED, last, **words)
    return planted
