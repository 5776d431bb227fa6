"""Tasks with labels: their metrics, the examples made of a corpus, data sets of anybody, heads, and `evaluate` on each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from sparsefinder import evaluate, models
from sparsefinder.attention import Masked
from sparsefinder.corpora import AnyDataset, Docstrings, TextFiles, train_tokenizer
from sparsefinder.errors import UserError
from sparsefinder.evaluate import EvaluateSettings
from sparsefinder.evaluation.adapt import AdaptSettings
from sparsefinder.evaluation.converted import Longformer
from sparsefinder.evaluation.tasks import LABELLED, HeadSettings, LabelledData, heads, measures
from sparsefinder.evaluation.tasks.data import named
from sparsefinder.evaluation.tasks.judges import Classes
from sparsefinder.evaluation.tasks.labelled import Feature, Reader, collate
from sparsefinder.evaluation.tasks.passages import LENGTH, sides
from sparsefinder.evaluation.tasks.question_answering import WHAT, Reference, Spans, recurring
from sparsefinder.evaluation.tasks.token_classification import written
from sparsefinder.evaluation.variants import AttentionChoice, Conversion
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.oracle import Oracle
from sparsefinder.patterns.window import Window
from sparsefinder.storage.store import Store
from tests.tiny_models import WORDS, tiny_batch, tiny_model, tiny_tokenizer

HEADS = [task.head for task in LABELLED.values()]
PASSAGE = (
    "The estimator keeps its parameters. Every Query of a MODEL attends to few keys. "
    "Nobody knows which 7 keys the estimator needs before pyTorch looks. "
)


class TestMeasures:
    def test_macro_f1_is_that_of_scikit_learn(self) -> None:
        generator = torch.Generator().manual_seed(0)
        answers, truth = torch.randint(0, 4, (2, 50), generator=generator).tolist()
        truth = [min(each, 2) for each in truth]  # a class that is answered and never right
        expected = f1_score(truth, answers, average="macro")
        assert measures.macro_f1(list(zip(answers, truth, strict=True))) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("answer", "truth", "exact", "f1"),
        [
            ("The  Cat!", "cat", 1, 1),
            ("cat sat", "the cat sat on", 0, 0.8),  # 2 of 2 and 2 of 3 words
            ("cat cat", "cat", 0, 2 / 3),
            ("a", "the", 1, 1),  # both empty
            ("", "cat", 0, 0),
        ],
    )
    def test_spans_are_compared_as_in_squad(self, answer: str, truth: str, exact: float, f1: float) -> None:
        assert measures.exact_match(answer, truth) == exact
        assert measures.span_f1(answer, truth) == pytest.approx(f1)
        assert measures.best(measures.span_f1, answer, ["dog", truth]) == pytest.approx(f1)

    def test_an_example_counts_the_same_in_a_padded_batch(self) -> None:
        features = [Feature([5, 6, 7, 8], {"labels": [-100, 1, 0, -100]}), Feature([5, 6], {"labels": [2, -100]})]
        batch = collate(features, 1)
        assert batch["input_ids"].tolist()[1] == [5, 6, 1, 1]
        assert batch["attention_mask"].tolist()[1] == [True, True, False, False]
        assert batch["labels"].tolist()[1] == [2, -100, -100, -100]
        logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        sums, answers = Classes("words").judge(Output(logits=logits), batch)
        alone, own = Classes("words").judge(Output(logits=logits[1:, :2]), collate(features[1:], 1))
        torch.testing.assert_close(sums[1:], alone)
        assert answers[1:] == own
        assert sums[:, 0].tolist() == [2, 1]
        assert sums[1, 1].item() == pytest.approx(-logits[1, 0].log_softmax(-1)[2].item(), rel=1e-5)


class Output:
    """What a model returns."""

    def __init__(self, **values: torch.Tensor):
        self.__dict__.update(values)


class TestMadeOfACorpus:
    def test_documents_are_held_out_whole(self) -> None:
        documents = [f"Line one of {place}.\n{'x' * LENGTH}\nLine three of {place}." for place in range(10)]
        training, held_out = sides(documents)
        assert (len(training), len(held_out)) == (8 * 3, 2 * 3)
        assert {text.split()[-1] for text in held_out if text[0] == "L"} == {"4.", "9."}

    @pytest.mark.parametrize(
        ("word", "tag"),
        [
            ("query,", "lower"),
            ("(Query)", "Capital"),
            ("I", "Capital"),
            ("MODEL.", "UPPER"),
            ("pyTorch", "miXed"),
            ("7", -100),
        ],
    )
    def test_how_a_word_is_written(self, word: str, tag: Any) -> None:
        assert written(word) == tag

    def test_a_recurring_span_is_asked_for(self) -> None:
        row = recurring(PASSAGE.strip())
        assert row is not None
        assert f"keys the {WHAT} needs" in row["question"]
        assert "Nobody" not in row["context"]
        for text, begin in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert text == row["context"][begin : begin + len(text)] == "estimator"
        assert recurring("The estimator keeps its parameters. Nobody knows.") is None


class TestEncoding:
    def test_the_first_token_of_a_word_has_its_label(self) -> None:
        read = Reader(train_tokenizer([PASSAGE], 300, 128), 128, False, ("Capital", "UPPER", "lower", "miXed"))
        words = ["", *PASSAGE.split(), "Ω"]
        tags = [written(word) for word in words]
        feature = LABELLED["token_classification"].encode({"tokens": [w.lower() for w in words], "tags": tags}, read)
        assert feature is not None
        labels = feature.labels["labels"]
        assert isinstance(labels, list)
        assert len(labels) == len(feature.input_ids) > len(words), "words of several tokens"
        assert [read.classes[each] for each in labels if each != -100] == [tag for tag in tags if tag != -100]
        short = replace(read, length=6)
        cut = LABELLED["token_classification"].encode({"tokens": words, "tags": tags}, short)
        assert cut is not None
        assert len(cut.input_ids) == 6

    def test_the_place_of_an_answer_reads_back_as_its_text(self) -> None:
        task = LABELLED["question_answering"]
        read = Reader(train_tokenizer([PASSAGE], 300, 128), 128, False)
        row = recurring(PASSAGE.strip())
        assert row is not None
        feature = task.encode(row, read)
        assert feature is not None
        logits = torch.zeros(1, len(feature.input_ids), 2)
        logits[0, feature.labels["start_positions"], 0] = 9.0
        logits[0, feature.labels["end_positions"], 1] = 9.0
        logits[0, 1, 0] = 99.0  # a token of the question is no answer
        judge = task.judge([feature])
        assert isinstance(judge, Spans)
        output = Output(start_logits=logits[..., 0], end_logits=logits[..., 1])
        sums, answers = judge.judge(output, collate([feature], 1))
        assert judge.references[0].read(answers[0]).strip() == "estimator"
        assert judge.scores(pd.DataFrame(), answers) == {"exact_match": 1.0, "answer_f1": 1.0}
        ends = [feature.labels[name] for name in ("start_positions", "end_positions")]
        losses = [-logits[0, :, side].log_softmax(0)[place].item() for side, place in enumerate(ends)]
        assert sums[0, :2].tolist() == pytest.approx([1, sum(losses) / 2], rel=1e-5)
        assert sums[0, 2] == 0, "the question had the largest start"

    def test_no_answer_is_longer_than_thirty_tokens(self) -> None:
        context = " ".join(map(str, range(50)))
        offsets = [(match.start(), match.end()) for match in re.finditer(r"\d+", context)]
        logits = torch.zeros(2, 52)
        logits[0, 2], logits[1, 51] = 9.0, 8.0  # 50 tokens apart
        logits[1, 31] = 7.0  # the thirtieth
        assert Reference(context, 2, offsets, ["0"]).read(logits) == " ".join(map(str, range(30)))
        logits[1, 31], logits[1, 1] = 0.0, 9.0  # before the context: no end
        assert Reference(context, 2, offsets, ["0"]).read(logits).startswith("0")

    def test_what_does_not_fit_is_left_out(self) -> None:
        tokenizer = train_tokenizer([PASSAGE], 300, 128)
        row = {"question": "Who?", "context": "x " * 90 + "me", "answers": {"text": ["me"], "answer_start": [180]}}
        task = LABELLED["question_answering"]
        assert task.encode(row, Reader(tokenizer, 400, False)) is not None
        assert task.encode(row, Reader(tokenizer, 60, False)) is None, "the answer is cut off"
        assert task.encode(row | {"question": "x " * 90}, Reader(tokenizer, 60, False)) is None, (
            "the question alone is too long"
        )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_takes_every_head_and_keeps_its_attention(family: str, head: str) -> None:
    body = tiny_model(family)
    models.set_normalizer(body, Normalizer(1.5))
    classes = () if "Question" in head else ("a", "b", "c")
    model = heads.with_head(body, head, classes, seed=0)
    assert models.get_normalizer(model).alpha == 1.5
    batch = tiny_batch()
    with torch.no_grad():
        hidden = [each.base_model(**batch).last_hidden_state for each in (body, model)]
        own = model(**batch)[0]
        with models.plugged(model, Masked(Window(1), Normalizer(1.5))):
            near = model(**batch)[0]
        models.set_normalizer(model, Normalizer(1.0))
        softmax = model(**batch)[0]
    torch.testing.assert_close(*hidden)
    assert (own - near).abs().max() > 1e-4
    assert (own - softmax).abs().max() > 1e-4
    if classes:
        assert own.shape[-1] == 3


class TestDataSets:
    ROWS = (
        {"text": "a model", "label": "yes"},
        {"text": None, "label": "no"},
        {"text": " ", "label": "no"},
        {"text": "the keys", "label": "no"},
    )

    def written(self, folder: Path, **splits: Any) -> LabelledData:
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return LabelledData("json", data_files={split: str(folder / f"{split}.jsonl") for split in splits})

    def test_rows_without_a_value_are_left_out_and_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = self.written(tmp_path, train=self.ROWS, test=self.ROWS[:1])
        rows = data.rows("train", {"text": "text", "label": "label"})
        assert rows == [{"text": "a model", "label": "yes"}, {"text": "the keys", "label": "no"}]
        assert "2 of 4 rows have no text or no label and are left out" in caplog.text
        before = data.fingerprint()
        self.written(tmp_path, train=self.ROWS[:3], test=self.ROWS[:1])
        assert data.fingerprint() != before, "the bytes count"

    def test_numbered_classes_have_their_names(self, tmp_path: Path) -> None:
        from datasets import ClassLabel, Dataset, Features, List, Value

        kinds = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "NAME"]))})
        file = str(tmp_path / "train.parquet")
        Dataset.from_dict({"tokens": [["the", "Model"]], "tags": [[0, 1]]}, features=kinds).to_parquet(file)
        data = LabelledData("parquet", data_files={"train": file})
        rows = data.rows("train", {"tokens": "tokens", "tags": "tags"})
        assert rows == [{"tokens": ["the", "Model"], "tags": ["O", "NAME"]}]
        assert named([0, -100], ["O", "NAME"], "x") == ["O", -100]
        with pytest.raises(UserError, match=r"has the label -1, and its classes are 0 to 1: a split without labels"):
            named(-1, ["O", "NAME"], "x")

    def test_what_is_wrong_is_said_in_one_line(self, tmp_path: Path) -> None:
        data = self.written(tmp_path, train=self.ROWS, test=({"text": "x", "label": "perhaps"},))
        roles = {"text": "text", "label": "label"}
        with pytest.raises(
            UserError, match=r"has no column kind: choose one of text, label with evaluate.labels.label="
        ):
            replace(data, label="kind").rows("train", roles)
        with pytest.raises(UserError, match=r"evaluate.labels.test=validation of json cannot be loaded .*validation"):
            replace(data, test="validation").rows("test", roles)
        task = LABELLED["sequence_classification"]
        with pytest.raises(UserError, match=r"perhaps is a label of the held-out side that .* it has no, yes"):
            task.classes(data.rows("train", roles), data.rows("test", roles))
        with pytest.raises(UserError, match="the only label"):
            task.classes([{"label": 1}], [])
        with pytest.raises(UserError, match=r"whole numbers or words, got 0.5"):
            task.classes([{"label": 0.5}, {"label": 1.0}], [])
        with pytest.raises(UserError, match="from the same rows"):
            replace(data, test="train[:10%]")
        empty = self.written(tmp_path, train=self.ROWS[1:3], test=self.ROWS)
        with pytest.raises(UserError, match="has no row with text and label"):
            empty.rows("train", roles)

    @pytest.mark.parametrize(
        ("task", "row"),
        [
            ("token_classification", {"tokens": ["a", "model"], "tags": [1]}),
            ("token_classification", {"tokens": "a model", "tags": [1, 1]}),
            ("question_answering", {"question": "Who?", "context": "me", "answers": "me"}),
            (
                "question_answering",
                {"question": "Who?", "context": "me", "answers": {"text": ["me"], "answer_start": []}},
            ),
        ],
    )
    def test_rows_of_another_form(self, task: str, row: Any) -> None:
        with pytest.raises(UserError, match=rf"evaluate.task={task}: .* evaluate.labels\."):
            LABELLED[task].encode(row, Reader(tiny_tokenizer(), 38, False, ("1",)))

    def test_a_datasets_corpus_has_the_rows_too(self) -> None:
        corpus = AnyDataset("glue", "sst2", column="sentence", streaming=False)
        data = LabelledData().of(corpus)
        assert (data.path, data.name, data.text, data.test) == ("glue", "sst2", "sentence", "validation")
        assert LabelledData("other").of(corpus) == LabelledData("other")


CONFIGURATIONS = (Configuration("oracle", Oracle()), Configuration("window", Window(1)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    folder = tmp_path_factory.mktemp("text")
    for split, count in (("train", 24), ("validation", 8), ("test", 9)):
        lines = [f"{PASSAGE}{' '.join(WORDS[place % 7 :])} {place}." for place in range(count)]
        (folder / split).write_text("\n\n".join(lines))
    return TextFiles(*(str(folder / split) for split in ("train", "validation", "test")))


@pytest.fixture(scope="module")
def model(texts: TextFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random entmax model with a vocabulary of the texts."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = train_tokenizer(texts.documents("train"), 400, 96)
    made = tiny_model("roberta", vocab_size=len(tokenizer), max_position_embeddings=98)
    models.set_normalizer(made, Normalizer(1.5))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_for(task: str, corpus: Any, **changes: Any) -> EvaluateSettings:
    head = HeadSettings(steps=4, batch_size=4, save_steps=2, learning_rate=1e-3)
    kinds = (AttentionChoice("masked", Masked),)
    sizes: dict[str, Any] = {"samples": 6, "batch_size": 4, "measured": 2}
    return EvaluateSettings(corpus, CONFIGURATIONS, kinds, task=task, head=head, **{**sizes, **changes})


def run(settings: EvaluateSettings, store: Store) -> pd.DataFrame:
    evaluate.run(settings, store)
    return pd.read_csv(store.run_dir / "evaluate" / "results.csv").set_index("variant")


MEASURES = {
    "sequence_classification": ("examples", ["accuracy", "macro_f1"]),
    "token_classification": ("words", ["accuracy", "macro_f1"]),
    "question_answering": ("questions", ["exact_match", "answer_f1"]),
}


class TestEvaluate:
    @pytest.mark.parametrize("task", list(LABELLED))
    def test_every_variant_is_asked_the_same(
        self, task: str, texts: TextFiles, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        packages = Docstrings(["click", "joblib"], ["tqdm"], ["fsspec"], max_characters=60_000)
        settings = settings_for(task, packages if task == "sequence_classification" else texts)
        first = run(settings, Store(tmp_path, {"model": model}))
        assert list(first.index) == ["dense full", "dense full (softmax)", "masked oracle", "masked window width=1"]
        asked, names = MEASURES[task]
        assert (first.task == task).all()
        assert first[asked].nunique() == 1
        for name in names:
            assert first[name].between(0, 1).all()
            assert first[f"{name}_minus_entmax"].iloc[0] == 0
        dense, softmax, oracle, window = first.loss
        assert oracle == pytest.approx(dense, abs=1e-5), "the gold graph changes nothing"
        assert abs(softmax - dense) > 1e-6
        assert abs(window - dense) > 1e-6, "the plugged attention is what runs"
        blocks = pd.read_parquet(tmp_path / "evaluate" / "blocks.parquet")
        assert (blocks.groupby("variant")[asked].sum() == first[asked].iloc[0]).all()
        assert not ({"perplexity", "masked_tokens"} & set(first))
        with caplog.at_level("INFO"):
            again = run(settings, Store(tmp_path, {"model": model}))
        assert "trained already" in caplog.text
        assert again.loss.tolist() == first.loss.tolist()

    def test_a_killed_training_ends_as_it_would_have_ended(
        self,
        texts: TextFiles,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        settings = settings_for("token_classification", texts)
        whole = run(settings, Store(tmp_path / "whole", {"model": model}))
        with monkeypatch.context() as patched:
            patched.setattr(heads, "_keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(settings, Store(tmp_path / "killed", {"model": model}))
        (last,) = (tmp_path / "killed" / "scratch" / "tasks").glob("*/checkpoint-4")
        (last / "trainer_state.json").write_text("{")  # half written
        with caplog.at_level("INFO"):
            resumed = run(settings, Store(tmp_path / "killed", {"model": model}))
        assert "going on from checkpoint-2" in caplog.text
        assert resumed.loss.tolist() == whole.loss.tolist()
        (kept,) = (tmp_path / "killed" / "scratch" / "tasks").glob("*/model")
        (kept / "config.json").write_text("{}")  # damaged: learned again, not read
        caplog.clear()
        with caplog.at_level("INFO"):
            assert run(settings, Store(tmp_path / "killed", {"model": model})).loss.tolist() == whole.loss.tolist()
        assert "trained already" not in caplog.text

    def test_labelled_data_and_adapted_variants(self, texts: TextFiles, model: Path, tmp_path: Path) -> None:
        rows = [{"a": f"{PASSAGE}{place}", "b": "the keys", "kind": place % 2} for place in range(12)]
        for split, part in (("train", rows[:8]), ("mine", rows[8:])):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "mine")}
        data = LabelledData("json", data_files=files, test="mine", text="a", text_pair="b", label="kind")
        settings = settings_for("sequence_classification", texts, labels=data, adapt=AdaptSettings(2, batch_size=2))
        store = Store(tmp_path / "run", {"model": model})
        results = run(settings, store)
        store.finish("evaluate", "evaluate", {}, {}, 0)
        manifest = store.manifest("evaluate")
        assert manifest is not None
        facts = manifest.facts
        assert (facts["split"], facts["blocks"], facts["classes"]) == ("mine", 4, 2)
        assert (results.examples == 4).all()
        assert (results.adapt_steps == 2).all()
        assert "labels" in settings.inputs
        assert (
            results.loss.iloc[0]
            != run(replace(settings, adapt=AdaptSettings()), Store(tmp_path / "run", {"model": model})).loss.iloc[0]
        )

    def test_wrong_settings(self, texts: TextFiles, model: Path, tmp_path: Path) -> None:
        choices = "masked_lm, causal_lm, seq2seq_lm, embedding, sequence_classification, token_classification, question_answering"
        with pytest.raises(UserError, match=rf"evaluate.task=summary is unknown; choose one of {choices}"):
            settings_for("summary", texts)
        with pytest.raises(UserError, match=r"measured with evaluate\.task=masked_lm"):
            settings_for("token_classification", texts, conversions=(Conversion("longformer", Longformer(8)),))
        with pytest.raises(UserError, match=r"evaluate.head.steps must be 1 or more"):
            HeadSettings(steps=0)
        with pytest.raises(UserError, match=r"needs labels: give evaluate.labels.path=DATASET"):
            run(settings_for("sequence_classification", texts), Store(tmp_path, {"model": model}))
        assert not (tmp_path / "evaluate").exists()
