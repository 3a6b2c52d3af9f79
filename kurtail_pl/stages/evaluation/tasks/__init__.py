"""Tasks: the paper's question-answering benchmarks, by EleutherAI's lm-evaluation-harness, in this process.

`spec` says which tasks and on what, `harness` makes the harness's own task objects, `model` answers their requests,
`evaluate` runs and sums up, `table` prints. Only `harness` and `model` import the harness, when tasks are asked for.
"""
