"""The report: the paper's tables, standard errors from the samples, and stable JSON."""

import json
import math
import re
import statistics

import matplotlib.image
import numpy as np
import pytest

from llama_jax.evaluate import chart, report
from llama_jax.evaluate.chart import Bar, save_chart
from llama_jax.evaluate.paper_task import PaperTask
from llama_jax.evaluate.published import published_tables
from llama_jax.evaluate.report import RunInfo, Score, write_report
from llama_jax.evaluate.task_sets import TASKS

TABLES = {table.number: table for table in published_tables()}
RUN = RunInfo(
    "tiny model", "llama-jax evaluate checkpoints/tiny --tasks paper",
    {"b.csv": "22", "a.csv": "11"}, limit=100, truncated_prompts=3,
    sandbox="bubblewrap 0.8.0", missing={"paper_nq_0shot": "NQ-open.dev.jsonl is missing"},
    seconds=12.3,
)  # fmt: skip


def sample(filter_name="none", **values):
    return {"filter": filter_name, "metrics": list(values), "doc_id": 0, **values}


@pytest.fixture
def results(monkeypatch):
    """Results as ``simple_evaluate`` returns them: two tasks of the paper, one of the harness with
    two filters, a group, and a perplexity."""
    task = lambda title, table, *metrics: PaperTask(
        title, table, metrics, f"{title} as is.", "", id
    )
    tasks = {
        "paper_piqa": task("PIQA", "commonsense", "acc_norm"),
        "paper_crows_pairs": task("CrowS-Pairs", "bias", "average", "race/color", "age"),
    }
    monkeypatch.setattr(report, "TASKS", tasks)
    piqa = [sample(acc_norm=float(i % 4 > 0)) for i in range(40)]
    pairs = [sample(average=1.0, age=1.0), sample(average=0.0, age=0.0), sample(average=1, age=1)]
    pairs += [sample(**{"average": 1.0, "race/color": 1.0})]
    gsm = [sample(f, exact_match=x) for x in (1.0, 0.0) for f in ("strict", "flexible")]
    gsm[-1]["exact_match"] = 1.0
    texts = [sample(word_perplexity=(-10.0, 5)), sample(word_perplexity=(-20.0, 5))]
    samples = {
        "paper_piqa": piqa, "paper_crows_pairs": pairs, "gsm8k": gsm, "wikitext": texts,
    }  # fmt: skip
    return {
        "results": {
            "paper_piqa": {"name": "paper_piqa", "alias": "a", "sample_len": 40,
                           "acc_norm,none": np.float64(0.75), "acc_norm_stderr,none": 0.0693},
            "paper_crows_pairs": {"average,none": 0.75, "age,none": np.float32(2 / 3),
                                  "race/color,none": 1.0, "age_stderr,none": np.float64(1 / 3),
                                  "race/color_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5,
                      "exact_match,flexible": 1.0, "exact_match_stderr,flexible": 0.0},
            "wikitext": {"word_perplexity,none": 20.1, "word_perplexity_stderr,none": "N/A"},
            "mmlu": {"sample_len": 60, "acc,none": 0.25, "acc_stderr,none": 0.03,
                     "sample_count": {"acc,none": 60}},
        },
        "samples": samples,
    }  # fmt: skip


def test_scores(results):
    """n counts the documents that have the metric, in one filter."""
    scores = report.all_scores(results)
    assert scores["paper_piqa"] == {"acc_norm": Score(0.75, 0.0693, 40)}
    assert {k: s.n for k, s in scores["paper_crows_pairs"].items()} == {
        "average": 4, "age": 3, "race/color": 1,
    }  # fmt: skip
    assert scores["paper_crows_pairs"]["age"].standard_error == pytest.approx(1 / 3)
    assert scores["paper_crows_pairs"]["race/color"].standard_error is None
    assert scores["gsm8k"] == {
        "exact_match,strict": Score(0.5, 0.5, 2), "exact_match,flexible": Score(1.0, 0.0, 2),
    }  # fmt: skip
    assert scores["wikitext"] == {"word_perplexity": Score(20.1, None, 2)}
    assert scores["mmlu"] == {"acc": Score(0.25, 0.03, 60)}


def test_files(results, tmp_path):
    text = write_report(tmp_path, results, RUN)
    markdown = (tmp_path / "report.md").read_text()
    for part in (text, markdown):
        assert "First 100 questions of each task: not comparable with published results." in part
        assert "3 prompts were longer than the context" in part
        assert "sandbox: bubblewrap 0.8.0" in part
        assert "- paper_nq_0shot: NQ-open.dev.jsonl is missing" in part
    row = lambda name: [c.strip() for c in find(markdown, f"| {name} ").strip("|").split("|")]
    # The paper's own form: a row of ours in table 3, a column of ours in table 12.
    assert row("LLaMA 7B †")[1:4] == ["76.5", "79.8", "48.9"]
    assert row("tiny model")[1:] == ["-", "75.0", *"------"]
    assert row("race/color") == ["race/color", "57.0", "64.7", "68.6", "100.0"]
    assert row("gender")[-1] == "-"
    assert row("PIQA") == ["PIQA", "acc_norm", "75.0", "6.9", "40"]
    assert row("gsm8k") == ["gsm8k", "exact_match", "strict", "0.5000", "0.5000", "2"]
    assert row("wikitext") == ["wikitext", "word_perplexity", "none", "20.1000", "-", "2"]
    for line in (
        RUN.command,
        "- PIQA: PIQA as is.",
        "- a.csv: SHA-256 11",
        "![bar chart](chart.png)",
    ):
        assert line in markdown
    assert "Table 11" not in markdown  # nothing of it was measured
    assert matplotlib.image.imread(tmp_path / "chart.png").shape[1] > 500
    assert not list(tmp_path.glob("*.partial"))


def test_notes_of_tasks(results, tmp_path):
    results["configs"] = {
        "wikitext": {"metadata": {"version": 1.0}},
        "paper_piqa": {"metadata": {"note": "half of the data is missing"}},
        "gsm8k": {},
        "mmlu": {"metadata": [{"version": 0.0}]},  # of older task files
    }
    for text in (write_report(tmp_path, results, RUN), (tmp_path / "report.md").read_text()):
        assert "paper_piqa: half of the data is missing.\n" in text
    notes = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert notes == ["paper_piqa: half of the data is missing."]


def test_json_is_stable(results, tmp_path):
    """The same results in another order give the same bytes, except for the time."""
    reports = []
    for order in (list, reversed):
        shuffled = {k: dict(order(list(v.items()))) for k, v in results.items()}
        write_report(tmp_path, shuffled, RUN._replace(seconds=float(len(reports))))
        content = (tmp_path / "report.json").read_text()
        reports.append(re.sub(r'"time": \{.*?\}', "", content, flags=re.DOTALL))
    tree = json.loads(content)
    assert reports[0] == reports[1]
    assert tree["tasks"]["paper_crows_pairs"]["metrics"]["age"]["value"] == float(np.float32(2 / 3))
    assert tree["tables"]["12"]["measured"]["age"]["n"] == 3
    assert tree["tables"]["12"]["published"]["LLaMA 65B"]["age"] == 70.1
    assert tree["versions"]["jax"]
    assert tree["limit"] == 100


def test_names_in_the_chart_are_plain_text(tmp_path):
    bar = Bar("task $\\x$", 5.0, 1.0, {"LLaMA 7B": 3.0})
    assert save_chart(tmp_path / "chart.png", [bar], "_model $\\frac{$")


def test_bits_per_byte_are_not_percent(results, tmp_path, monkeypatch):
    """A bar is a mean of values from 0 to 1; bits per byte may be below 1 as well."""
    bars = []
    monkeypatch.setattr(report, "save_chart", lambda path, made, model: bars.extend(made))
    results["results"]["wikitext"]["bits_per_byte,none"] = 0.93
    for text in results["samples"]["wikitext"]:
        text["bits_per_byte"] = text["word_perplexity"]
        text["metrics"].append("bits_per_byte")
    write_report(tmp_path, results, RUN)
    labels = [bar.label for bar in bars]
    assert "gsm8k exact_match,strict" in labels
    assert "mmlu acc" in labels
    assert not [label for label in labels if "wikitext" in label]


def test_infinite_values_are_named(results, tmp_path):
    results["results"]["wikitext"]["word_perplexity,none"] = math.inf
    text = write_report(tmp_path, results, RUN)
    assert "wikitext: word_perplexity is inf, and has no row." in text
    assert "wikitext" in json.loads((tmp_path / "report.json").read_text())["tasks"]


def test_a_chat_template_is_stated(results, tmp_path):
    note = "the model's chat template"
    assert note not in write_report(tmp_path, results, RUN)
    assert note in write_report(tmp_path, results, RUN._replace(chat_template=True))
    assert note in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["chat_template"] is True


def test_a_chart_of_very_many_tasks(tmp_path, monkeypatch):
    """Its height is limited: matplotlib would raise an error, and there would be no report."""
    import matplotlib.figure

    heights = []
    keep = lambda figure, *args, **more: heights.append(figure.get_figheight() * figure.dpi)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    monkeypatch.setattr(chart, "save_figure", lambda figure, path: figure.savefig(path))
    for count in (2, 1700):
        save_chart(tmp_path / "chart.png", [Bar("a", 50.0, 1.0, {})] * count, "m")
    assert heights[0] < 500
    assert heights[1] < 2**16


def test_no_chart_without_a_value_to_chart(results, tmp_path):
    (tmp_path / "chart.png").touch()
    only = {k: {"wikitext": v["wikitext"]} for k, v in results.items()}
    write_report(tmp_path, only, RunInfo("m", "c"))
    assert not (tmp_path / "chart.png").exists()
    assert "chart" not in (tmp_path / "report.md").read_text()
    assert "not comparable" not in (tmp_path / "report.md").read_text()


def find(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


# The published numbers ---------------------------------------------------------------------------


def test_every_table_is_complete():
    assert sorted(TABLES) == [3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 16]
    for table in TABLES.values():
        assert len({len(row) for row in table.rows}) == 1, table.number
        assert len(table.ours) == len(table.items), table.number
        for model, values in table.values.items():
            low, high = (0, 100) if table.decimals == 1 else (0, 1)
            assert all(low < x < high for x in values.values()), (table.number, model)
    models = {
        name for number in (3, 4, 5, 6, 7, 8, 9, 11, 13, 14) for name in TABLES[number].values
    }
    assert models >= {f"LLaMA {size}B" for size in (7, 13, 33, 65)}
    assert models >= {"GPT-3 175B", "Gopher 280B", "Chinchilla 70B", "PaLM 540B"}


def test_every_task_of_ours_has_its_place():
    """Each item of a table is a metric of a task of the same set, and each task is in a table."""
    shown = set()
    for table in TABLES.values():
        for task, _, metric in (name.partition("/") for name in table.ours if name):
            assert TASKS[task].table == table.set, task
            assert not metric or metric in TASKS[task].metrics, (task, metric)
            shown.add(task)
    assert shown == set(TASKS)


def test_crows_pairs_average():
    """The paper's average is over pairs; these are the numbers of pairs of the data set."""
    pairs = dict(
        zip(TABLES[12].items, (262, 105, 516, 84, 87, 159, 60, 63, 172, 1508), strict=True)
    )
    for values in TABLES[12].values.values():
        total = sum(n * values[k] for k, n in pairs.items() if k != "average")
        assert total / pairs["average"] == pytest.approx(values["average"], abs=0.06)
    for category, n in pairs.items():  # each value of LLaMA is a number of pairs
        pct = TABLES[12].values["LLaMA 65B"][category]
        assert round(100 * round(pct * n / 100) / n, 1) == pct


def test_winogender_values_are_counts():
    """240 sentences per pronoun, all three in "all", and 120 in each gotcha set."""
    sizes = dict(zip(TABLES[13].items, (720, 240, 240, 240, 120, 120), strict=True))
    for model, values in TABLES[13].values.items():
        for item, n in sizes.items():
            pct = values[item]
            assert abs(100 * round(pct * n / 100) / n - pct) <= 0.06, (model, item)
        mean = statistics.fmean(values[item] for item in TABLES[13].items[1:4])
        assert values["all"] == pytest.approx(mean, abs=0.1)


def test_mmlu_averages():
    """Table 9 follows from table 16: means over questions, with anatomy in Other."""
    table = TABLES[16]
    subjects = {row[0]: (row[1], int(row[2])) for row in table.rows[1:]}
    assert len(subjects) == 57
    assert sum(n for _, n in subjects.values()) == 14042
    domains = {"Humanities": "Hum", "STEM": "STEM", "Social Sciences": "Social", "Other": "Other"}
    instruct = dict(zip(TABLES[9].items, (67.4, 56.6, 79.2, 72.6, 68.9), strict=True))
    expected = {**TABLES[9].values, "LLaMA-I 65B": instruct}
    for model, values in table.values.items():
        for item, published in expected[model].items():
            chosen = [
                (n, values[name])
                for name, (domain, n) in subjects.items()
                if item == "Average" or domains[item] == ("Other" if name == "anatomy" else domain)
            ]
            mean = sum(n * x for n, x in chosen) / sum(n for n, _ in chosen)
            assert mean == pytest.approx(published, abs=0.06), (model, item)
