"""Language and vision models of transformers, and adapters of peft."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.real_models.reference import Case, Returning, check, each, prepared

transformers = pytest.importorskip("transformers", reason="tox -e models installs it")
peft = pytest.importorskip("peft", reason="tox -e models installs it")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks for it
)

VOCABULARY = 50


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def language_data(length=6):
    """Two uneven batches; some targets do not count."""
    data = []
    for size in (3, 2):
        ids = tokens(size, length)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        y = ids.roll(-1, 1)
        y[:, -1] = -100
        data.append(({"input_ids": ids, "attention_mask": mask}, y))
    return data


def logits_by_class(output):
    """The classes as the second dimension, as the loss wants it."""
    return output.logits.transpose(1, 2)


def causal(model, dtype, **options):
    model = Returning(prepared(model, dtype), logits_by_class)
    return Case(model, nn.CrossEntropyLoss(), language_data(), **options)


def gpt2_model(**options):
    settings = {
        "vocab_size": VOCABULARY,
        "n_positions": 12,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings | options))


LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}


def gpt2(dtype):
    return causal(gpt2_model(), dtype)


def llama(dtype):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return causal(model, dtype, float32_inside=True)


def mistral(dtype):
    config = transformers.MistralConfig(**LLAMA, head_dim=4, sliding_window=3)
    model = transformers.MistralForCausalLM(config)
    return causal(model, dtype, float32_inside=True)


def qwen3(dtype):
    config = transformers.Qwen3Config(**LLAMA, head_dim=4, tie_word_embeddings=True)
    return causal(transformers.Qwen3ForCausalLM(config), dtype, float32_inside=True)


def mixtral(dtype):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    return causal(transformers.MixtralForCausalLM(config), dtype, float32_inside=True)


def mamba(dtype):
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=2,
        time_step_rank=2,
        use_mambapy=False,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return causal(transformers.MambaForCausalLM(config), dtype, float32_inside=True)


def sequence_classifier(model, dtype):
    data = [(X, torch.randint(3, (len(y),))) for X, y in language_data()]
    model = Returning(prepared(model, dtype), lambda output: output.logits)
    return Case(model, nn.CrossEntropyLoss(), data)


def bert(dtype):
    config = transformers.BertConfig(**BERT)
    return sequence_classifier(transformers.BertForSequenceClassification(config), dtype)


def bert_masked(dtype):
    return causal(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), dtype)


def roberta(dtype):
    config = transformers.RobertaConfig(**BERT)
    return sequence_classifier(transformers.RobertaForSequenceClassification(config), dtype)


def distilbert(dtype):
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        hidden_dim=24,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=2,
    )
    return sequence_classifier(
        transformers.DistilBertForSequenceClassification(config), dtype
    )


def t5(dtype):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = prepared(transformers.T5ForConditionalGeneration(config), dtype)
    data = [
        ({**X, "decoder_input_ids": tokens(len(y), 4)}, tokens(len(y), 4))
        for X, y in language_data()
    ]
    model = Returning(model, logits_by_class)
    return Case(model, nn.CrossEntropyLoss(), data, float32_inside=True)


def image_classifier(model, dtype, size=16):
    data = [
        ({"pixel_values": torch.randn(n, 3, size, size).to(dtype)}, torch.randint(3, (n,)))
        for n in (3, 2)
    ]
    model = Returning(prepared(model, dtype), lambda output: output.logits)
    return Case(model, nn.CrossEntropyLoss(), data)


def vit(dtype):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    return image_classifier(model, dtype)


def swin(dtype):
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=3,
    )
    return image_classifier(transformers.SwinForImageClassification(config), dtype)


def convnext(dtype):
    config = transformers.ConvNextConfig(
        patch_size=2, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3
    )
    return image_classifier(transformers.ConvNextForImageClassification(config), dtype)


CLIP_TEXT = {k: v for k, v in BERT.items() if k != "num_labels"} | {
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CLIP_VISION = {k: v for k, v in VISION.items() if k != "num_labels"} | {"projection_dim": 8}


def clip_text(dtype):
    config = transformers.CLIPTextConfig(**CLIP_TEXT)
    model = prepared(transformers.CLIPTextModelWithProjection(config), dtype)
    data = [(X, torch.randn(len(y), 8).to(dtype)) for X, y in language_data()]
    return Case(Returning(model, lambda output: output.text_embeds), nn.MSELoss(), data)


def clip(dtype):
    """Images against the texts of their batch: logits depend on both encoders."""
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8
    )
    model = prepared(transformers.CLIPModel(config), dtype)
    texts = tokens(4, 5)
    data = [
        (
            {"pixel_values": torch.randn(n, 3, 16, 16).to(dtype), "input_ids": texts},
            torch.randint(4, (n,)),
        )
        for n in (3, 2)
    ]
    model = Returning(model, lambda output: output.logits_per_image)
    return Case(model, nn.CrossEntropyLoss(), data)


def whisper(dtype):
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=8,
        max_target_positions=8,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=3,
    )
    model = prepared(transformers.WhisperForConditionalGeneration(config), dtype)
    data = [
        (
            {
                "input_features": torch.randn(n, 6, 16).to(dtype),
                "decoder_input_ids": tokens(n, 4),
            },
            tokens(n, 4),
        )
        for n in (3, 2)
    ]
    return Case(Returning(model, logits_by_class), nn.CrossEntropyLoss(), data)


def wav2vec2(dtype):
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=[8, 8],
        conv_stride=[4, 4],
        conv_kernel=[8, 4],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=8,
    )
    model = prepared(transformers.Wav2Vec2ForSequenceClassification(config), dtype)
    data = [
        ({"input_values": torch.randn(n, 160).to(dtype)}, torch.randint(3, (n,)))
        for n in (3, 2)
    ]
    model = Returning(model, lambda output: output.logits)
    # its positions are embedded by a convolution with weight_norm
    return Case(model, nn.CrossEntropyLoss(), data, by_differences=True)


def head_of_a_tied_model(dtype):
    """The head is the embedding: one parameter under two names."""
    case = gpt2(dtype)
    case.params = [case.model.model.lm_head.weight]
    return case


def body_of_a_tied_model(dtype):
    """Tied weights that are not differentiated."""
    case = gpt2(dtype)
    tied = case.model.model.lm_head.weight
    case.params = [p for p in case.params if p is not tied]
    return case


def lora(dtype):
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    return causal(peft.get_peft_model(gpt2_model(), config), dtype)


def checkpointed(dtype, use_reentrant):
    case = gpt2(dtype)
    network = case.model.model
    network.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    network.train()  # where there is no dropout; else nothing is checkpointed

    def plain(X):
        network.eval()
        try:
            return case.model(X)
        finally:
            network.train()

    case.plain = plain
    return case


def checkpointed_reentrant(dtype):
    return checkpointed(dtype, True)


def checkpointed_without_reentry(dtype):
    return checkpointed(dtype, False)


CASES = [
    gpt2,
    llama,
    mistral,
    qwen3,
    mixtral,
    mamba,
    bert,
    bert_masked,
    roberta,
    distilbert,
    t5,
    vit,
    swin,
    convnext,
    clip_text,
    clip,
    whisper,
    wav2vec2,
    head_of_a_tied_model,
    body_of_a_tied_model,
    lora,
    checkpointed_reentrant,
    checkpointed_without_reentry,
]


@each(CASES)
def test_hessian(build):
    check("Hessian", build)


@each(CASES)
def test_ggn(build):
    check("GGN", build)


@each([gpt2, t5, swin, lora, body_of_a_tied_model, checkpointed_without_reentry])
def test_jacobian(build):
    check("Jacobian", build)


@each([gpt2, bert, vit, convnext])
def test_float32(build):
    check("Hessian", build, torch.float32)
    check("GGN", build, torch.float32)
