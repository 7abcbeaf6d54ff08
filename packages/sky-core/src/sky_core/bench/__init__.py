"""`sky bench`: ours and the peers, measured beside each other on one machine in one session.

    record.py      what a benchmark leaves behind: measures, targets, machine, versions, commit
    timing.py      interleaved rounds of several contenders; ratios of neighbours in a round
    ceilings.py    what the machine itself can do: matrix products, memory
    shape.py       the model that is measured, by the name of a preset or from a file
    contenders/    ours, transformers and litgpt behind one small protocol
    student.py     intervals of paired differences
    report.py      Markdown tables, plots
    compare.py     which ratios fell since another record
    train.py, memory.py, decode.py, requests.py, load.py, optimizer.py, start.py, recipe.py, scaling.py
                   one benchmark each: `run(...)` measures, records and reports

Importing this package imports no torch; a benchmark does when it runs.
"""
