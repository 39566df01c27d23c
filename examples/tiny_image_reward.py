"""A tiny ImageReward with random weights, in the layout of the published one, and a BERT tokenizer of single characters.

2 MB, made in a second.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

IMAGE = 32
"""Height and width of the images that the model sees, in patches of 16x16."""

PATCH, WIDTH = 16, 64
HIDDEN = 32
LAYERS = 2
SPECIAL = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""With the numbers that they have in bert-base-uncased: 0, 100, 101, ..."""

LETTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * HIDDEN,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": WIDTH,
    "add_cross_attention": True,
}


def saved_image_reward(folder: Path, seed: int) -> Path:
    """Write ImageReward.pt and med_config.json as metrics.image_reward reads them. The seed draws the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(image_reward_state(seed), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def saved_bert(folder: Path) -> Path:
    """Write a tokenizer in bert-base-uncased's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(VOCABULARY)}))
    return folder


def image_reward_state(seed: int) -> dict[str, Tensor]:
    """Weights by their published names, large enough for scores to depend on every token."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        state[name] = mean + std * torch.randn(shape, generator=generator)

    def linear(name: str, to: int, *of: int) -> None:
        draw(f"{name}.weight", to, *of, std=1.0 * torch.Size(of).numel() ** -0.5)
        draw(f"{name}.bias", to)

    def norm(name: str, width: int) -> None:
        draw(f"{name}.weight", width, mean=1.0)
        draw(f"{name}.bias", width)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    draw(f"{vision}.cls_token", 1, 1, WIDTH)
    draw(f"{vision}.pos_embed", 1, 1 + (IMAGE // PATCH) ** 2, WIDTH)
    linear(f"{vision}.patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    for block in (f"{vision}.blocks.{i}" for i in range(LAYERS)):
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
    norm(f"{vision}.norm", WIDTH)

    state[f"{text}.embeddings.position_ids"] = torch.arange(CONFIG["max_position_embeddings"])[None]
    draw(f"{text}.embeddings.word_embeddings.weight", CONFIG["vocab_size"], HIDDEN, std=1.0)
    draw(f"{text}.embeddings.position_embeddings.weight", CONFIG["max_position_embeddings"], HIDDEN, std=1.0)
    norm(f"{text}.embeddings.LayerNorm", HIDDEN)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(LAYERS)):
        for attention, of in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}.{attention}.self.key", HIDDEN, of)
            linear(f"{layer}.{attention}.self.value", HIDDEN, of)
            linear(f"{layer}.{attention}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}.{attention}.output.LayerNorm", HIDDEN)
        linear(f"{layer}.intermediate.dense", 2 * HIDDEN, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, 2 * HIDDEN)
        norm(f"{layer}.output.LayerNorm", HIDDEN)

    linear("blip.vision_proj", 256, WIDTH)
    linear("blip.text_proj", 256, HIDDEN)
    widths = {0: (1024, HIDDEN), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for i, (to, of) in widths.items():
        linear(f"mlp.layers.{i}", to, of)
    return state
