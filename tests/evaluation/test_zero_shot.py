from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.nn.functional import normalize
from torchvision.datasets import ImageFolder

from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, ZeroShotClassification, class_hits, wilson, zero_shot_classifier
from tests.evaluation.digits import NAMES as DIGITS
from tests.evaluation.digits import TEMPLATES, digit_model, write_digits
from tests.evaluation.toy import COLOURS, Colours, WordTokenizer, pretrained

NAMES = ["red", "green", "blue"]
SIX = partial(Colours, COLOURS, [0, 1, 2, 1, 2, 1])


def test_six_pictures_by_hand() -> None:
    # A red, B green, C blue, E (0,1,2) blue: right. D (2,1,0) is green: red leads. F (2,0,1) is green: red
    # and blue lead.
    metrics = ZeroShotClassification(SIX, NAMES, ["{}"], ks=(1, 2, 5), batch_size=4)(pretrained())
    assert (metrics["images"], metrics["classes"]) == (6, 3)
    assert (metrics["top1"], metrics["top2"], metrics["top5"]) == (4 / 6, 5 / 6, 1)
    assert metrics["mean_class_recall"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert (metrics["top1/chance"], metrics["top2/chance"], metrics["top5/chance"]) == (1 / 3, 2 / 3, 1)
    assert (metrics["top1/ci_low"], metrics["top1/ci_high"]) == wilson(4, 6)
    assert metrics["mean_class_recall/ci_low"] < 7 / 9 < metrics["mean_class_recall/ci_high"]


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_hits_match_brute_force_and_scikit_learn(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(50, 8, generator=generator), dim=-1)
    classifier = normalize(torch.randn(7, 8, generator=generator), dim=-1)
    labels = torch.randint(0, 6, (50,), generator=generator)  # class 6 has no sample
    hits, counts = class_hits(images, classifier, labels, (1, 3, 9), chunk_size)
    order = (images.double() @ classifier.double().T).argsort(dim=1, descending=True)
    for row, k in enumerate((1, 3, 9)):
        hit = (order[:, :k] == labels[:, None]).any(dim=1)
        assert hits[row].tolist() == torch.bincount(labels[hit], minlength=7).tolist()
    assert counts.tolist() == torch.bincount(labels, minlength=7).tolist()
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels.numpy(), order[:, 0].numpy())
    assert float((hits[0][:6] / counts[:6]).mean()) == pytest.approx(expected)


def test_ties_count_against_the_model() -> None:
    """A model that gives everything the same embedding knows nothing, whatever the order of the classes."""
    images, classifier = normalize(torch.ones(5, 4), dim=-1), normalize(torch.ones(3, 4), dim=-1)
    for label in range(3):
        hits, counts = class_hits(images, classifier, torch.full((5,), label), (1, 2, 3))
        assert hits.sum(dim=1).tolist() == [0, 0, 5] and counts[label] == 5


def test_of_classes_with_one_name_the_first_is_taken_as_in_published_numbers() -> None:
    images, classifier = torch.eye(3)[[0, 0, 1, 2, 2]], torch.eye(3)[[0, 1, 1, 2, 2]]
    labels, names = torch.tensor([0, 1, 1, 3, 4]), ["a", "b", "b", "c", "c"]
    hits, _ = class_hits(images, classifier, labels, (1, 2), names=names)
    assert hits.tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    hits, _ = class_hits(images, classifier, labels, (1, 2))
    assert hits.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 1, 1]]
    # The names alone decide: that one was embedded a little nearer than the other is rounding.
    classifier[4, 2] += 1e-6
    hits, _ = class_hits(images, classifier, labels, (1, 2), names=names)
    assert hits.tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


def test_a_rank_without_a_picture_counts_none() -> None:
    hits, counts = class_hits(torch.zeros(0, 4), torch.eye(3, 4), torch.zeros(0, dtype=torch.int64), (1, 5))
    assert hits.tolist() == [[0] * 3] * 2 and counts.tolist() == [0] * 3


def test_classifier_is_the_unit_mean_of_unit_vectors() -> None:
    model, _, tokenizer = pretrained()
    classifier = zero_shot_classifier(model, tokenizer, ["red", "blue"], ["{}", "{} green", "{} {} {}"])
    # "red red red" has length 3 but counts once: (1,0,0) + (1,1,0)/sqrt 2 + (1,0,0)
    red = torch.tensor([2 + 0.5**0.5, 0.5**0.5, 0.0])
    torch.testing.assert_close(classifier, normalize(torch.stack([red, red.flip(0)]), dim=-1))
    torch.testing.assert_close(classifier.norm(dim=1), torch.ones(2))


def test_braces_in_names_and_templates_are_text() -> None:
    model, _, _ = pretrained()
    seen: list[str] = []

    class Spy(WordTokenizer):
        def __call__(self, texts):  # type: ignore[no-untyped-def]
            seen.extend(texts)
            return super().__call__(texts)

    zero_shot_classifier(model, Spy(), ["{0.__class__}"], ["a {} {x}"])
    assert seen == ["a {0.__class__} {x}"]


def test_image_folder_as_is(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 4), name).save(tmp_path / name / "0.png")
    parts = pretrained()._replace(preprocess=lambda image: torch.tensor(image.getpixel((0, 0))).view(3, 1, 1))
    folder = partial(ImageFolder, str(tmp_path))
    metrics = ZeroShotClassification(folder, templates=["{}"])(parts)  # its own sorted class names
    assert metrics["top1"] == 1
    # PIL's green is (0,128,0); sorted names are blue, green, red, so the names in another order are a mistake
    with pytest.raises(InputError, match="in the data set's order"):
        ZeroShotClassification(folder, NAMES)(parts)
    with pytest.raises(InputError, match="in the data set's order"):
        ZeroShotClassification(folder, NAMES[:2])(parts)
    renamed = ZeroShotClassification(folder, ["blue blue", "green", "red"], ["{}"])(parts)
    assert renamed["top1"] == 1


@pytest.mark.parametrize("label", [3, -1, "red", 1.0, None])
def test_unknown_label(label: object) -> None:
    with pytest.raises(InputError, match="item 1 has label"):
        ZeroShotClassification(partial(Colours, COLOURS[:2], [0, label]), NAMES)(pretrained())


def test_bad_input() -> None:
    with pytest.raises(InputError, match="empty"):
        ZeroShotClassification(partial(Colours, [], []), NAMES)(pretrained())
    with pytest.raises(InputError, match="does not name its classes"):
        ZeroShotClassification(SIX)(pretrained())
    with pytest.raises(InputError, match="no place for the class name"):
        ZeroShotClassification(SIX, NAMES, ["a photo"])(pretrained())
    with pytest.raises(InputError, match="0 templates"):
        ZeroShotClassification(SIX, NAMES, [])(pretrained())
    with pytest.raises(InputError, match="batch_size is 0"):
        ZeroShotClassification(SIX, NAMES, batch_size=0)(pretrained())
    with pytest.raises(InputError, match="batch_size is 'many'"):
        ZeroShotClassification(SIX, NAMES, batch_size="many")(pretrained())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_workers is -1"):
        ZeroShotClassification(SIX, NAMES, num_workers=-1)(pretrained())
    with pytest.raises(InputError, match="NaN"):
        class_hits(torch.full((1, 3), torch.nan), torch.eye(3), torch.tensor([0]), (1,))


def test_equal_to_clip_benchmark_on_real_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # It turns arrays of one number into numbers, which NumPy no longer does.
    monkeypatch.setattr(theirs, "float", lambda value: value.item(), raising=False)
    folder = write_digits(tmp_path / "digits")
    metrics = ZeroShotClassification(partial(BenchmarkData, folder), batch_size=64)(digit_model())
    model, preprocess, tokenizer = digit_model()
    loader = torch.utils.data.DataLoader(BenchmarkData(folder, transform=preprocess), batch_size=32)
    classifier = theirs.zero_shot_classifier(model, tokenizer, DIGITS, TEMPLATES, "cpu", amp=False)
    logits, labels = theirs.run_classification(model, classifier, loader, "cpu", amp=False)
    top1, top5 = theirs.accuracy(logits, labels, topk=(1, 5))
    assert metrics["top1"] == pytest.approx(top1, abs=1e-6)
    assert metrics["top5"] == pytest.approx(top5, abs=1e-6)
    expected = balanced_accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert metrics["mean_class_recall"] == pytest.approx(expected, abs=1e-6)
