"""Released checkpoints under their original names (spec abstractive 0.5, 2.7, 3.5, 4.4, 5.4)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from etcbench.baselines import llama_vid
from safetensors.torch import save_file
from tiny import picture, tiny_llava
from torch import Tensor

from etcbench import registry
from etcbench.backbones import Backbone
from etcbench.checkpoints import installed, load_method
from etcbench.compressor import Budget
from etcbench.errors import UsageError
from etcbench.eva import EvaShape
from etcbench.released import LLAVA, KeyMap

D, TEXT_MLP, KV, WORDS = 32, 48, 16, 260  # sizes of the tiny LLaVA's decoder
LAYERS, TOWER_LAYERS = 4, 3
State = dict[str, Tensor]


@pytest.fixture
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def named(names: dict[str, tuple[int, ...]]) -> State:
    """Random weights of given shapes."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in names.items()}


def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def language(words: int = WORDS) -> State:
    """Vicuna as LLaVA stores it."""
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (words, D),
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        names |= {
            f"{layer}.self_attn.q_proj.weight": (D, D),
            f"{layer}.self_attn.k_proj.weight": (KV, D),
            f"{layer}.self_attn.v_proj.weight": (KV, D),
            f"{layer}.self_attn.o_proj.weight": (D, D),
            f"{layer}.self_attn.rotary_emb.inv_freq": (4,),
            f"{layer}.mlp.gate_proj.weight": (TEXT_MLP, D),
            f"{layer}.mlp.up_proj.weight": (TEXT_MLP, D),
            f"{layer}.mlp.down_proj.weight": (D, TEXT_MLP),
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
    return named(names)


def tower() -> State:
    """CLIP as LLaVA stores it."""
    vision = "model.vision_tower.vision_tower.vision_model"
    names: dict[str, tuple[int, ...]] = {
        f"{vision}.embeddings.class_embedding": (D,),
        f"{vision}.embeddings.patch_embedding.weight": (D, 3, 4, 4),
        f"{vision}.embeddings.position_embedding.weight": (37, D),
        f"{vision}.embeddings.position_ids": (1, 37),
        **norm(f"{vision}.pre_layrnorm", D),
        **norm(f"{vision}.post_layernorm", D),
    }
    for number in range(TOWER_LAYERS):
        layer = f"{vision}.encoder.layers.{number}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            names |= linear(f"{layer}.self_attn.{part}", D, D)
        names |= linear(f"{layer}.mlp.fc1", 48, D) | linear(f"{layer}.mlp.fc2", D, 48)
        names |= norm(f"{layer}.layer_norm1", D) | norm(f"{layer}.layer_norm2", D)
    return named(names)


def projector() -> State:
    return named(linear("model.mm_projector.0", D, D) | linear("model.mm_projector.2", D, D))


def attention(name: str) -> dict[str, tuple[int, ...]]:
    """torch's multi-head attention."""
    return {
        f"{name}.in_proj_weight": (3 * D, D),
        f"{name}.in_proj_bias": (3 * D,),
        **linear(f"{name}.out_proj", D, D),
    }


def mqt() -> State:
    abstractor = "model.query_abstractor"
    own: dict[str, tuple[int, ...]] = {
        f"{abstractor}.query": (16, D),
        f"{abstractor}.pos_embed": (16, D),
        f"{abstractor}.proj": (D, D),
        **attention(f"{abstractor}.attn"),
    }
    for part in ("ln_q", "ln_k", "ln_v"):
        own |= norm(f"{abstractor}.{part}", D)
    return language() | tower() | named(own)


def quecc() -> State:
    first = "model.mm_projector.0"
    own: dict[str, tuple[int, ...]] = {
        **attention(f"{first}.clip_attn"),
        f"{first}.q_downsample.weight": (D, 1, 3, 3),
        f"{first}.q_downsample.bias": (D,),
        **linear(f"{first}.text_projection.0", D, D),
        **norm(f"{first}.text_projection.1", D),
        **linear("model.mm_projector.1", D, D),
        **linear("model.mm_projector.3", D, D),
    }
    for part, inputs in (("q", D), ("k", 4 * D), ("v", 4 * D)):
        own |= linear(f"{first}.{part}_proj.0", D, inputs) | linear(f"{first}.{part}_proj.2", D, D)
        own |= norm(f"{first}.{part}_proj.3", D)
    return language() | tower() | named(own)


def voco() -> State:
    return language(WORDS + 1) | tower() | projector()


FORMATS: dict[str, tuple[Callable[[], State], int | None]] = {
    "full": (lambda: language() | tower() | projector(), None),
    "voco": (voco, 2),
    "quecc": (quecc, 4),
    "mqt-llava": (mqt, 3),
}


def write(folder: Path, state: State, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [dict(list(state.items())[number::2]) for number in range(2)]
    for number, part in enumerate(parts):
        save_file(part, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llava_llama"}))
    return folder


def load(name: str, tokens: int | None, backbone: Backbone, folder: Path, **options: Any) -> Any:
    budget = None if tokens is None else Budget(tokens)
    return load_method(name, budget, backbone, checkpoint=str(folder), options=options)[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_release_loads_under_its_own_names(tmp_path: Path, backbone: Backbone, name: str) -> None:
    state, tokens = FORMATS[name][0](), FORMATS[name][1]
    method = load(name, tokens, backbone, write(tmp_path / "release", state))
    tuned = method.tuned
    language_model = "model.language_model"
    for theirs, ours in (
        ("model.embed_tokens.weight", f"{language_model}.embed_tokens.weight"),
        ("model.layers.3.mlp.up_proj.weight", f"{language_model}.layers.3.mlp.up_proj.weight"),
        ("model.norm.weight", f"{language_model}.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.bias",
            "model.vision_tower.encoder.layers.1.self_attn.q_proj.bias",
        ),
    ):
        assert torch.equal(tuned[ours], state[theirs][: len(tuned[ours])]), theirs
    numbers = {"quecc": (1, 3), "mqt-llava": None}.get(name, (0, 2))
    for layer, number in zip((1, 2), numbers or (), strict=False):
        found = tuned[f"model.multi_modal_projector.linear_{layer}.weight"]
        assert torch.equal(found, state[f"model.mm_projector.{number}.weight"])
    own = {} if method.module is None else method.module.state_dict()
    inside = {"quecc": "model.mm_projector.0.", "mqt-llava": "model.query_abstractor."}.get(name)
    if inside:
        theirs_own = {k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)}
        assert own.keys() == theirs_own.keys()
        assert all(torch.equal(own[key], value) for key, value in theirs_own.items())
    if name == "voco":
        assert torch.equal(own["tokens"][0], state["model.embed_tokens.weight"][WORDS])
    with installed(method, backbone), torch.inference_mode():
        weight = backbone.model.get_parameter("model.language_model.norm.weight")
        assert torch.equal(weight, state["model.norm.weight"])
        pixels = backbone.preprocess([picture(0)], ["x"])
        visual = backbone.visual(pixels, method, [(0, "what?")])
        assert bool(visual.embeds.isfinite().all())
    assert not torch.equal(weight, state["model.norm.weight"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_or_surplus_name_is_said(tmp_path: Path, backbone: Backbone, name: str) -> None:
    state, tokens = FORMATS[name][0](), FORMATS[name][1]
    for gone in ("model.layers.2.mlp.up_proj.weight", next(reversed(state))):
        fewer = {key: value for key, value in state.items() if key != gone}
        with pytest.raises(UsageError, match=f"lacks {gone}"):
            load(name, tokens, backbone, write(tmp_path / gone, fewer))
    for more in ("model.layers.9.mlp.up_proj.weight", "model.other.weight"):
        with pytest.raises(UsageError, match=more):
            folder = write(tmp_path / f"more-{more}", {**state, more: torch.zeros(1)})
            load(name, tokens, backbone, folder)
    wrong = {**state, "model.norm.weight": torch.zeros(D + 1)}
    with pytest.raises(UsageError, match=r"model.norm.weight has shape \[33\] instead of \[32\]"):
        load(name, tokens, backbone, write(tmp_path / "shape", wrong))


def test_a_tower_may_be_left_out_as_a_whole_only(tmp_path: Path, backbone: Backbone) -> None:
    state = mqt()
    no_tower = {key: value for key, value in state.items() if "vision_tower" not in key}
    method = load("mqt-llava", 4, backbone, write(tmp_path / "none", no_tower))
    assert not any("vision_tower" in name for name in method.tuned)
    half = {key: value for key, value in state.items() if "encoder.layers.1" not in key}
    with pytest.raises(UsageError, match=r"lacks model.vision_tower"):
        load("mqt-llava", 4, backbone, write(tmp_path / "half", half))


def test_a_shorter_vocabulary_keeps_the_rows_behind_it(tmp_path: Path, backbone: Backbone) -> None:
    state = language(WORDS - 4) | tower() | projector()
    method = load("full", None, backbone, write(tmp_path, state))
    found = method.tuned["model.language_model.embed_tokens.weight"]
    present = backbone.model.get_parameter("model.language_model.embed_tokens.weight")
    assert torch.equal(found[:-4], state["model.embed_tokens.weight"])
    assert torch.equal(found[-4:], present[-4:])


def test_what_is_no_plain_tensors_is_never_opened(tmp_path: Path, backbone: Backbone) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(UsageError, match=r"pytorch_model.bin does not load as plain weights"):
        load("mqt-llava", 4, backbone, folder)
    assert not (tmp_path / "opened").exists()
    torch.save(mqt(), folder / "pytorch_model.bin")
    assert load("mqt-llava", 4, backbone, folder).tuned


def test_rules_are_tried_in_order_and_read_both_ways() -> None:
    keys = KeyMap({"a.skip": None, "a.*.x.*": "model.*.y.*", "a.*": "compressor.*"})
    wanted = {"model.1.y.w": torch.zeros(1), "compressor.b": torch.zeros(2)}
    state = {"a.skip": torch.ones(9), "a.1.x.w": torch.ones(1), "a.b": torch.ones(2)}
    assert keys.rename(state, wanted, "file").keys() == wanted.keys()
    with pytest.raises(UsageError, match=r"file lacks a.1.x.w \(here model.1.y.w\)"):
        keys.rename({"a.b": torch.ones(2)}, wanted, "file")
    assert LLAVA.options({}) == {}


# LLaMA-VID -----------------------------------------------------------------------------------

SMALL = EvaShape(width=16, depth=39, heads=2, inner=20, side=2)
Q, DEPTH, QUERIES = 8, 3, 4


def eva_g() -> State:
    """LAVIS's file, one block longer than what is used."""
    names: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 5, 16),
        **{"patch_embed.proj.weight": (16, 3, 14, 14), "patch_embed.proj.bias": (16,)},
    }
    for number in range(40):
        block = f"blocks.{number}"
        names |= {
            f"{block}.attn.qkv.weight": (48, 16),
            f"{block}.attn.q_bias": (16,),
            f"{block}.attn.v_bias": (16,),
            **linear(f"{block}.attn.proj", 16, 16),
            **norm(f"{block}.norm1", 16),
            **norm(f"{block}.norm2", 16),
            **linear(f"{block}.mlp.fc1", 20, 16),
            **linear(f"{block}.mlp.fc2", 16, 20),
        }
    return named(names)


def vid() -> State:
    bert = "model.vlm_att_encoder.bert"
    names: dict[str, tuple[int, ...]] = {
        f"{bert}.embeddings.word_embeddings.weight": (30523, Q),
        f"{bert}.embeddings.position_embeddings.weight": (512, Q),
        f"{bert}.embeddings.position_ids": (1, 512),
        **norm(f"{bert}.embeddings.LayerNorm", Q),
        "model.vlm_att_query": (1, QUERIES, Q),
        **norm("model.vlm_att_ln", 16),
        **linear("model.vlm_att_projector", 16, Q),
        **linear("model.vlm_att_key_projector", 16, 16),
        **linear("model.vlm_att_val_projector", D, 16),
        **linear("model.mm_projector.0", D, 16),
        **linear("model.mm_projector.2", D, D),
    }
    for number in range(DEPTH):
        layer = f"{bert}.encoder.layer.{number}"
        kinds = {"attention": Q, **({"crossattention": 16} if number % 2 == 0 else {})}
        for kind, inputs in kinds.items():
            names |= linear(f"{layer}.{kind}.self.query", Q, Q)
            names |= linear(f"{layer}.{kind}.self.key", Q, inputs)
            names |= linear(f"{layer}.{kind}.self.value", Q, inputs)
            names |= linear(f"{layer}.{kind}.output.dense", Q, Q)
            names |= norm(f"{layer}.{kind}.output.LayerNorm", Q)
        for end in ("", "_query"):
            names |= linear(f"{layer}.intermediate{end}.dense", 4 * Q, Q)
            names |= linear(f"{layer}.output{end}.dense", Q, 4 * Q)
            names |= norm(f"{layer}.output{end}.LayerNorm", Q)
    return language() | named(names)


@pytest.fixture
def small_eva(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_vid, "GIANT", SMALL)


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "##s", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return str(tmp_path / "vocab.txt")


@pytest.mark.usefixtures("small_eva")
@pytest.mark.parametrize(("compress", "tokens"), [("mean_concat", 2), ("grid:2", 5), (None, 577)])
def test_llama_vid_loads_with_its_tower_beside_it(
    tmp_path: Path, backbone: Backbone, vocabulary: str, compress: str | None, tokens: int
) -> None:
    config = {"compress_type": compress, "num_query": QUERIES, "model_type": "llava"}
    state, beside = vid(), eva_g()
    folder = write(tmp_path / "release", state, config)
    sizes = {"width": Q, "depth": DEPTH, "heads": 2, "vocabulary": vocabulary}
    with pytest.raises(UsageError, match=r"lacks eva_vit_g: put eva_vit_g.safetensors"):
        load("llama-vid", tokens, backbone, folder, **sizes)
    torch.save(beside, folder / "eva_vit_g.pth")
    method = load("llama-vid", tokens, backbone, folder, **sizes)
    own = method.module.state_dict()
    assert len(own) == len(state) - len(language()) - 1 + len(beside) - 13 - 39
    assert torch.equal(own["W_v.weight"], state["model.vlm_att_val_projector.weight"])
    assert torch.equal(own["content_mlp.2.bias"], state["model.mm_projector.2.bias"])
    key = "attention.self.value.weight"
    found = own["qformer.encoder.layer.2.crossattention.attention.value.weight"]
    theirs = state[f"model.vlm_att_encoder.bert.encoder.layer.2.cross{key}"]
    assert torch.equal(found, theirs)
    bias = own["eva.encoder.layers.38.self_attn.qkv.bias"]
    zeros = torch.zeros(16)
    parts = (beside["blocks.38.attn.q_bias"], zeros, beside["blocks.38.attn.v_bias"])
    assert torch.equal(bias, torch.cat(parts))
    with pytest.raises(UsageError, match=f"it can make {tokens}"):
        load("llama-vid", 3, backbone, folder, **sizes)
    pixels = backbone.preprocess([picture(0)], ["x"])
    with installed(method, backbone), torch.inference_mode():
        asked = [(0, "What is it?"), (0, "it?")]
        visual = backbone.visual(pixels, method, asked)
    assert visual.place.shape == (2, tokens)
    differs = (visual.embeds[0] - visual.embeds[1]).abs().amax(-1) > 1e-7
    assert differs.nonzero()[:, 0].tolist() == [0]
    fewer = {k: v for k, v in beside.items() if k != "blocks.7.attn.proj.bias"}
    torch.save(fewer, folder / "eva_vit_g.pth")
    with pytest.raises(UsageError, match=r"lacks blocks.7.attn.proj.bias"):
        load("llama-vid", tokens, backbone, folder, **sizes)


def test_a_224_release_says_so(backbone: Backbone) -> None:
    options = llama_vid.LlamaVid.released.options
    assert options({"image_processor": "./clip-patch14-224", "num_qformer": 32})["image"] == 224
    assert options({})["compress"] == "null" and options({})["image"] == 336


def test_a_llava_without_voco_s_token_is_refused() -> None:
    plain = {"model.embed_tokens.weight": torch.zeros(32_000, 2)}
    with pytest.raises(UsageError, match="none for VoCo's token"):
        registry.load("baselines", "voco").released.before(plain)
