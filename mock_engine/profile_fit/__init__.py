"""
Fits a profile to a server that somebody benchmarked: `mock-engine profiles record` and `profiles fit`.

Data flows one way:

    observed                    requests of one run, as a client timed them
    readers                     runs out of AIPerf's and vLLM's files
    replay                      the same requests against a profile, in virtual time
    observations                a run in few figures, and how far chance moves them
    parameters                  what may differ from the start profile, with a prior; tables with corrections in them
    sensitivity                 how the figures move with the parameters
    fit                         Gauss-Newton over all of that
    start, writing, report      where it starts; a folder; words and tables
    flags, record, command      the command line

As a library:

    from mock_engine.profile_fit import fit_profile, replay, run_of_means
    fit = fit_profile(load_profile("h100-sxm/llama-3.1-8b/vllm-tp1-bf16"), runs)
"""

from mock_engine.profile_fit.fit import Fit, fit_profile
from mock_engine.profile_fit.observed import ObservedRequest, ObservedRun, make_run, run_of_means
from mock_engine.profile_fit.readers import read_run
from mock_engine.profile_fit.replay import Replay, replay

__all__ = [
    "Fit",
    "ObservedRequest",
    "ObservedRun",
    "Replay",
    "fit_profile",
    "make_run",
    "read_run",
    "replay",
    "run_of_means",
]
