"""`graft check`: from its config to a report, with the tokenizer and template that training would use and no weights."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_config, load_tokenizer, resolve
from graftlm.config import CheckConfig
from graftlm.data.check import DataReport, check
from graftlm.data.sources import Source, named_source, share, token_limit


def check_data(
    config: CheckConfig, sources: Sequence[Source] | None = None, eval_source: Source | None = None
) -> DataReport:
    """Read every row as training would, of the config's data or of those that are handed over.

    Raises GraftError for a model or a file that cannot be read at all.
    """
    folder = resolve(config.model, config.trust_remote_code, weights=False)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    text_config = load_config(folder, config.trust_remote_code).get_text_config()
    limit = token_limit(config.max_length, getattr(text_config, "max_position_embeddings", None))
    encoder = Encoder(tokenizer, train_on=config.train_on, date=config.template_date)
    sources = sources or [named_source(text, "train") for text in config.data]
    # A share of the training rows is held out by content, so nothing of it can be among them.
    part = share(config.eval_data)
    eval_sources = [named_source(config.eval_data, "valid")] if config.eval_data and part is None else []
    eval_sources = [eval_source] if eval_source is not None else eval_sources
    return check(sources, encoder, eval_sources=eval_sources, max_tokens=limit, overlong=config.overlong)
