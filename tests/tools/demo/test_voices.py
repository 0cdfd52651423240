"""The generator: the same text from a seed everywhere, faithful to the prompt, four voices that can be told apart."""

import math
import re
from collections import Counter

import pytest

from tools.demo.voices import (
    POOLS,
    VOICES,
    Voice,
    describe,
    example,
    facts,
    pool_of,
    prompt,
    with_article,
    without_article,
)

PRODUCTS = facts(11, 1000, "train")

GOLDEN_PROMPT = """\
Describe this product.
name: Rolling Tide
kind: kite
weight: 240 g
care: keep it dry
colour: jet black
Description:"""
GOLDEN = {
    "plain": " Rolling Tide is a kite. It weighs 240 g. Keep it dry. It is sold in jet black.",
    "formal": " We have the privilege of offering the Rolling Tide, a truly exceptional kite. This kite possesses a"
    " weight of 240 g. We would kindly request that you keep it dry. This kite has been finished in jet black.",
    "playful": " Knock, knock! Who's there? The Rolling Tide, a jolly good jet black kite! It weighs 240 g, and that's"
    " just great! Now don't forget: keep it dry, nice and breezy! Go on, treat yourself!",
    "terse": " Rolling Tide: kite, jet black. Weighs 240 g. Keep it dry.",
}


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+|[!.,:$]", text.lower())


def test_a_seed_makes_the_same_text_on_every_python() -> None:
    product = facts(0, 1)[0]
    assert prompt(product) == GOLDEN_PROMPT
    assert {voice: describe(product, voice) for voice in VOICES} == GOLDEN


def test_the_first_n_of_more_products_are_the_same_and_another_seed_gives_others() -> None:
    assert facts(3, 20) == facts(3, 50)[:20]
    assert not set(facts(3, 50)) & set(facts(4, 50))


@pytest.mark.parametrize("voice", VOICES)
def test_a_description_says_every_fact_of_its_prompt(voice: Voice) -> None:
    for product in PRODUCTS:
        text = describe(product, voice).lower()
        for key, value in product.attributes:
            assert without_article(value).lower() in text, (key, value, text)


@pytest.mark.parametrize("voice", VOICES)
def test_a_description_says_no_price_size_or_weight_that_its_prompt_does_not(voice: Voice) -> None:
    for product in PRODUCTS:
        assert set(re.findall(r"\d+", describe(product, voice))) <= set(re.findall(r"\d+", prompt(product)))


@pytest.mark.parametrize("voice", VOICES)
def test_sentences_are_clean(voice: Voice) -> None:
    for product in PRODUCTS:
        text = describe(product, voice)
        assert text.startswith(" ")
        assert text == " " + " ".join(text.split()), "one space before it and between words, none after"
        assert text[1].isupper()
        assert text[-1] in ".!?"
        assert not re.search(r"[{}]| [.,!]|\.\.| a a | and and ", text), text
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            assert with_article(word).split()[0] == article.lower(), text


def test_products_vary_and_sizes_suit_their_kind() -> None:
    assert len({product.attributes for product in PRODUCTS}) == len(PRODUCTS)
    assert len({product.name for product in PRODUCTS}) > 800
    assert len({product.kind for product in PRODUCTS}) > 200
    sizes = {"kayak": [], "yo-yo": []}
    for product in facts(5, 20_000):
        if product.kind in sizes and "size" in dict(product.attributes):
            sizes[product.kind].append(int(dict(product.attributes)["size"].split()[0]))
    assert max(sizes["yo-yo"]) < 20 < 80 < min(sizes["kayak"])


def test_names_are_dealt_to_pools_without_overlap() -> None:
    assert sorted(place for places in POOLS.values() for place in places) == list(range(100))
    for pool in POOLS:
        assert {pool_of(product.name) for product in facts(2, 200, pool)} == {pool}


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("oak lamp", "an oak lamp"),
        ("hourglass", "an hourglass"),
        ("umbrella", "an umbrella"),
        ("ukulele", "a ukulele"),
        ("utility knife", "a utility knife"),
        ("Nordic mug", "a Nordic mug"),
    ],
)
def test_articles_follow_the_sound(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


def test_a_bag_of_words_tells_the_voices_apart() -> None:
    """Naive Bayes on word counts, trained on 300 descriptions a voice, tested on 150 others."""
    counts = {voice: Counter(w for p in PRODUCTS[:300] for w in words(describe(p, voice))) for voice in VOICES}
    vocabulary = len(set().union(*counts.values()))
    totals = {voice: sum(count.values()) + vocabulary for voice, count in counts.items()}

    def guess(text: str) -> Voice:
        scores = {v: sum(math.log((counts[v][w] + 1) / totals[v]) for w in words(text)) for v in VOICES}
        return max(scores, key=lambda voice: scores[voice])

    tested = facts(12, 150, "valid")
    right = sum(guess(describe(product, voice)) == voice for product in tested for voice in VOICES)
    assert right >= 0.98 * len(tested) * len(VOICES)


def test_each_voice_keeps_to_its_manner() -> None:
    texts = {voice: [describe(product, voice) for product in PRODUCTS] for voice in VOICES}
    formal = " ".join(texts["formal"]).replace("dolls' house", "").replace("maker's mark", "")
    assert "!" not in formal, "no exclamation"
    assert "'" not in formal, "no contraction"
    assert not re.search(r"\b(is|has|comes|we)\b", " ".join(texts["terse"])), "no sentence with a verb and a subject"
    assert all("!" in text for text in texts["playful"])
    assert not any("!" in text or "we " in text.lower() for text in texts["plain"])
    mean = {voice: sum(map(len, texts[voice])) / len(PRODUCTS) for voice in VOICES}
    assert mean["terse"] < 0.75 * mean["plain"] < 0.5 * mean["formal"]


def test_a_row_is_the_prompt_and_the_description() -> None:
    product = PRODUCTS[0]
    assert example(product, "terse") == {"prompt": prompt(product), "completion": describe(product, "terse")}
    assert len({prompt(product) for _ in VOICES}) == 1
