"""Tiny models for tests: every architecture in a few thousand random values, written as a Hugging Face folder.

Sizes are odd and differ from each other, norms and biases are random too, so that no mistake of shape or order hides.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from graftlm.adapters.attach import Adapter, AdapterPlan, attach, new_adapter, select_layers
from graftlm.base.attention import ATTENTION, set_attention
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.data.dataset import Example
from graftlm.data.sampler import make_sampler
from graftlm.kernels.counter_rng import uniform
from graftlm.segments import Segments
from graftlm.training.optimizer import AdamW, LRSchedule
from graftlm.training.trainer import TrainerCallback
from graftlm.training.trial import Trial

VOCABULARY = 83
_LLAMA: dict[str, Any] = {
    "hidden_size": 28, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64,
}  # fmt: skip
_NO_HEAD_DIM = {**{k: v for k, v in _LLAMA.items() if k != "head_dim"}, "hidden_size": 24}
_PHI3 = {**_NO_HEAD_DIM, "pad_token_id": 0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", _NO_HEAD_DIM),
    "qwen3": ("Qwen3Config", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "sliding_window": 5, "attn_logit_softcapping": 3.0,
                                "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 7}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 7,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", _PHI3),
    "gpt2": ("GPT2Config", {"n_embd": 28, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": 64}),
    "opt": ("OPTConfig", {"hidden_size": 28, "ffn_dim": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "word_embed_proj_dim": 28, "max_position_embeddings": 64}),
    "falcon": ("FalconConfig", {"hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
                                "ffn_hidden_size": 44, "max_position_embeddings": 64}),
    "bloom": ("BloomConfig", {"hidden_size": 28, "n_layer": 2, "n_head": 4}),
    "olmo2": ("Olmo2Config", _NO_HEAD_DIM),
    "starcoder2": ("Starcoder2Config", _NO_HEAD_DIM),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
                                     "norm_topk_prob": True, "mlp_only_layers": [1]}),
}  # fmt: skip
ARCHITECTURES = tuple(CONFIGS)
MIXTURES = ("mixtral", "qwen3_moe")


def config(architecture: str, **changes: Any) -> Any:
    """The tiny configuration of an architecture."""
    kind, sizes = CONFIGS[architecture]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, kind)(**{"vocab_size": VOCABULARY, **special, **sizes, **changes})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `<pad> <s> </s> w3 w4 ...`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def random_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of random float32 weights, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def write(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """A model and the tokenizer as a folder."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="graft-tiny-"))


@functools.cache
def folder(architecture: str) -> Path:
    """The folder of an architecture's tiny model, written once in a session and never changed."""
    return write(_root() / architecture, random_model(architecture))


@functools.cache
def wide() -> Path:
    """A Llama whose layers are wide enough for products in bfloat16 (`gemm.c`: more than 64 columns)."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24, "num_key_value_heads": 4}
    return write(_root() / "wide", random_model("llama", **sizes))


def plain(place: Path | str) -> PreTrainedModel:
    """A folder as plain transformers loads it, in float32; with attention that caps its scores where the config says so."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # before 5.21 transformers chooses sdpa, which drops the cap
    return model


def examples(lengths: Sequence[int] = (9, 4, 12, 9, 7), seed: int = 0) -> tuple[Example, ...]:
    """Random examples; about two thirds of their tokens are trained."""
    generator = np.random.default_rng(seed)
    found: list[Example] = []
    for i, length in enumerate(lengths):
        loss_mask = generator.random(length) < 0.67
        loss_mask[-1] = True
        ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        found.append(Example(ids=ids, loss_mask=loss_mask, row=f"tiny:{i + 1}", digest=f"{seed}-{i}"))
    return tuple(found)


def layout(lengths: Sequence[int], slots: Sequence[int] | None = None) -> Segments:
    """Examples laid end to end."""
    return Segments(lengths=tuple(lengths), slots=tuple(slots or [1] * len(lengths)))


@torch.no_grad()
def base_logits(base: Base, ids: Tensor, slot: int = 1) -> Tensor:
    """One example's ids (L,) through our base and the adapter in `slot`: logits (L, vocabulary)."""
    context = ForwardContext(Segments(lengths=(len(ids),), slots=(slot,), stacked=not base.packs))
    return base.logits(base.hidden(ids, context), context)


@torch.no_grad()
def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """One example's ids (L,) through a plain or a PEFT model: logits (L, vocabulary)."""
    return model(input_ids=ids[None], use_cache=False).logits[0]


def ids(length: int = 11, seed: int = 1) -> Tensor:
    """Random token ids (length,)."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def adapted(
    base: Base, *, targets: Sequence[str] = ("all-linear",), slot: int = 1, seed: int = 3, **plan: Any
) -> Adapter:
    """An adapter with random B (so that it changes something), attached in `slot`."""
    values = {"rank": 3, "alpha": 5.0, **plan}
    adapter = new_adapter(base, select_layers(base, targets), AdapterPlan(**values), seed)
    for name, parameter in adapter.parameters().items():
        if name.endswith("lora_B.weight"):
            with torch.no_grad():
                parameter.copy_((uniform(tuple(parameter.shape), seed, "B", name) - 0.5) * 0.6)
    attach(base, adapter, slot=slot)
    return adapter


def trial(
    base: Base,
    adapter: Adapter | None,
    rows: Sequence[Example],
    *,
    steps: int = 3,
    rate: float = 5e-3,
    slot: int = 1,
    clip: float = 0.0,
    weight_decay: float = 0.0,
) -> Trial:
    """One line of training on all of `rows` in every step, at a level learning rate."""
    parameters = base.train_all() if adapter is None else adapter.parameters()
    return Trial(
        name="tiny", slot=0 if adapter is None else slot, seed=7, parameters=parameters,
        optimizer=AdamW(parameters, beta1=0.9, beta2=0.99, epsilon=1e-6, weight_decay=weight_decay),
        schedule=LRSchedule(peak=rate, kind="constant", warmup_steps=0, steps=steps), examples=rows,
        sampler=make_sampler([len(rows)], [1.0], seed=7, batch_size=len(rows), epochs=None, steps=steps),
        max_grad_norm=clip,
    )  # fmt: skip


class Heard(TrainerCallback):
    """A callback that remembers the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, trial: Any, result: Any) -> None:
        self.losses.append(result.loss)

    def on_evaluate(self, trial: Any, evaluation: Any, best: bool) -> None: ...

    def on_iteration_end(self, trials: Any) -> bool:
        return True


def mean_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """What the loop should compute, the plain way: each example alone through a plain or PEFT model."""
    total = torch.zeros(())
    count = 0
    for row in rows:
        one = torch.from_numpy(row.ids.astype(np.int64))
        logits = model(input_ids=one[None], use_cache=False).logits[0].float()  # (L, vocabulary)
        wanted = torch.from_numpy(row.loss_mask[1:])
        total = total + F.cross_entropy(logits[:-1][wanted], one[1:][wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count


def peft_config(**changes: Any) -> LoraConfig:
    """A LoraConfig with uneven numbers."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "lora_dropout": 0.0, **changes})


def with_peft(model: Any, lora: LoraConfig, seed: int = 5) -> Any:
    """A PEFT model with random A, B and whatever else it trains."""
    torch.manual_seed(seed)
    peft: Any = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_B" in name:
                    parameter.copy_(noise * 0.3)
                elif "lora_A" not in name:  # DoRA's magnitude, whole modules, token rows
                    parameter.add_(noise.to(parameter.dtype) * 0.05)
    return peft.eval()


def read_peft(model: Any, place: Path) -> Any:
    """An adapter folder as PEFT reads it, ready to be trained on."""
    return PeftModel.from_pretrained(model, str(place), is_trainable=True).eval()


@contextmanager
def original_attention(base: Base) -> Iterator[None]:
    """A base that packs, made to run on stacks for a while."""
    packs = base.packs
    base.packs = False
    set_attention(base.model, base.original_attention)
    try:
        yield
    finally:
        base.packs = packs
        set_attention(base.model, ATTENTION if packs else base.original_attention)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Equal within `rtol`, with an absolute part of `rtol` times the expected values' size."""
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=rtol, atol=rtol * expected.float().abs().max().item()
    )
