"""A loaded base that everything shares: training, answering, and a loop of one's own.

model = graft.load("demo", base_precision="nf4")
run = graft.train(model, rows)                                  # the base is afterwards as it was
model.generate(["Hi", "Hi"], adapter=[None, run])               # base beside tuned, one batch
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graftlm.adapters.peft_format import AdapterFolder
from graftlm.adapters.store import open_adapter
from graftlm.api.own_loop import SLOT, Batch, OwnLoop, refuse_other_options
from graftlm.api.run import Run
from graftlm.base.caches import Decoding, prove_decoding
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, checkpoint_precision, load_base
from graftlm.base.shared_base import computing_in
from graftlm.commands.generate import sampling_of
from graftlm.config import GenerateConfig, Precision, TrainConfig
from graftlm.config.fields import TrainOn
from graftlm.config.load import LoadConfig
from graftlm.data.dataset import load as load_rows
from graftlm.data.in_memory import names_of, source_of
from graftlm.data.sources import named_source, token_limit
from graftlm.errors import ConfigError, ModelError
from graftlm.formatting import count, size
from graftlm.heap import release_memory
from graftlm.serving.engine.generate import encode_prompts, generate_all

Messages = Sequence[Mapping[str, Any]]
AdapterName = Run | str | Path
Format = Literal["auto", "chat", "text"]


def load(model: str | Path, **options: Any) -> Model:
    """Load a base model once, for everything after.

    `model` is a directory, a hub id, or `demo`. Options, with their names elsewhere (`load_in_4bit`, `torch_dtype`, ...):
    `base_precision` float32, bfloat16, int8 or nf4, default the checkpoint's own type; `compute_dtype`; `device`;
    `trust_remote_code`. Raises ConfigError for an unknown option, with the nearest one, and ModelError.
    """
    config = LoadConfig.build({"model": str(model), **options})
    precision = config.base_precision or checkpoint_precision(config.model, config.trust_remote_code)
    base = load_base(
        config.model, precision=precision, compute_dtype=config.compute_dtype, device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    return Model(base, config)


class Model:
    """A base model in memory. `del` gives its memory back; one call at a time."""

    def __init__(self, base: Base, config: LoadConfig) -> None:
        """Made by `graft.load`."""
        self.base, self.config = base, config
        self._damage: str | None = None
        self._decoding: Decoding | None = None
        self._own: OwnLoop | None = None
        base.model.__dict__.setdefault("graft_slots", itertools.count(SLOT + 1))

    def __del__(self) -> None:
        # A transformers model refers to itself, so without this its memory comes back only when Python next looks for such.
        if sys is not None and not sys.is_finalizing():  # at the interpreter's end modules are gone before their values
            self.__dict__.clear()
            release_memory()

    @property
    def name(self) -> str:
        """What it was called, or the folder of what full training has made of it."""
        return self.base.name

    @property
    def base_precision(self) -> Precision:
        """How it is stored."""
        return self.base.precision

    @property
    def device(self) -> str:
        """Where it is: `cpu`, `cuda:0`."""
        return str(self.base.device)

    @property
    def parameters(self) -> int:
        """How many values it has."""
        return self.base.parameters

    @property
    def bytes(self) -> int:
        """Bytes of its weights as they are stored."""
        return self.base.bytes

    @property
    def fingerprint(self) -> str:
        """Its identity by content, which adapters are bound to."""
        return self.base.fingerprint

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        return self.base.tokenizer

    def __repr__(self) -> str:
        base = self.base
        return (
            f"Model('{base.name}': {count(base.parameters)} as {base.precision}, {size(base.bytes)} on {base.device})"
        )

    # ---- answering -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        adapter: AdapterName | Sequence[AdapterName | None] | None = None,
        *,
        store: str | Path | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Answer one prompt (a string is returned) or several (a list is), all in one batch.

        A prompt is a text, or a conversation as a list of messages `{"role": ..., "content": ...}`. `adapter` is one for all
        prompts, or a list with one for each: None for the base, a Run, a PEFT folder, or a version such as `formal@prod`
        in `store` (default ./adapters). Options as `graft generate` has them: `max_tokens` (default 128), `temperature` (0
        takes the likeliest token each time), `top_p`, `seed`, `system`, `format` (auto, chat or text). Raises ConfigError,
        AdapterError, StoreError, DataError.
        """
        self.check_usable()
        one = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(part, Mapping) for part in prompts))
        asked: list[Any] = [prompts] if one else list(prompts)
        if not asked:
            return []
        config = _generation(self.name, options)
        adapters = _each(adapter, len(asked))
        opened = {id(a): self._opened(a, store) for a in adapters if a is not None}
        folders = [None if a is None else opened[id(a)] for a in adapters]
        with computing_in(self.base, self.config.compute_dtype, training=False):
            self._decoding = self._decoding or prove_decoding(self.base)
            encoded = encode_prompts(self.base, asked, folders, style=config.format, system=config.system)
            answers = generate_all(
                self.base, encoded, max_tokens=config.max_tokens, sampling=sampling_of(config), decoding=self._decoding
            )
        texts = [answer.text for answer in answers]
        return texts[0] if one else texts

    def _opened(self, adapter: AdapterName, store: str | Path | None) -> AdapterFolder:
        return open_adapter(folder_of(adapter), None if store is None else Path(store), model=self.name)

    # ---- a loop of one's own -------------------------------------------------------------------------------------------

    def new_adapter(self, **options: Any) -> None:
        """Attach an untrained adapter for `forward_backward`; the one before it is dropped.

        Options of `graft.train` that an adapter and its AdamW are made of: `rank`, `alpha`, `targets`,
        `lora_dropout`, `dora`, ..., `seed`, `beta1`, `beta2`, `epsilon`, `weight_decay`, `loraplus_lr_ratio`.
        Raises ConfigError.
        """
        self.check_usable()
        named = TrainConfig.named(options)
        known = TrainConfig.model_fields
        refuse_other_options([name for name in named if name in known])
        given = {"model": self.name, "data": ("rows",), "out": Path("."), "method": method_for(self), **named}
        config = TrainConfig.build(given)
        if config.trainable_tokens:
            raise ConfigError(
                "trainable_tokens may add tokens to the tokenizer, which is the run's business; use graft.train"
            )
        self.remove_adapter()
        self._own = OwnLoop(self.base, config)

    def remove_adapter(self) -> None:
        """Take the adapter of `new_adapter` off the base."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def encode(
        self, rows: Any, *, train_on: TrainOn = "all-assistant",
        max_length: int | None = None, overlong: Literal["error", "drop", "truncate"] = "error",
    ) -> Batch:  # fmt: skip
        """Rows as `graft.train` takes them -> a batch: token ids, and which of them the loss counts.

        `max_length` in tokens, default the model's longest position. Raises DataError that names each bad row.
        """
        config = TrainConfig.build({"model": self.name, "data": ("rows",), "out": Path("."), "train_on": train_on})
        limit = token_limit(max_length, self.base.structure.max_positions)
        encoder = Encoder(self.base.tokenizer, train_on=config.train_on, date=config.template_date)
        source = source_of(rows, "rows")
        sources = [source] if source is not None else [named_source(text, "train") for text in names_of(rows)]
        return Batch(load_rows(sources, encoder, max_tokens=limit, overlong=overlong), encoder, config.train_on)

    def forward_backward(self, batch: Batch, *, micro_batch_tokens: int | None = None) -> float:
        """Add the gradient of the batch's mean loss to those that are there; returns that loss, in nats a target token.

        The first call attaches an adapter with the defaults of `graft.train` where `new_adapter` was not called.
        `micro_batch_tokens`: most tokens in one forward pass, default 4096; memory and speed only. Raises Diverged.
        """
        own = self._adapter()
        with computing_in(self.base, self.config.compute_dtype, training=True):
            return own.forward_backward(batch, micro_batch_tokens)

    def optimizer_step(self, learning_rate: float, *, max_grad_norm: float = 1.0) -> float:
        """One step of AdamW, gradients clipped to `max_grad_norm` (0: not); returns the gradient's norm before clipping.

        Raises ConfigError where no gradient is there, Diverged where one is not finite.
        """
        return self._adapter().optimizer_step(learning_rate, max_grad_norm)

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter as a PEFT folder, which `generate`, `publish` and PEFT read. Raises AdapterError, OSError."""
        return self._adapter().save(Path(folder), self.name)

    def _adapter(self) -> OwnLoop:
        self.check_usable()
        if self._own is None:
            self.new_adapter()
        assert self._own is not None
        return self._own

    # ---- what training does to it --------------------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise ModelError where a full training was broken off and left weights that belong to no model."""
        if self._damage is not None:
            raise ModelError(self._damage)

    def became(self, run: Run) -> None:
        """Full training has made this model what is saved in the run's folder."""
        folder = run.model_folder
        if folder is None:
            self.spoiled(run.folder)
            return
        self.base.name, self.base.folder = str(folder), folder
        self.base.__dict__.pop("fingerprint", None)  # cached, of the weights before
        self._decoding = None

    def spoiled(self, out: Path) -> None:
        """Full training was broken off in the middle, so the weights are nobody's."""
        self._damage = (
            f"the full training in {out} ended without a result and had changed this model's weights; load it again with "
            f"graft.load('{self.config.model}')"
        )


def method_for(model: Model) -> Literal["lora", "qlora"]:
    """The method that a base's precision asks for."""
    return "qlora" if model.base_precision == "nf4" else "lora"


def folder_of(adapter: AdapterName) -> Path:
    """The folder or the name of an adapter. Raises ConfigError for a run that has none."""
    if not isinstance(adapter, Run):
        return Path(adapter)
    if adapter.adapter is None:
        what = "trained the whole model" if adapter.model_folder is not None else "has saved nothing yet"
        way_out = f"load it with graft.load('{adapter.model_folder}')" if adapter.model_folder else "let it go on"
        raise ConfigError(f"the run in {adapter.folder} has no adapter: it {what}; {way_out}")
    return adapter.adapter


def _generation(model: str, options: Mapping[str, Any]) -> GenerateConfig:
    own = ("max_tokens", "temperature", "top_p", "seed", "system", "format")
    named = GenerateConfig.named(options)
    for name in named:
        if name in GenerateConfig.model_fields and name not in own:
            raise ConfigError(f"option '{name}' was chosen by graft.load; generate takes {', '.join(own)}")
    return GenerateConfig.build({"model": model, "prompt": "-", **named})


def _each(adapter: Any, prompts: int) -> list[AdapterName | None]:
    if adapter is None or isinstance(adapter, Run | str | Path):
        return [adapter] * prompts
    found: list[Any] = list(adapter)
    if len(found) != prompts:
        raise ConfigError(
            f"there are {prompts} prompts and {len(found)} adapters; give one adapter, or one for each prompt"
        )
    return found
