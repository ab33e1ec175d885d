"""Runs of the suite, drawn: what may stand in a verdict, and the texts that break pages and terminals."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st

from conformance.catalogue import LEVELS, Rule, load_catalogue
from conformance.verdict import Finding, Outcome, Subject, SuiteRun, Verdict
from conformance.verdict_text import BROKEN, message_of, printable

QUICK = settings(max_examples=60)
HOSTILE = [
    "</details><script>alert(1)</script>",
    '" onmouseover="x',
    "&amp;&#0;",
    "]]>",
    "\x00\x07\x1b[31mred",
    "\ufffe\uffff\udc80\x85",
    "\r\n\r",
    "$title ${body} {0} %s",
    "```\n~~~\n````python",
    "| a \\| b | *c* _d_ [e](f) <g> \\",
    "[bold]x[/bold] :warning:",
    "漢字 \u202egnp.exe",
    "  ",
    "",
]
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=12), max_size=3).map("".join)
SAID = TEXTS.filter(str.strip)
AREAS = ("gen", "cancel", "kv")
NAMES = ("mid", "empty_prompt", "usage_arith", "of_a_name_that_is_longer_than_any_rule_has_had")
SECONDS = st.floats(0, 1e4)
FINDINGS = st.builds(
    Finding,
    message=SAID,
    sent=st.lists(TEXTS, max_size=2).map(tuple),
    transcript=st.lists(TEXTS, max_size=3).map(tuple),
    script=TEXTS,
    example=st.sampled_from(["", "6.100.0:AXicY2BgZGAAAAAVAAM="]),
)
SUBJECTS = st.builds(
    Subject,
    engine=TEXTS,
    engine_args=TEXTS,
    driver=st.sampled_from(["plain", "bridge", "worker"]),
    role=st.sampled_from(["agg", "prefill", "decode", "encode"]),
    clock=st.sampled_from(["virtual", "real"]),
    dynamo_version=TEXTS,
    suite_version=TEXTS,
    capabilities=st.dictionaries(TEXTS, st.sampled_from(["yes", "yes, 2", "no: "]) | TEXTS, max_size=3),
)


@st.composite
def verdicts(draw):
    rule = Rule(
        id=f"{draw(st.sampled_from(AREAS))}.{draw(st.sampled_from(NAMES))}",
        level=draw(st.sampled_from(sorted(LEVELS))),
        sentence=draw(TEXTS),
        source=" | ".join(draw(st.lists(TEXTS, min_size=1, max_size=2))),
        since=draw(st.sampled_from(["", "1.3"])),
        until="",
        applies=draw(st.frozensets(st.sampled_from(["agg", "prefill", "kv"]), min_size=1)),
        check=draw(TEXTS),
        remark=draw(TEXTS),
        entered="0.1",
    )
    outcome = draw(st.sampled_from(Outcome))
    finding = draw(st.none() | FINDINGS) if outcome in BROKEN else None
    return Verdict(rule, outcome, draw(TEXTS), finding, draw(st.integers(0, 999)), draw(SECONDS))


RUNS = st.builds(
    SuiteRun,
    subject=SUBJECTS,
    verdicts=st.lists(verdicts(), max_size=6, unique_by=lambda verdict: verdict.rule.id).map(tuple),
    seconds=SECONDS,
)


def counts_of(run):
    found = Counter(verdict.outcome for verdict in run.verdicts)
    return [found[outcome] for outcome in Outcome]


def all_texts(verdict):
    """What of a verdict must be seen wherever it is shown."""
    finding = verdict.finding or Finding("")
    texts = [verdict.rule.sentence, *verdict.rule.sources, message_of(verdict), verdict.reason]
    texts += [*finding.sent, *finding.transcript, finding.script, finding.example]
    return [printable(text) for text in texts if text.strip()]


def example_run(**outcomes):
    """All rules passed, but for `outcomes`: rule ids with _ for the dot."""
    rules = load_catalogue()
    found = [Verdict(rule, outcomes.get(rule_id.replace(".", "_"), Outcome.PASSED)) for rule_id, rule in rules.items()]
    subject = Subject("my_pkg:Engine", "", "bridge", "agg", "virtual", "1.6.1", "0.1.0")
    return SuiteRun(subject, tuple(found), 1.0)
