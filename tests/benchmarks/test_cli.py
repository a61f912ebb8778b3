from typer.testing import CliRunner

from benchmarks.__main__ import cli


def test_an_error_is_told_letter_by_letter(tmp_path):
    folder = tmp_path / "[red] [/tmp]"
    folder.mkdir(parents=True)
    (folder / "cpu.jsonl").write_text("broken\n{}\n")
    result = CliRunner().invoke(cli, ["report", "--folder", str(folder)])
    assert result.exit_code == 1 and f"line 1 of {folder}/cpu.jsonl is damaged" in result.stderr
