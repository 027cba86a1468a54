"""The short form of `python -m tests.fuzz`, and every input that was once a finding.

A new one is kept by `tar -C fuzz_findings/KIND/SEED -cJf tests/fuzz/found/KIND/NAME.tar.xz .`, its message beside it.
"""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from golden.archives import unpacked
from tests.fuzz import kinds, running, worker
from tests.fuzz.__main__ import inputs
from tests.fuzz.running import Input

FOUND = Path(__file__).parent / "found"

# A reader of weights is a process for each input, so that these take longer than all others together.
SLOW = (
    "tars",
    "hdf5",
    "keras",
    "npz",
    "safetensors",
    "torch",
    "torch_older",
    "tensorflow",
    "hub",
    "checkpoint",
    "curves",
    "values",
)


def test_inputs_of_every_kind_end_in_an_answer_or_a_sentence(tmp_path):
    """And each is the same for its seed in another process."""
    known = kinds.all_kinds()
    fast = {name: kind for name, kind in known.items() if name not in SLOW}
    chosen = [Input(name) for name in known]
    chosen += list(itertools.islice(inputs(fast, 10), 200 - len(chosen)))
    results = list(running.run(chosen, num_workers=1))
    assert [(r.input, r.message) for r in results if r.outcome == "finding"] == []
    counts = Counter(result.outcome for result in results)
    assert counts["accepted"] + counts["refused"] == len(chosen) == 200
    assert min(counts["accepted"], counts["refused"]) > 30
    for result in results[: len(known)]:
        name = result.input.kind
        kinds.write(known[name].make(kinds.generator(name, 0)), tmp_path / name)
        assert worker.digest(tmp_path / name) == result.digest, name


def test_what_was_found_is_answered_with_the_same_sentence(tmp_path):
    """Beside each input, how its message begins, without its folder: a library's words follow. Nothing: accepted."""
    names = [str(path.relative_to(FOUND)).removesuffix(".tar.xz") for path in sorted(FOUND.glob("*/*.tar.xz"))]
    given = [
        Input(name.partition("/")[0], path=unpacked(f"../fuzz/found/{name}.tar.xz", tmp_path / name)) for name in names
    ]
    results = running.run(given, num_workers=1)
    said = {str(r.input.path.relative_to(tmp_path)): r.message.replace(r.folder, "FOLDER") for r in results}
    texts = {name: (FOUND / f"{name}.txt").read_text().removesuffix("\n") for name in names}
    assert {name: said[name][: len(text) or None] for name, text in texts.items()} == texts
    assert len(said) > 10


@pytest.mark.parametrize(
    ("kind", "outcome", "message"),
    [
        ("crash", "finding", "the process ended with SIGSEGV: "),
        ("hang", "finding", "it was not done after 1 s"),
        ("memory", "finding", "MemoryError:  ()"),
        ("wrong", "finding", "WrongError: 2 and 2 are 5 ()"),
        ("traceback", "finding", "KeyError: 'a key' ()"),
        ("silence", "finding", "a message of 0 letters: "),
        ("speech", "finding", f"a message of 5000 letters: {'x' * 300}"),
        ("refused", "refused", "it is refused."),
        ("accepted", "accepted", ""),
    ],
)
def test_each_kind_of_finding_is_seen(tmp_path, monkeypatch, kind, outcome, message):
    """A process that crashes or hangs is followed by another, and the input is kept."""
    monkeypatch.setattr(running, "START_SECONDS", 0 if kind == "hang" else 60)
    name = f"planted {kind}"
    given = [Input(name, 3), Input("planted accepted", 4)] if kind == "crash" else [Input(name, 3)]
    first, *others = running.run(given, num_workers=1, keep=tmp_path, seconds=1)
    assert (first.input, first.outcome) == (Input(name, 3), outcome)
    assert first.message.startswith(message)
    assert kind == "crash" or first.message == message
    assert [result.outcome for result in others] == ["accepted"] * (len(given) - 1)
    kept = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    content = kinds.generator(name, 3).randbytes(4)
    assert kept == ({f"{name}/3/input": content} if outcome == "finding" else {})
