"""The script that refits the paper's points: its page says which form picks which rank."""

import sys

import refit_paper


def test_the_page_says_that_the_papers_form_picks_the_worst_rank_beyond_its_points(tmp_path, monkeypatch):
    monkeypatch.setattr(refit_paper, "BOOTSTRAPS", 20)
    monkeypatch.setattr(refit_paper, "LARGEST", (2**11, 2**12))
    monkeypatch.setattr(sys, "argv", ["refit_paper.py", "--out", str(tmp_path)])
    refit_paper.main()
    page = (tmp_path / "paper.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    by_form = {(row[0], row[1]): row for row in rows}
    assert by_form["2048", "power"][-3:] == ["64, wrong"] * 3
    assert by_form["2048", "power"][2] == by_form["4096", "with over-fitting term"][2] == "yes"
    assert by_form["4096", "with over-fitting term"][-3:] == ["16 (seen)", "8", "8"]
    assert by_form["64", "1.587"][2] == "0.6800"
    assert (tmp_path / "paper.svg").read_text().count("<svg") == 1
