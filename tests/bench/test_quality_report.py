"""The quality report: its numbers from rows, its files, and the manifest of documents."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest

from bench import record
from bench.quality import figures, plots, report, stats, sweep, tables, texts
from bench.quality.policies import DEFAULT, USUAL
from express_vllm.wide import MEASURED

HEAD = {
    "command": "python -m bench.quality nll", "date": "2026-01-01", "hardware": "test",
    "versions": {"torch": "1"}, "model": "tiny", "dtype": "float32", "seconds": 1, "stopped": [],
    "length": 300, "first": 100, "documents": ["a", "b"],
}  # fmt: skip


def nll_rows():
    rows = [{"policy": "exact", "slots": 0, "seed": 0, "document": d, "nll": n}
            for d, n in (("a", 2.0), ("b", 3.0))]  # fmt: skip
    for policy, gap in (("express", 0.1), ("snapkv", 0.3)):
        for seed in (0, 1):
            for document, exact in (("a", 2.0), ("b", 3.0)):
                nll = exact + gap + 0.02 * seed + (0.04 if document == "b" else 0)
                rows.append({"policy": policy, "slots": 128, "seed": seed, "document": document,
                             "nll": nll})  # fmt: skip
    return rows


def test_gaps_are_paired_with_exact_and_averaged_over_seeds():
    gaps = stats.gaps(nll_rows())
    assert gaps["express", 128] == pytest.approx({"a": 0.11, "b": 0.15})
    assert stats.shown(list(gaps["express", 128].values())) == "0.130 ± 0.020"
    assert stats.per_cent(list(gaps["express", 128].values())) == "13.9%"
    assert stats.paired(gaps, "snapkv", 128) == "0.200 ± 0.000", "what documents share cancels"


def test_the_jackknife_of_equal_shares_is_zero():
    share, spread = stats.jackknife([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)])
    assert (share, spread) == pytest.approx((0.5, 0.0))
    assert math.isnan(stats.jackknife([(1.0, 2.0)])[1])


def repeated_rows():
    return [
        {"policy": p, "slots": n, "task": "repeated", "document": d, "distance": 50,
         "second": 1.0 + lost, "control": 2.0}
        for p, n, lost in (("exact", 0, 0.0), ("express", 128, 0.25)) for d in "ab"
    ]  # fmt: skip


def test_tables_say_what_the_rows_say():
    losses = HEAD | {"experiment": "nll", "rows": nll_rows(), "axes": ["peers"]}
    assert "| express, equal layers | 0.130 ± 0.020 (13.9%) |" in tables.losses(losses)
    assert "| SnapKV-style | 0.200 ± 0.000 |" in tables.behind(losses)
    assert "| SnapKV-style | 0.330 (0.200 ± 0.000) |" in tables.axis(losses, "peers")
    layers = {"exact": [0.1, 0.2], "streaming": [0.1, 0.3]}
    errors = [{"policy": "express", "slots": 128, "document": d, **layers} for d in "ab"]
    assert "| 0.1500 ± 0.0000 | 0.2000 ± 0.0000 |" in tables.errors(HEAD | {"rows": errors})
    again = tables.repeated(HEAD | {"rows": repeated_rows()})
    assert "| express, equal layers | 128 | 0.75 ± 0.00 |" in again, "a quarter of it is lost"
    asked = [
        {"policy": p, "slots": n, "task": "needle", "length": 300, "depth": depth, "document": "a",
         "distance": 99, "log_probability": -1.0, "margin": 1.0, "choice": True, "match": False}
        for p, n in (("exact", 0), ("express", 128)) for depth in (0.1, 0.9)
    ]  # fmt: skip
    assert "| express, equal layers | 128 | 2 | 1.00" in tables.asked({"rows": asked}, "needle")


def test_a_plot_is_stored_for_every_result(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    figures.losses("losses", {"rows": nll_rows()})
    figures.repeated("repeated", {"rows": repeated_rows()})
    for name in ("losses", "repeated"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_parts_of_a_result_become_one(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    whole = HEAD | {"experiment": "nll"}
    first = whole | {"axes": ["heavy"], "rows": nll_rows()[:4], "commit": "abc"}
    second = whole | {"axes": ["window"], "rows": nll_rows()[2:]}
    for name, part in (("1", first), ("2", second)):
        (tmp_path / f"losses.{name}.json").write_text(json.dumps(part))
    monkeypatch.setattr(record, "typed", lambda: "python -m bench.quality join losses")
    assert record.join("losses").name == "losses.json"
    assert [path.name for path in tmp_path.iterdir()] == ["losses.json"]
    joined = record.load("losses")
    assert joined["rows"] == nll_rows() and joined["axes"] == ["heavy", "window"]
    assert joined["seconds"] == 2 and joined["command"] == "python -m bench.quality join losses"
    assert [part.get("commit") for part in joined["parts"]] == ["abc", None]
    with pytest.raises(ValueError, match="differ in dtype"):
        record.joined([first, second | {"dtype": "bfloat16"}])
    with pytest.raises(FileNotFoundError, match="no parts"):
        record.join("gains")


@pytest.mark.parametrize("page", report.pages(), ids=lambda page: page.stem)
def test_pages_have_the_tables_of_the_stored_results(page):
    """`python -m bench.quality report` writes them."""
    text = page.read_text()
    assert report.filled(text) == text
    assert text.count("<!-- end -->") == len(report.MARK.findall(text)), "every mark is filled"


def section(page, anchor):
    """The text under a heading, which must be the only one of its anchor."""
    parts = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    found = [body for title, body in zip(parts[1::2], parts[2::2], strict=True)
             if re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") == anchor]  # fmt: skip
    assert len(found) == 1, f"{page.name}#{anchor}"
    return found[0]


def test_every_number_of_the_index_stands_where_the_index_says():
    index = (report.PAGES / "README.md").read_text()
    claims = re.findall(
        r"^\| .* \| (.*) \| \[.*\]\(([\w-]+\.md)#([\w-]+)\) \|$", index, re.MULTILINE
    )
    assert len(claims) > 15
    for numbers, page, anchor in claims:
        text = section(report.PAGES / page, anchor)
        for number in re.findall(r"-?\d+\.\d+(?: ± \d+\.\d+|%)?", numbers):
            assert number in text, f"{number} is not in {page}#{anchor}"


def test_every_plot_and_result_is_on_a_page():
    text = "".join(page.read_text() for page in report.pages())
    for path in record.RESULTS.glob("[qp]*/*"):
        name = path.relative_to(record.RESULTS).with_suffix("")
        shown = f"results/{name}.png)" if path.suffix == ".png" else f" of {name} -->"
        assert shown in text, f"no page shows {name}"


def test_a_stored_command_writes_the_file_that_it_is_stored_in():
    for path in record.RESULTS.glob("*/*.json"):
        stored = json.loads(path.read_text())
        words = stored["command"].split()
        assert words[:2] == ["python", "-m"] and stored["date"] and stored["hardware"], path
        if words[3:4] == ["join"]:
            assert words[4] == f"{path.parent.name}/{path.stem}"
            assert all(f"--name {path.stem}." in part["command"] for part in stored["parts"])
        elif words[2] == "pytest":
            named = stored["environment"]["EXPRESS_SOAK_RESULT"]
            assert named == f"{path.parent.name}/{path.stem}"
        elif "--name" in words:
            assert words[words.index("--name") + 1] == path.stem
        else:
            assert path.stem in OWN[words[2]], path


#: Command -> the files that it writes unless told otherwise.
OWN = {
    "bench.kernels": ["kernels"], "bench.engine": ["engine"], "bench.cpu": ["cpu"],
    "bench.host": ["host-gpu"], "bench.reuse": ["reuse"],
    "bench.quality": ["attention-error", "bounds"],
    "bench.quality.paper": ["prefill", "compress", "size", "time"],
}  # fmt: skip


def test_a_result_knows_the_commit_of_its_code(tmp_path, monkeypatch):
    if (record.ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record.commit())
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown", "an installed copy's, or none in a repository"


#: What stands beside the default in the stored runs: other caches, and those with wide layers too.
PEERS = tuple(name for name in USUAL if name not in ("exact", "express", DEFAULT))
WIDE_PEERS = tuple(
    f"{name}:wide=auto" for name in ("uniform", "streaming", "snapkv", "expected", "h2o")
)
SLOTS = (512, 1024, 2048)
#: Peers that are clearly behind express with equal layers on the held-out documents, by slots: by
#: more than two paired standard errors.  StreamingLLM is not at 2,048 (docs/results).
BEHIND = {
    512: {"paper", "uniform", "streaming", "h2o", "knorm", "keydiff", "random"},
    1024: set(PEERS),
    2048: set(PEERS) - {"streaming"},
}


def behind(name, slots, documents, ours, rivals):
    """Rival -> how far it is behind `ours` in a stored run, and the paired standard error."""
    stored = record.load(f"quality/{name}")
    assert stored["length"] >= 8192 and len(stored["documents"]) == documents
    assert not stored["stopped"]
    gaps = stats.gaps(stored["rows"])
    base = gaps[ours, slots]
    return {
        rival: stats.mean_error([gaps[rival, slots][d] - base[d] for d in base]) for rival in rivals
    }


@pytest.mark.parametrize("slots", SLOTS)
def test_the_default_beats_everything_on_the_held_out_documents(slots):
    """By more than two paired standard errors."""
    found = behind("likelihood", slots, 26, DEFAULT, ("express", *PEERS, *WIDE_PEERS))
    assert all(mean > 2 * error for mean, error in found.values()), found


@pytest.mark.parametrize("slots", SLOTS)
def test_with_equal_layers_it_beats_what_it_replaces_and_no_peer_beats_it(slots):
    """On the held-out documents."""
    found = behind("likelihood", slots, 26, "express", PEERS)
    assert {name for name, (mean, error) in found.items() if mean > 2 * error} == BEHIND[slots]
    assert all(mean > -2 * error for mean, error in found.values())


@pytest.mark.parametrize("slots", SLOTS)
def test_so_it_does_on_the_documents_that_it_was_chosen_on(slots):
    found = behind("defaults", slots, 12, "express", PEERS)
    assert {"paper", "uniform", "streaming", "h2o"} <= {
        name for name, (mean, error) in found.items() if mean > 2 * error
    }
    assert all(mean > -2 * error for mean, error in found.values())
    ((gain, error),) = behind("layers", slots, 12, "express", [DEFAULT]).values()
    assert gain < -2 * error


def test_the_wide_layers_are_those_that_gain_most_alone():
    """With twice the slots, one layer at a time: four are clear, and three of them are taken."""
    names = [f"express:wide={layer},factor=2" for layer in range(30)]
    found = behind("layers", 1024, 12, "express", names)
    best = sorted(range(30), key=lambda layer: found[names[layer]][0])[:4]
    assert best == [18, 20, 17, 23]
    (wide,) = MEASURED.values()
    assert set(wide.layers) < set(best)
    assert all(found[names[layer]][0] < -2 * found[names[layer]][1] for layer in best)


def test_the_manifest_is_that_of_the_sources():
    entries = texts.manifest()
    assert [e.name for e in entries] == [s.name for s in texts.SOURCES]
    assert sum(e.split == "report" for e in entries) >= 12
    assert len({e.language for e in entries}) >= 8
    assert all(len(e.sha256) == 64 and e.version and e.licence for e in entries)


def test_markup_leaves_text():
    page = '.SH "N\\(aqAME"\n.\\" comment\n.B ls\n\\fBlist\\fP files\\-now\n.TP\nend'
    assert texts._from_roff(page).split() == ["N'AME", "ls", "list", "files-now", "end"]
    assert texts._from_html("<p>a&amp;b</p><script>x()</script><br>c").split() == ["a&b", "c"]


@pytest.mark.parametrize("slots", [512, 2048])
def test_the_sweep_has_the_default_and_only_what_fits(slots, small_config):
    heads = SimpleNamespace(layers=30, config=small_config)
    policies = sweep.policies(slots, tuple(sweep.AXES), "cuda", heads)
    labels = [p.label for p in policies]
    assert labels[:2] == ["exact", "express"]
    assert len(labels) == len(set(labels)) > 30
    assert not any("kernel=uniform" in label for label in labels)
    assert labels.count("express:wide=29,factor=2") == 1
    heads = SimpleNamespace(layers=20, config=small_config)
    labels = [p.label for p in sweep.policies(slots, ("layers", "wide"), "cuda", heads)]
    assert "express:wide=19,factor=2" in labels and "express:wide=20,factor=2" not in labels
