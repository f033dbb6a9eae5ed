"""Judging language models at long context: what do they find, and how well do they predict?

The twins of this library (NSA, dense, window-only) differ in their attention and in nothing else, so every
difference in these numbers is the attention's. To keep it so, the prompts of a task depend on its parameters,
its seed and the tokenizer only: every model answers exactly the same questions.

    prompts.py   prompts of an exact length in tokens, with facts planted at exact places
    scoring.py   one forward pass a batch: exact match of the answer, loss at every position, intervals
    tasks/       one file a task: a dataclass of its parameters and `run(model, tokenizer) -> rows`
    models.py    folders -> models, and one clear line when a folder holds none
    runner.py    models x tasks -> a result, as a table and as JSON
    blocks.py    which blocks does a query of an NSA model select, how many keys does it read?
    report.py    a result -> one HTML file that needs nothing else
    demo.py      `nsa demo`: three twins, trained and judged, one report; demo_work.py does the work, twins.py hands it
                 out to processes (workers.py)
    command.py   the arguments of `nsa eval` and `nsa demo`
    methods/     attention methods that can be laid over a trained model, one file each
    compare.py   `nsa compare`: methods x lengths x tasks on one model, beside trained ones (compared.py); costs.py and
                 compare_table.py show what they read, keep and take
    fetch.py     `nsa fetch`: a real, small model
"""
