import json
import re

from training.compare import compare


def test_a_comparison_goes_on_and_ends_in_a_table(contest_config, tmp_path):
    told: list[str] = []
    page = tmp_path / "docs" / "comparison.md"
    compare(contest_config, tmp_path / "runs", page, told.append)
    text = page.read_text()
    assert f"ViT from elsewhere waits for {tmp_path}/later.pt" in told
    assert (tmp_path / "docs" / "images" / "comparison.png").exists()
    rows = dict(re.findall(r"^\| ([^|]+) \| (0\.\d+ \[[^|]+\] \| 0\.\d+ [^|]+ \| 0\.\d+ [^|]+) \|$", text, re.M))
    assert {"small ViT", "ResNet", "colour histogram, SVM"} <= rows.keys()
    assert "| ViT from elsewhere | not finished | not finished | not finished |" in text
    assert re.search(r"\| ResNet \| small ViT \| [+-]0\.\d+ \[", text)
    assert "## The best 1, 2 rounds of folds\n\nLeft open until every network has answered" in text

    ledger = page.with_suffix(".jsonl")
    whole = ledger.read_text()
    folds = [json.loads(line)["fold"] for line in whole.splitlines()]
    assert len([f for f in folds if f.startswith("random-0")]) == 4 and not [f for f in folds if "random-1" in f]

    lost = next(line for line in whole.splitlines(keepends=True) if '"ResNet", "fold": "slide-0-3"' in line)
    ledger.write_text(whole.replace(lost, ""))
    compare(contest_config, tmp_path / "another machine", page, told.append, train=False)
    assert re.search(r"\| ResNet \| 0\.\d+ [^|]+ \| 0\.\d+ [^|]+ \| not finished \|", page.read_text())
    compare(contest_config, tmp_path / "another machine", page, told.append)
    assert ledger.read_text() == whole.replace(lost, "") + lost
    assert [path.name for path in (tmp_path / "another machine" / "c").iterdir()] == ["resnet"]
    assert accuracies(page.read_text()) == accuracies(text)


def test_the_best_are_named_once_all_have_answered(contest_config, tmp_path):
    page = tmp_path / "comparison.md"
    both = contest_config.model_copy(update={"networks": contest_config.networks[:2]})
    compare(both, tmp_path / "runs", page, lambda text: None)
    assert re.search(r"## The best 1, 2 rounds of folds\n\n\|.*\n.*\n\| (small ViT|ResNet) \| 0", page.read_text())
    lines = page.with_suffix(".jsonl").read_text().splitlines()
    folds = [json.loads(line)["fold"] for line in lines]
    assert len([f for f in folds if f.startswith("random-1")]) == 2

    page.with_suffix(".jsonl").write_text("\n".join(line for line in lines if '"random-1-' not in line) + "\n")
    compare(both, tmp_path / "runs", page, lambda text: None, train=False)
    assert re.search(
        r"Chosen by the first round: (small ViT|ResNet)\. Their other rounds are not finished", page.read_text()
    )

    page.with_suffix(".jsonl").write_text("\n".join(line for line in lines if '"small ViT"' in line) + "\n")
    compare(both, tmp_path / "runs", page, lambda text: None, train=False)
    assert "folds\n\nLeft open until every network has answered" in page.read_text()


def accuracies(page: str) -> str:
    return page.partition("## Cost")[0]
