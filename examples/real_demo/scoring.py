"""How good answers are, in percent: two scores for each task."""

import json

from graftlm.scores import score


def scores(task, rows, kind):
    """{name: percent} of the answers `kind`, base or tuned, in `rows`."""

    def mean(measure):
        return 100 * sum(measure(row[kind], row) for row in rows) / len(rows)

    if task == "describe":
        rouge = score("rouge-l", [row[kind] for row in rows], [[row["expected"]] for row in rows])
        return {"facts that are named": mean(named), "ROUGE-L": rouge}
    if task == "extract":
        keys = mean(lambda text, row: list(as_object(text)) == list(as_object(row["expected"])))
        return {"JSON with the eight keys": keys, "facts that are right": mean(fields)}
    hidden = mean(lambda text, row: "[NAME]" in text and text.count("[NAME]") == row["expected"].count("[NAME]"))
    return {"every name replaced": hidden, "and nothing else changed": mean(lambda text, row: text == row["expected"])}


def named(text, row):
    """The share of the prompt's facts, `key: value` on a line each, whose value is in `text`."""
    facts = dict(line.split(": ", 1) for line in row["prompt"].split("\n\n")[1].splitlines())
    facts.pop("family friendly", None)  # said in too many ways
    return sum(value.lower() in text.lower() for value in facts.values()) / len(facts)


def fields(text, row):
    """The share of the expected JSON's values that `text` has under the same key."""
    found, expected = as_object(text), json.loads(row["expected"])
    return sum(key in found and found[key] == value for key, value in expected.items()) / len(expected)


def as_object(text):
    """The JSON object that `text` is, or an empty one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
