"""Translate options, under Graft's names or another program's, to fields.

`translated` does it for all options of a command at once, since some have a meaning only together: the batch size per device
and the gradient accumulation steps, the warmup steps and the steps of the run. The names are in `aliases.py` and `answers.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from graftlm.config.aliases import (
    ALIASES,
    ANSWERS,
    LEFT_OUT,
    OPTIMIZERS,
    RANKS,
    SCHEDULERS,
    STEPS,
    TRAINING,
    Alias,
    OptionAnswer,
    former_value,
    number,
)
from graftlm.errors import ConfigError

JOINT: dict[str, str] = {
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size",
    "warmup_steps": "warmup_ratio", "eval_steps": "eval_every", "save_steps": "save_every",
    "metric_for_best_model": "best_by", "greater_is_better": "best_by", "predict_with_generate": "score",
}  # fmt: skip
"""Foreign names whose value follows from two options, and their field."""


def foreign_names(fields: Collection[str], command: str) -> dict[str, bool]:
    """The foreign and former names that a command with these fields takes, each with whether it is a switch."""
    found = {name: alias.switch for name in ALIASES if (alias := alias_of(name, fields, command)) is not None}
    joint = {
        name: False for name, field in JOINT.items() if field in fields and name not in fields and command in TRAINING
    }
    return {**found, **joint}


def alias_of(name: str, fields: Collection[str], command: str) -> Alias | None:
    """The alias that a name is for a command with these fields; None if it is not known."""
    if name in fields:
        return None
    found = ALIASES.get(name, ())
    return next((a for a in found if a.field in fields and (not a.commands or command in a.commands)), None)


def translated(
    values: Mapping[str, Any], fields: Collection[str], command: str, beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Options by field, from names with hyphens or underscores and from aliases; None values are left out.

    `beside` holds options (by field) that are given elsewhere, for values that follow from two. An unknown name is kept, for
    `Config.build` to refuse. Raises ConfigError for an option that is given twice, and for one that has an answer instead of a
    field.
    """
    taken = (*fields, *foreign_names(fields, command), *ANSWERS)
    values = {k: v for k, v in values.items() if v is not None or _underscored(k, fields) not in taken}
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    plain = {_underscored(key, fields): (str(key), value) for key, value in values.items()}
    plain = _joined(plain, values, fields, command, beside)
    for name, (key, value) in plain.items():
        alias = alias_of(name, fields, command)
        if alias is None and name not in fields:
            answer = ANSWERS.get(name)
            if answer is not None and not _is_harmless(answer, value):
                raise ConfigError(f"option '{key}' is not Graft's: {answer.text}")
            if answer is not None:
                continue
        if alias is None and name not in fields:
            found[key] = value  # unknown: `Config.build` refuses it
            continue
        field = name if alias is None else alias.field
        value = LEFT_OUT if value is None else _valued(key, field, value, alias)
        if value is LEFT_OUT:
            continue
        if field in found:
            raise ConfigError(_twice(key, names[field], field))
        found[field], names[field] = value, key
    return found


def _underscored(key: Any, fields: Collection[str]) -> str:
    name = str(key).replace("-", "_")
    return f"{name}_" if f"{name}_" in fields else name  # a keyword of Python's, such as `for`


def _twice(key: str, before: str, field: str) -> str:
    return f"option '{key}' is given twice; keep one of '{before}' and '{key}' (both are --{field.replace('_', '-')})"


def _valued(key: str, field: str, value: Any, alias: Alias | None) -> Any:
    try:
        if alias is not None and alias.translate is not None:
            return alias.translate(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    own = {"lr_scheduler": SCHEDULERS, "optimizer": OPTIMIZERS}.get(field)  # foreign values under the same name
    if own is not None and isinstance(value, str):
        try:
            return own(value)
        except ValueError:
            return value
    return former_value(field, value)


def _is_harmless(answer: OptionAnswer, value: Any) -> bool:
    if value is None or answer.harmless is None:
        return True
    words = [str(word).lower() for word in answer.harmless]
    parts = value if isinstance(value, (list, tuple)) and value else [value]
    return all(str(part).lower() in words for part in parts)


# ---- names that mean something together ------------------------------------------------------------------------------

_Given = dict[str, tuple[str, Any]]  # by underscored name: as it was written, and its value


def _joined(
    plain: _Given, values: Mapping[str, Any], fields: Collection[str], command: str, beside: Mapping[str, Any]
) -> _Given:
    """Replace names whose meaning follows from two of them."""
    if len(plain) < len(values):  # batch-size and batch_size
        seen: dict[str, str] = {}
        for key in map(str, values):
            name = _underscored(key, fields)
            if name in seen:
                raise ConfigError(_twice(key, seen[name], name))
            seen[name] = key
    if "batch_size" in fields and command in TRAINING:
        plain = _batch(plain, beside)
    if "best_by" in fields:
        plain = _best({name: value for name, value in plain.items() if value[1] is not None}, beside)
    if "steps" in fields:
        plain = _lengths(plain, {**beside, **{name: value for name, (_, value) in plain.items() if name in fields}})
    return plain


def _batch(plain: _Given, beside: Mapping[str, Any]) -> _Given:
    """per_device_train_batch_size x gradient_accumulation_steps x ranks; Axolotl's micro_batch_size is the first."""
    each = [name for name in ("per_device_train_batch_size", "micro_batch_size") if name in plain]
    more = "gradient_accumulation_steps"
    if not each and more not in plain:
        return plain
    rest = {name: given for name, given in plain.items() if name not in (*each, more)}
    if len(each) > 1:
        raise ConfigError(_twice(each[1], each[0], "batch_size"))
    if "batch_size" in plain:
        if each == ["micro_batch_size"]:  # Axolotl's batch_size is the whole step's
            return rest
        raise ConfigError(
            f"option '{(each or [more])[0]}' is given twice; keep --batch-size, the examples of one optimizer step"
        )
    if not each:
        raise ConfigError(f"option '{more}' alone does not say how many examples a step has; give --batch-size")
    key, value = plain[each[0]]
    try:
        times = number(plain[more][1]) if more in plain and plain[more][1] is not None else 1.0
        ranks = next((plain[name][1] for name in ("ranks", *RANKS) if name in plain), beside.get("ranks"))
        total = number(value) * times * (1.0 if ranks is None else number(ranks))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    return {**rest, "batch_size": (key, int(total) if total == int(total) else total)}


_SCORES = {
    "loss": None, "score": None, "exact_match": "exact-match", "em": "exact-match", "rouge_l": "rouge-l", "rougel": "rouge-l",
    "bleu": "bleu", "sacrebleu": "bleu",
}  # fmt: skip
"""What `metric_for_best_model` may name, without `eval_`."""


def _best(plain: _Given, beside: Mapping[str, Any]) -> _Given:
    """transformers' metric_for_best_model, which names a score and chooses by it, its direction, and predict_with_generate."""
    found = dict(plain)
    score = found["score"][1] if "score" in found else beside.get("score")
    if "metric_for_best_model" in found:
        key, value = found.pop("metric_for_best_model")
        name = str(value).removeprefix("eval_").replace("-", "_")
        own = str(score).rpartition(":")[2]
        if name.lower() not in _SCORES and name != own:
            raise ConfigError(
                f"{key} '{value}': no such score is taken; give --score exact-match, rouge-l, bleu or FILE.py:FUNCTION, and "
                "--best-by score"
            )
        if "best_by" in found:
            raise ConfigError(_twice(key, found["best_by"][0], "best_by"))
        wanted = _SCORES.get(name.lower())
        if wanted is not None and score not in (None, wanted):
            raise ConfigError(f"{key} '{value}' is not the score that is taken, --score {score}; keep one of the two")
        score = score or wanted
        if wanted is not None and "score" not in found and "score" not in beside:
            found["score"] = (key, wanted)
        found["best_by"] = (key, "loss" if name.lower() == "loss" else "score")
    best_by = found["best_by"][1] if "best_by" in found else beside.get("best_by", "loss")
    for name, meant, why in (
        ("greater_is_better", best_by == "score", "the lower eval loss or the higher score is the better one (--best-by)"),
        ("predict_with_generate", score is not None,
         "give --score exact-match, rouge-l, bleu or FILE.py:FUNCTION, which answers eval prompts, or leave both out"),
    ):  # fmt: skip
        if name in found:
            key, value = found.pop(name)
            if str(value).strip().lower() != str(meant).lower():
                raise ConfigError(f"{key} {value}: {why}")
    return found


def _lengths(plain: _Given, options: Mapping[str, Any]) -> _Given:
    """Options in steps or in shares of a run, and max_steps, which overrides epochs as in transformers."""
    found = dict(plain)
    steps = options.get("steps")
    if "max_steps" in found:
        key, value = found["max_steps"]
        try:
            steps = steps or (None if (limit := STEPS(value)) is LEFT_OUT else limit)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
        if steps is not None:
            for name in ("num_train_epochs", "num_epochs"):
                found.pop(name, None)
    for name, field in (("warmup_steps", "warmup_ratio"), ("eval_steps", "eval_every"), ("save_steps", "save_every")):
        if name not in found:
            continue
        key, value = found.pop(name)
        if value is None:
            continue
        if field in found:
            raise ConfigError(_twice(key, found[field][0], field))
        found[field] = (key, _in_steps(key, field, value, steps))
    return found


def _in_steps(key: str, field: str, value: Any, steps: Any) -> Any:
    flag = f"--{field.replace('_', '-')}"
    try:
        amount = number(value)
        total = None if steps is None else number(steps)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    if field == "warmup_ratio":
        if amount < 1:
            return amount
        if total is None:
            raise ConfigError(
                f"{key} {value}: a number of steps needs --steps beside it; or give {flag}, the share of the run"
            )
        return amount / total
    if amount >= 1:
        return int(amount) if amount == int(amount) else amount
    if total is None:
        raise ConfigError(f"{key} {value}: a share of the run needs --steps beside it; or give {flag} N")
    return max(1, round(amount * total)) if amount > 0 else None
