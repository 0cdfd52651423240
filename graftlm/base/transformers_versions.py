"""Where releases of transformers differ for the one who loads a model: what the installed one lacks, and what to do.

    missing_class(config.json's values)   why no model of this type can be built, and which release has one
    own_attention(model)                  the attention that computes what the model's config asks for

Graft takes the releases from OLDEST up to, not including, BELOW, as pyproject.toml says; `make compat` runs the contract
tests with the oldest, one between, and the newest. Names that changed between releases are given in all their forms where
they are used: `caches.ARGUMENTS` and the keywords that `attention.segment_attention` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from graftlm.errors import ModelError, nearest
from graftlm.jsonfile import read_json

INSTALLED: str = transformers.__version__
OLDEST, BELOW = "5.17", "6"
RANGE = f">={OLDEST},<{BELOW}"
FIRST_RELEASES = Path(__file__).with_name("first_releases.json")
"""Causal language models that came after OLDEST: type -> first release. `tools/first_releases.py` writes it."""


def is_known_type(model_type: Any) -> bool:
    """Whether the installed transformers has a config of this type; types that trusted code registered count."""
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def missing_class(values: dict[str, Any]) -> str:
    """Why the installed transformers has no causal language model for a config.json, and the way out."""
    model_type: str = values["model_type"]
    missing = f"transformers {INSTALLED} has no causal language model of type {model_type[:60]!r}"
    known = read_json(FIRST_RELEASES, ModelError)
    first, saved = known["first_release"].get(model_type), _release_of(values.get("transformers_version"))
    if first is not None and Version(first) > Version(INSTALLED):
        return f"{missing}; transformers {first} has one: {_way_to(first)}"
    if is_known_type(model_type):
        return f"{missing}; Graft trains models that AutoModelForCausalLM loads"
    if saved is not None and Version(saved) > Version(INSTALLED):
        return f"{missing}; the model was saved with transformers {saved}, which is newer: {_way_to(saved)}"
    causal: Any = AutoModelForCausalLM._model_mapping  # pyright: ignore[reportPrivateUsage]
    near = nearest(model_type[:60], {kind.model_type for kind in causal}) or "."
    return f"{missing}{near} No release up to {known['surveyed']} has one; model_type in config.json names the architecture"


def _way_to(release: str) -> str:
    if Version(release) >= Version(BELOW):
        return f"this Graft takes transformers {RANGE}, so a newer Graft is needed"
    return f'pip install "transformers>={release},<{BELOW}"'


def _release_of(version: Any) -> str | None:
    """`5.25.0.dev0` -> `5.25.0`: the release in which a version's models are; None for what is no version."""
    try:
        return Version(version).base_version if isinstance(version, str) and len(version) < 40 else None
    except InvalidVersion:
        return None


def own_attention(model: PreTrainedModel) -> tuple[str, str]:
    """The attention that a model comes with, or `eager` where that leaves out what its config asks for; and a note on it.

    Before 5.21 transformers took `sdpa` for models that cap their attention scores (Gemma 2, VaultGemma), and sdpa dropped
    the cap; later ones refuse it.
    """
    config: Any = model.config
    own: str = config._attn_implementation
    if own != "sdpa" or all(getattr(m, "attn_logit_softcapping", None) is None for m in model.modules()):
        return own, ""
    return "eager", (
        f"transformers {INSTALLED} chooses sdpa attention for {type(model).__name__}, which cannot cap attention scores; Graft "
        "caps them as the model's config asks (attn_logit_softcapping)"
    )
