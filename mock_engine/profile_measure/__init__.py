"""
Measures a GPU: `mock-engine profiles measure`.

Data flows one way:

    settings, measured_models   what the user asked for, checked
    gpus                        the device and its data sheet
    memory, grid                what fits, and which points to measure
    transformer, timers         random weights; how long a piece of work takes
    measuring                   the points, coarse ones first, until the time is up
    overhead                    what whole passes take beyond the sum of their parts
    profile_document, report    profile.toml and tables; report.md

`transformer` (with `elementwise` and `attention_backend`) and `timers` import torch, `gpus` and `command` when they
are called; all else works without.
"""
