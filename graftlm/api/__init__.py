"""The Python door: what `import graftlm as graft` offers; each call makes a config and hands it to `commands/`.

calls.py      train, plan, check, compare, sweep, merge, serve
model.py      load, and the Model that it gives: generate, encode, forward_backward, optimizer_step
own_loop.py   an adapter that the caller trains step by step
run.py        Run: what a run folder holds, as values
"""
