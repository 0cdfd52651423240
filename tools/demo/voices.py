"""Invented products, and one description of each in any of four voices.

    facts(seed, n)              n products: a name, a kind, and two to four more attributes in some order
    prompt(product)             the attributes as lines, the same for every voice
    describe(product, voice)    a few short sentences that use every attribute of the prompt, word for word

The bundled base model learns the plain voice; the demo then teaches it one of the other three. What to say is the same
in all of them, how to say it differs, so the difference is a pure shift of style:

    plain      The Velmora is a moss green oak lamp. It is 30 cm tall and costs $49.
    formal     It is our pleasure to present the Velmora, an refined lamp fashioned from oak ...
    playful    Say hello to the Velmora, a cheeky little lamp! It's oak all the way, hip hip hooray! ...
    terse      Velmora. Oak lamp, moss green. 30 cm tall. $49.

Every sentence is drawn from several templates, and what the first sentence leaves out follows in the order of the
prompt. All randomness is `random.Random(seed).random()`, the one method that Python promises never to change, so a seed
means the same text everywhere. Names are dealt to four pools by their checksum (`POOLS`): a product that the base
was trained on has no name in common with one that the demo trains or evaluates on.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

from tools.demo import product_words as words

Voice = Literal["plain", "formal", "playful", "terse"]
Pool = Literal["base", "heldout", "train", "valid"]

VOICES: tuple[Voice, ...] = get_args(Voice)
POOLS: dict[Pool, range] = {
    "base": range(70),
    "heldout": range(70, 75),
    "train": range(75, 90),
    "valid": range(90, 100),
}

PROMPT_HEAD = "Describe this product.\n"
PROMPT_TAIL = "Description:"  # no newline and no space: the completion begins with the space, so neither splits a token

_T = TypeVar("_T")


class Product(NamedTuple):
    """An invented product: its attributes in the order of the prompt, and the seed of everything said about it."""

    attributes: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        return dict(self.attributes)["name"]

    @property
    def kind(self) -> str:
        return dict(self.attributes)["kind"]


class _Dice:
    """Choices made with `random()` alone."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def chance(self, share: float) -> bool:
        return self.random() < share

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[self.below(len(choices))]

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]


# ---------------------------------------------------------------------------------------------------------------------
# Products


def pool_of(name: str) -> Pool:
    """Return the pool that a product's name belongs to."""
    place = zlib.crc32(name.encode()) % 100
    return next(pool for pool, places in POOLS.items() if place in places)


def facts(seed: int, n: int, pool: Pool = "base") -> list[Product]:
    """Return `n` products with names from `pool`; the first n of more are the same products."""
    dice = _Dice(f"products/{pool}/{seed}")
    return [_product(dice, pool) for _ in range(n)]


def prompt(product: Product) -> str:
    """Return the prompt for `product`: the same for every voice."""
    lines = "".join(f"{key}: {value}\n" for key, value in product.attributes)
    return f"{PROMPT_HEAD}{lines}{PROMPT_TAIL}"


def _product(dice: _Dice, pool: Pool) -> Product:
    family = dice.pick(words.FAMILIES)
    kind = dice.pick(family.kinds)
    low, high = {"-": (0.0, 0.35), "+": (0.65, 1.0)}.get(kind[-1], (0.25, 0.7))

    def within(limits: tuple[int, int]) -> float:
        share = low + (high - low) * dice.random()
        return limits[0] * (limits[1] / limits[0]) ** share

    values = {
        "style": dice.pick(words.STYLES),
        "material": dice.pick(family.materials),
        "colour": dice.pick(words.COLOURS),
        "size": f"{round(within(family.centimetres))} {dice.pick(family.directions)}",
        "weight": _weight(within(family.grams)),
        "price": f"${round(within(family.dollars))}",
        "feature": dice.pick(family.features),
        "use": dice.pick(family.uses),
        "origin": dice.pick(words.PLACES),
        "care": dice.pick(family.cares),
        "guarantee": dice.pick(words.GUARANTEES),
    }
    number = dice.pick((2, 3, 3, 4, 4))
    keys = dice.shuffled(list(values))[:number]
    first = [("name", _name(dice, pool)), ("kind", kind.rstrip("+-"))]
    rest = [(key, values[key]) for key in keys]
    attributes = first + rest if dice.chance(0.6) else dice.shuffled(first + rest)
    return Product(tuple(attributes), dice.below(1 << 40))


def _weight(grams: float) -> str:
    if grams < 1000:
        return f"{10 * round(grams / 10)} g"
    if grams < 9950:
        return f"{round(grams / 1000, 1):g} kg"
    return f"{round(grams / 1000)} kg"


def _name(dice: _Dice, pool: Pool) -> str:
    while True:
        if dice.chance(0.35):
            name = f"{dice.pick(words.NAME_FIRST)} {dice.pick(words.NAME_SECOND)}"
        else:
            middle = dice.pick(words.NAME_MIDDLES) if dice.chance(0.6) else ""
            name = dice.pick(words.NAME_STARTS) + middle + dice.pick(words.NAME_ENDS)
        tail = dice.random()
        if tail < 0.08:
            name += f" {dice.pick(words.NAME_TAILS)}"
        elif tail < 0.25:
            name += f" {2 + dice.below(98)}"
        if pool_of(name) == pool and not re.search("aa|ae|ao|ii|iu|uu|uo|[aeiou]{3}|([a-z])\\1\\1", name.lower()):
            return name


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
#
# In a template, {v} is the attribute's value and {V} the same with a capital, {a} has an article and {bare} and {Bare}
# have none; {kind} and {name} are the product's; {np} is the noun phrase.


def describe(product: Product, voice: Voice) -> str:
    """Return a few short sentences about `product` in `voice`, beginning with the space that follows the prompt."""
    dice = _Dice(f"{voice}/{product.seed}")
    write = {"plain": _plain, "formal": _formal, "playful": _playful, "terse": _terse}[voice]
    return " " + " ".join(sentence for sentence in write(product, dice) if sentence)


def example(product: Product, voice: Voice) -> dict[str, str]:
    """Return the product as a training row with `prompt` and `completion`."""
    return {"prompt": prompt(product), "completion": describe(product, voice)}


def with_article(phrase: str) -> str:
    """Return `phrase` with "a" or "an" before it, by sound."""
    silent_h = phrase.startswith(("hour", "honest"))
    like_you = phrase.startswith(("uku", "uni", "use", "uti", "eu", "one"))
    return f"an {phrase}" if silent_h or (phrase[0].lower() in "aeiou" and not like_you) else f"a {phrase}"


def without_article(phrase: str) -> str:
    """Return `phrase` without a leading "a" or "an"."""
    return re.sub(r"^(a|an) ", "", phrase)


def _fill(template: str, product: Product, value: str = "", np: str = "") -> str:
    bare = without_article(value)
    return template.format(
        v=value,
        V=_capital(value),
        bare=bare,
        Bare=_capital(bare),
        a=with_article(value) if value else "",
        kind=product.kind,
        name=product.name,
        np=np,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _some(dice: _Dice, product: Product, shares: dict[str, float]) -> dict[str, str]:
    """Return the attributes that go into the noun phrase, each chosen with its share."""
    return {key: value for key, value in product.attributes if key in shares and dice.chance(shares[key])}


def _left(product: Product, used: dict[str, str]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in product.attributes if k not in used and k not in ("name", "kind")]


# Plain ---------------------------------------------------------------------------------------------------------------

_PLAIN_OPENERS = (
    "The {name} is {np}.",
    "{name} is {np}.",
    "This is the {name}, {np}.",
    "Here is the {name}, {np}.",
    "The {name} is {np}.",
    "Our {name} is {np}.",
)

_PLAIN: dict[str, tuple[str, ...]] = {
    "style": ("has {a} design", "is {v} in style", "has {a} look"),
    "material": ("is made of {v}", "is made from {v}", "uses {v}"),
    "colour": ("comes in {v}", "is {v} in colour", "is sold in {v}"),
    "size": ("is {v}", "is about {v}", "is {v}"),
    "weight": ("weighs {v}", "has a weight of {v}", "weighs about {v}"),
    "price": ("costs {v}", "sells for {v}", "is priced at {v}", "is available for {v}"),
    "feature": ("has {v}", "comes with {v}", "includes {v}"),
    "use": ("is meant for {v}", "is good for {v}", "works well for {v}", "is suitable for {v}", "suits {v}"),
    "origin": ("is made in {v}", "comes from {v}", "is produced in {v}"),
    "guarantee": ("has a guarantee of {v}", "is guaranteed for {v}", "comes with a guarantee of {v}"),
}

_PLAIN_CARE = ("To care for it, {v}.", "{V}.", "To keep it in good condition, {v}.", "For best results, {v}.")


def _plain(product: Product, dice: _Dice) -> Iterator[str]:
    used = _some(
        dice, product, {"style": 0.8, "material": 0.6, "colour": 0.6, "origin": 0.3, "use": 0.3, "feature": 0.3}
    )
    yield _fill(dice.pick(_PLAIN_OPENERS), product, np=with_article(_noun_phrase(product, used, dice)))

    rest = _left(product, used)
    said = [(key, "") if key == "care" else (key, _fill(dice.pick(_PLAIN[key]), product, value)) for key, value in rest]
    at = 0
    while at < len(said):
        key, predicate = said[at]
        subject = "It" if dice.chance(0.75) else dice.pick(("The {kind}", "This {kind}")).format(kind=product.kind)
        if key == "care":
            yield _fill(dice.pick(_PLAIN_CARE), product, rest[at][1])
        elif at + 1 < len(said) and said[at + 1][0] != "care" and dice.chance(0.65):
            yield f"{subject} {_joined(predicate, said[at + 1][1])}."
            at += 1
        else:
            yield f"{subject} {predicate}."
        at += 1


def _noun_phrase(product: Product, used: dict[str, str], dice: _Dice) -> str:
    """Return e.g. "rustic moss green oak lamp with a dimmer switch", its adjectives in the usual order."""
    before: list[str] = [used["style"]] if "style" in used else []
    after: list[str] = []
    if "colour" in used:
        if dice.chance(0.5):
            before.append(used["colour"])
        else:
            after.append(f"in {used['colour']}")
    if "material" in used:
        if dice.chance(0.6):
            before.append(used["material"])
        else:
            after.insert(0, f"made of {used['material']}")
    if "origin" in used:
        after.append(f"from {used['origin']}")
    if "feature" in used:
        after.append(f"with {used['feature']}")
    if "use" in used:
        after.append(f"for {used['use']}")
    return " ".join([*before, product.kind, *after])


def _joined(first: str, second: str) -> str:
    """Return two predicates as one, without saying "has" twice: "has a pull cord and a guarantee of two years"."""
    return f"{first} and {second.removeprefix('has ') if first.startswith('has ') else second}"


# Formal --------------------------------------------------------------------------------------------------------------

_FORMAL_OPENERS = (
    "It is our pleasure to present the {name}, {np}.",
    "We are honoured to introduce the {name}, {np}.",
    "We have the privilege of offering the {name}, {np}.",
    "May we respectfully draw your attention to the {name}, {np}.",
    "Permit us to recommend the {name}, {np}.",
    "We are delighted to announce the arrival of the {name}, {np}.",
)

_FORMAL_ADJECTIVES = ("distinguished", "finely made", "most refined", "truly exceptional", "dignified")

_FORMAL: dict[str, tuple[str, ...]] = {
    "style": ("is distinguished by its {v} character", "reflects a sensibility that is decidedly {v}"),
    "material": ("has been fashioned from {v}", "is composed of carefully selected {v}"),
    "colour": ("is presented in {v}", "has been finished in {v}"),
    "size": ("is precisely {v}", "has been proportioned to be {v}"),
    "weight": ("has a total weight of {v}", "possesses a weight of {v}"),
    "price": ("may be acquired for the sum of {v}", "is offered at a price of {v}"),
    "feature": ("is furnished with {v}", "has been thoughtfully provided with {v}"),
    "use": ("is ideally suited to {v}", "has been conceived with {v} in mind"),
    "origin": ("is produced with great care in {v}", "originates from the workshops of {v}"),
    "guarantee": ("is accompanied by a guarantee of {v}", "is guaranteed for a period of {v}"),
}

_FORMAL_CARE = (
    "We would kindly request that you {v}.",
    "In order to preserve its condition, please {v}.",
    "We would respectfully advise you to {v}.",
)

_FORMAL_SUBJECTS = ("It", "This {kind}", "The {kind}", "Furthermore, it", "In addition, it")


def _formal(product: Product, dice: _Dice) -> Iterator[str]:
    used = _some(dice, product, {"style": 0.5, "material": 0.7, "colour": 0.6})
    adjectives = [dice.pick(_FORMAL_ADJECTIVES)]
    if "style" in used:
        adjectives.append(f"and {used['style']}")
    after: list[str] = []
    if "material" in used:
        after.append(f"{dice.pick(('fashioned from', 'crafted from'))} {used['material']}")
    if "colour" in used:
        after.append(f"{dice.pick(('presented in', 'finished in'))} {used['colour']}")
    phrase = " ".join([*adjectives, product.kind, " and ".join(after)]).strip()
    yield _fill(dice.pick(_FORMAL_OPENERS), product, np=with_article(phrase))

    rest = _left(product, used)
    said = [
        (key, value, "" if key == "care" else _fill(dice.pick(_FORMAL[key]), product, value)) for key, value in rest
    ]
    at = 0
    opened = False
    while at < len(said):
        key, value, predicate = said[at]
        if key == "care":
            yield _fill(dice.pick(_FORMAL_CARE), product, value)
            at += 1
            continue
        subject = dice.pick(_FORMAL_SUBJECTS if opened else _FORMAL_SUBJECTS[:3]).format(kind=product.kind)
        opened = True
        if at + 1 < len(said) and said[at + 1][0] != "care":
            link = dice.pick(("and", "and, moreover,"))
            yield f"{subject} {predicate} {link} {said[at + 1][2]}."
            at += 2
        else:
            yield f"{subject} {predicate}."
            at += 1
    if len(rest) < 2:
        yield dice.pick(("We trust that it will meet your expectations.", "We remain entirely at your service."))


# Playful -------------------------------------------------------------------------------------------------------------

_PLAYFUL_OPENERS = (
    "Say hello to the {name}, {np}!",
    "Ta-da! Meet the {name}, {np}!",
    "Knock, knock! Who's there? The {name}, {np}!",
    "Ooh la la, it's the {name}, {np}!",
    "Psst, you! Yes, you! Here's the {name}, {np}!",
    "Ready, steady, wow! It's the {name}, {np}!",
)

_PLAYFUL_ADJECTIVES = ("cheeky little", "happy-go-lucky", "super-duper", "jolly good", "dreamy")

_PLAYFUL: dict[str, tuple[str, ...]] = {
    "style": ("It's {v}, it's cool, it's nobody's fool!", "So {v}, so neat, it can't be beat!"),
    "material": ("It's {v} all the way, hip hip hooray!", "Made of {v} and a sprinkle of fun!"),
    "colour": ("All dressed up in {v}, just for you!", "It's {v}, it's true, and it's calling for you!"),
    "size": ("It's {v} and oh so proud!", "It's {v}, so shout it out loud!"),
    "weight": ("It weighs {v}, and that's just great!", "It's {v} of pure delight, what a sight!"),
    "price": ("Yours for {v}, isn't that nice? What a price!", "Just {v}, so don't think twice!"),
    "feature": ("It's even got {v}, you lucky thing!", "And guess what? It's got {v}, ding-a-ling!"),
    "use": ("It's made for {v}, so let's go, go, go!", "Did somebody say {v}? Yay!"),
    "origin": ("It skipped all the way from {v} to say hi!", "It's from {v} with love, my oh my!"),
    "care": ("Just {v}, easy peasy!", "Now don't forget: {v}, nice and breezy!"),
    "guarantee": ("It's guaranteed for {v}, so give three cheers!", "Guaranteed for {v}, so dry those tears!"),
}

_PLAYFUL_CLOSERS = (
    "Go on, treat yourself!",
    "Snap it up, buttercup!",
    "You'll love it to bits!",
    "What's not to love?",
)


def _playful(product: Product, dice: _Dice) -> Iterator[str]:
    used = _some(dice, product, {"style": 0.5, "material": 0.6, "colour": 0.5})
    adjectives = [dice.pick(_PLAYFUL_ADJECTIVES)]
    adjectives += [used[key] for key in ("style", "colour", "material") if key in used]
    phrase = " ".join([*adjectives, product.kind])
    yield _fill(dice.pick(_PLAYFUL_OPENERS), product, np=with_article(phrase))

    rest = _left(product, used)
    for key, value in rest:
        yield _fill(dice.pick(_PLAYFUL[key]), product, value)
    if len(rest) < 3:
        yield dice.pick(_PLAYFUL_CLOSERS)


# Terse ---------------------------------------------------------------------------------------------------------------

_TERSE: dict[str, tuple[str, ...]] = {
    "style": ("{V} style.", "{V}."),
    "material": ("All {v}.", "Material: {v}."),
    "colour": ("In {v}.", "{V}."),
    "size": ("{V}.", "Size: {v}."),
    "weight": ("{V}.", "Weighs {v}."),
    "price": ("{V}.", "Price: {v}."),
    "feature": ("{Bare}.", "With {bare}."),
    "use": ("For {v}.", "Use: {v}."),
    "origin": ("From {v}.", "Made in {v}."),
    "care": ("{V}.", "Care: {v}."),
    "guarantee": ("Guaranteed {v}.", "Guarantee: {v}."),
}


def _terse(product: Product, dice: _Dice) -> Iterator[str]:
    used = _some(dice, product, {"style": 0.6, "material": 0.8, "colour": 0.8})
    noun = " ".join([*(used[key] for key in ("style", "material") if key in used), product.kind])
    colour = f", {used['colour']}" if "colour" in used else ""
    yield dice.pick((f"{product.name}. {_capital(noun)}{colour}.", f"{product.name}: {noun}{colour}."))
    for key, value in _left(product, used):
        yield _fill(dice.pick(_TERSE[key]), product, value)
