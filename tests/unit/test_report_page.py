"""The report: what it says of made-up runs, and that it is nothing but what it says."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from evaluation_runs import EVIL, about, row, write_run, write_runs
from msa.errors import InputError
from msa.evaluation.judge import _digest
from msa.evaluation.report_page import write_report
from msa.evaluation.report_page.blocks import size_name
from msa.evaluation.report_page.content import sections
from msa.evaluation.report_page.data import verdict
from msa.evaluation.report_page.explorer import explorer_data
from msa.evaluation.report_page.markdown import code, markdown, plain
from msa.evaluation.report_page.sources import read_findings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"), count=8, systems=("msa", "bm25-1", "full"))


def two(tmp_path, one, other, task="qa/squad", size=16_000):
    """Findings of the memory and of BM25, from lists of right (1) and wrong (0)."""
    for system, rights in (("msa", one), ("bm25-1", other)):
        rows = [row(i, system, bool(right)) for i, right in enumerate(rights)]
        write_run(tmp_path, about(task, size, system), rows)
    return read_findings(tmp_path)


def said(findings):
    return markdown(findings, sections(findings))


def test_a_loss_stands_first_with_its_interval_and_p(tmp_path):
    text = said(two(tmp_path, [0] * 20 + [1] * 10, [1] * 30))
    assert re.search(
        r"\*\*Where msa loses\*\*\n\n- qa/squad at 16K: 33\.3 against 100\.0 of bm25-1 "
        r"\(F1; −66\.7 points, 95% interval −8\d\.\d to −\d\d\.\d, p &lt; 0\.001\)",
        text,
    )
    assert text.index("Where msa loses") < text.index("## Scores")
    assert "Where msa is ahead" not in text
    assert "| 33.3 behind (" in text


def test_a_gain_is_no_loss_and_chance_is_called_chance(tmp_path):
    text = said(two(tmp_path, [1] * 30, [1] * 10 + [0] * 20))
    assert "ahead by more than chance at 1" in text
    assert "- Nowhere that these questions can show." in text
    text = said(two(tmp_path, [1, 0, 0], [1, 1, 0]))
    assert "Lower, but within chance: qa/squad at 16K −33.3" in text


def test_who_is_handed_the_right_documents_is_no_rival(tmp_path):
    two(tmp_path, [0] * 30, [0] * 30)
    rows = [row(i, "gold", True) for i in range(30)]
    write_run(tmp_path, about("qa/squad", 16_000, "gold"), rows)
    findings = read_findings(tmp_path)
    assert [c.other.system for c in findings.rivals] == ["bm25-1"]
    assert "the same reader scores 100.0 points more" in said(findings)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (row(0, "msa", True), "right"),
        (row(0, "msa", False, "unrouted"), "not routed"),
        (row(0, "msa", False, "unnamed"), "not named"),
        (row(0, "msa", False, "misread"), "not read right"),
        (row(0, "msa", False, "refused"), "refused wrongly"),
        (row(0, "msa", False, "unrouted", refused=True), "not routed"),
        (row(0, "msa", True, wrong_used=True), "used an outdated fact"),
        (row(0, "msa", False, answers=[], gold=[]), "should have refused"),
        (row(0, "msa", False, scores={"score": 0.6}), "partly right"),
        (row(0, "closed", False), "not read right"),
        (row(0, "bm25-1", False, answer="", named=[]), "partly right"),
    ],
)
def test_why_an_answer_is_wrong_is_what_went_wrong_first(made, why):
    assert verdict(made) == why


def test_outdated_facts_are_counted_on_the_first_page(tmp_path):
    rows = [row(i, "msa", False, wrong_used=i < 3) for i in range(10)]
    write_run(tmp_path, about("changing/updates", 0, "msa"), rows)
    text = said(read_findings(tmp_path))
    assert "- **3** outdated or deleted facts used (must be 0; 10 answers after changes)" in text
    assert "- 3 answers used an outdated or deleted fact; none may" in text
    assert "older document" not in text


def test_an_older_document_that_is_still_there_is_no_deleted_fact(tmp_path):
    rows = [row(i, "msa", False, wrong_used=i < 3) for i in range(10)]
    write_run(tmp_path, about("changing/updates", 0, "msa", share=None), rows)
    text = said(read_findings(tmp_path))
    assert "outdated or deleted facts used" not in text
    assert "- 3 answers believed an older document where a newer one says otherwise" in text


def test_routed_recall_is_told_layer_by_layer(folder):
    text = said(read_findings(folder))
    assert (
        "each layer routed to, in any round**\n\n| system | layer 9 | layer 12 | layer 15 |" in text
    )
    assert "| routed 9 |" not in text


def test_degradation_is_of_all_systems_that_were_run_at_both_ends(folder):
    text = said(read_findings(folder))
    assert re.search(r"\| qa: msa \| 16K to 1M \| \d", text)
    assert re.search(r"\| ruler: full \| 16K to 1M \| \d", text)
    assert "beyond: msa" not in text  # has one size


def test_every_table_of_figures_says_how_it_was_made(folder):
    text = said(read_findings(folder))
    tables = re.findall(r"\*\*([^*\n]+)\*\*\n\n\|.*?\n\n(.{7})", text, re.S)
    unsaid = {name for name, following in tables if following != "Made by"}
    assert len(tables) > 10
    assert unsaid == {"Where every run comes from"}  # which is the list of commands itself
    assert (
        "`msa eval run qa/squad --sizes 16K,128K,1M --output runs/default (commit 8d2315e" in text
    )


def test_runs_are_compared_with_those_before_them(tmp_path):
    now, before = tmp_path / "now", tmp_path / "before"
    two(now, [1] * 30, [1] * 30)
    two(before, [0] * 15 + [1] * 15, [1] * 30)
    findings = read_findings(now, before)
    text = said(findings)
    assert "Of 2 runs that both folders have, 0 are worse" in text
    assert "and 1 better" in text
    assert re.search(r"\| qa/squad 16K \| msa \| 100\.0 \| 50\.0 \| \+50\.0 ahead", text)
    was = explorer_data(findings)["places"][0]["answers"]["0"][0]["before"]
    assert was["score"] == 0


def test_the_judges_mean_stands_beside_the_score(tmp_path):
    findings = two(tmp_path, [1, 0], [1, 1])
    rows = findings.at(("qa/squad", 16_000), "msa").rows
    lines = [
        {"about": {}},
        *({"digest": _digest(r), "score": s} for r, s in zip(rows, (5, 2), strict=True)),
    ]
    (tmp_path / "judged").mkdir()
    name = next((tmp_path / "runs").glob("*msa.jsonl")).name
    (tmp_path / "judged" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "3.50 of 5" in said(read_findings(tmp_path))
    page, _ = write_report(tmp_path)
    assert "3.50 of 5" in said(read_findings(page))


class Reader(HTMLParser):
    """Elements and their attributes, as a browser sees them."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


def test_the_page_runs_its_own_script_and_loads_nothing(tmp_path):
    evil = about(
        "qa/squad", 16_000, f"msa{EVIL}", title=EVIL, metric=EVIL, command=EVIL, model=EVIL
    )
    rows = [
        row(i, "msa", False, question=EVIL, answer=EVIL, gold=[EVIL], kind=EVIL, id=f"{EVIL}{i}")
        for i in range(3)
    ]
    (tmp_path / "runs").mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in [{"about": evil}, *rows])
    (tmp_path / "runs" / "evil.jsonl").write_text(lines)
    path, beside = write_report(tmp_path)
    text = path.read_text()
    elements = Reader(text).elements
    assert [a for t, a in elements if t == "script"] == [
        {"id": "data", "type": "application/gzip"},
        {},
    ]
    assert not {"img", "link", "iframe", "object", "base"} & {tag for tag, _ in elements}
    names = {name for _, attributes in elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | ({"style", "src"} & names)
    assert not re.findall(r"https?://", text)
    assert "<" not in re.sub(r"`[^`\n]+`", "", beside.read_text())  # in code it is no markup


def test_the_policy_allows_the_script_and_the_style_by_their_hash(folder, tmp_path):
    text = write_report(folder, tmp_path / "x.html")[0].read_text()
    for tag in ("style", "script"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#x27;sha256-{digest}&#x27;" in text
    assert "unsafe" not in text
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[0]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_the_questions_in_the_page_are_those_of_the_runs(folder, tmp_path):
    text = write_report(folder, tmp_path / "x.html")[0].read_text()
    packed = re.findall(r'type="application/gzip">([^<]*)<', text)[0]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    findings = read_findings(folder)
    place = next(p for p in data["places"] if (p["task"], p["size"]) == ("qa/squad", 16_000))
    run = findings.at(("qa/squad", 16_000), "msa")
    answers = place["answers"]["0"]
    assert data["systems"][0] == "msa"
    assert [data["pool"][a["answer"]] for a in answers] == [r["answer"] for r in run.rows]
    assert [data["verdicts"][a["verdict"]] for a in answers] == [verdict(r) for r in run.rows]
    first = answers[0]
    assert [data["pool"][i] for i in first["routed"][0]["9"]] == run.rows[0]["routed"][0]["9"]
    assert data["left"] == 0


def test_of_too_many_questions_the_wrong_ones_are_shown_and_the_rest_is_counted(tmp_path):
    findings = two(tmp_path, [1] * 20 + [0] * 10, [1] * 30)
    data = explorer_data(findings, rows=20)
    (place,) = data["places"]
    assert [q["id"] for q in place["questions"]] == [f"q{i}" for i in range(20, 30)]
    assert data["left"] == 20


def test_no_question_is_left_out_while_all_answers_fit(tmp_path):
    two(tmp_path, [1] * 2, [1] * 2, size=32_000)
    findings = two(tmp_path, [1] * 30, [0] * 30)
    assert explorer_data(findings, rows=64)["left"] == 0  # an equal share of these is 16
    assert explorer_data(findings, rows=63)["left"] == 15


def test_the_same_runs_make_the_same_files(folder, tmp_path):
    first, second = (write_report(folder, tmp_path / f"{n}.html") for n in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_reported_is_said(tmp_path):
    with pytest.raises(InputError, match=r"no answers in runs/\*.jsonl; run `msa eval run` first"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"give the name of an HTML file, as in report\.html"):
        write_report(tmp_path, tmp_path / "report.md")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.jsonl").write_text('{"about": {"set": "squad"}}\n')
    with pytest.raises(
        InputError, match=r"x.jsonl: its first line has no 'task'; the report reads"
    ):
        write_report(tmp_path)


def test_two_runs_of_one_system_are_refused(tmp_path):
    path = write_run(tmp_path, about("qa/squad", 0, "msa"), [row(0, "msa", True)])
    path.with_name("again.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="a second run of msa on qa/squad; keep one of them"):
        read_findings(tmp_path)


def test_runs_of_two_models_are_pointed_out(tmp_path):
    for system, model in (("msa", "aaaa"), ("bm25-1", "bbbb")):
        write_run(tmp_path, about("qa/squad", 0, system, model=model), [row(0, system, True)])
    assert "these runs are of 2 models (aaaa, bbbb)" in said(read_findings(tmp_path))


def test_text_is_no_markup_in_markdown():
    assert plain("a|b <i>*x*</i>\n# _y_ [l](u) `c`") == (
        r"a\|b &lt;i&gt;\*x\*&lt;/i&gt; \# \_y\_ \[l\](u) \`c\`"
    )
    assert code("a ``b`` c") == "``` a ``b`` c ```"


def test_sizes_are_named_in_short():
    assert [size_name(n) for n in (0, 500, 16_000, 16_384, 1_500_000, 10**8)] == [
        "", "500", "16K", "16K", "1.5M", "100M",
    ]  # fmt: skip


def test_a_page_holds_its_runs_and_can_be_gone_on_with(folder, tmp_path):
    changed = tmp_path / "changed"
    rows = [row(i, "msa", bool(i % 2), wrong_used=[None, True, False][i % 3]) for i in range(5)]
    write_run(changed, about("changing/updates", 0, "msa"), rows)
    for path in (folder, changed):
        page, beside = write_report(path, tmp_path / "first.html")
        again, same = write_report(page, tmp_path / "second.html")
        assert same.read_text() == beside.read_text()
        assert again.read_text() == page.read_text()


def test_runs_of_a_folder_take_the_place_of_those_of_a_page(folder, tmp_path):
    page, _ = write_report(folder, tmp_path / "old.html")
    rows = [row(i, "msa", False) for i in range(8)]
    key = next(key for key in read_findings(folder).runs if key[2] == "msa")
    write_run(tmp_path / "new", about(key[0], key[1], "msa"), rows)
    held = read_findings([tmp_path / "new", page])
    assert held.runs.keys() == read_findings(folder).runs.keys()
    assert set(held.runs[key].scores.values()) == {0.0}
    assert set(read_findings([page, tmp_path / "new"]).runs[key].scores.values()) != {0.0}
    compared = read_findings(tmp_path / "new", page)
    assert [change.one.place for change in compared.changes] == [key[:2]]


def test_pages_that_cannot_be_gone_on_with_are_refused(folder, tmp_path, monkeypatch):
    page, _ = write_report(folder, tmp_path / "page.html")
    with pytest.raises(InputError, match=r"is a page; name the new one with --output"):
        write_report(page)
    (tmp_path / "other.html").write_text("<p>hello</p>")
    with pytest.raises(InputError, match=r"no page of msa eval report"):
        read_findings(tmp_path / "other.html")
    text = page.read_text()
    start = text.index('type="application/gzip">') + len('type="application/gzip">')
    (tmp_path / "torn.html").write_text(text[: start + 40] + text[start + 44 :])
    with pytest.raises(InputError, match=r"torn\.html: cannot be read as a report"):
        read_findings(tmp_path / "torn.html")
    with pytest.raises(InputError, match=r"nowhere\.html: cannot be read"):
        read_findings(tmp_path / "nowhere.html")
    monkeypatch.setattr(explorer_data, "__defaults__", (5,))
    cut, _ = write_report(folder, tmp_path / "cut.html")
    with pytest.raises(InputError, match=r"questions are left out of this page"):
        read_findings(cut)
