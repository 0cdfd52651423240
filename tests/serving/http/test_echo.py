"""Evaluation harnesses ask for a prompt's log probabilities by `echo`: they are the model's own, and lm-eval runs unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import tiny_server
import torch
from peft import PeftModel

from graftlm.serving.http.logprobs_writer import LogprobsWriter

MODELS = ("base", "alpha")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    store = tiny_server.new_store(tmp_path_factory.mktemp("echo"))
    with tiny_server.serving(store=str(store), max_num_batched_tokens=16, max_num_seqs=8) as one:
        yield one


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The same models in transformers and PEFT."""
    tuned = PeftModel.from_pretrained(tiny.plain(tiny_run.folder()), str(tiny_server.trained("ALPHA"))).eval()
    return {"base": tiny.plain(tiny_run.folder()), "alpha": tuned}


def logprobs_of(model: Any, ids: list[int]) -> torch.Tensor:
    """(L - 1, V): what a model's own forward pass says of each next token."""
    return torch.log_softmax(tiny.plain_logits(model, torch.tensor(ids))[:-1].float(), dim=-1)


def echoed(server: tiny_server.Loopback, model: str, prompt: Any, **given: Any) -> Any:
    asked = {"max_tokens": 0, "temperature": 0, "logprobs": 1, "echo": True, **given}
    return server.openai().completions.create(model=model, prompt=prompt, **asked)


def test_a_prompts_log_probabilities_are_the_models_own(server: tiny_server.Loopback, models: dict[str, Any]) -> None:
    tokenizer = server.built.base.tokenizer
    texts = ["the old mill by a river turned slowly", "7: ALPHA", "x"]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for model, max_tokens, prompts in (
        ("base", 0, texts), ("base", 1, rows), ("alpha", 1, texts), ("alpha", 0, rows), ("base", 0, texts),
    ):  # fmt: skip
        response = echoed(server, model, prompts, max_tokens=max_tokens)
        assert response.usage.completion_tokens == max_tokens * len(prompts)
        for text, ids, choice in zip(texts, rows, response.choices, strict=True):
            report = choice.logprobs
            assert choice.text[: len(text)] == text
            assert len(report.tokens) == len(report.top_logprobs) == len(ids) + max_tokens
            assert "".join(report.tokens[: len(ids)]) == text
            assert report.text_offset[: len(ids)] == list(range(len(ids)))
            assert report.token_logprobs[0] is report.top_logprobs[0] is None
            own = logprobs_of(models[model], ids)
            values = own.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            assert report.token_logprobs[1 : len(ids)] == pytest.approx(values, abs=3e-5)
            assert [max(top.values()) for top in report.top_logprobs[1 : len(ids)]] == pytest.approx(
                own.amax(1).tolist(), abs=3e-5
            )
            assert choice.finish_reason in ("length", "stop")


def test_an_echo_comes_with_every_answer_whole_and_streamed(server: tiny_server.Loopback) -> None:
    whole = echoed(server, "alpha", ["3: ", "4: "], max_tokens=3, n=2)
    assert [choice.text for choice in whole.choices] == ["3: ALP", "3: ALP", "4: ALP", "4: ALP"]
    assert [choice.logprobs.tokens for choice in whole.choices[:2]] == [list("3: ALP")] * 2
    assert whole.choices[0].logprobs == whole.choices[1].logprobs
    told: dict[int, tuple[str, list[Any]]] = {}
    for chunk in echoed(server, "alpha", ["3: ", "4: "], max_tokens=3, n=2, stream=True):
        (choice,) = chunk.choices
        text, values = told.get(choice.index, ("", []))
        more = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        told[choice.index] = (text + choice.text, [*values, *more])
    assert told == {c.index: (c.text, c.logprobs.token_logprobs) for c in whole.choices}
    plain = echoed(server, "alpha", "3: ", max_tokens=3, logprobs=None).choices[0]
    assert (plain.text, plain.logprobs) == ("3: ALP", None)
    assert echoed(server, "alpha", "3: ", logprobs=None).choices[0].text == "3: "


def test_the_tokens_of_a_prompt_are_written_beside_the_event_loop_and_decoded_once(
    server: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop: list[bool] = []
    decoded: Counter[int] = Counter()
    write, text_of = LogprobsWriter.of_text, LogprobsWriter._text

    def watched(self: LogprobsWriter, index: int, reports: Any, echo: Any = None) -> Any:
        with contextlib.suppress(RuntimeError):
            if echo is not None:
                on_loop.append(False)
                on_loop[-1] = asyncio.get_running_loop() is not None
        return write(self, index, reports, echo)

    def counted(self: LogprobsWriter, token: int) -> str:
        decoded[token] += token not in self._texts
        return text_of(self, token)

    monkeypatch.setattr(LogprobsWriter, "of_text", watched)
    monkeypatch.setattr(LogprobsWriter, "_text", counted)
    echoed(server, "alpha", "3: 3: 3: ", n=2, max_tokens=1, logprobs=5)
    assert max(decoded.values()) == 1
    list(echoed(server, "alpha", ["3: ", "4: "], max_tokens=2, stream=True))
    assert on_loop == [False] * 4


def test_lm_eval_runs_against_the_server_unchanged(
    server: tiny_server.Loopback, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"{i}: ", "choices": ["BETA", "ALPHA", "the old mill"], "text": f"{i}: ALPHA"} for i in range(3)]
    tiny_run.write_rows(tmp_path / "rows.jsonl", rows)
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test",
    }  # fmt: skip
    choice = {
        **common, "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": 1, "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    rolling = {
        **common, "task": "tiny_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "byte_perplexity"}],
    }  # fmt: skip
    writing = {
        **common, "task": "tiny_writing", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "ALPHA",
        "target_delimiter": "", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    }  # fmt: skip
    for task in (choice, rolling, writing):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = simple_evaluate(
        model="local-completions",
        model_args={
            "model": "alpha", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "huggingface",
            "tokenizer": str(tiny_run.folder()), "max_retries": 1, "max_length": 256, "batch_size": 2,
        },
        tasks=["tiny_choice", "tiny_rolling", "tiny_writing"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert found is not None
    assert found["results"]["tiny_choice"]["acc,none"] == 1.0
    tokenizer = server.built.base.tokenizer
    for sample in found["samples"]["tiny_choice"]:
        for words, ((value, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            # lm-eval moves white space at the end of a context to its continuation.
            texts = sample["doc"]["q"].rstrip(), f" {words}"
            context, more = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
            own = logprobs_of(models["alpha"], context + more)[len(context) - 1 :]
            assert float(value) == pytest.approx(sum(own[i, token].item() for i, token in enumerate(more)), abs=1e-3)
            assert str(greedy) == str(own.argmax(1).tolist() == more)
    assert found["results"]["tiny_writing"]["exact_match,none"] == 1.0
    assert found["results"]["tiny_rolling"]["byte_perplexity,none"] > 1
