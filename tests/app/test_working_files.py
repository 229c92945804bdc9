"""app/working_files.py: files for visitors to download."""

from concurrent.futures import ThreadPoolExecutor

from app import working_files


def test_many_at_once_get_files_and_old_ones_go(monkeypatch):
    monkeypatch.setattr(working_files, "KEPT", 20)
    files = working_files.WorkingFiles()

    def made(number: int) -> None:
        files.new(f"{number}.png").write_text("")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(made, range(20)))
    assert len(list(files.folder.iterdir())) == 20
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: files.new(f"{number}.png"), range(200)))
    assert len(list(files.folder.iterdir())) == 20
