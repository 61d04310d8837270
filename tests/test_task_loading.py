"""Where rows come from, what stays together, and what is said when something is missing."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys

import datasets
import pytest
from PIL import Image
from reference import REFERENCE, needs_reference

from etcbench import registry
from etcbench.doc import Doc, Docs, Picture, UnreadableImage, pictures_in
from etcbench.errors import UsageError
from etcbench.loading import JoinedTable, load_task, make_task, task_names
from etcbench.task import Task


def png(colour="red", size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def vqa_rows(n, **more):
    return [
        {"question_id": k, "image_id": k // 2, "question": f"q{k}", "answer_type": "other",
         "answers": [{"answer": "x", "answer_id": 1}] * 10, "image": {"bytes": png(), "path": "p"},
         **more}
        for k in range(n)
    ]  # fmt: skip


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_scoring_and_loading_do_without_torch():
    code = (
        "import sys; from etcbench.loading import load_task; from etcbench.scoring import files\n"
        "load_task('mme', 'micro')\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_pictures_stay_encoded_until_opened():
    docs = load_task("mme", "micro").docs
    picture = docs[0].pictures[0]
    assert isinstance(picture.data, bytes)
    assert picture.open().mode == "RGB"
    assert picture.size == picture.open().size
    assert picture.key == hashlib.sha256(picture.data).hexdigest()
    assert docs[1].pictures[0].key == picture.key


def test_a_drawn_box_is_a_picture_of_its_own():
    plain = Picture(png("white"))
    drawn = Picture(png("white"), box=(1, 1, 5, 4))
    assert drawn.key != plain.key != Picture(png("white"), box=(1, 1, 5, 3)).key
    image = drawn.open()
    red = {(x, y) for x in range(8) for y in range(6) if image.getpixel((x, y)) == (255, 0, 0)}
    outline = {(x, y) for x in range(1, 6) for y in (1, 4)} | {
        (x, y) for x in (1, 5) for y in (2, 3)
    }
    assert red == outline
    assert plain.open().getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"no picture", png()[:40]])
def test_broken_bytes_are_a_clean_error(data):
    with pytest.raises(UnreadableImage, match=r"thing\.png does not decode: "):
        Picture(data, path="thing.png").open()
    assert Picture(b"junk").size is None


def test_pictures_from_every_kind_of_column(tmp_path):
    import base64

    (tmp_path / "a.png").write_bytes(png())
    image = Image.new("RGB", (3, 2))
    for value in ({"bytes": png(), "path": None}, png(), "a.png", base64.b64encode(png()).decode()):
        assert pictures_in(value, tmp_path)[0].data == png()
    assert pictures_in(image)[0].open().size == (3, 2)
    assert len(pictures_in([png(), {"bytes": png()}])) == 2
    assert pictures_in(None) == () == pictures_in(float("nan"))
    with pytest.raises(UsageError, match="neither a file"):
        pictures_in("missing.png", tmp_path)


@pytest.mark.parametrize("place", ["vqav2.parquet", "vqav2/validation.parquet"])
def test_directory_in_the_hubs_columns(tmp_path, place):
    path = write_parquet(tmp_path / place, vqa_rows(6))
    loaded = load_task("vqav2", tmp_path)
    assert [doc.id for doc in loaded.docs] == list("012345")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert loaded.fingerprint == f"sha256:{digest}"
    assert loaded.docs[2].pictures[0].open().size == (8, 6)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_directory_with_picture_files(tmp_path, ending):
    (tmp_path / "a.png").write_bytes(png())
    rows = vqa_rows(3, image="a.png")
    lines = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"vqav2.{ending}").write_text(lines)
    docs = load_task("vqav2", tmp_path).docs
    assert len(docs) == 3
    assert docs[0].pictures[0].open().size == (8, 6)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load_task("vqav2", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no vqav2\.parquet; there is no data file"):
        load_task("vqav2", tmp_path)
    rows = [{k: v for k, v in row.items() if k != "answers"} for row in vqa_rows(2)]
    path = write_parquet(tmp_path / "vqav2.parquet", rows)
    with pytest.raises(UsageError) as caught:
        load_task("vqav2", tmp_path)
    assert str(caught.value).startswith(f"{path} has no column 'answers'; it has question_id")
    with pytest.raises(UsageError, match=r"has no mme\.parquet; there is vqav2\.parquet"):
        load_task("mme", tmp_path)
    (tmp_path / "mme.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"mme\.parquet is not a readable parquet file"):
        load_task("mme", tmp_path)


def test_unknown_names_and_options():
    with pytest.raises(UsageError, match="unknown task 'mmme'; did you mean mme"):
        make_task("mmme")
    with pytest.raises(UsageError, match="mmbench has no option 'lang'; its options: language"):
        make_task("mmbench", lang="cn")
    with pytest.raises(UsageError, match="no language 'fr'"):
        make_task("mmbench", language="fr")
    with pytest.raises(UsageError, match="leaves nothing"):
        load_task("mme", "micro", limit=0)


def test_every_name_makes_a_task():
    assert set(registry.builtin_modules("tasks")) == {
        "mme", "pope", "vqav2", "gqa", "textvqa", "seedbench", "scienceqa", "mmbench", "qbench",
        "refcoco_rec", "refcoco_caption",
    }  # fmt: skip
    for name in task_names():
        task = make_task(name)
        assert isinstance(task, Task)
        assert task.mode(None) == task.modes[0]
        assert "``" in sys.modules[type(task).__module__].__doc__
    assert make_task("mmbench_cn").name == "mmbench_cn"
    assert make_task("scienceqa_full").full


@pytest.mark.parametrize("name", sorted(registry.builtin_modules("tasks")))
@pytest.mark.parametrize("limit", [1, 7, 50])
def test_limit_keeps_groups_whole(name, limit):
    loaded, part = load_task(name, "micro"), load_task(name, "micro", limit=limit)
    whole = {}
    for doc in loaded.docs.without_pictures():
        whole.setdefault(doc.group, []).append(doc.id)
    kept = {}
    for doc in part.docs.without_pictures():
        kept.setdefault(doc.group, []).append(doc.id)
    assert kept == {group: whole[group] for group in kept}
    assert limit <= len(part.docs) < limit + max(map(len, whole.values()))
    assert part.fingerprint.startswith(loaded.fingerprint)
    assert part.fingerprint != loaded.fingerprint
    if name in ("mme", "mmbench"):
        loaded.task.score((doc, "A") for doc in part.docs)


def test_ids_are_unique():
    for name in registry.builtin_modules("tasks"):
        docs = load_task(name, "micro").docs
        ids = [doc.id for doc in docs.without_pictures()]
        assert len(set(ids)) == len(ids)
        assert [doc.id for doc in docs] == ids


def test_vqav2_subset_is_fixed_by_hash(tmp_path, monkeypatch):
    from etcbench.tasks import vqav2

    monkeypatch.setattr(vqav2, "SUBSET", 5)
    write_parquet(tmp_path / "vqav2.parquet", vqa_rows(40))
    subset = load_task("vqav2", tmp_path)
    hashes = sorted(range(40), key=lambda k: hashlib.sha256(str(k).encode()).digest())
    assert {doc.id for doc in subset.docs} == {str(k) for k in hashes[:5]}
    assert subset.fingerprint.endswith("]")
    report = subset.task.score((doc, "x") for doc in subset.docs)
    assert report.notes == ("fixed subset of 5 questions",)
    assert len(load_task("vqav2", tmp_path, full=True).docs) == 40
    assert len(load_task("vqav2_full", tmp_path).docs) == 40


def test_scienceqa_images_only(tmp_path):
    row = {"question": "?", "choices": ["a", "b"], "answer": 1, "hint": ""}
    rows = [{**row, "image": image} for image in ({"bytes": png(), "path": "p"}, None)]
    write_parquet(tmp_path / "scienceqa.parquet", rows)
    assert len(load_task("scienceqa", tmp_path).docs) == 1
    assert len(load_task("scienceqa_full", tmp_path).docs) == 2


def test_seedbench_shows_the_middle_frame():
    frames = [{"bytes": png(colour)} for colour in ("red", "lime", "blue")]
    row = {"question_id": "v1", "answer": "A", "image": frames, "question_type_id": 10}
    doc = make_task("seedbench").doc(row, 0)
    assert [p.open().getpixel((0, 0)) for p in doc.pictures] == [(0, 255, 0)]


class Hub:
    """Stands in for the hub: knows some ids, records what it was asked."""

    def __init__(self, **tables):
        self.tables = tables
        self.asked = []

    def load_dataset(self, hub_id, config, *, split, revision, token):
        assert token is False
        self.asked.append((hub_id, config, split, revision))
        if hub_id not in self.tables:
            raise datasets.exceptions.DatasetNotFoundError(f"{hub_id} doesn't exist")
        table = datasets.Dataset.from_list(self.tables[hub_id][config])
        table.info.download_checksums = {f"hf://datasets/{hub_id}@{'ab' * 20}/x.parquet": {}}
        return table


def test_hub_falls_back_to_the_older_namespace_and_records_the_revision(monkeypatch):
    hub = Hub(**{"lmms-lab/VQAv2": {None: vqa_rows(3)}})
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    loaded = load_task("vqav2", "hub")
    assert [asked[0] for asked in hub.asked] == ["lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2"]
    assert loaded.fingerprint == f"lmms-lab/VQAv2@{'ab' * 20}/default/validation"
    load_task("vqav2", "hub", revision="v2", split="testdev")
    assert hub.asked[-1] == ("lmms-lab/VQAv2", None, "testdev", "v2")


def test_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Hub().load_dataset)
    with pytest.raises(UsageError, match=r"cannot load lmms-lab-encoder/MME .*--data") as caught:
        load_task("mme", "hub")
    assert "\n" not in str(caught.value)


def test_gqa_joins_its_pictures(monkeypatch):
    questions = [
        {
            "id": str(k),
            "imageId": "n1",
            "question": "?",
            "answer": "no",
            "types": {"semantic": "rel"},
        }
        for k in range(3)
    ]
    pictures = [{"id": "n1", "image": {"bytes": png(), "path": "p"}}]
    hub = Hub(
        **{
            "lmms-lab/GQA": {
                "testdev_balanced_instructions": questions,
                "testdev_balanced_images": pictures,
            }
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    docs = load_task("gqa", "hub", limit=2).docs
    assert docs[0].pictures[0].open().size == (8, 6)
    assert len(docs) == 3
    assert docs[1].categories == {"semantic": "rel"}
    assert isinstance(docs.table, JoinedTable)


def test_slices_and_rows_of_docs():
    table = datasets.Dataset.from_list([{"k": k, "items": ["a", "b"]} for k in range(4)])

    def build(row, index):
        return Doc(f"{row['k']}{row['items']}", str(row["k"]), (), {}, row["entry_index"])

    docs = Docs(table, build, "f", explode="items")
    assert [doc.id for doc in docs[2:5]] == ["1a", "1b", "2a"]
    assert [doc.id for doc in docs.rows([3])] == ["3a", "3b"]
    assert [doc.gold for doc in docs.without_pictures()] == [0, 1] * 4


@needs_reference
@pytest.mark.parametrize(
    ("name", "answer", "figure", "value"),
    [
        ("mme", "Yes", "total", 150.0),
        ("pope", "yes", "f1", 66.67),
        ("vqav2", "yes", "accuracy", 37.20),
        ("seedbench", "A", "image", 25.23),
        ("refcoco_rec", "[0, 0, 1, 1]", "acc@0.5", 8.17),
        ("refcoco_rec", "[0, 0, 1, 1]", "mean_iou", 18.87),
        ("refcoco_rec", "[0.25, 0.25, 0.75, 0.75]", "acc@0.5", 7.98),
    ],
)
def test_photos_score_as_their_description_says(name, answer, figure, value):
    loaded = load_task(name, REFERENCE / "photos")
    report = loaded.task.score((doc, answer) for doc in loaded.docs)
    assert round(report.headline[figure], 2) == value


@needs_reference
def test_perfect_padded_boxes_read_as_plain_fractions():
    from etcbench.scoring.boxes import from_pixels

    loaded = load_task("refcoco_rec", REFERENCE / "photos")
    pairs = [
        (doc, str(list(from_pixels(doc.gold, "unit_padded", *doc.fields["size"]))))
        for doc in loaded.docs
    ]
    assert round(loaded.task.score(pairs, "unit").value, 2) == 79.66
    assert loaded.task.score(pairs, "unit_padded").value == 100
