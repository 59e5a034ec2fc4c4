"""Everything shipped compiles as one graph, a few graphs serve all lengths, and no gradient changes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from mmpretrain import ImageEncoder, InputError, MultimodalModel, Outputs, Padded, Prediction
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.training.compilation import check_compile, check_place, compile_model, uncompiled
from mmpretrain.training.micro_batches import forward_in_micro_batches
from mmpretrain.types import IGNORE_INDEX, Lengths
from tests import models
from tests.training.test_module import FAMILIES, double

CONFIGS = Path(str(files("mmpretrain.configs")))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
# torch looks at the gradient of what enters a compiled block, and hides the warning only where warnings are no errors.
NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LOSSES = sorted(path.stem for path in (CONFIGS / "losses").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def composed(*overrides: str) -> Any:
    register_resolvers()
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        return compose("train", overrides=["run_dir=none", *overrides])


def shallow(name: str) -> list[str]:
    """Overrides that give a model two blocks of each kind: the others run the same code."""
    encoders = f"model={name}", "model.encoders.text.depth=2"
    if "convnext" in name:
        return [*encoders, "+model.encoders.image.model_args={depths:[1,1,1,1]}"]
    if "_rn" in name:
        return [*encoders]
    image = "++model.encoders.image.model_args.depth=2"
    return [*encoders, image, *(["model.fusion.depth=2"] if name.startswith("coca") else [])]


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_model_is_one_graph(name):
    tokenizer = {"siglip": "siglip", "coca": "coca"}.get(name.split("_")[0], "clip")
    config = composed(*shallow(name), f"tokenizer={tokenizer}", "data.image_size=64")
    side, length = 64 if name.endswith("tiny") else 224, config.tokenizer.context_length
    with torch.device("meta"):
        model = instantiate(config.model)
        ids = torch.zeros(2, length, dtype=torch.long)
        text = Padded(ids, ids == 0, Lengths([5, 9]))
        image = Padded(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    compile_model(model, "eager", by_block=False, whole_graph=True)
    outputs = model({"image": image, "text": text})
    assert outputs.embeddings["image"].shape == outputs.embeddings["text"].shape == (2, model.embed_dim)


def outputs(size: int, width: int = 16) -> Outputs:
    leaf = lambda *shape: nn.functional.normalize(torch.randn(*shape).double(), dim=-1).requires_grad_()  # noqa: E731
    embeddings = {m: leaf(size, width) for m in ("image", "text")}
    labels = torch.randint(0, 50, (size, 5)).masked_fill(torch.rand(size, 5) < 0.3, IGNORE_INDEX)
    prediction = Prediction(leaf(size, 5, width), leaf(50, width), labels)
    scale, bias = torch.tensor([10.0], dtype=torch.float64), torch.tensor([-10.0], dtype=torch.float64)
    return Outputs(embeddings, scale, bias, {"caption": prediction}, {"text": torch.randint(0, 3, (size,))})


@pytest.mark.parametrize("name", LOSSES)
def test_every_shipped_loss_is_one_graph(name):
    for loss in instantiate(composed(f"losses={name}").losses)["losses"].values():
        given = outputs(12)
        compiled = torch.compile(lambda outputs, loss=loss: loss(outputs), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(given), loss(given), rtol=1e-12, atol=1e-12)


def with_lengths(batch: dict[str, Padded], length: int) -> dict[str, Padded]:
    """The same batch padded to `length`, its lengths known to the host."""
    values, mask, _ = batch["text"]
    room = (0, length - values.shape[1])
    text = Padded(nn.functional.pad(values, room), nn.functional.pad(mask, room), Lengths(mask.sum(1).tolist()))
    return {**batch, "text": text}


@NON_LEAF
@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_graphs_serve_every_length(family, by_block):
    """Texts are padded to a multiple of 8 and packed into any total: no new graph for each."""
    build, losses = FAMILIES[family]
    model = build().train()
    compile_model(model, "eager", by_block, whole_graph=True)
    graphs = []
    for seed in range(8):
        batch = models.batch(6, seed, lengths=[3 + (seed + row) % 9 for row in range(6)])
        longest = 12 if family == "siglip" else -(-batch["text"].values.shape[1] // 4) * 4
        found = model(with_lengths(batch, longest))
        sum(loss(found) for loss in losses).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3], graphs  # four steps have seen all there is
    assert graphs[-1] <= (12 if by_block else 3), graphs


def gradients(model: MultimodalModel, losses: Any, batch: Any, micro: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # patch dropout draws from it
    model.zero_grad()
    found = model(batch) if micro is None else forward_in_micro_batches(model, batch, micro)
    sum(loss(found) for loss in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dropping(model: MultimodalModel) -> MultimodalModel:
    """Give a model's pictures patch dropout."""
    args = {**models.VIT, "img_size": 32, "patch_drop_rate": 0.5}
    model.encoders["image"] = ImageEncoder("vit_tiny_patch16_224", args)
    return model


@NON_LEAF
@pytest.mark.parametrize(
    ("family", "by_block", "micro"),
    [("clip", False, 3), ("clip", True, None), ("coca", False, None), ("coca", True, 3)],
    ids=["clip-whole-micro", "clip-blocks", "coca-whole", "coca-blocks-micro"],
)
def test_compiling_changes_no_gradient_and_no_name(family, by_block, micro):
    build, losses = FAMILIES[family]
    model, batch = build().double().train(), with_lengths(double(models.batch(8)), 12)
    if family == "clip":  # random, too; the last of three micro-batches is smaller
        model = dropping(model).double()
        batch["image"] = Padded(torch.rand(8, 3, 32, 32, dtype=torch.float64))
    names, want = list(model.state_dict()), gradients(model, losses, batch, micro)
    compile_model(model, "aot_eager", by_block, any_size=micro is not None)
    got = gradients(model, losses, batch, micro)
    assert list(model.state_dict()) == names and set(got) == set(want)
    assert counters["stats"]["unique_graphs"] > 0
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=name)


def test_evaluation_runs_the_model_as_written():
    model = models.clip().eval()
    want = model.embed("text", models.batch(4)["text"])
    for by_block in (False, True):
        compile_model(model, "eager", by_block)
        with uncompiled():
            assert torch.equal(model.embed("text", models.batch(4)["text"]), want)
        assert counters["stats"]["unique_graphs"] == 0


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match=r"trainer\.compile is 'fast'; choose null or one of default, reduce-overhead"):
        check_compile("fast", None)
    with pytest.raises(InputError, match="next micro-batch would overwrite"):
        check_compile("reduce-overhead", 4)
    with pytest.raises(InputError, match="exchange between blocks"):
        check_place("max-autotune", torch.device("cpu"), 2)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(InputError, match=r"C\+\+ compiler"):
        check_place("default", torch.device("cpu"), 1)
    check_place("aot_eager", torch.device("cpu"), 2)
