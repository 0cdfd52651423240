"""Where body, head, embedding and layers are, for every architecture; fails first when transformers changes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from graftlm.base.loading import Base, load_base
from graftlm.base.modules import StoredLinear
from graftlm.base.structure import ModelStructure
from graftlm.errors import ModelError
from graftlm.training.micro_batch import BatchItem, collate, forward

every = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)

PARTS = {  # body, embedding, head
    "gpt2": ("transformer", "transformer.wte", "lm_head"),
    "bloom": ("transformer", "transformer.word_embeddings", "lm_head"),
    "falcon": ("transformer", "transformer.word_embeddings", "lm_head"),
    "opt": ("model", "model.decoder.embed_tokens", "lm_head"),
}


def loaded(architecture: str, precision: Any = "float32", compute_dtype: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype=compute_dtype, device="cpu")


@every
def test_body_embedding_head_and_layers_are_found(architecture: str) -> None:
    structure = loaded(architecture).structure
    body, embedding, head = PARTS.get(architecture, ("model", "model.embed_tokens", "lm_head"))
    assert (structure.embedding_name, structure.head_name) == (embedding, head)
    assert structure.body_name in (body, "model.decoder")
    assert len(structure.layers) == 2
    assert structure.vocabulary == tiny.VOCABULARY
    assert structure.max_positions == (0 if architecture == "bloom" else 64)


@every
def test_body_and_head_give_the_untouched_models_logits(architecture: str) -> None:
    base = loaded(architecture)
    expected = tiny.plain_logits(tiny.plain(base.folder), tiny.ids(13))
    assert torch.equal(expected, expected.clamp(-2, 2)) == (architecture == "gemma2")  # the soft cap of its logits
    tiny.close(tiny.base_logits(base, tiny.ids(13), slot=0), expected, rtol=1e-5)


@every
def test_activation_checkpointing_gives_the_same_gradients(architecture: str) -> None:
    rows = tiny.examples((7, 7, 7), seed=4)
    found: list[dict[str, Tensor]] = []
    runs: list[int] = []
    for again in (False, True):
        base = loaded(architecture)
        adapter = tiny.adapted(base, **({} if architecture in tiny.MIXTURES else {"dropout": 0.3}))
        base.model.requires_grad_(True)
        if again:
            assert base.structure.checkpoint_layers(True) == 2
        count = [0]
        projection = next(m for m in base.structure.layers[0].modules() if isinstance(m, StoredLinear))
        projection.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        micro_batch = collate(base, [BatchItem(row, 1, (3, i), 0.1) for i, row in enumerate(rows)])
        forward(base, micro_batch)[0].backward()
        runs.append(count[0])
        trained = {**dict(base.model.named_parameters()), **adapter.parameters()}
        found.append({n: p.grad for n, p in trained.items() if p.grad is not None})
    assert runs[1] == 2 * runs[0]
    once, twice = found
    assert set(once) == set(twice)
    assert [name for name, gradient in once.items() if not torch.equal(gradient, twice[name])] == []


class Tail(transformers.LlamaForCausalLM):
    """A model that reads more of its body's output than the last hidden states."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        first = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        noise = self.model.embed_tokens(input_ids)  # the tokens themselves, which the head does not get
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(first) + self.lm_head(noise))


def test_a_model_whose_tail_reads_more_than_the_hidden_states_is_refused() -> None:
    torch.manual_seed(0)
    model = Tail(tiny.config("llama")).eval()
    with pytest.raises(ModelError, match="Tail: the part between its layers and its logits"):
        ModelStructure(model, torch.float32)


def test_taking_logits_never_changes_the_model_that_another_thread_looks_at() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    names = [name for name, _ in base.model.named_modules()]
    seen: list[list[str]] = []

    def watch(module: nn.Module, args: object) -> None:
        seen.append([name for name, _ in base.model.named_modules()])

    handle = base.structure.head.register_forward_pre_hook(watch)
    base.structure.logits(torch.zeros(2, base.model.config.hidden_size))
    handle.remove()
    assert seen == [names]
