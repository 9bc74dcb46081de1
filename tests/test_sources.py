"""Sources: every format gives the same rows, and bad input stops with one line that says where and what to do."""

import json
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pandas as pd
import pytest

from src import hub_datasets
from src.config import CorpusSettings
from src.labels import LABEL_IDS, label_id
from src.pretraining_dataset import Documents, cleaned_documents
from src.sources import SourceError, count_articles, describe_source, read_articles, read_labelled

ROWS = [("Profit rose 3%, to €5", "bullish"), ("NA", "neutral"), ("null", "neutral"), ('He said: "we\nfell"', "bearish"), ("x", "Positive")]
LABELS = [2, 1, 1, 0, 2]


def write(path: Path, rows=ROWS) -> Path:
    frame = pd.DataFrame(rows, columns=["text", "label"])
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl", force_ascii=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_every_format_gives_the_same_rows(tmp_path, suffix, mark):
    """Breaks when a reader turns NA or null into nothing, loses a quoted newline, or trips over a byte order mark."""
    path = write(tmp_path / f"news{suffix}")
    if suffix != ".parquet":
        path.write_bytes(mark + path.read_bytes())
    frame = read_labelled(path)
    assert frame.text.tolist() == [text for text, _ in ROWS]
    assert frame.label.tolist() == LABELS
    assert frame.source_row.tolist() == [0, 1, 2, 3, 4]
    assert [article.text for article in read_articles(path)] == [text for text, _ in ROWS]


def test_text_files_and_folders(tmp_path):
    """Breaks when a folder mixes stray text files into its tables, reads files in random order, or splits one-document files."""
    (tmp_path / "b.txt").write_text("first line\nsecond line\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("alone", encoding="utf-8")
    assert [article.text for article in read_articles(tmp_path / "b.txt")] == ["first line", "second line"]
    assert [(article.row, article.text) for article in read_articles(tmp_path)] == [(0, "alone"), (1, "first line\nsecond line")]
    write(tmp_path / "part-2.jsonl", ROWS[3:])
    write(tmp_path / "part-1.csv", ROWS[:3])
    assert read_labelled(tmp_path).label.tolist() == LABELS
    assert [Path(source["path"]).name for source in describe_source(tmp_path)] == ["part-1.csv", "part-2.jsonl"]


def test_headlines_lead_their_articles(tmp_path):
    """Breaks when a headline runs into the first sentence, is lost, or stands in for text that is not there."""
    path = tmp_path / "news.jsonl"
    articles = [
        {"Headline": "Acme falls", "Article": "Shares fell."},
        {"Headline": "Why?", "Article": None},
        {"Headline": "", "Article": "B."},
    ]
    path.write_text("\n".join(map(json.dumps, articles)), encoding="utf-8")
    assert [article.text for article in read_articles(path)] == ["Acme falls.\nShares fell.", "Why?", "B."]
    assert [article.text for article in read_articles(path, "Article")] == ["Shares fell.", "", "B."]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_limited_run_is_spread_evenly(tmp_path, suffix):
    """Breaks when `max_documents` takes the first rows: the oldest news, or a single class."""
    path = write(tmp_path / f"news{suffix}", [(str(i), "neutral") for i in range(100)])
    rows = [article.row for article in read_articles(path, max_documents=10)]
    assert rows == list(range(9, 100, 10))
    assert count_articles(path) == len(list(read_articles(path, max_documents=1000))) == 100
    assert len(read_labelled(path, max_documents=7)) == 7


def test_a_document_of_two_megabytes_in_one_line(tmp_path):
    """Breaks when a csv field is limited to Python's 131,072 characters."""
    text = "profit rose, " * 160_000
    for path in (write(tmp_path / "a.csv", [(text, "neutral")]), write(tmp_path / "a.jsonl", [(text, "neutral")])):
        assert next(read_articles(path)).text == text.strip()
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert next(read_articles(tmp_path / "a.txt")).text == text.strip()


@pytest.mark.parametrize("limit", [None, 9])
def test_a_json_array_is_parsed_few_times(tmp_path, monkeypatch, limit):
    """Breaks when the columns, the format, the count or a progress bar has the whole file parsed again."""
    path = write(tmp_path / "a.json", [(f"Profit rose {i}%", "neutral") for i in range(100)])
    whole, parsed, loads = path.stat().st_size, [], json.loads
    monkeypatch.setattr("json.loads", lambda text: parsed.append(len(text)) or loads(text))
    settings = CorpusSettings(path=str(path), min_words=1, max_documents=limit)
    assert len(list(cleaned_documents(settings, Documents()))) == (limit or 100)
    assert len(read_labelled(path, max_documents=limit)) == (limit or 100)
    assert 2 <= parsed.count(whole) <= 8


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    """Breaks when an empty or blank sentence becomes a training example, or vanishes without a word."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": "neutral"}, {"text": None, "label": "neutral"}, {"text": "  ", "label": "neutral"}, {"label": "neutral"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"a.jsonl: row 2 has no text, as 3 of 4 rows: left out"):
        frame = read_labelled(path)
    assert frame.text.tolist() == ["a"]
    assert frame.attrs["without_text"] == 3
    assert [article.text for article in read_articles(path)] == ["a", "", "", ""]


GOOD = "text,label\na,neutral\n"
BAD = {  # name: (file, content, what the message holds)
    "empty": ("a.csv", b"", "a.csv is empty"),
    "header only": ("a.csv", b"text,label\n", "a.csv holds no row"),
    "no row": ("a.jsonl", b"\n\n", "a.jsonl holds no row"),
    "empty parquet": ("a.parquet", b"", "a.parquet is empty"),
    "not parquet": ("a.parquet", b"PAR1 cut off", "a.parquet is not a whole parquet file"),
    "unknown format": ("a.xlsx", b"x", "format .xlsx is not known: use .csv"),
    "wrong column": ("a.csv", b"body_text,label\na,neutral\n", "has columns 'body_text', 'label': say which one to read with TEXT_COLUMN"),
    "not utf-8": ("a.csv", GOOD.encode() + b"it\x92s,neutral\n", "line 3 is not UTF-8 (byte 0x92 at position 3)"),
    "utf-16": ("a.csv", GOOD.encode("utf-16"), "a.csv is UTF-16"),
    "semicolons": ("a.csv", b"text;label\na, b;neutral\n", "a.csv is separated by ';': save it with commas"),
    "twice": ("a.csv", b"text,label,text\na,neutral,b\n", "a.csv has two columns 'text': rename one"),
    "ragged": ("a.csv", b"text,label\na,b,neutral\n", "row 1 (line 2) has 3 fields, the header 2"),
    "open quote": ("a.csv", b'text,label\na,neutral\n"b,neutral\n', "row 2 (line 3) is not valid csv"),
    "open header": ("a.csv", b'text,"label\na,neutral\n', "the header is not valid csv"),
    "line ends of old Macs": ("a.csv", b"text,label\ra,neutral\r", "the header is not valid csv"),
    "columns, not rows": ("a.json", b'{"text": {"0": "a"}, "label": {"0": "neutral"}}', 'write it with to_json(orient="records")'),
    "truncated": ("a.jsonl", b'{"text": "a", "label": "neutral"}\n{"text": "b", "la', "row 2 is not valid JSON"),
    "truncated array": ("a.json", b'[{"text": "a", "label": "neutral"}, {"te', "a.json is not valid JSON"),
    "not an object": ("a.jsonl", b"[1, 2]\n", "row 1 is a JSON list"),
    "not text": ("a.jsonl", b'{"text": 5, "label": "neutral"}', "row 1, column 'text' holds int 5, not text"),
    "unknown label": ("a.csv", b"text,label\na,neutral\nb,bulish\n", "row 2, column 'label': label 'bulish' is unknown"),
    "no label": ("a.csv", b"text,label\na,\n", "row 1 has no label in column 'label'"),
    "integers": ("a.csv", b"text,label\na,1\n", "row 1, column 'label': label '1' is a number without a declared meaning: pass LABEL_MAP"),
    "all blank": ("a.csv", b'text,label\n" ",neutral\n', "column 'text' holds no text in any row"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_stop_with_one_line(tmp_path, name):
    """Breaks when bad input raises something else, spans lines, or hides the file, the row or the cure."""
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError) as error:
        read_labelled(tmp_path / file)
    assert message in str(error.value)
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert ": " in str(error.value), "a cure follows the problem"


def test_files_that_a_folder_passes_over_are_said(tmp_path):
    """Breaks when half of the data stays unread because it is packed, and nobody hears of it."""
    write(tmp_path / "a.csv")
    (tmp_path / "b.csv.gz").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"b\.csv\.gz is not read, as 1 file\(s\): unpack it"):
        assert len(read_labelled(tmp_path)) == len(ROWS)


def test_one_row_that_holds_a_list_is_one_row(tmp_path):
    """Breaks when the list is taken for the rows of a file that is an object with one array in it."""
    (tmp_path / "a.json").write_text('{"text": "Profit rose", "label": "neutral", "tags": ["profit"]}', encoding="utf-8")
    assert read_labelled(tmp_path / "a.json").text.tolist() == ["Profit rose"]


def test_half_an_emoji_is_one_unknown_sign(tmp_path):
    """Breaks when a tweet cut at a length, which JSON can hold and UTF-8 cannot, stops the run when it is written."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "Profit \ud83d rose", "label": "neutral"}', encoding="utf-8")
    assert read_labelled(tmp_path / "a.jsonl").text.tolist() == ["Profit \ufffd rose"]


@pytest.mark.parametrize("value", ["1", "1.0", "+1", 1, 1.0])
def test_a_number_is_the_same_label_however_it_is_written(value):
    """Breaks when a column of integers with one missing, which a csv then holds as 1.0, has no meaning any more."""
    assert label_id(value, {"1": "bullish"}) == LABEL_IDS["bullish"]


def test_hidden_folders_are_not_data(tmp_path):
    """Jupyter keeps an old copy of an edited csv in `.ipynb_checkpoints`: read too, its labels contradict the corrected ones."""
    write(tmp_path / "news.csv", [("Profit rose", "positive")])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints" / "news-checkpoint.csv", [("Profit rose", "negative")])
    assert read_labelled(tmp_path).label.tolist() == [2]


@pytest.mark.parametrize("read", [lambda path: list(read_articles(path)), read_labelled])
def test_bad_places_stop_with_one_line(tmp_path, read):
    """Breaks when a missing path or a folder without data reaches a library that talks of the Hub or of globs."""
    with pytest.raises(SourceError, match=r"nowhere.csv does not exist: correct the path, or use sample, hub or a Hub id"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(SourceError, match=r"is a folder without data: put \.csv"):
        read(tmp_path)


def test_named_columns(tmp_path):
    """Breaks when a column that does not exist is ignored, or a label map is not."""
    path = tmp_path / "a.csv"
    path.write_text("a,b,c\nx,y,7\n", encoding="utf-8")
    assert read_labelled(path, "b", "c", "7=bearish").values.tolist() == [["y", 0, 0]]
    assert next(read_articles(path, "a+b")).text == "x.\ny"
    with pytest.raises(SourceError, match=r"a.csv has no column 'd': choose from 'a', 'b', 'c'"):
        next(read_articles(path, "d"))
    with pytest.raises(SourceError, match=r"label '7' is not in the label map"):
        read_labelled(path, "b", "c", "0=bearish")


def test_the_hub_is_read_at_a_recorded_revision(monkeypatch):
    """Breaks when a Hub dataset is read at another revision than the one recorded, or with another label order."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(hub_id, revision):
        asked.append((hub_id, revision))
        return {"test": None, "train": datasets.Dataset.from_dict({"text": ["up", "flat", "down"], "label": [0, 1, 2]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    info = types.SimpleNamespace(sha="0123abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, hub_id, timeout: info)
    hub_datasets.hub_revision.cache_clear()
    hub_datasets.load_hub_dataset.cache_clear()
    assert read_labelled("hub").label.tolist() == [2, 1, 0]
    assert read_labelled("hub", max_documents=1).text.tolist() == ["down"]
    assert asked == [("ugursa/Yahoo-Finance-News-Sentences", "0123abc")]
    expected = [{"hub_id": "ugursa/Yahoo-Finance-News-Sentences", "split": None, "revision": "0123abc"}]
    assert describe_source("hub", labelled=True) == expected
    with pytest.raises(SourceError, match="has no split 'dev': choose one of test, train"):
        read_labelled("ugursa/Yahoo-Finance-News-Sentences:dev")
    hub_datasets.hub_revision.cache_clear()
    hub_datasets.load_hub_dataset.cache_clear()


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_an_unreachable_hub_names_the_way_out(kind):
    """Breaks when a library's retries keep a user without network waiting, or the message does not say what to do."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()
        code = "from src.sources import read_articles; next(read_articles('hub'))"
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "PATH": "",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "the Hub cannot be reached" in last
    assert "CORPUS=sample" in last
    assert "a local file or folder" in last


def test_a_call_that_hangs_is_left_behind():
    """Breaks when a name server that does not answer holds up the run beyond the deadline."""
    with pytest.raises(TimeoutError, match="no answer within"):
        hub_datasets.within(0.05, lambda: threading.Event().wait(3))
    with pytest.raises(KeyError):
        hub_datasets.within(5, lambda: {}["missing"])


def test_the_sample_reads_like_any_source():
    """Breaks when the bundled sample needs settings that a run without arguments does not have."""
    articles = list(read_articles("sample"))
    assert len(articles) == count_articles("sample") >= 2000
    assert set(read_labelled("sample").label) == {0, 1, 2}
