"""An unpadded model under the libraries that people train and serve with: equal to plain, and really unpadded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import unpad_cases as cases
from corpus_fixtures import tiny_tokenizer
from torch import Tensor

from bert_kernels.hf import repad, unpad

WORDS = "word1 word2 word3 word4 word5 word6 word7 word8"
TEXTS = [" ".join(WORDS.split()[:length]) for length in (1, 8, 3, 5, 2, 8, 1, 4)]


def rows(name: str, *, number: int = 24) -> list[dict[str, Any]]:
    """Return examples of different lengths with labels for the class."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        length = 2 + i * 7 % 11
        ids = torch.randint(1, cases.VOCABULARY, (length,), generator=generator).tolist()
        words = [token if place % 3 == 0 else -100 for place, token in enumerate(ids)]
        found.append({"input_ids": ids, "labels": words if name.endswith("MaskedLM") else i % 3})
    return found


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad examples to the longest, on the right."""
    longest = max(len(example["input_ids"]) for example in examples)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    batch = {
        "input_ids": torch.tensor([pad(each, cases.PAD) for each in ids]),
        "attention_mask": torch.tensor([pad([1] * len(each), 0) for each in ids]),
    }
    per_token = isinstance(labels[0], list)
    return batch | {"labels": torch.tensor([pad(each, -100) for each in labels] if per_token else labels)}


class Shapes:
    """Notes the shapes that the first layer sees."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, ...]] = []
        kinds = ("BertLayer", "TransformerBlock", "ModernBertEncoderLayer")
        layer = next(module for module in model.modules() if type(module).__name__ in kinds)
        layer.register_forward_hook(lambda module, args, output: self.seen.append(tuple(args[0].shape[:2])))

    @property
    def packed(self) -> bool:
        return bool(self.seen) and all(batch == 1 for batch, _ in self.seen)


def train(model: Any, folder: Path, name: str, *, resume: bool = False, **settings: Any) -> tuple[list[float], Any]:
    """Train 6 steps with Trainer; return the losses and the Trainer."""
    pytest.importorskip("accelerate", reason="Trainer wants accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=3,
        learning_rate=1e-3,
        **{"save_strategy": "no", **settings},
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=padded, train_dataset=rows(name), eval_dataset=rows(name, number=7)
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


def assert_close(ours: list[float], plain: list[float], *, rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=rtol, atol=0)


def float_pair(name: str, **settings: Any) -> tuple[Any, Any]:
    plain = cases.make_model(name, **settings).float()
    return plain, unpad(copy.deepcopy(plain))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForSequenceClassification"])
def test_trainer_makes_the_same_steps_and_scores(tmp_path: Path, name: str) -> None:
    plain, ours = float_pair(name)
    shapes = Shapes(ours)
    wanted, reference = train(plain, tmp_path / "plain", name)
    found, trainer = train(ours, tmp_path / "ours", name)
    assert shapes.packed and len(found) == 6
    assert_close(found, wanted, rtol=2e-5)
    scores, scores_wanted = trainer.predict(rows(name, number=7)), reference.predict(rows(name, number=7))
    assert_close([scores.metrics["test_loss"]], [scores_wanted.metrics["test_loss"]], rtol=2e-4)
    assert scores.predictions.shape == scores_wanted.predictions.shape


def test_trainer_resumes_an_unpadded_model_and_recomputes_layers(tmp_path: Path) -> None:
    name = "BertForMaskedLM"
    straight = unpad(cases.make_model(name, hidden_dropout_prob=0.1).float())
    whole, _ = train(straight, tmp_path / "a", name, save_strategy="steps", save_steps=3)
    fresh = unpad(cases.make_model(name, seed=9, hidden_dropout_prob=0.1).float())
    after, _ = train(fresh, tmp_path / "a", name, resume=True, gradient_checkpointing=True)
    assert_close(after, whole, rtol=1e-5)
    assert fresh.bert.encoder.layer[0].gradient_checkpointing
    cases.assert_same_weights(fresh, straight)


def test_trainer_with_bf16_is_as_far_from_fp32_as_the_plain_model_is(tmp_path: Path) -> None:
    name = "BertForMaskedLM"
    plain, ours = float_pair(name)
    truth = copy.deepcopy(plain)
    exact, _ = train(truth, tmp_path / "truth", name)
    wanted, _ = train(plain, tmp_path / "plain", name, bf16=True)
    found, _ = train(ours, tmp_path / "ours", name, bf16=True)
    far = max(abs(a - b) for a, b in zip(wanted, exact, strict=True))
    assert 0 < max(abs(a - b) for a, b in zip(found, exact, strict=True)) <= 2 * far


def test_pipelines_classify_fill_and_extract(tmp_path: Path) -> None:
    tiny_tokenizer(60).save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for task, name, texts in (
        ("text-classification", "BertForSequenceClassification", TEXTS),
        ("fill-mask", "BertForMaskedLM", ["word1 [MASK] word3", "[MASK]"]),
        ("token-classification", "DistilBertForTokenClassification", TEXTS),
    ):
        plain, ours = float_pair(name, vocab_size=len(tokenizer))
        shapes = Shapes(ours)
        answers = [
            transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")(texts, batch_size=4)
            for model in (plain, ours)
        ]
        assert shapes.packed
        assert_same_answers(answers[1], answers[0])


def assert_same_answers(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_answers(one, other)
    elif isinstance(wanted, dict):
        assert {key: value for key, value in found.items() if key != "score"} == {
            key: value for key, value in wanted.items() if key != "score"
        }
        assert abs(float(found["score"]) - float(wanted["score"])) < 1e-4


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentences")
    tiny_tokenizer(60).save(folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    cases.make_model("BertForSequenceClassification", vocab_size=size, num_labels=1).float().save_pretrained(folder)
    return folder


def test_sentence_transformers_encodes_and_trains_the_same(sentence_folder: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra embeddings is not installed")
    from sentence_transformers import losses

    for pooling in ("mean", "cls"):
        encoder, mean = library.SentenceTransformer(str(sentence_folder), device="cpu")
        plain = library.SentenceTransformer(modules=[encoder, type(mean)(32, pooling_mode=pooling)], device="cpu")
        ours = unpad(copy.deepcopy(plain))
        shapes = Shapes(ours)
        wanted, found = plain.encode(TEXTS), ours.encode(TEXTS)
        assert shapes.packed
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        for model in (plain, ours):
            loss = losses.CosineSimilarityLoss(model.train())
            features = [model.preprocess(TEXTS[:4]), model.preprocess(TEXTS[4:])]
            loss(features, torch.linspace(0, 1, 4)).backward()
        cases.assert_same_gradients(ours, plain, limit=2e-4)
        assert not repad(ours)[0].auto_model.__dict__.keys() & {"_bert_kernels"}


def test_a_cross_encoder_scores_the_same(sentence_folder: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra embeddings is not installed")
    plain, ours = (library.CrossEncoder(str(sentence_folder), device="cpu") for _ in range(2))
    shapes = Shapes(unpad(ours))
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    torch.testing.assert_close(torch.tensor(ours.predict(pairs)), torch.tensor(plain.predict(pairs)), atol=1e-5, rtol=0)
    assert shapes.packed


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("adapter_first", [True, False])
def test_lora_before_and_after_gives_the_same_gradients(adapter_first: bool, kernels: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    name = "BertForSequenceClassification"

    def config() -> Any:
        return peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query", "value", "dense"], init_lora_weights=False
        )

    torch.manual_seed(1)
    plain = peft.get_peft_model(cases.make_model(name), config()).double()
    if adapter_first:
        ours = unpad(copy.deepcopy(plain), kernels=kernels)
    else:
        torch.manual_seed(1)
        ours = peft.get_peft_model(unpad(cases.make_model(name), kernels=kernels), config()).double()
        ours.load_state_dict(plain.state_dict())
    shapes = Shapes(ours)
    batch = cases.make_batch(name)
    theirs, mine = plain.train()(**batch.inputs), ours.train()(**batch.inputs)
    assert shapes.packed
    cases.assert_same_outputs(mine, theirs, batch.keep)
    theirs.loss.backward(), mine.loss.backward()
    cases.assert_same_gradients(ours, plain)
    assert sum(parameter.grad is not None for parameter in ours.parameters()) > 10
    merged = ours.merge_and_unload().eval()
    torch.testing.assert_close(merged(**batch.inputs).logits, plain.eval()(**batch.inputs).logits)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM", "ModernBertForMaskedLM"])
def test_compiled_it_gives_the_same_numbers_and_makes_no_graph_for_each_batch(name: str) -> None:
    import torch._dynamo

    plain, ours = cases.pair(name)
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(ours.train(), backend=backend)
    counts = []
    for seed, mask in enumerate(("ragged", "equal", "holes", "ragged", "full")):
        batch = cases.make_batch(name, mask, seed=seed)
        plain.zero_grad(), ours.zero_grad()
        theirs, mine = plain.train()(**batch.inputs), compiled(**batch.inputs)
        torch.testing.assert_close(mine.loss, theirs.loss)
        theirs.loss.backward(), mine.loss.backward()
        cases.assert_same_gradients(ours, plain)
        counts.append(len(graphs))
    assert counts[3] == counts[2] > 0
