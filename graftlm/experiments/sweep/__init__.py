"""`graft sweep`: many trials on one base at once; which ones is Optuna's to say.

run.py        from a config to a finished sweep
study.py      Optuna's study: who asks for a trial, who has one, what came of it
conductor.py  hears the loop for all trials that are trained together, fills the places of those that end
places.py     how many trials fit memory
results.py    what was tried and found, read back
report.py     report.md and report.html     view.py     what a person sees
"""
