"""lmms-eval and etcbench agree: same answers and same scores, whichever of them asks."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from tiny import picture, save_tiny_llava

from etcbench.backbones import load_backbone
from etcbench.engine import Settings
from etcbench.errors import UsageError
from etcbench.loading import LoadedTask, load_task, make_task
from etcbench.run import evaluate, load_compressor

pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install "etcbench[lmms]"')

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from etcbench.lmms.model import EtcbenchChat, EtcbenchSimple
from etcbench.lmms.samples import Decoding, question_text

TASKS = Path(__file__).parent / "lmms_tasks"
NAMES = ("mme", "pope", "vqav2")
ROWS = 12
JSON_TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.json}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, until: ["!"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep lmms-eval's copies of the rows out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


class Oracle(lmms):
    """Answers well, badly and in odd forms."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.answer(*request.args[-3:]) for request in requests]

    def answer(self, number: int, task: str, split: str) -> str:
        row = self.task_dict[task][split][number]
        gold = row["answer"] if "answer" in row else row["answers"][0]["answer"]
        return [gold, f" {gold.upper()}. ", "no", "Yes, two dogs", "", "A red one"][number % 6]

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: Any) -> Any:
        raise NotImplementedError


def ask(model: Any, *, tasks: Any = None, folder: Path = TASKS, **settings: Any) -> dict[str, Any]:
    manager = TaskManager(
        include_path=str(folder),
        include_defaults=False,
        model_name=model if isinstance(model, str) else "oracle",
    )
    return simple_evaluate(
        model=model,
        tasks=tasks or [f"micro_{name}" for name in NAMES],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
        process_docs_parallel=1,
        **settings,
    )


def responses(result: dict[str, Any], task: str) -> list[str]:
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0].strip() for sample in samples]


def figures(result: dict[str, Any], task: str) -> dict[str, float]:
    """The metrics of a task, in the scale of etcbench."""
    found = {
        name.partition(",")[0]: value
        for name, value in result["results"][task].items()
        if name.endswith(",none") and "stderr" not in name
    }
    if task == "micro_mme":
        return {"total": sum(found.values())}
    names = {"exact_match": "accuracy", "pope_f1_score": "f1", "pope_yes_ratio": "yes_rate"}
    return {names.get(k, k.removeprefix("pope_")): 100 * value for k, value in found.items()}


def first_rows(name: str, rows: int) -> LoadedTask:
    task = load_task(name, "micro")
    return LoadedTask(task.task, task.docs.rows(range(rows)), "micro")


@pytest.fixture(scope="module")
def llava_hf(checkpoint):
    settings = f"pretrained={checkpoint},dtype=float32,device_map=cpu"
    return ask("llava_hf", model_args=settings, batch_size=1, limit=ROWS, force_simple=True)


@pytest.mark.parametrize("simple", [True, False], ids=["simple", "chat"])
def test_our_plugin_answers_as_llava_hf(checkpoint, llava_hf, simple):
    settings = f"model={checkpoint},method=full,dtype=float32,image=processor"
    ours = ask("etcbench", model_args=settings, batch_size=5, limit=ROWS, force_simple=simple)
    for name in NAMES:
        assert responses(ours, f"micro_{name}") == responses(llava_hf, f"micro_{name}")
        assert figures(ours, f"micro_{name}") == figures(llava_hf, f"micro_{name}")


@pytest.mark.parametrize("name", NAMES)
def test_our_runs_answer_as_llava_hf(checkpoint, llava_hf, name, tmp_path):
    model = load_backbone(str(checkpoint), device="cpu", image="processor")
    method = load_compressor("full", None, model)
    settings = Settings(batch_size=5, style="lmms")
    task = first_rows(name, ROWS)
    theirs = responses(llava_hf, f"micro_{name}")
    assert len(set(theirs)) > ROWS // 4, "the answers must depend on the questions"

    run = evaluate(model, method, task, settings=settings, mode="lmms", out=tmp_path)
    assert [run.records[doc.id]["response"] for doc in task.docs] == theirs
    headline = run.summary["headline"]
    for figure, value in figures(llava_hf, f"micro_{name}").items():
        assert headline[figure] == pytest.approx(value, abs=1e-9)

    lmms_task = load_task(f"lmms:micro_{name}", TASKS)
    lmms_task = LoadedTask(lmms_task.task, lmms_task.docs.rows(range(ROWS)), "lmms")
    run = evaluate(model, method, lmms_task, settings=Settings(batch_size=5), out=tmp_path)
    assert [run.records[doc.id]["response"] for doc in lmms_task.docs] == theirs
    metrics = llava_hf["results"][f"micro_{name}"]
    for figure, value in run.summary["headline"].items():
        assert value == metrics[f"{figure},none"]


def test_scores_of_varied_answers_agree():
    rows = 96
    result = ask(Oracle(), limit=rows)
    for name in NAMES:
        said = responses(result, f"micro_{name}")
        task = first_rows(name, rows)
        report = task.task.score(zip(task.docs, said, strict=True), "lmms")
        theirs = figures(result, f"micro_{name}")
        assert theirs[next(iter(theirs))] > 0
        for figure, value in theirs.items():
            assert report.headline[figure] == pytest.approx(value, abs=1e-9)

        adapter = load_task(f"lmms:micro_{name}", TASKS)
        docs = list(adapter.docs.rows(range(rows)).without_pictures())
        report = adapter.task.score(reversed(list(zip(docs, said, strict=True))))
        metrics = result["results"][f"micro_{name}"]
        assert report.headline == {k: metrics[f"{k},none"] for k in report.headline}
        assert report.interval.low < report.value < report.interval.high
        assert report.unit == "raw"


def test_a_method_compresses_behind_the_plugin(checkpoint):
    def asked(settings: str) -> list[str]:
        common = f"model={checkpoint},dtype=float32,{settings}"
        result = ask("etcbench", tasks=["micro_pope"], model_args=common, batch_size=4, limit=8)
        return responses(result, "micro_pope")

    assert asked("method=pool,tokens=4") != asked("method=full")


def test_json_task_both_ways(checkpoint, tmp_path):
    rows = [{"question": f"Capital {n}?", "answer": "paris"} for n in range(3)]
    (tmp_path / "capitals.json").write_text(json.dumps(rows))
    (tmp_path / "capitals.yaml").write_text(JSON_TASK)

    result = ask(Oracle(), tasks=["capitals"], folder=tmp_path)
    # "paris", "PARIS." and "no"
    assert result["results"]["capitals"]["exact_match,none"] == pytest.approx(1 / 3)

    task = load_task("lmms:capitals", tmp_path)
    assert task.task.max_new_tokens == 4
    docs = list(task.docs)
    assert [doc.pictures for doc in docs] == [(), (), ()]
    assert task.task.prompt(docs[1]) == "Capital 1?"
    said = ["paris", " PARIS! In France.", "no"]
    assert task.task.score(zip(docs, said, strict=True)).value == pytest.approx(2 / 3)

    settings = f"model={checkpoint},dtype=float32"
    ours = ask("etcbench", tasks=["capitals"], folder=tmp_path, model_args=settings, batch_size=2)
    model = load_backbone(str(checkpoint), device="cpu")
    run = evaluate(model, load_compressor("full", None, model), task, out=tmp_path / "runs")
    records = [run.records[doc.id]["parsed"] for doc in docs]
    assert records == responses(ours, "capitals")


def test_builtin_task_on_local_rows():
    task = load_task("lmms:pope", "micro", limit=3)
    doc = task.docs[0]
    ours = load_task("pope", "micro").docs[0]
    assert task.task.prompt(doc) == make_task("pope").prompt(ours, "lmms")
    assert doc.pictures[0].open().tobytes() == ours.pictures[0].open().tobytes()
    assert len({doc.group for doc in task.docs}) == len({d.pictures[0].key for d in task.docs})
    with pytest.raises(UsageError, match=r"is a group; name one of its tasks: mmbench_en_dev, "):
        load_task("lmms:mmbench_en", "micro")


def test_entry_point_fills_both_slots():
    (point,) = (p for p in entry_points(group="lmms_eval.models") if p.name == "etcbench")
    assert point.load()().model_id == "etcbench"
    assert get_model("etcbench") is EtcbenchChat
    assert get_model("etcbench", force_simple=True) is EtcbenchSimple


def request(content: Any, chat: bool = False, **settings: Any) -> Instance:
    arguments = ("What is it?", content, settings) if chat else ("What is it?", settings, content)
    about = {"task": "t", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", (*arguments, 0, "t", "test"), 0, metadata=about)


@pytest.mark.parametrize(
    ("chat", "content", "message"),
    [
        (False, lambda row: ["clip.mp4"], "shows a str; etcbench reads pictures"),
        (True, lambda row: [{"role": "system"}, {"role": "user"}], "has 2 messages"),
        (
            True,
            lambda row: [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "image", "url": picture()}],
                }
            ],
            "places pictures inside its text",
        ),
    ],
)
def test_unsupported_requests_are_named(checkpoint, chat, content, message):
    kind = EtcbenchChat if chat else EtcbenchSimple
    model = kind(model=str(checkpoint), device="cpu")
    model.task_dict = {"t": {"test": [{}]}}
    with pytest.raises(UsageError, match=message):
        model.generate_until([request(content, chat)])
    with pytest.raises(UsageError, match="generate_until tasks only"):
        model.loglikelihood([request(content)])
    with pytest.raises(UsageError, match="single questions only"):
        model.generate_until_multi_round([request(content)])


def test_a_picture_that_does_not_decode_costs_one_sample(checkpoint):
    def visuals(row: dict[str, Any]) -> list[Any]:
        if row["broken"]:
            raise OSError("truncated file")
        return [picture()]

    model = EtcbenchSimple(model=str(checkpoint), device="cpu", batch_size=2)
    model.task_dict = {"t": {"test": [{"broken": True}, {"broken": False}]}}
    about = {"task": "t", "doc_id": 0, "repeats": 1}
    requests = [
        Instance(
            "generate_until",
            ("What is it?", {"max_new_tokens": 4}, visuals, number, "t", "test"),
            0,
            metadata=about,
        )
        for number in (0, 1)
    ]
    first, second = model.generate_until(requests)
    assert first == "" and second != ""


def test_model_arguments_are_checked(checkpoint):
    with pytest.raises(UsageError, match="batch size 'auto'"):
        EtcbenchSimple(model=str(checkpoint), batch_size="auto")
    with pytest.raises(UsageError, match="unknown llava option 'imagge'"):
        EtcbenchSimple(model=str(checkpoint), device="cpu", imagge="processor")
    with pytest.raises(UsageError, match="unknown method 'ful'"):
        EtcbenchSimple(model=str(checkpoint), method="ful")


def test_generation_settings():
    assert Decoding.read({"until": ["\n\n"]}, "t") == Decoding(1024, ())
    asked = {"max_new_tokens": 16, "until": ["\n\n", "Q:"], "temperature": 0, "top_p": 1.0}
    assert Decoding.read(asked, "t") == Decoding(16, ("Q:",))
    assert Decoding(16, ("Q:", "!")).cut("yes Q: no!") == "yes "
    assert Decoding.read({"do_sample": False, "temperature": 0.2, "num_beams": 1}, "t")
    for wrong in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 5}):
        with pytest.raises(UsageError, match="etcbench decodes greedily"):
            Decoding.read(wrong, "t")
    with pytest.raises(UsageError, match="sets visual_cot, which"):
        Decoding.read({"visual_cot": True}, "t")


def test_placeholders_in_front_are_the_backbones():
    assert question_text("<image>\n<image> What?", "t") == "What?"
    with pytest.raises(UsageError, match=r"places pictures inside its text"):
        question_text("First <image> then <image>", "t")


def test_lmms_names(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="did you mean micro_pope"):
        load_task("lmms:micro_popp", TASKS)
    with pytest.raises(UsageError, match="scored together with its data"):
        make_task("lmms:mme").harness  # noqa: B018
    monkeypatch.delitem(sys.modules, "etcbench.lmms.task")
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    with pytest.raises(UsageError, match=r'pip install "etcbench\[lmms\]"'):
        make_task("lmms:mme")
