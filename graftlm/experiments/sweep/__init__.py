"""Many trials on one base at once; Optuna chooses which. `commands/sweep.py` puts the parts together.

run.py              what trials share, the session of each, the loop over all
study.py            Optuna's study: new trials, claimed trials, results
trial_scheduler.py  the training callback of all trials that are trained together; starts the next one when one ends
concurrency.py      how many trials fit in memory
results.py          trials and their results, read back
view.py             progress and table in the terminal; the report is reports/sweep.py
"""
