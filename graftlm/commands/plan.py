"""`graft plan`: what full, LoRA and QLoRA would take, from a config alone.

    find the models -> read the data with their tokenizers -> measure the domain shift -> plan

No weight is read, except to measure how far the data are from the base, which takes a small model seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftlm.config import PlanConfig
from graftlm.config.fields import is_gguf
from graftlm.errors import ConfigError, ModelError
from graftlm.formatting import duration
from graftlm.planning import hardware
from graftlm.planning.hardware import Card
from graftlm.planning.layouts import Cluster
from graftlm.planning.models import NamedModel, built_in, find
from graftlm.planning.perplexity import FEWEST_TOKENS, SAMPLE_TOKENS, DomainShift
from graftlm.planning.plan import ModelPlan, PlanReport, plan_model
from graftlm.planning.timing import EFFICIENCY
from graftlm.progress import working

if TYPE_CHECKING:
    from graftlm.data.dataset import Dataset
    from graftlm.data.sources import Source

QUICK_SECONDS = 20.0
"""The base reads as many tokens as take about so long; the domain shift is measured unasked where these are enough."""


def plan(config: PlanConfig, sources: Sequence[Source] | None = None) -> PlanReport:
    """Plan every model of the config, with the config's data or with `sources`, rows that the caller hands over.

    Raises GraftError for a model, a card or data that cannot be found or read.
    """
    card = _card(config)
    if sources is None and config.data:
        from graftlm.data.sources import named_source

        sources = [named_source(text, "train") for text in config.data]
    models = [find(name, trust_remote_code=config.trust_remote_code) for name in config.models]
    plans = tuple(_plan(model, card, config, sources) for model in models)
    return PlanReport(
        card=card, plans=plans, data=config.data, epochs=config.epochs, price_per_hour=config.price_per_hour,
        explain=config.explain, cluster=Cluster(gpus=config.gpus, nodes=config.nodes),
    )  # fmt: skip


def _plan(model: NamedModel, card: Card, config: PlanConfig, sources: Sequence[Source] | None) -> ModelPlan:
    if not sources:
        return plan_model(model, card, config)
    notes: list[str] = []
    dataset = _read(model, config, sources, notes)
    domain_shift = _measure_domain_shift(model, config, dataset, notes)
    return plan_model(model, card, config, dataset, domain_shift, notes)


def _card(config: PlanConfig) -> Card:
    """The card that is planned for. Raises ConfigError for several that are no GPUs."""
    found = _named_card(config)
    if config.gpus * config.nodes > 1 and found.kind != "cuda":
        asked = f"--gpus {config.gpus}" if config.nodes == 1 else f"--nodes {config.nodes}"
        raise ConfigError(f"{asked} is for GPUs, found {found.name}; give --gpu NAME or --memory 24GB")
    return found


def _named_card(config: PlanConfig) -> Card:
    if config.gpu is not None:
        return hardware.card(config.gpu)
    with working("looking at this machine"):
        return hardware.local() if config.memory is None else hardware.from_memory(config.memory)


def _folder(model: NamedModel) -> Path | None:
    """Where the model's own files are: its directory, or the hub's cache."""
    if model.folder is not None:
        return model.folder
    name = built_in()[model.name]["hub"] if model.name in built_in() else model.name
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _read(model: NamedModel, config: PlanConfig, sources: Sequence[Source], notes: list[str]) -> Dataset:
    """The data through the model's own tokenizer; through the bundled one where that is not here, which makes more tokens."""
    from graftlm import demo
    from graftlm.base.chat import Encoder
    from graftlm.base.loading import load_tokenizer
    from graftlm.data.dataset import load

    folder = _folder(model)
    try:
        tokenizer = load_tokenizer(folder, config.trust_remote_code) if folder is not None else None
    except ModelError:
        tokenizer = None
    if tokenizer is None:
        tokenizer = load_tokenizer(Path(demo.resolve_model("demo")))
        notes.append(
            f"The tokenizer of {model.name} is not here: tokens are counted by the bundled one, whose 4,096 tokens make "
            "about a third more of them. A directory or a hub id with a tokenizer counts them right."
        )
    dataset = load(sources, Encoder(tokenizer, train_on=config.train_on))
    notes += dataset.notes
    return dataset


def _measure_domain_shift(
    model: NamedModel, config: PlanConfig, dataset: Dataset, notes: list[str]
) -> DomainShift | None:
    """The base's own loss on the data, where its weights are here and measuring it is quick, or wanted."""
    from graftlm.base.fingerprint import weight_files

    folder = _folder(model)
    here = folder is not None and bool(weight_files(folder))
    if config.ask_base == "no" or (not here and config.ask_base == "auto"):
        return None
    if folder is None or not here:
        raise ModelError(f"ask-base yes: the weights of {model.name} are not here; give a directory that holds them")
    tokens = sample_tokens(model, config, notes)
    if not tokens:
        return None
    from graftlm.base.loading import load_base
    from graftlm.gguf.folder import gguf_of
    from graftlm.planning.domain_shift import LONGEST, measure_domain_shift, sample_examples

    base = load_base(
        model.name if is_gguf(model.name) else str(folder),  # a GGUF file's folder has a digest for its name
        precision="bfloat16" if gguf_of(folder) is None else "gguf",
        training=True,  # in the compute dtype of training, the fastest one
        trust_remote_code=config.trust_remote_code,
    )
    examples = sample_examples(dataset.examples, tokens, longest=min(LONGEST, base.structure.max_positions or LONGEST))
    return measure_domain_shift(base, examples, of_rows=dataset.rows, in_nf4=True)


def sample_tokens(model: NamedModel, config: PlanConfig, notes: list[str]) -> int:
    """How many tokens the base reads within `QUICK_SECONDS`, up to a whole sample; 0 where that is too few to say anything."""
    machine = hardware.local()
    seconds = 2.0 * model.shape.parameters / (machine.rate * EFFICIENCY[machine.kind] or 1e12)  # of a token
    wide = 4 * model.shape.parameters
    tokens = min(SAMPLE_TOKENS, int(QUICK_SECONDS / seconds))
    if config.ask_base == "yes":
        return max(tokens, FEWEST_TOKENS)
    if tokens >= FEWEST_TOKENS and wide <= machine.usable:
        return tokens
    notes.append(
        f"The domain shift was not measured: reading {FEWEST_TOKENS:,} tokens would take about "
        f"{duration(seconds * FEWEST_TOKENS)} (--ask-base yes does it)."
    )
    return 0
