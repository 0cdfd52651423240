"""The releases that brought a model type, as the wheels have them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftlm.base.transformers_versions import BELOW, FIRST_RELEASES, INSTALLED, OLDEST
from tools.first_releases import causal_types, first_releases


def test_a_type_belongs_to_the_first_release_that_has_it_and_the_oldests_are_left_out() -> None:
    types = {"5.17": {"llama"}, "5.18": {"llama", "new"}, "5.19": {"new"}, "5.20": {"llama", "new", "newer"}}
    assert first_releases(types) == {"new": "5.18", "newer": "5.20"}


def test_the_types_of_a_wheel_are_read_from_its_source(tmp_path: Path) -> None:
    source = (
        "raise SystemExit('imported')\n"
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict([('a', 'AForCausalLM'), ('b', ('B1', 'B2'))])\n"
        "OTHER = OrderedDict([('c', 'C')])\n"
    )
    with zipfile.ZipFile(tmp_path / "t.whl", "w") as wheel:
        wheel.writestr("transformers/models/auto/modeling_auto.py", source)
    assert causal_types(tmp_path / "t.whl") == {"a", "b"}


def test_the_installed_transformers_has_the_types_of_its_release_and_not_those_of_later_ones() -> None:
    known = json.loads(FIRST_RELEASES.read_text(encoding="utf-8"))
    installed = Version(INSTALLED)
    for name, release in known["first_release"].items():
        assert Version(OLDEST) < Version(release) < Version(BELOW)
        assert (name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == (Version(release) <= installed), name
