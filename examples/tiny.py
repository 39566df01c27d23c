"""Tiny pipelines of the classes of Stable Diffusion, SD3 and FLUX, with random weights: a few MB, made in a second."""

import backends as backends  # before diffusers

# isort: split

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # type: ignore[attr-defined]
)

HIDDEN = 32
LENGTH = 77
"""Tokens of a prompt."""


def tiny_sd15(prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's classes: 16x16 images from 8x8 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(HIDDEN, 2 * HIDDEN),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae(4, 0.18215, None),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's classes: 16x16 images from 8x8 latents."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=2 * HIDDEN,
        out_channels=16,
    )
    with torch.no_grad():
        transformer.proj_out.weight.normal_(0, 0.2)  # else the velocity hardly depends on anything
    encoders = [CLIPTextModelWithProjection(clip_config()).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 1.5305, 0.0609),
        text_encoder=encoders[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * HIDDEN),
        tokenizer_3=t5_tokenizer(),
    )


def tiny_flux() -> FluxPipeline:
    """FLUX.1-dev's classes, guidance embedded: 16x16 images from 8x8 latents, packed into 4x4 tokens."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(4, 0.3611, 0.1159),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(HIDDEN),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )


TINY = {"sd15": tiny_sd15, "sd3": tiny_sd3, "flux": tiny_flux}


def saved(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Write a pipeline as its from_pretrained reads it."""
    pipe.save_pretrained(folder)
    return folder


def vae(latent_channels: int, scaling_factor: float, shift_factor: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),  # type: ignore[arg-type]
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    ).eval()


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Of single bytes: no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=LENGTH)


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=128,
        d_model=width,
        d_ff=2 * width,
        d_kv=8,
        num_layers=1,
        num_heads=4,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """Of single characters."""
    letters = [chr(code) for code in range(33, 127)]
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return T5TokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", extra_ids=0, model_max_length=LENGTH
    )


if __name__ == "__main__":  # python examples/tiny.py: what conf/backbone/tiny_*.yaml and conf/metrics/tiny.yaml read
    from tiny_metrics import saved_metrics

    for name, make in TINY.items():
        saved(make(), Path("data/tiny", name))
    saved_metrics(Path("data/tiny"))
