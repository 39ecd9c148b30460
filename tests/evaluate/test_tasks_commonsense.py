"""Table 3: documents from the published formats, requests of the stock tasks, and the metrics."""

import json

import pytest
from task_tools import requests, scores, shared, stock_task, write

from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.tasks import commonsense
from llama_jax.evaluate.tasks.commonsense import TASKS

BOOLQ = {"question": "is ice cold", "passage": "Ice is frozen water.", "title": "Ice"}
PIQA = {"goal": "Cool a drink.", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0}
SIQA = {
    "context": "Al fell.", "question": "How is Al?",
    "answerA": "hurt", "answerB": "glad", "answerC": "a bird", "label": "3",
}  # fmt: skip
HELLASWAG = {
    "activity_label": "Baking [header] Pie", "ctx_a": "A man bakes. [title] He waits.",
    "ctx_b": "the Pie", "endings": ["burns [step] a lot.", "flies.", "sings."], "label": "1",
}  # fmt: skip
WINOGRANDE = {
    "sentence": "The cup fell on the rug because the _ was loose.",
    "option1": "cup", "option2": "rug", "answer": "2",
}  # fmt: skip
CHOICES = [
    {"text": "sun", "label": "1"},
    {"text": "moon", "label": "2"},
    {"text": "a", "label": "3"},
]
ARC = {"id": "x", "question": {"stem": "What shines?", "choices": CHOICES}, "answerKey": "2"}
ARC_HUB = {
    "question": "What shines?", "answerKey": "2",
    "choices": {"text": ["sun", "moon", "a"], "label": ["1", "2", "3"]},
}  # fmt: skip
OBQA_TSV = (
    "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
    "1\tIce is\t(A) cold (really) (B) hot (C) red (D) loud\tIce is ...\tB\n"
)
OBQA_CHOICES = {"text": ["cold (really)", "hot", "red", "loud"], "label": ["A", "B", "C", "D"]}

BOOLQ_DOC = {
    "query": "Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", "choices": ["no", "yes"],
    "gold": 1,
}  # fmt: skip
PIQA_DOC = {
    "query": "Question: Cool a drink.\nAnswer:", "choices": ["Add ice.", "Add fire."], "gold": 0,
}  # fmt: skip
SIQA_DOC = {
    "query": "Q: Al fell. How is Al?\nA:", "choices": ["hurt", "glad", "a bird"], "gold": 2,
}  # fmt: skip
WINOGRANDE_DOC = {
    "contexts": [f"The cup fell on the rug because the {x}" for x in ("cup", "rug")],
    "continuation": "was loose.", "gold": 1,
}  # fmt: skip
ARC_DOC = {
    "query": "Question: What shines?\nAnswer:", "choices": ["sun", "moon", "a"], "gold": 1,
}  # fmt: skip
OBQA_DOC = {"query": "Ice is", "choices": OBQA_CHOICES["text"], "gold": 1}


def without_label(record):
    return {name: value for name, value in record.items() if name != "label"}


def docs(task, folder):
    data_set = TASKS[task].make.args[1]
    return commonsense._read(data_set, TaskOptions(data=folder), TASKS[task].download)


@pytest.mark.parametrize(
    ("task", "files", "expected"),
    [
        ("boolq", {"boolq/dev.jsonl": [{**BOOLQ, "answer": True}]}, BOOLQ_DOC),
        ("boolq", {"BoolQ/val.jsonl": [{**BOOLQ, "label": True, "idx": 0}]}, BOOLQ_DOC),
        ("boolq", {"boolq/validation-00000-of-00001.parquet": [{**BOOLQ, "label": 1}]}, BOOLQ_DOC),
        ("piqa", {"piqa/valid.jsonl": [{**PIQA, "label": 0}]}, PIQA_DOC),
        ("piqa", {"piqa/valid.jsonl": [without_label(PIQA)],
                  "piqa/valid-labels.lst": "0\n"}, PIQA_DOC),
        ("piqa", {"piqa/plain_text/validation-00000-of-00001.parquet": [PIQA]}, PIQA_DOC),
        ("siqa", {"siqa/validation.jsonl": [SIQA]}, SIQA_DOC),
        ("siqa", {"socialiqa-train-dev/dev.jsonl": [without_label(SIQA)],
                  "socialiqa-train-dev/dev-labels.lst": "3\n"}, SIQA_DOC),
        ("siqa", {"siqa/x_dev.jsonl": [{"context": "Al fell.", "question": "How is Al?",
                                        "options": ["hurt", "glad", "a bird"],
                                        "answer": "a bird"}]}, SIQA_DOC),
        ("siqa", {"socialIQa_v1.4/socialIWa_v1.4_dev.jsonl": [
            {**without_label(SIQA), "correct": "C"}]}, SIQA_DOC),
        ("siqa", {"socialIQa_v1.4_withDims/socialIWa_v1.4_dev_wDims.jsonl": [
            {**without_label(SIQA), "label_letter": "C", "label_ix": 2}]}, SIQA_DOC),
        ("winogrande", {"winogrande_1.1/dev.jsonl": [WINOGRANDE]}, WINOGRANDE_DOC),
        ("winogrande", {"winogrande/winogrande_xl/validation-00000-of-00001.parquet": [WINOGRANDE]},
         WINOGRANDE_DOC),
        ("winogrande", {"winogrande/val.jsonl": [{"context_options": WINOGRANDE_DOC["contexts"],
                                                  "continuation": "was loose.", "gold": 1}]},
         WINOGRANDE_DOC),
        ("arc_easy", {"arc/ARC-Easy-Test.jsonl": [ARC]}, ARC_DOC),
        ("arc_easy", {"ai2_arc/ARC-Easy/test-00000-of-00001.parquet": [ARC_HUB],
                      "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet": [{"bad": 1}]}, ARC_DOC),
        ("arc_challenge", {"arc/ARC-Challenge-Dev.jsonl": [ARC]}, ARC_DOC),
        ("arc_easy", {"arc/arc_easy_test.jsonl": [{"query": "Question: What shines?", "gold": 1,
                                                   "choices": ["sun", "moon", "a"]}]}, ARC_DOC),
        ("openbookqa", {"openbookqa/dev.tsv": OBQA_TSV}, OBQA_DOC),
        ("openbookqa", {"OpenBookQA/Data/Main/test.jsonl": [
            {"question": {"stem": "Ice is", "choices": [
                {"text": t, "label": x} for t, x in zip(OBQA_DOC["choices"], "ABCD", strict=True)]},
             "answerKey": "B"}]}, OBQA_DOC),
        ("openbookqa", {"openbookqa/main/test-00000-of-00001.parquet": [
            {"question_stem": "Ice is", "choices": OBQA_CHOICES, "answerKey": "B"}]}, OBQA_DOC),
    ],
)  # fmt: skip
def test_published_formats(tmp_path, task, files, expected):
    for name, content in files.items():
        write(tmp_path, name, content)
    assert docs(f"paper_{task}", tmp_path) == [expected]


def test_hellaswag_is_cleaned(tmp_path):
    write(tmp_path, "hellaswag/hellaswag_val.jsonl", [HELLASWAG])
    assert docs("paper_hellaswag", tmp_path) == [
        {
            "query": "Baking Pie: A man bakes.. He waits. The pie",
            "choices": ["burns a lot.", "flies.", "sings."],
            "gold": 1,
        }
    ]


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        ("boolq", {"boolq/dev.jsonl": [BOOLQ]}, 'dev.jsonl line 1: field "answer" must be true'),
        ("boolq", {"boolq/dev.jsonl": [{**BOOLQ, "passage": 3, "answer": True}]},
         'line 1: field "passage" must be a string; it is 3'),
        ("piqa", {"piqa/valid.jsonl": [PIQA, {**PIQA, "label": -1}]},
         'line 2: field "label" must be a number from 0 to 1; it is -1 .*test sets'),
        ("piqa", {"piqa/valid.jsonl": [without_label(PIQA)],
                  "piqa/valid-labels.lst": "0\n1\n"}, "has 2 labels; expected 1"),
        ("piqa", {"piqa/valid.jsonl": [without_label(PIQA)],
                  "piqa/valid-labels.lst": "2\n"}, r"valid-labels.lst line 1, .*it is '2'"),
        ("siqa", {"siqa/dev.jsonl": [{**SIQA, "label": "4"}]}, "a number from 1 to 3"),
        ("siqa", {"siqa/dev.jsonl": [{"context": "a", "question": "b", "options": ["c", "d"],
                                      "answer": "e"}]}, '"e" is not one of the options'),
        ("hellaswag", {"hellaswag/hellaswag_test.jsonl": [{**HELLASWAG, "label": ""}]},
         'field "label" must be a number from 0 to 2'),
        ("hellaswag", {"hellaswag/val.jsonl": [{**HELLASWAG, "endings": "abc"}]}, "must be a list"),
        ("winogrande", {"winogrande/dev.jsonl": [{**WINOGRANDE, "sentence": "No blank."}]},
         'must have "_"'),
        ("winogrande", {"winogrande/dev.jsonl": [{**WINOGRANDE, "answer": ""}]}, 'field "answer"'),
        ("winogrande", {"winogrande/dev.jsonl": [{"query": "a", "choices": ["b", "c"], "gold": 0}]},
         'field "sentence" must be a string; fields: query, choices, gold'),
        ("arc_easy", {"arc/ARC-Easy-Test.jsonl": [{**ARC, "answerKey": "D"}]},
         'answerKey is "D", and the labels of 3 choices are 1, 2, 3'),
        ("arc_easy", {"arc/ARC-Easy-Test.jsonl": [{**ARC_HUB, "choices": ["a", "b"]}]},
         "a text and a label"),
        ("arc_easy", {"arc/arc_easy.jsonl": [{"query": "a", "choices": ["b", "c"], "gold": 2}]},
         "the right answer is 2, of 2 choices"),
        ("openbookqa", {"openbookqa/dev.tsv": OBQA_TSV.replace("(C)", "C")}, "dev.tsv line 2"),
    ],
)  # fmt: skip
def test_bad_records_name_file_and_line(tmp_path, task, files, message):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        docs(f"paper_{task}", tmp_path)


def test_missing_data_says_what_to_download(tmp_path):
    for name in TASKS:
        with pytest.raises(MissingData, match=r"^[^\n]*download [^\n]* to DIR/\w+/$"):
            docs(name, tmp_path)
    write(tmp_path, "piqa/valid.jsonl", [without_label(PIQA)])
    with pytest.raises(MissingData, match=r"valid-labels\.lst.*is missing"):
        docs("paper_piqa", tmp_path)


PLAIN_AND_STOCK = {
    "paper_hellaswag": ("hellaswag/hellaswag.yaml", "validation", HELLASWAG),
    "paper_piqa": ("piqa/piqa.yaml", "validation", PIQA),
    "paper_siqa": ("siqa/siqa.yaml", "validation", SIQA),
    "paper_winogrande": ("winogrande/default.yaml", "validation", WINOGRANDE),
    "paper_arc_easy": ("arc/arc_easy.yaml", "test", ARC_HUB),
    "paper_boolq": ("super_glue/boolq/default.yaml", "validation", {**BOOLQ, "label": 1}),
    "paper_openbookqa": (
        "openbookqa/openbookqa.yaml", "test",
        {"question_stem": "Ice is", "choices": OBQA_CHOICES, "answerKey": "B"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_AND_STOCK)
def test_requests_are_those_of_the_stock_task(tmp_path, name):
    pytest.importorskip("lm_eval")
    yaml, split, record = PLAIN_AND_STOCK[name]
    write(tmp_path, f"{name[6:].replace('arc_easy', 'arc/easy_')}/{split}.jsonl", [record])
    ours = requests(TASKS[name].make(TaskOptions(data=tmp_path)))
    stock = requests(stock_task(yaml, {split: [record]}))
    if "acc_mutual_info" in TASKS[name].metrics:
        assert ours == [*stock, *[("Answer:", continuation) for _, continuation in stock]]
    else:
        assert ours == stock


def test_three_rules_give_three_answers(tmp_path):
    """acc: sum; acc_norm: per character; acc_mutual_info: minus log P(choice | "Answer:")."""
    pytest.importorskip("lm_eval")
    data = [{"question_stem": "Ice is", "choices": OBQA_CHOICES, "answerKey": x} for x in "ABCD"]
    write(tmp_path, "openbookqa/main/test.jsonl", data)
    task = TASKS["paper_openbookqa"].make(TaskOptions(data=tmp_path))
    # Choices of 13, 3, 3 and 4 characters. Highest: the sum of B; per character A; less the
    # log-likelihood after "Answer:" D.
    given, after_answer = [-6.5, -3.0, -4.0, -5.0], [-6.0, -4.0, -4.5, -9.0]
    for gold in range(4):
        doc = task.eval_docs[gold]
        results = [(x, False) for x in given + after_answer]
        assert task.process_results(doc, results) == {
            "acc_mutual_info": float(gold == 3),
            "acc_norm": float(gold == 0),
            "acc": float(gold == 1),
        }
    everything = scores(task, (given + after_answer) * 4)
    assert everything == {"acc_mutual_info": 0.25, "acc_norm": 0.25, "acc": 0.25}


def test_winogrande_compares_the_contexts(tmp_path):
    pytest.importorskip("lm_eval")
    write(tmp_path, "winogrande/dev.jsonl", [WINOGRANDE, {**WINOGRANDE, "answer": "1"}])
    task = TASKS["paper_winogrande"].make(TaskOptions(data=tmp_path))
    assert scores(task, [-2, -1, -2, -1]) == {"acc": 0.5}
    assert scores(task, [-2, -1, -1, -2]) == {"acc": 1.0}


@pytest.mark.parametrize("name", ["hellaswag", "piqa", "arc_easy"])
def test_accuracies_from_the_log_likelihoods_of_a_real_model(name):
    pytest.importorskip("lm_eval")
    folder = shared("smollm2")
    golden = json.loads((folder / "golden_eval.json").read_text())[name]
    task = TASKS[f"paper_{name}"].make(TaskOptions(data=folder))
    answers = [x for of_question in golden["loglikelihoods"] for x in of_question]
    assert len(task.eval_docs) == golden["n"]
    assert scores(task, answers) == {"acc": golden["acc"], "acc_norm": golden["acc_norm"]}


def test_real_files():
    """Number of questions, and the questions of the golden file among those of the data set."""
    data = shared("piqa").parent
    counts = {
        "boolq": 2474, "piqa": 1838, "siqa": 1954, "hellaswag": 1000, "winogrande": 1267,
        "arc_easy": 2376, "arc_challenge": 294, "openbookqa": 500,
    }  # fmt: skip
    for name, count in counts.items():
        read = docs(f"paper_{name}", data)
        assert len(read) == count
        if name in ("piqa", "hellaswag", "arc_easy"):
            golden = docs(f"paper_{name}", data / "smollm2")
            assert all(doc in read for doc in golden)
